// Words that devices exchange, and how long to wait for them.
//
// Epochs. A device counts its calls in Control::epoch; call number e of a device meets call number
// e of every other device of its group. Every flag carries e, only grows, and is never reset.
// Kernels read the epoch from memory and advance it themselves, so that a captured graph can be
// replayed.
//
// Postcondition of every call: it has seen this call's flags of every peer.
//
// Why two halves suffice. Device a writes the half of epoch e + 2 into device b's heap only when
// its call e + 1 is over, hence after it saw b's flags of e + 1, which b wrote after its call e was
// over (kernels of one stream do not overlap). So b has read everything of epoch e. No
// acknowledgement needed.
//
// Who writes what. meta and chunk flags: the source, into each destination's heap, after a fence at
// system scope that follows a barrier of all threads that wrote the data. Who reads: any thread of
// the destination, by an acquiring load at system scope, before it reads the data. Data that peers
// write is read past the first-level cache (__ldcg), which no other device's store invalidates.
//
// Peers out of reach of plain stores (Peers::heap null; kernels with kPuts only). The source writes
// into its own heap, at the place that is its own at the peer, and puts that place; staged partial
// sums are put from the staging area. The order is the same: all threads that put, a barrier, one
// thread's fence, the flag. The two halves cover the sources of puts as well: a peer that has
// flagged the next call has received this one's. Staging areas are reused earlier, after a quiet.

#ifndef JAXMOE_XLA_FFI_CUDA_PROTOCOL_CUH_
#define JAXMOE_XLA_FFI_CUDA_PROTOCOL_CUH_

#include "xla_ffi/cuda/launch.h"

namespace jaxmoe::cuda {

// Whether this library has NVSHMEM. Kernels with kPuts are made only then.
#ifdef JAXMOE_NVSHMEM
constexpr bool kWithPuts = true;
#else
constexpr bool kWithPuts = false;
#endif

// For peers that are reached through NVSHMEM; xla_ffi/nvshmem/puts.cu. Places are in the own heap.
// A warp together: starts to copy `bytes` from `source` to `place` at process `pe`.
__device__ void PutWarp(void* place, const void* source, size_t bytes, int pe);
// One thread: what its block put before a barrier arrives before this flag.
__device__ void PutFlag(uint64_t* place, uint64_t value, int pe);
// One thread: until all that was put before has been read.
__device__ void Quiet();

__device__ __forceinline__ uint64_t LoadAcquire(const uint64_t* word) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
  return value;
}

__device__ __forceinline__ void StoreRelaxed(uint64_t* word, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// Everything that this block's threads wrote before the last barrier comes before what this thread
// stores next, for any device.
__device__ __forceinline__ void FenceSystem() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ uint64_t NowNs() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// One call on one device, as seen by a thread.
struct Call {
  const Peers& peers;
  const Layout& layout;
  int32_t operation;  // an Operation
  uint64_t epoch;     // of this call
  int parity;         // the part of the regions that it uses

  __device__ Call(const Peers& p, const Layout& l, int op) : peers(p), layout(l), operation(op) {
    epoch = *reinterpret_cast<volatile uint64_t*>(&control()->epoch) + 1;
    parity = epoch & 1;
  }
  __device__ Call(const Peers& p, const Layout& l, int op, uint64_t e)
      : Call(p, l, op, e, int(e & 1)) {}
  __device__ Call(const Peers& p, const Layout& l, int op, uint64_t e, int part)
      : peers(p), layout(l), operation(op), epoch(e), parity(part) {}

  __device__ Control* control() const {
    return reinterpret_cast<Control*>(peers.heap[peers.rank] + layout.control);
  }
  __device__ char* heap(int device) const { return peers.heap[device]; }
  __device__ char* own() const { return peers.heap[peers.rank]; }
  // Whether plain stores reach a device. Without kPuts they reach all.
  template <bool kPuts>
  __device__ bool Reaches(int device) const {
    return !kPuts || peers.heap[device] != nullptr;
  }
  // Where to write what is for `device`: there, or where it is put from.
  template <bool kPuts>
  __device__ char* Outbox(int device) const {
    return Reaches<kPuts>(device) ? peers.heap[device] : own();
  }
  // Sets a flag at `device`, after a fence.
  template <bool kPuts>
  __device__ void SetFlag(int device, size_t at, uint64_t value) const {
    if (Reaches<kPuts>(device)) {
      StoreRelaxed(reinterpret_cast<uint64_t*>(peers.heap[device] + at), value);
    } else if constexpr (kPuts) {
      PutFlag(reinterpret_cast<uint64_t*>(own() + at), value, peers.pe[device]);
    }
  }
  __device__ bool failed() const {
    return *reinterpret_cast<volatile uint32_t*>(&control()->failed) != 0;
  }

  // How long to wait. Twice as long for the device's own blocks: they may wait for a peer, and
  // their failure says more.
  __device__ uint64_t Patience(Phase phase) const {
    return phase == kPhaseGrid ? 2 * peers.timeout_ns : peers.timeout_ns;
  }

  // The first failure of the group is kept; later ones only end their waits.
  __device__ void Fail(int peer, Phase phase, uint64_t expected, uint64_t seen,
                       bool wrong = false) const {
    if (atomicExch(&control()->failed, 1u) != 0) return;
    volatile ErrorRecord* e = peers.error;
    e->operation = operation;
    e->rank = peers.rank;
    e->peer = peer;
    e->phase = phase;
    e->wrong = wrong;
    e->epoch = epoch;
    e->expected = expected;
    e->seen = seen;
    FenceSystem();
    e->set = 1;
  }

  // Waits until the word, shifted right by `shift`, is at least `expected`; returns the word. False
  // in `ok` when the time was up or the group has failed.
  __device__ uint64_t Wait(const uint64_t* word, int shift, uint64_t expected, int peer,
                           Phase phase, bool* ok) const {
    uint64_t value = LoadAcquire(word);
    if ((value >> shift) >= expected) return value;
    const uint64_t start = NowNs();
    for (unsigned spins = 0;; ++spins) {
      value = LoadAcquire(word);
      if ((value >> shift) >= expected) return value;
      if (spins % 256 == 255) {
        if (failed()) break;
        if (NowNs() - start > Patience(phase)) {
          Fail(peer, phase, expected, value >> shift);
          break;
        }
      }
    }
    *ok = false;
    return value;
  }
};

// A barrier of `num_threads` threads of a block, number `id` of 1 to 15.
__device__ __forceinline__ void BlockBarrier(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Threads that work together: whole warps of a block, numbered from 0, with a block barrier, in
// several blocks.
struct Crew {
  int barrier;
  int num_threads;  // in this block
  int thread;       // this one
  int block;        // this one, among the blocks that have such a crew
  int num_blocks;

  __device__ int warp() const { return thread / 32; }
  __device__ int num_warps() const { return num_threads / 32; }
  __device__ void Sync() const { BlockBarrier(barrier, num_threads); }
  // A barrier that tells every thread whether all of them are `ok`.
  __device__ bool All(bool ok) const {
    int all;
    asm volatile(
        "{ .reg .pred p, q; setp.ne.s32 p, %1, 0; bar.red.and.pred q, %2, %3, p; selp.s32 %0, 1, "
        "0, q; }"
        : "=r"(all)
        : "r"(int(ok)), "r"(barrier), "r"(num_threads)
        : "memory");
    return all != 0;
  }
};

// A barrier of the crews of all blocks, which must all be resident. False if one of this block is
// not `ok` or the time is up. Resets itself and does not depend on the size of the grid.
__device__ inline bool GridBarrier(const Call& call, const Crew& crew, bool ok) {
  ok = crew.All(ok);
  if (!ok || crew.num_blocks == 1) return ok;
  if (crew.thread == 0) {
    Control* control = call.control();
    volatile uint32_t* phase = &control->barrier_phase;
    const uint32_t before = *phase;
    __threadfence();
    if (atomicAdd(&control->barrier_arrived, 1u) + 1 == crew.num_blocks) {
      control->barrier_arrived = 0;
      __threadfence();
      *phase = before + 1;
    } else {
      const uint64_t start = NowNs();
      for (unsigned spins = 0; *phase == before && ok; ++spins) {
        if (spins % 256 != 255) continue;
        if (call.failed()) ok = false;
        if (NowNs() - start > call.Patience(kPhaseGrid)) {
          call.Fail(call.peers.rank, kPhaseGrid, before + 1, before);
          ok = false;
        }
      }
    }
    __threadfence();
  }
  return crew.All(ok);
}

// What a call is, in 32 bits: devices in different calls must not exchange rows.
__device__ inline uint32_t HeaderHash(const Call& call, int num_tokens, uint32_t site) {
  const uint32_t hash = (site ^ uint32_t(num_tokens) << 16) * 2654435761u ^ uint32_t(num_tokens);
  return uint32_t(call.operation) << kHeaderOperationShift |
         (hash & ((1u << kHeaderOperationShift) - 1));
}

// The first warp of the first block tells every peer which call this is, and checks theirs.
template <bool kPuts>
__device__ inline void ExchangeHeaders(const Call& call, int num_devices, uint32_t hash) {
  if (blockIdx.x != 0 || threadIdx.x >= 32) return;
  for (int peer = threadIdx.x; peer < num_devices; peer += 32) {
    if (peer == call.peers.rank) continue;
    call.SetFlag<kPuts>(peer, call.layout.Header(call.parity, call.peers.rank),
                        call.epoch << 32 | hash);
  }
  for (int peer = threadIdx.x; peer < num_devices; peer += 32) {
    if (peer == call.peers.rank) continue;
    bool ok = true;
    const uint64_t header = call.Wait(
        reinterpret_cast<const uint64_t*>(call.own() + call.layout.Header(call.parity, peer)), 32,
        call.epoch & 0xffffffff, peer, kPhaseHeader, &ok);
    if (ok && uint32_t(header) != hash) {
      call.Fail(peer, kPhaseHeader, hash, uint32_t(header), true);
    }
  }
  __syncwarp();
}

// The end of a call, by all threads of a block: the last block advances the epoch. If the call has
// failed, that block calls `poison` first, so that nobody takes half a result for a whole one.
template <typename Poison>
__device__ __forceinline__ void EndCall(const Call& call, Poison poison) {
  __syncthreads();
  Control* control = call.control();
  bool last = false;
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&control->blocks_finished, 1u) + 1 == gridDim.x;
    __threadfence();
  }
  if (!__syncthreads_or(last)) return;
  if (call.failed()) poison();
  if (threadIdx.x != 0) return;
  control->blocks_finished = 0;
  control->tickets = 0;
  control->epoch = call.epoch;
}

// Fills an array with one value, by all threads of a block; null is none.
template <typename T>
__device__ void FillArray(T* array, size_t n, T value) {
  if (array == nullptr) return;
  for (size_t i = threadIdx.x; i < n; i += blockDim.x) array[i] = value;
}

// Rows of NaN, whatever their type, by all threads of a block.
__device__ inline void PoisonRows(char* rows, size_t num_rows, int row_bytes) {
  FillArray(reinterpret_cast<uint32_t*>(rows), num_rows * (row_bytes / 4), ~0u);
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_PROTOCOL_CUH_

// Low-latency calls: what their kernels exchange, and how they begin and end.
//
// No barrier, no flag and no fence lies between a device's operands and its peers' results: all
// that is sent says itself whether it has come, and is waited for where it is used.
//
// Ids (dispatch). A vector of 16 bytes holds some of a device's choices and the epoch. It is stored
// and loaded whole (PTX: 128-bit accesses of relaxed strength are single). It is never reset: an
// epoch of 64 bits does not recur.
//
// Wire rows. A row, or a partial sum of rows, is sent in vectors of 16 bytes whose lowest bit of
// the last word is replaced by a one. The bits that were there travel in marks: a mark of 8 bytes,
// stored whole too, holds those of the 32 vectors that a warp sends at once, and is not zero. A
// mark alone can say that there is nothing to send. A weight, and what an encoding adds to a batch,
// travels in 8 bytes beside such a word.
// Empty is zero. Writer: a warp of the source, into its own slot at the destination. Reader: one
// warp of the destination, which writes zeros over what it has read.
//
// Postcondition of every call, besides that of protocol.cuh, which the headers fulfil: all that
// peers sent to this device in this call has been read, and the wire rows are zero again.
//
// Why two halves suffice. As in protocol.cuh: device a writes the half of epoch e + 2 into device
// b's heap only when its call e + 1 is over, hence after it saw b's header of e + 1, which b stored
// after its call e was over; by then b has read and cleared all of e. The epochs are those of all
// calls, so it does not matter which kernels ran in between; only low-latency ones use these
// regions. A call of another size uses other parts of a slot, or other slots: each is zero, whoever
// used it last.
//
// Headers. Every device tells all others at once which call it is in. Nobody takes anything from a
// device before it has seen its header: in dispatch each block looks for all of them, in combine
// each warp for those of the devices whose sums it adds.
//
// Beginning and end: latency_entry.cuh, also for calls that are split into a start and a done.
//
// Failure. Each warp writes NaN instead of what it would have written; in dispatch, if the plan
// cannot be made, each block a share of all results. So no block needs to know how the others
// fared.

#ifndef JAXMOE_XLA_FFI_CUDA_LATENCY_CUH_
#define JAXMOE_XLA_FFI_CUDA_LATENCY_CUH_

#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/protocol.cuh"
#include "xla_ffi/cuda/rows.cuh"

namespace jaxmoe::cuda {

constexpr int kLatencyWarps = 16;
constexpr int kLatencyThreads = kLatencyWarps * 32;
// Tell these calls, whole and split, from others of the same site in headers.
constexpr uint32_t kLatencySite = 0x9e3779b9u, kSplitSite = 0x85ebca6bu;

// Division by a number that is known on the host.
struct Divisor {
  uint32_t number, inverse;

  explicit Divisor(int n) : number(n), inverse(~0u / uint32_t(n)) {}
  // The quotient and the rest of a number that is not negative. The estimate is at most one less.
  __device__ int Divide(int n, int* rest) const {
    uint32_t quotient = __umulhi(n, inverse);
    uint32_t left = n - quotient * number;
    if (left >= number) {
      ++quotient;
      left -= number;
    }
    *rest = left;
    return quotient;
  }
};

// A kernel's operands, what all blocks read first at the beginning.
template <typename Args>
struct LatencyParams {
  char* own;  // heap
  Sizes sizes;
  int num_senders;
  int pieces;  // of a row
  Divisor per_piece, per_peer, per_id_vector, per_local_expert;
  Args args;
  Layout layout;
  Peers peers;

  LatencyParams(const Peers& p, const Layout& l, const Sizes& s, const Args& a, int num_senders,
                int pieces)
      : own(p.heap[p.rank]),
        sizes(s),
        num_senders(num_senders),
        pieces(pieces),
        per_piece(pieces),
        per_peer(s.num_devices > 1 ? s.num_devices - 1 : 1),
        per_id_vector(Layout::IdVectors(s.num_choices())),
        per_local_expert(s.num_local_experts),
        args(a),
        layout(l),
        peers(p) {}
};

// 16 bytes at once, for or from any device.
__device__ __forceinline__ uint4 LoadVector(const char* p) {
  uint64_t low, high;
  asm volatile(
      "{ .reg .b128 v;\n"
      "ld.relaxed.sys.global.b128 v, [%2];\n"
      "mov.b128 {%0, %1}, v; }"
      : "=l"(low), "=l"(high)
      : "l"(p)
      : "memory");
  return make_uint4(uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32));
}
__device__ __forceinline__ void StoreVector(char* p, const uint4& v) {
  asm volatile(
      "{ .reg .b128 v;\n"
      "mov.b128 v, {%1, %2};\n"
      "st.relaxed.sys.global.b128 [%0], v; }" ::"l"(p),
      "l"(uint64_t{v.y} << 32 | v.x), "l"(uint64_t{v.w} << 32 | v.z)
      : "memory");
}
// 8 bytes at once.
__device__ __forceinline__ uint64_t LoadWord(const char* p) {
  uint64_t value;
  asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void StoreWord(char* p, uint64_t value) {
  StoreRelaxed(reinterpret_cast<uint64_t*>(p), value);
}
// Ordinary loads that shall begin here, ahead of what is written after them.
__device__ __forceinline__ uint4 LoadEarly(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ int32_t LoadEarly(const int32_t* p) {
  int32_t v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// How long somebody has waited.
struct Waiting {
  unsigned spins = 0;
  uint64_t since = 0;
};

// Of somebody who has waited for a while for what `peer` sends: since when, which was 0 the first
// time, or 0 to give up. Then a failure is recorded: the group's before, the peer's being in
// another call, or that the time is up. Not inline, which leaves the kernels short.
static __device__ __noinline__ uint64_t CheckWaiting(const Peers& peers, const Layout& layout,
                                                     int operation, uint64_t epoch, int part,
                                                     uint32_t hash, uint64_t since, int peer,
                                                     int phase) {
  const Call call(peers, layout, operation, epoch, part);
  if (call.failed()) return 0;
  const uint64_t now = NowNs();
  const uint64_t header = LoadWord(call.own() + layout.Header(call.parity, peer));
  if (header >> 32 == uint32_t(epoch) && uint32_t(header) != hash) {
    call.Fail(peer, kPhaseHeader, hash, uint32_t(header), true);
    return 0;
  }
  if (since == 0 || now - since <= peers.timeout_ns) return since == 0 ? now : since;
  call.Fail(peer, static_cast<Phase>(phase), epoch, header >> 32);
  return 0;
}

// What the threads of a block learn of a call at its beginning; latency_entry.cuh.
struct Entry {
  uint64_t number;  // the epoch, or the number of a split call
  int part;         // of the regions
  uint32_t hash;    // of the header, for the done of a split call
  bool failed;      // the group has, before
};

struct LatencyCall : Call {
  char* own_heap;
  uint32_t hash;  // of the header

  template <typename Args>
  __device__ LatencyCall(const LatencyParams<Args>& params, int operation, uint64_t number,
                         int part)
      : Call(params.peers, params.layout, operation, number, part), own_heap(params.own) {}
  template <typename Args>
  __device__ void MakeHash(const LatencyParams<Args>& params, uint32_t kind) {
    hash = HeaderHash(*this, params.sizes.num_tokens, params.args.site ^ kind);
  }

  __device__ char* own() const { return own_heap; }
  __device__ uint64_t Header(int peer) const {
    return LoadWord(own() + layout.Header(parity, peer));
  }
  // Whether a header is one of this call's epoch. Those of another call of the same epoch are left
  // to CheckWaiting.
  __device__ bool IsHere(uint64_t header) const { return header == (epoch << 32 | hash); }
  // Tells every peer which call this is; one warp of the grid.
  __device__ void TellHeader(int num_devices) const {
    for (int peer = threadIdx.x % 32; peer < num_devices; peer += 32) {
      if (peer == peers.rank) continue;
      StoreWord(heap(peer) + layout.Header(parity, peers.rank), epoch << 32 | hash);
    }
  }
  // Whether to look again for what `peer` sends.
  __device__ bool KeepWaiting(Waiting* waiting, int peer, Phase phase) const {
    if (++waiting->spins % 128 != 0) return true;
    waiting->since =
        CheckWaiting(peers, layout, operation, epoch, parity, hash, waiting->since, peer, phase);
    return waiting->since != 0;
  }
  // The same for all lanes of a warp.
  __device__ bool WarpKeepsWaiting(Waiting* waiting, int peer, Phase phase) const {
    bool keep = true;
    if (waiting->spins % 128 == 127 && threadIdx.x % 32 != 0) {
      ++waiting->spins;
    } else {
      keep = KeepWaiting(waiting, peer, phase);
    }
    return __shfl_sync(~0u, keep, 0);
  }
};

// Whether a peer is in this call, by all lanes of a warp; `header` is what was seen of it before.
__device__ __forceinline__ bool AwaitHeader(const LatencyCall& call, uint64_t header, int peer) {
  Waiting waiting;
  while (!__all_sync(~0u, call.IsHere(header))) {
    if (!call.WarpKeepsWaiting(&waiting, peer, kPhaseHeader)) return false;
    header = call.Header(peer);
  }
  return true;
}

// What a warp moves at once: up to kVectors batches of a row, from batch `first` on.
struct Span {
  int first;
  int num_vectors;  // of the row

  __device__ Span(int row_bytes, int first) : first(first), num_vectors(row_bytes / 16) {}
  // The vector of this lane in batch number j from the first.
  __device__ int Vector(int j) const { return (first + j) * kBatchVectors + int(threadIdx.x % 32); }
  __device__ bool Has(int j) const { return Vector(j) < num_vectors; }
  __device__ bool HasBatch(int j) const { return (first + j) * kBatchVectors < num_vectors; }
};

// Such a part of a row in a warp's registers: as it is, or closed for the wire. An encoding of the
// row's elements on the wire belongs between Load and Close, and between Open and their use; it may
// send kWords words of 32 bits beside the marks.
template <int kVectors, int kWords = 0>
struct WirePiece {
  static constexpr uint64_t kPresent = uint64_t{1} << 32, kAbsent = uint64_t{2} << 32;
  static_assert(kVectors + kWords <= 32, "a mark or word in a lane");

  uint4 v[kVectors];
  uint64_t mark;  // once closed: of batch j in lane j, and behind them the words

  JAXMOE_HOST_DEVICE static int NumOf(int row_bytes) {
    return (Layout::Batches(row_bytes) + kVectors - 1) / kVectors;
  }
  __device__ void Load(const char* row, const Span& span) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      v[j] = span.Has(j) ? LoadEarly(AsVectors(row) + span.Vector(j)) : make_uint4(0, 0, 0, 0);
    }
  }
  __device__ void Store(char* row, const Span& span) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (span.Has(j)) AsVectors(row)[span.Vector(j)] = v[j];
    }
  }

  // `words`: of a lane past the first kVectors its word and kPresent.
  __device__ void Close(uint64_t words = 0) {
    mark = words;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const unsigned bits = __ballot_sync(~0u, v[j].w & 1);
      if (threadIdx.x % 32 == j) mark = kPresent | bits;
      v[j].w |= 1;
    }
  }
  __device__ void Open() {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const unsigned bits = __shfl_sync(~0u, unsigned(mark), j);
      v[j].w = (v[j].w & ~1u) | (bits >> (threadIdx.x % 32) & 1);
    }
  }

  // To a wire row, once closed.
  __device__ void Send(char* wire, int row_bytes, const Span& span) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (span.Has(j)) StoreVector(wire + span.Vector(j) * 16, v[j]);
    }
    if (HasMark(span)) StoreWord(wire + MarkOf(row_bytes, span), mark);
  }
  // Instead: there is nothing to send.
  __device__ static void SendAbsent(char* wire, int row_bytes, const Span& span) {
    if (threadIdx.x % 32 == 0) StoreWord(wire + MarkOf(row_bytes, span), kAbsent);
  }

  // What there is of it, from a wire row.
  __device__ void Poll(const char* wire, int row_bytes, const Span& span) {
    PollMarks(wire, row_bytes, span);
    PollVectors(wire, span);
  }
  __device__ bool Absent() const { return __shfl_sync(~0u, mark, 0) == kAbsent; }
  // Waits for the rest of what was polled; false if the call has failed. Then opens it, unless it
  // is absent, and clears the wire row.
  __device__ bool Receive(const LatencyCall& call, int peer, char* wire, int row_bytes,
                          const Span& span) {
    constexpr int kWholePolls = 6;
    Waiting waiting;
    while (!Complete() && !Absent()) {
      if (!call.WarpKeepsWaiting(&waiting, peer, kPhaseRows)) return false;
      PollMarks(wire, row_bytes, span);
      // Later the marks alone: less to load while the wire is behind.
      if (waiting.spins < kWholePolls || Marked()) PollVectors(wire, span);
    }
    if (HasMark(span)) StoreWord(wire + MarkOf(row_bytes, span), 0);
    if (Absent()) return true;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (span.Has(j)) StoreVector(wire + span.Vector(j) * 16, make_uint4(0, 0, 0, 0));
    }
    Open();
    return true;
  }
  // Instead of what did not come.
  __device__ void Poison() {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) v[j] = make_uint4(~0u, ~0u, ~0u, ~0u);
  }

 private:
  __device__ void PollMarks(const char* wire, int row_bytes, const Span& span) {
    mark = HasMark(span) ? LoadWord(wire + MarkOf(row_bytes, span)) : kPresent;
  }
  __device__ void PollVectors(const char* wire, const Span& span) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      v[j] = make_uint4(0, 0, 0, 1);
      if (span.Has(j)) v[j] = LoadVector(wire + span.Vector(j) * 16);
    }
  }
  __device__ bool Marked() const { return __all_sync(~0u, mark != 0); }
  __device__ bool Complete() const {
    unsigned all = mark != 0;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) all &= v[j].w;
    return __all_sync(~0u, all & 1);
  }
  __device__ static bool HasMark(const Span& span) {
    const int lane = threadIdx.x % 32;
    return lane < kVectors ? span.HasBatch(lane) : lane < kVectors + kWords;
  }
  __device__ static int MarkOf(int row_bytes, const Span& span) {
    const int before = kWords == 0 ? span.first : span.first / kVectors * (kVectors + kWords);
    return Layout::Mark(row_bytes, before + int(threadIdx.x % 32));
  }
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_LATENCY_CUH_

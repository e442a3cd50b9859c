// The work of combine's warps: units, which of them a warp does, and how a sender block announces
// what its warps have sent.

#ifndef JAXMOE_XLA_FFI_CUDA_UNITS_CUH_
#define JAXMOE_XLA_FFI_CUDA_UNITS_CUH_

#include "xla_ffi/cuda/bulk.cuh"
#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/pieces.cuh"
#include "xla_ffi/cuda/protocol.cuh"

namespace jaxmoe::cuda {

constexpr int kSumWarps = 16;
constexpr int kSumThreads = kSumWarps * 32;
constexpr int kSendingWarps = kSumWarps - 1;  // of a sender; the last one announces

// Pieces [begin, end) of one token's sum. Row of choice k in lane k, or -1, and its weight.
struct Unit {
  int peer;   // whose token
  int token;  // -1: there are no more
  int begin, end;
  int chunk;  // of a sender: the block's number of it
  int row;
  float weight;
  unsigned rows;
};

// What all functions of a warp need.
struct Context {
  const Call& call;
  const Sizes& sizes;
  const CombineArgs& args;
  int pieces;
  int pieces_per_unit;
  int units_per_token;

  __device__ Context(const Call& c, const Sizes& s, const CombineArgs& a, int pieces, int per_unit)
      : call(c),
        sizes(s),
        args(a),
        pieces(pieces),
        pieces_per_unit(per_unit),
        units_per_token((pieces + per_unit - 1) / per_unit) {}
  __device__ Unit MakeUnit(int peer, int token, int part, int chunk) const {
    const int begin = part * pieces_per_unit;
    const int end = min(begin + pieces_per_unit, pieces);
    Unit unit = {peer, token, begin, end, chunk, -1, 1.0f, 0};
    const int lane = threadIdx.x % 32;
    if (token >= 0 && token < sizes.num_tokens && lane < sizes.top_k) {
      unit.row = args.row_map[(peer * sizes.num_tokens + token) * sizes.top_k + lane];
    }
    return unit;
  }
};

// A sender block's units: chunk by chunk, the units of a chunk over the warps.
class SendSchedule {
 public:
  __device__ SendSchedule(const Context& context, int block, int num_blocks)
      : c_(context), block_(block), num_blocks_(num_blocks), next_(threadIdx.x / 32) {}

  __device__ int units_per_chunk() const { return kSumChunkTokens * c_.units_per_token; }
  __device__ int num_chunks() const {
    return (c_.sizes.num_tokens + kSumChunkTokens - 1) / kSumChunkTokens;
  }
  // Chunk and peer of the block's chunk number `i`.
  __device__ int chunk_of(int i) const {
    return (block_ + num_blocks_ * i) / (c_.sizes.num_devices - 1);
  }
  __device__ int peer_of(int i) const {
    return (c_.call.peers.rank + 1 + (block_ + num_blocks_ * i) % (c_.sizes.num_devices - 1)) %
           c_.sizes.num_devices;
  }
  __device__ Unit Next() {
    const int i = next_ / units_per_chunk();
    const int in_chunk = next_ - i * units_per_chunk();
    next_ += kSendingWarps;
    const int chunk = chunk_of(i);
    if (chunk >= num_chunks()) return c_.MakeUnit(0, -1, 0, 0);
    const int t = in_chunk / c_.units_per_token;
    return c_.MakeUnit(peer_of(i), chunk * kSumChunkTokens + t, in_chunk - t * c_.units_per_token,
                       i);
  }

 private:
  const Context& c_;
  const int block_, num_blocks_;
  int next_;
};

// Units of this device's own tokens, to whichever warp comes first.
class FinishSchedule {
 public:
  __device__ explicit FinishSchedule(const Context& context)
      : c_(context), tickets_(context.call) {}

  __device__ Unit Next() {
    const int ticket = tickets_.Next();
    const int token = ticket / c_.units_per_token;
    if (token >= c_.sizes.num_tokens) return c_.MakeUnit(0, -1, 0, 0);
    return c_.MakeUnit(c_.call.peers.rank, token, ticket - token * c_.units_per_token, 0);
  }

 private:
  const Context& c_;
  Tickets tickets_;
};

// Starts what depends on the unit's rows: their weights, and the list of what to load.
__device__ inline void ListRows(const Context& c, Unit* unit, RowList* list, bool complete) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // all lanes have read what the list held
  unit->rows = __ballot_sync(~0u, unit->row >= 0);
  if (unit->row >= 0) {
    if (c.args.row_weights != nullptr) unit->weight = c.args.row_weights[unit->row];
    list->rows[__popc(unit->rows & ((1u << lane) - 1))] =
        c.args.rows + size_t(unit->row) * c.sizes.row_bytes;
  }
  if (lane == 0) {
    list->token = unit->token;
    list->count = __popc(unit->rows);
    list->rest = 0;
    list->complete = complete;
  }
  __syncwarp();
}

// What the warps of a sender block tell the one that announces chunks. Chunk number i of the block
// has slot i % kChunkSlots once all chunks up to i - kChunkSlots are announced.
struct ChunkSlots {
  uint64_t written[kChunkSlots];  // barriers; a phase is over when a chunk's units are written
  uint32_t tokens[kChunkSlots];   // which of the chunk's tokens are sent
  int announced;                  // chunks of the block, ever

  __device__ void Init(int units_per_chunk) {
    if (threadIdx.x < kChunkSlots) {
      InitBarrier(&written[threadIdx.x], units_per_chunk);
      tokens[threadIdx.x] = 0;
    }
    if (threadIdx.x == 0) announced = 0;
  }
};

// Puts a chunk that is written to the staging area where its peer expects it; a warp together.
__device__ inline void PutChunk(const Context& c, int peer, int chunk, int slot, uint32_t sent) {
  const Layout& layout = c.call.layout;
  const int parity = c.call.parity, me = c.call.peers.rank, pe = c.call.peers.pe[peer];
  char* own = c.call.own();
  FenceSystem();
  for (uint32_t rest = sent; rest != 0; rest &= rest - 1) {
    const int i = __ffs(rest) - 1;
    PutWarp(own + layout.Row(parity, me, chunk * kSumChunkTokens + i),
            own + layout.StagedRow(blockIdx.x, slot, i), c.sizes.row_bytes, pe);
  }
  if (c.args.row_values == nullptr) return;
  const int tokens = min(kSumChunkTokens, c.sizes.num_tokens - chunk * kSumChunkTokens);
  const size_t token_bytes = size_t(c.sizes.top_k) * 4;
  PutWarp(own + layout.Weights(parity, me) + chunk * kSumChunkTokens * token_bytes,
          own + layout.StagedValues(blockIdx.x, slot, 0), tokens * token_bytes, pe);
}

// Announces the block's chunks in order; one warp, whose fence waits for the others' stores in
// their place: with a fence after each unit instead, even for the block alone, combine takes 250
// instead of 219 us on 132 multiprocessors. Chunks that are ready together share a fence.
template <bool kPuts>
__device__ void Announce(const Context& c, const SendSchedule& schedule, ChunkSlots* slots) {
  const int lane = threadIdx.x % 32;
  for (int first = 0; schedule.chunk_of(first) < schedule.num_chunks();) {
    const int i = first + lane, slot = i % kChunkSlots, phase = i / kChunkSlots % 2;
    const bool mine = lane < kChunkSlots && schedule.chunk_of(i) < schedule.num_chunks();
    if (lane == 0) WaitLoad(&slots->written[slot], phase);
    __syncwarp();
    const unsigned ready = __ballot_sync(~0u, mine && IsOver(&slots->written[slot], phase));
    const int count = __ffs(~ready) - 1;
    if constexpr (kPuts) {
      for (int j = first; j < first + count; ++j) {
        const int peer = schedule.peer_of(j);
        if (c.call.Reaches<kPuts>(peer)) continue;
        const uint32_t sent = *const_cast<volatile uint32_t*>(&slots->tokens[j % kChunkSlots]);
        PutChunk(c, peer, schedule.chunk_of(j), j % kChunkSlots, sent);
      }
      __syncwarp();
    }
    if (lane < count) {
      const uint32_t sent = slots->tokens[slot];
      slots->tokens[slot] = 0;
      FenceSystem();
      c.call.SetFlag<kPuts>(
          schedule.peer_of(i),
          c.call.layout.ChunkFlag(c.call.parity, c.call.peers.rank, schedule.chunk_of(i)),
          c.call.epoch << kEpochShift | sent);
    }
    __syncwarp();
    if constexpr (kPuts) {
      if (lane == 0) Quiet();  // the staging area is free again
    }
    first += count;
    if (lane == 0) {
      asm volatile("st.release.cta.shared.u32 [%0], %1;" ::"r"(SharedAddress(&slots->announced)),
                   "r"(first)
                   : "memory");
    }
  }
}

// A sender's unit is written.
__device__ inline void FinishSending(const Unit& unit, ChunkSlots* slots) {
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  int announced;
  do {
    asm volatile("ld.acquire.cta.shared.u32 %0, [%1];"
                 : "=r"(announced)
                 : "r"(SharedAddress(&slots->announced))
                 : "memory");
  } while (unit.chunk - announced >= kChunkSlots);
  const int slot = unit.chunk % kChunkSlots;
  if (unit.begin == 0 && unit.rows != 0) {
    atomicOr(&slots->tokens[slot], 1u << (unit.token % kSumChunkTokens));
  }
  Arrive(&slots->written[slot]);
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_UNITS_CUH_

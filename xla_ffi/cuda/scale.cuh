// Rows of the gradient of combine: a token's gradient times each row's weight, and the dot product
// with the expert's row for the weight's gradient.
//
// A unit is a whole token, so that one warp sums each dot product: within a lane, over the lanes,
// then over the pieces in order. The same every time, whatever warp does it.

#ifndef JAXMOE_XLA_FFI_CUDA_SCALE_CUH_
#define JAXMOE_XLA_FFI_CUDA_SCALE_CUH_

#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/pieces.cuh"
#include "xla_ffi/cuda/protocol.cuh"
#include "xla_ffi/cuda/rows.cuh"

namespace jaxmoe::cuda {

// A token and its rows: row of choice k in lane k, or -1, and its weight.
struct ScaleUnit {
  int source;
  int token;  // -1: there are no more
  int row;
  float weight;
  unsigned rows;
};

// Tokens of all devices in turn, to whichever warp comes first.
__device__ inline ScaleUnit NextScaleUnit(const Call& call, const Sizes& sizes,
                                          const DispatchArgs& args, Tickets& tickets) {
  const int lane = threadIdx.x % 32;
  const int ticket = tickets.Next();
  ScaleUnit unit = {(call.peers.rank + ticket) % sizes.num_devices, ticket / sizes.num_devices, -1,
                    0.0f, 0};
  if (unit.token >= sizes.num_tokens) {
    unit.token = -1;
  } else if (lane < sizes.top_k) {
    unit.row =
        args.plan.row_map[(unit.source * sizes.num_tokens + unit.token) * sizes.top_k + lane];
  }
  return unit;
}

// Starts what depends on the unit's rows. The list counts none until the token is here.
__device__ inline void ListExpertRows(const Call& call, const Sizes& sizes,
                                      const DispatchArgs& args, ScaleUnit* unit, RowList* list) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // all lanes have read what the list held
  unit->rows = __ballot_sync(~0u, unit->row >= 0);
  if (unit->row >= 0) {
    unit->weight = args.row_weights_in[unit->row];
    list->rows[1 + __popc(unit->rows & ((1u << lane) - 1))] =
        args.expert_rows + size_t(unit->row) * sizes.row_bytes;
  }
  if (lane == 0) {
    list->rows[0] = unit->source == call.peers.rank
                        ? args.tokens + size_t(unit->token) * sizes.row_bytes
                        : call.own() + call.layout.Row(call.parity, unit->source, unit->token);
    list->source = unit->source;
    list->token = unit->token;
    list->count = 0;
    list->rest = unit->rows == 0 ? 0 : 1 + __popc(unit->rows);
    list->complete = unit->token < 0;
  }
  __syncwarp();
}

// Waits until the list's token is here.
__device__ inline void AwaitToken(const Call& call, RowList* list, bool* ok) {
  __syncwarp();  // all lanes have seen that the list is not complete
  if (threadIdx.x % 32 == 0) {
    if (list->source != call.peers.rank) {
      const auto* flag = reinterpret_cast<const uint64_t*>(
          call.own() +
          call.layout.ChunkFlag(call.parity, list->source, list->token / kChunkTokens));
      call.Wait(flag, kEpochShift, call.epoch, list->source, kPhaseRows, ok);
      FenceBulk();
    }
    list->count = *ok ? list->rest : 0;
    list->complete = 1;
  }
  __syncwarp();
  *ok = __shfl_sync(~0u, *ok, 0);
}

// One piece of one row: stores the scaled piece, returns this warp's dot product in every lane.
template <typename T, int kVectors>
__device__ float ScalePiece(const uint4 (&token)[kVectors], const uint4* expert_row, float weight,
                            uint4* to, int first, int n) {
  float dot = 0.0f;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    if (first + 32 * j >= n) continue;
    dot += Vector<T>::Dot(token[j], expert_row[32 * j]);
    StoreStreaming(to + first + 32 * j, Vector<T>::Scale(token[j], weight));
  }
  for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
  return dot;
}

// Gradients of all rows, by all warps that call this.
template <typename T, int kVectors>
__device__ void ScaleTokens(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                            typename Piece<kVectors>::Ring& ring, RowList* lists, bool* ok) {
  const int lane = threadIdx.x % 32;
  const int n = sizes.row_bytes / 16, pieces = Piece<kVectors>::NumOf(sizes.row_bytes);
  Tickets tickets(call);
  PieceStream<kVectors> stream(ring, sizes.row_bytes);
  const auto complete = [&](RowList* list) { AwaitToken(call, list, ok); };
  ScaleUnit unit = NextScaleUnit(call, sizes, args, tickets);
  ScaleUnit next = NextScaleUnit(call, sizes, args, tickets);
  ListExpertRows(call, sizes, args, &unit, &lists[0]);
  stream.Queue(&lists[0], 0, unit.token < 0 ? 0 : pieces);
  stream.Fill(complete);
  for (int turn = 0; unit.token >= 0 && *ok; turn ^= 1) {
    const ScaleUnit after = NextScaleUnit(call, sizes, args, tickets);
    ListExpertRows(call, sizes, args, &next, &lists[turn ^ 1]);
    stream.Queue(&lists[turn ^ 1], 0, next.token < 0 ? 0 : pieces);
    stream.Fill(complete);
    float dot_of_lane = 0.0f;
    for (int piece = 0; unit.rows != 0 && piece < pieces && *ok; ++piece) {
      const int first = piece * kVectors * 32 + lane;
      uint4 token[kVectors];
      const uint4* loaded = ring.Wait() + lane;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) token[j] = loaded[32 * j];
      ring.Release();
      stream.Fill(complete);
      for (unsigned rest = unit.rows; rest != 0; rest &= rest - 1) {
        const int k = __ffs(rest) - 1;
        const float weight = __shfl_sync(~0u, unit.weight, k);
        const int row = __shfl_sync(~0u, unit.row, k);
        const float dot =
            ScalePiece<T, kVectors>(token, ring.Wait() + lane, weight,
                                    AsVectors(args.rows + size_t(row) * sizes.row_bytes), first, n);
        if (lane == k) dot_of_lane += dot;
        ring.Release();
        stream.Fill(complete);
      }
    }
    if (unit.row >= 0 && *ok) args.row_weights[unit.row] = dot_of_lane;
    unit = next;
    next = after;
  }
  ring.Drain();
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_SCALE_CUH_

// The grouped product's kernel: persistent blocks in clusters, each with a warp that feeds tiles to
// two warpgroups of tensor cores.
//
// A tile's result is computed with the weights' features as rows and the tokens as columns of the
// tensor cores' product: features come in whole blocks, while a group's tokens may have any number,
// and the instruction's width goes down to any multiple of 16. So a group of 200 rows costs 208.
//
// The blocks of a cluster compute neighbouring features of the same rows. Each loads its share of
// the rows' tile and sends it to all: half of the reading from the L2 cache is saved.

#ifndef JAXMOE_XLA_FFI_GEMM_KERNEL_CUH_
#define JAXMOE_XLA_FFI_GEMM_KERNEL_CUH_

#include <type_traits>

#include "xla_ffi/gemm/block.cuh"
#include "xla_ffi/gemm/schedule.cuh"

namespace jaxmoe::gemm {

// Columns of the product for a tile of `rows` tokens.
__device__ __forceinline__ int ColumnsOf(int rows) { return CeilDiv(rows, 16) * 16; }

// Steps of the contraction, of one pair of factors and of all.
template <Op kOp>
__device__ __forceinline__ int StepsOfPair(const Params& p, const Tile& tile) {
  return CeilDiv(kOp == Op::kWeightGrad ? tile.rows : p.depth, kStepDepth<kOp>);
}
template <Op kOp>
__device__ __forceinline__ int StepsOf(const Params& p, const Tile& tile) {
  return (kOp == Op::kInputGradOfTwo ? 2 : 1) * StepsOfPair<kOp>(p, tile);
}

// The first feature that this block computes.
template <Op kOp>
__device__ __forceinline__ int FeatureOf(const Tile& tile) {
  constexpr int kWidth = kOp == Op::kSwiglu   ? kFeatures / 2
                         : kOp == Op::kScaled ? kMaxColumns
                                              : kFeatures;
  return (tile.major * kCluster + static_cast<int>(RankInCluster())) * kWidth;
}

// One box of B for all blocks of the cluster.
__device__ __forceinline__ void LoadShared(uint32_t to, const CUtensorMap& map, int x, int y,
                                           uint32_t barrier) {
  if constexpr (kCluster > 1) {
    LoadInBlocks(to, map, x, y, barrier, (1 << kCluster) - 1);
  } else {
    Load(to, map, x, y, barrier);
  }
}

// Loads stage `at`, which is free: the step of a tile's contraction that begins at `k`. Of the
// second pair of factors, if kSecond.
template <Op kOp, bool kSecond>
__device__ __forceinline__ void LoadStep(const Params& p, const Shared& shared, const Tile& tile,
                                         int rank, int feature, int loads, int k, int at) {
  constexpr int kLoadBytes = kOp == Op::kWeightGrad ? kBlockBytes : kLoadRows * kRowBytes;
  constexpr int kOwnBytes = kOp == Op::kScaled ? kBBytes : kABytes;
  const uint32_t full = shared.Full(at), a = shared.A(at), b = shared.B(at);
  ArriveExpecting(full, kOwnBytes + loads * kLoadBytes);
  if constexpr (kOp == Op::kForward) {
    Load(a, p.a, feature, k, tile.group, full);
    Load(a + kBlockBytes, p.a, feature + 64, k, tile.group, full);
  } else if constexpr (kOp == Op::kSwiglu) {
    Load(a, p.a, feature, k, tile.group, full);
    Load(a + kBlockBytes, p.a2, feature, k, tile.group, full);
  } else if constexpr (kIsInputGrad<kOp>) {
    Load(a, kSecond ? p.a2 : p.a, k, feature, tile.group, full);
  } else if constexpr (kOp == Op::kScaled) {
    Load(b, p.b, k, feature, tile.group, full);
  } else {
    Load(a, p.a, feature, tile.row + k, full);
    Load(a + kBlockBytes, p.a, feature + 64, tile.row + k, full);
  }
  for (int i = rank; i < loads; i += kCluster) {
    if constexpr (kOp == Op::kWeightGrad) {
      const int column = tile.minor * kMaxColumns + i * kBlockColumns;
      LoadShared(b + i * kLoadBytes, p.b, column, tile.row + k, full);
    } else if constexpr (kOp == Op::kScaled) {
      LoadShared(a + i * kLoadBytes, p.a, k, tile.row + i * kLoadRows, full);
    } else {
      LoadShared(b + i * kLoadBytes, kSecond ? p.b2 : p.b, k, tile.row + i * kLoadRows, full);
    }
  }
}

// The feeding warp: loads all steps of all tiles, as fast as stages come free.
template <Op kOp>
__device__ void Feed(const Params& p, const Shared& shared, Schedule<kOp>* schedule) {
  const int rank = static_cast<int>(RankInCluster());
  Ring ring(p.stages.num);
  Tile tile;
  while (schedule->Next(&tile)) {
    const int feature = FeatureOf<kOp>(tile), steps = StepsOfPair<kOp>(p, tile);
    const int loads =
        kOp == Op::kWeightGrad ? kMaxColumns / kBlockColumns : CeilDiv(tile.rows, kLoadRows);
    if (LaneId() != 0) continue;  // and waits in Next
    const auto load = [&](auto second) {
      for (int step = 0; step < steps; ++step, ring.Next()) {
        Wait(shared.Empty(ring.at), ring.parity ^ 1);
        LoadStep<kOp, decltype(second)::value>(p, shared, tile, rank, feature, loads,
                                               step * kStepDepth<kOp>, ring.at);
      }
    };
    load(std::false_type());
    if constexpr (kOp == Op::kInputGradOfTwo) load(std::true_type());
  }
}

// Gives a stage back to the feeding warps that write to it: those of all blocks of the cluster.
__device__ __forceinline__ void Release(const Shared& shared, int stage) {
  if (LaneId() < kCluster) Arrive(InBlock(shared.Empty(stage), LaneId()));
}

// d = A B over `steps` stages. `a` and `b` describe the first stage's tiles.
template <int kN, bool kTransposedA, bool kTransposedB>
__device__ __forceinline__ void Multiply(const Shared& shared, Ring* ring, int steps, uint32_t a,
                                         uint32_t b, float (&d)[kAccumulators]) {
  int last = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    Wait(shared.Full(ring->at), ring->parity);
    const uint32_t stage = ring->at * DescriptorStep(shared.stage_bytes);
    BeginProducts();
#pragma unroll
    for (int i = 0; i < kDepth / kInstructionDepth; ++i) {
      Product<kN, kTransposedA, kTransposedB>::Do(d, a + stage + i * kDepthStep<kTransposedA>,
                                                  b + stage + i * kDepthStep<kTransposedB>,
                                                  step > 0 || i > 0);
    }
    EndProducts();
    // The stage before is read; this one is being read while the next is waited for.
    WaitProducts<1>();
    if (step > 0) Release(shared, last);
    last = ring->at;
    ring->Next();
  }
  WaitProducts<0>();
  if (steps > 0) Release(shared, last);
}

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_KERNEL_CUH_

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

#include <cuda_bf16.h>

#include <cstddef>

#include "xla_ffi/gemm/ptx.cuh"
#include "xla_ffi/gemm/tiles.cuh"
#include "xla_ffi/gemm/wgmma.cuh"

namespace jaxmoe::gemm {

#ifndef JAXMOE_GEMM_CLUSTER  // for benchmarks
#define JAXMOE_GEMM_CLUSTER 2
#endif
constexpr int kCluster = JAXMOE_GEMM_CLUSTER;
constexpr int kMultipliers = 2;  // warpgroups that multiply
constexpr int kMultiplierWarps = 4 * kMultipliers;
constexpr int kThreads = 128 * (kMultipliers + 1);
constexpr int kGivenRegisters = 40, kTakenRegisters = 232;  // per thread; sum fits 64 Ki a block

// What one block holds of both factors for one step of the contraction.
constexpr int kFeatures = 64 * kMultipliers;  // of A: 64 for each warpgroup
constexpr int kABytes = kMultipliers * kBlockBytes;
constexpr int kBBytes = kMaxColumns * kDepth * 2;
// How many such stages: more of them, which hold fewer rows, for products of so few rows that they
// take as long as reading the weights does.
struct Stages {
  int num, bytes, rows;
};
constexpr int kFewRows = 64, kMaxStages = 8;
constexpr Stages kStages = {4, kABytes + kBBytes, kMaxColumns};
constexpr Stages kMoreStages = {kMaxStages, kABytes + kFewRows * kDepth * 2, kFewRows};
constexpr int kStagesBytes = kStages.num * kStages.bytes;
static_assert(kMoreStages.num * kMoreStages.bytes <= kStagesBytes);
constexpr int kLoadRows = 32;  // rows in one load of B, when B's rows are tokens

// A warpgroup's place to lay out results before they leave: 128 rows of 64 features.
constexpr int kOutRows = 128;
constexpr int kOutBytes = kOutRows * kRowBytes;

constexpr int kSlots = 2;  // tiles that the feeding warp has told the others of
constexpr int kSlotBytes = 32;

struct Barriers {
  uint64_t full[kMaxStages], empty[kMaxStages];    // data of a stage
  uint64_t slot_full[kSlots], slot_empty[kSlots];  // tiles
  alignas(16) char slot[kSlots][kSlotBytes];
};

enum class Op {
  kForward,     // y = x w
  kInputGrad,   // d_x = d_y w^T
  kWeightGrad,  // d_w = x^T d_y per group
  kSwiglu,      // y = silu(x gate) (x up)
  kScaled,      // y = x w of FP8 values with scales, w as [L, F, D]
};
constexpr int kSharedBytes =
    kStagesBytes + kMultipliers * kOutBytes + static_cast<int>(sizeof(Barriers)) + kPatternBytes;

// Elements of the contraction in a step: as many as a row of a tile holds.
template <Op kOp>
constexpr int kStepDepth = kOp == Op::kScaled ? kRowBytes : kDepth;
// FP8 numbers with one scale: a step's.
constexpr int kScaleBlock = 128;

// What tiles' heights are multiples of; see Tiles.
constexpr int kRowMultiple = 16;

// Operands of a call. With "rows" for tokens: A and B of the tensor cores' product are
//   kForward, kSwiglu  weights [D, F] (gate: first warpgroup, up: second) and rows [C, D]
//   kInputGrad         weights [D, F] and rows [C, F]
//   kWeightGrad        rows x [C, D] and rows d_y [C, F]
//   kScaled            rows [C, D] and weights [F, D]: see fp8.cu
struct Params {
  CUtensorMap a, a2;  // a2: up
  CUtensorMap b;
  CUtensorMap out;          // kWeightGrad only
  __nv_bfloat16* y;         // [C, features]
  __nv_bfloat16* saved[2];  // kSwiglu: x gate and x up, or null
  // kScaled: of rows [C, depth / kScaleBlock], and of weights
  // [L, features / kScaleBlock, depth / kScaleBlock]
  const float *row_scales, *weight_scales;
  GroupSizes groups;
  int features;  // of the result: width of y, or D for kWeightGrad
  int depth;     // contracted, but for kWeightGrad
  int num_major, num_minor;
  Stages stages;
  int tallest;  // rows of a tile
};

// Runs over the stages of a ring of barriers.
struct Ring {
  const int size;
  int at = 0;
  uint32_t parity = 0;
  explicit __device__ Ring(int num) : size(num) {}
  __device__ void Next() {
    if (++at == size) at = 0, parity ^= 1;
  }
};

// Addresses in a block's shared memory.
struct Shared {
  uint32_t stage_bytes, stages, out, barriers;

  __device__ Shared(const char* memory, const Stages& s)
      : stage_bytes(s.bytes),
        stages((SharedAddress(memory) + kPatternBytes - 1) / kPatternBytes * kPatternBytes),
        out(stages + kStagesBytes),
        barriers(out + kMultipliers * kOutBytes) {}
  __device__ uint32_t A(int stage) const { return stages + stage * stage_bytes; }
  __device__ uint32_t B(int stage) const { return A(stage) + kABytes; }
  __device__ uint32_t Full(int i) const { return barriers + offsetof(Barriers, full) + 8 * i; }
  __device__ uint32_t Empty(int i) const { return barriers + offsetof(Barriers, empty) + 8 * i; }
  __device__ uint32_t SlotFull(int i) const {
    return barriers + offsetof(Barriers, slot_full) + 8 * i;
  }
  __device__ uint32_t SlotEmpty(int i) const {
    return barriers + offsetof(Barriers, slot_empty) + 8 * i;
  }
  __device__ uint32_t Slot(int i) const {
    return barriers + offsetof(Barriers, slot) + kSlotBytes * i;
  }
};

// The sequence of a cluster's tiles: every so-manieth, so that neighbours run at the same time. The
// feeding warp finds them and tells the multiplying ones, which need their registers for results.
template <Op kOp>
class Schedule {
 public:
  __device__ Schedule(const Params& p, const Shared& shared)
      : tiles_(p.groups, p.tallest, p.num_major, p.num_minor),
        shared_(shared),
        number_(blockIdx.x / kCluster) {}

  // The next tile of this cluster; false after the last. By a whole warp.
  __device__ bool Next(Tile* tile) {
    __syncwarp();
    const bool found = tiles_.Find(number_, tile);
    number_ += gridDim.x / kCluster;
    Wait(shared_.SlotEmpty(ring_.at), ring_.parity ^ 1);
    if (LaneId() == 0) {
      const uint32_t slot = shared_.Slot(ring_.at);
      const int row = found ? tile->row : tiles_.RowsEnd();
      WriteShared(slot, uint4{found, Bits(row), Bits(tile->rows), Bits(tile->group)});
      WriteShared(slot + 16, uint4{Bits(tile->major), Bits(tile->minor), 0, 0});
      ArriveHere(shared_.SlotFull(ring_.at));
    }
    ring_.Next();
    return found;
  }

 private:
  static __device__ uint32_t Bits(int value) { return static_cast<uint32_t>(value); }

  Tiles<kOp != Op::kWeightGrad, kRowMultiple> tiles_;
  const Shared shared_;
  int number_;
  Ring ring_{kSlots};
};

// The same sequence, as it is told to a multiplying warp.
class ToldTiles {
 public:
  explicit __device__ ToldTiles(const Shared& shared) : shared_(shared) {}

  // The next tile; false after the last, and then tile->row is where the rows of groups end.
  __device__ bool Next(Tile* tile) {
    Wait(shared_.SlotFull(ring_.at), ring_.parity);
    const uint4 first = ReadShared(shared_.Slot(ring_.at));
    const uint4 second = ReadShared(shared_.Slot(ring_.at) + 16);
    __syncwarp();
    if (LaneId() == 0) ArriveHere(shared_.SlotEmpty(ring_.at));
    ring_.Next();
    *tile = {static_cast<int>(first.w), static_cast<int>(first.y), static_cast<int>(first.z),
             static_cast<int>(second.x), static_cast<int>(second.y)};
    return first.x != 0;
  }

 private:
  const Shared shared_;
  Ring ring_{kSlots};
};

// Columns of the product for a tile of `rows` tokens.
__device__ __forceinline__ int ColumnsOf(int rows) { return CeilDiv(rows, 16) * 16; }

// Steps of the contraction.
template <Op kOp>
__device__ __forceinline__ int StepsOf(const Params& p, const Tile& tile) {
  return CeilDiv(kOp == Op::kWeightGrad ? tile.rows : p.depth, kStepDepth<kOp>);
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

// The feeding warp: loads all steps of all tiles, as fast as stages come free.
template <Op kOp>
__device__ void Feed(const Params& p, const Shared& shared, Schedule<kOp>* schedule) {
  const int rank = static_cast<int>(RankInCluster());
  Ring ring(p.stages.num);
  Tile tile;
  while (schedule->Next(&tile)) {
    const int steps = StepsOf<kOp>(p, tile), feature = FeatureOf<kOp>(tile);
    const int loads =
        kOp == Op::kWeightGrad ? kMaxColumns / kBlockColumns : CeilDiv(tile.rows, kLoadRows);
    constexpr int kLoadBytes = kOp == Op::kWeightGrad ? kBlockBytes : kLoadRows * kRowBytes;
    constexpr int kOwnBytes = kOp == Op::kScaled ? kBBytes : kABytes;
    const int bytes = kOwnBytes + loads * kLoadBytes;
    if (LaneId() != 0) continue;  // and waits in Next
    for (int step = 0; step < steps; ++step, ring.Next()) {
      Wait(shared.Empty(ring.at), ring.parity ^ 1);
      const uint32_t full = shared.Full(ring.at), a = shared.A(ring.at), b = shared.B(ring.at);
      const int k = step * kStepDepth<kOp>;
      ArriveExpecting(full, bytes);
      if constexpr (kOp == Op::kForward) {
        Load(a, p.a, feature, k, tile.group, full);
        Load(a + kBlockBytes, p.a, feature + 64, k, tile.group, full);
      } else if constexpr (kOp == Op::kSwiglu) {
        Load(a, p.a, feature, k, tile.group, full);
        Load(a + kBlockBytes, p.a2, feature, k, tile.group, full);
      } else if constexpr (kOp == Op::kInputGrad) {
        Load(a, p.a, k, feature, tile.group, full);
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
        } else {
          constexpr bool kRowsAreA = kOp == Op::kScaled;
          LoadShared((kRowsAreA ? a : b) + i * kLoadBytes, kRowsAreA ? p.a : p.b, k,
                     tile.row + i * kLoadRows, full);
        }
      }
    }
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

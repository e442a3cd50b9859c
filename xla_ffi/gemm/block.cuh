// A block of the grouped product: its parameters, and what lies where in its shared memory.

#ifndef JAXMOE_XLA_FFI_GEMM_BLOCK_CUH_
#define JAXMOE_XLA_FFI_GEMM_BLOCK_CUH_

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
constexpr int kNumberSlots = 2;  // tiles that a cluster's first block has told the others of

struct Barriers {
  uint64_t full[kMaxStages], empty[kMaxStages];    // data of a stage
  uint64_t slot_full[kSlots], slot_empty[kSlots];  // tiles
  uint64_t number_full[kNumberSlots], number_empty[kNumberSlots];
  alignas(16) char slot[kSlots][kSlotBytes];
  alignas(16) int32_t number[kNumberSlots];
};

enum class Op {
  kForward,         // y = x w
  kInputGrad,       // d_x = d_y w^T
  kInputGradOfTwo,  // d_x = d_y w^T + d_y2 w2^T
  kWeightGrad,      // d_w = x^T d_y per group
  kSwiglu,          // y = silu(x gate) (x up)
  kScaled,          // y = x w of FP8 values with scales, w as [L, F, D]
};
template <Op kOp>
constexpr bool kIsInputGrad = kOp == Op::kInputGrad || kOp == Op::kInputGradOfTwo;
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
//   kInputGradOfTwo    the same, and a second pair of both
//   kWeightGrad        rows x [C, D] and rows d_y [C, F]
//   kScaled            rows [C, D] and weights [F, D]: see fp8.cu
struct Params {
  CUtensorMap a, a2;        // a2: up, or the second pair's
  CUtensorMap b, b2;        // b2: the second pair's
  CUtensorMap out;          // kWeightGrad only
  __nv_bfloat16* y;         // [C, features]
  __nv_bfloat16* saved[2];  // kSwiglu: x gate and x up, or null
  // kScaled: of rows [C, depth / kScaleBlock], and of weights
  // [L, features / kScaleBlock, depth / kScaleBlock]
  const float *row_scales, *weight_scales;
  GroupSizes groups;
  int features;  // of the result: width of y, or D for kWeightGrad
  int depth;     // contracted, but for kWeightGrad; of one pair
  int num_major, num_minor;
  Stages stages;
  int tallest;      // rows of a tile
  int32_t* claims;  // see Numbers; may be null
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
  __device__ uint32_t NumberFull(int i) const {
    return barriers + offsetof(Barriers, number_full) + 8 * i;
  }
  __device__ uint32_t NumberEmpty(int i) const {
    return barriers + offsetof(Barriers, number_empty) + 8 * i;
  }
  __device__ uint32_t Number(int i) const {
    return barriers + offsetof(Barriers, number) + sizeof(int32_t) * i;
  }
};

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_BLOCK_CUH_

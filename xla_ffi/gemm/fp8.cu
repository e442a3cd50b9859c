// The grouped products of FP8: rows with a scale for each 128 of their numbers, weights with one
// for each 128 x 128. The tensor cores add up 128 products; those sums, times both scales, are
// added up in float32 by ordinary instructions, for the tensor cores keep too few bits of an FP8
// sum.
//
// A warpgroup holds two halves of the results, each of 64 features and up to 128 tokens: of a plain
// product both halves of the tile's tokens, of SwiGLU gate and up for one half of them. While one
// warpgroup scales a half, the tensor cores work for the other.

#include <cuda_runtime.h>

#include "xla_ffi/gemm/kernel.cuh"
#include "xla_ffi/gemm/launch.h"
#include "xla_ffi/gemm/launch_kernel.cuh"
#include "xla_ffi/gemm/results.cuh"
#include "xla_ffi/gemm/tensor_map.h"
#include "xla_ffi/gemm/wgmma_fp8.cuh"

namespace jaxmoe::gemm {
namespace {

constexpr int kFp8InstructionDepth = 32;
constexpr int kHalfPacked = kHalfAccumulators / 2;

// Where the warpgroups lay out results, and behind that the scales of the stages.
constexpr int kFp8OutRows = 64;
constexpr int kFp8OutBytes = kFp8OutRows * kRowBytes;
static_assert(kMultipliers * kFp8OutBytes <= kMultipliers * kOutBytes / 2);

// sum += d * scale of the column * weight_scale. `scales`: of the half's first column.
template <int kN>
__device__ __forceinline__ void AddScaled(const float (&d)[kHalfAccumulators], uint32_t scales,
                                          float weight_scale, float (&sum)[kHalfAccumulators]) {
  scales += LaneId() % 4 * 8;
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const float2 column = ReadSharedPair(scales + 32 * j);
    const float x = column.x * weight_scale, y = column.y * weight_scale;
    sum[4 * j] += d[4 * j] * x;
    sum[4 * j + 1] += d[4 * j + 1] * y;
    sum[4 * j + 2] += d[4 * j + 2] * x;
    sum[4 * j + 3] += d[4 * j + 3] * y;
  }
}

// What tells one half from the other.
struct Half {
  uint32_t a, b;              // descriptors in the first stage
  uint32_t scales;            // of its columns, in the first stage
  const float* weight_scale;  // of the first step
};

// One step of one half, in a stage's data: sum += A B, scaled.
template <int kN>
__device__ __forceinline__ void AddStep(const Half& half, int stage, int step,
                                        float (&sum)[kHalfAccumulators]) {
  constexpr uint32_t kNext = DescriptorStep(kFp8InstructionDepth);
  const uint32_t at = stage * DescriptorStep(kStageBytes);
  const float weight_scale = __ldg(half.weight_scale + step);
  float d[kHalfAccumulators];
  BeginProducts();
#pragma unroll
  for (int i = 0; i < kRowBytes / kFp8InstructionDepth; ++i) {
    Fp8Product<kN>::Do(d, half.a + at + i * kNext, half.b + at + i * kNext, i > 0);
  }
  EndProducts();
  WaitProducts<0>();
  TakeResults(d);
  AddScaled<kN>(d, half.scales + stage * kScaleBytes, weight_scale, sum);
}

// sum = A B over `steps` stages, for both halves.
template <int kN>
__device__ __forceinline__ void MultiplyScaled(const Shared& shared, Ring<kStages>* ring, int steps,
                                               const Half& half0, const Half& half1,
                                               float (&sum0)[kHalfAccumulators],
                                               float (&sum1)[kHalfAccumulators]) {
#pragma unroll
  for (int i = 0; i < kHalfAccumulators; ++i) sum0[i] = sum1[i] = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    Wait(shared.Full(ring->at), ring->parity);
    AddStep<kN>(half0, ring->at, step, sum0);
    AddStep<kN>(half1, ring->at, step, sum1);
    Release(shared, ring->at);
    ring->Next();
  }
}

__device__ __forceinline__ void PackHalf(const float (&sum)[kHalfAccumulators],
                                         uint32_t (&packed)[kHalfPacked]) {
#pragma unroll
  for (int i = 0; i < kHalfPacked; ++i) {
    packed[i] = BitsOf(__floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]));
  }
}

// Writes the columns of a half: `rows` tokens from `row` on.
__device__ __forceinline__ void WriteHalf(const Shared& shared, const Place& place,
                                          const uint32_t (&packed)[kHalfPacked], int row, int rows,
                                          __nv_bfloat16* y, int feature, int width) {
  if (rows <= 0) return;
  const uint32_t out = shared.out + place.group * kFp8OutBytes;
  y += static_cast<int64_t>(row) * width + feature;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (i * kFp8OutRows >= rows) break;
    WriteTokens<kFp8OutRows>(
        out, place, packed + i * kHalfPacked / 2, min(rows - i * kFp8OutRows, kFp8OutRows),
        y + static_cast<int64_t>(i) * kFp8OutRows * width, width, width - feature);
  }
}

// The whole of a tile with kN columns in each half. One function for each kN: registers that several
// products share would be too many.
template <Op kOp, int kN>
__device__ __forceinline__ void MultiplyScaledTile(const Params& p, const Shared& shared,
                                                   const Place& place, const Tile& tile, int steps,
                                                   Ring<kStages>* ring) {
  constexpr bool kGated = kIsGated<kOp>;
  const int feature = FeatureOf<kOp>(tile);
  const int64_t scale = (static_cast<int64_t>(tile.group) * CeilDiv(p.features, kScaleBlock) +
                         feature / kScaleBlock) *
                        steps;
  const auto half = [&](int h) {
    const int a = kGated ? h : place.group, b = kGated ? place.group : h;
    return Half{Descriptor(shared.A(0) + a * kBlockBytes),
                Descriptor(shared.B(0) + b * kN * kRowBytes),
                shared.Scales(0) + b * kN * static_cast<int>(sizeof(float)),
                p.weight_scales[kGated ? h : 0] + scale};
  };
  float sum0[kHalfAccumulators], sum1[kHalfAccumulators];
  MultiplyScaled<kN>(shared, ring, steps, half(0), half(1), sum0, sum1);
  uint32_t packed0[kHalfPacked], packed1[kHalfPacked];
  PackHalf(sum0, packed0);
  PackHalf(sum1, packed1);
  if constexpr (kGated) {
    const int row0 = tile.row + place.group * kN, rows0 = min(tile.rows - place.group * kN, kN);
    if (p.saved[0] != nullptr) {
      WriteHalf(shared, place, packed0, row0, rows0, p.saved[0], feature, p.features);
      WriteHalf(shared, place, packed1, row0, rows0, p.saved[1], feature, p.features);
    }
#pragma unroll
    for (int i = 0; i < kHalfPacked; ++i) packed0[i] = Swiglu(packed0[i], packed1[i]);
    WriteHalf(shared, place, packed0, row0, rows0, p.y, feature, p.features);
  } else {
    const int own = feature + place.group * 64;
    WriteHalf(shared, place, packed0, tile.row, min(tile.rows, kN), p.y, own, p.features);
    WriteHalf(shared, place, packed1, tile.row + kN, tile.rows - kN, p.y, own, p.features);
  }
  // Keeps the compiler from joining the ends of all widths, and with them their registers.
  asm volatile("// %0" ::"n"(kN) : "memory");
}

template <Op kOp>
__device__ __forceinline__ void MultiplyScaledTiles(const Params& p, const Shared& shared) {
  ToldTiles tiles(shared);
  const Place place;
  const int steps = CeilDiv(p.depth, kStepDepth<kOp>);
  Ring<kStages> ring;
  Tile tile;
  while (tiles.Next(&tile)) {
#define JAXMOE_CASE(n)                                                      \
  case n:                                                                   \
    MultiplyScaledTile<kOp, n>(p, shared, place, tile, steps, &ring);       \
    break;
    switch (CeilDiv(tile.rows, 16) * 8) {
      JAXMOE_CASE(8)
      JAXMOE_CASE(16)
      JAXMOE_CASE(24)
      JAXMOE_CASE(32)
      JAXMOE_CASE(40)
      JAXMOE_CASE(48)
      JAXMOE_CASE(56)
      JAXMOE_CASE(64)
      JAXMOE_CASE(72)
      JAXMOE_CASE(80)
      JAXMOE_CASE(88)
      JAXMOE_CASE(96)
      JAXMOE_CASE(104)
      JAXMOE_CASE(112)
      JAXMOE_CASE(120)
      JAXMOE_CASE(128)
    }
#undef JAXMOE_CASE
  }
  WriteUnusedRows(p, tile.row);
}

template <Op kOp>
__global__ void __launch_bounds__(kThreads, 1) ScaledProduct(const __grid_constant__ Params p) {
  const Shared shared = Shared::Of<kOp>(SharedMemory());
  BeginBlock(shared);
  if (IsFeeder()) {
    FeedBlock<kOp>(p, shared);
  } else {
    TakeRegisters<kTakenRegisters>();
    MultiplyScaledTiles<kOp>(p, shared);
  }
  EndBlock();
}

Params MakeScaled(const Shape& s, const int32_t* group_sizes, void* y, int tile_width) {
  return MakeParams(s, group_sizes, y, s.features, tile_width, s.dim);
}

// Rows and their scales: [ceil(dim / 128), num_rows rounded up to 4].
cudaError_t DescribeRows(const Shape& s, const void* x, const float* x_scales, Params* p) {
  const int64_t num_blocks = (s.dim + kScaleBlock - 1) / kScaleBlock;
  const int64_t num_columns = (s.num_rows + 3) / 4 * 4;
  return First({DescribeBytes(x, {s.dim, s.num_rows}, kLoadRows, &p->b),
                DescribeFloats(x_scales, {num_columns, num_blocks}, kMaxColumns, &p->scales)});
}

}  // namespace

cudaError_t LaunchFp8Forward(cudaStream_t stream, int num_sms, const Shape& s, const void* x,
                             const float* x_scales, const void* w, const float* w_scales,
                             const int32_t* group_sizes, void* y) {
  Params p = MakeScaled(s, group_sizes, y, kFeatures);
  p.weight_scales[0] = w_scales;
  const cudaError_t error =
      First({DescribeRows(s, x, x_scales, &p),
             DescribeBytes(w, {s.dim, s.features, s.num_groups}, kFeatures, &p.a)});
  return error != cudaSuccess ? error
                              : Launch(ScaledProduct<Op::kScaledForward>, stream, num_sms, p);
}

cudaError_t LaunchFp8Swiglu(cudaStream_t stream, int num_sms, const Shape& s, const void* x,
                            const float* x_scales, const void* gate, const float* gate_scales,
                            const void* up, const float* up_scales, const int32_t* group_sizes,
                            void* y, void* a, void* b) {
  Params p = MakeScaled(s, group_sizes, y, kFeatures / 2);
  p.weight_scales[0] = gate_scales;
  p.weight_scales[1] = up_scales;
  p.saved[0] = static_cast<__nv_bfloat16*>(a);
  p.saved[1] = static_cast<__nv_bfloat16*>(b);
  const cudaError_t error =
      First({DescribeRows(s, x, x_scales, &p),
             DescribeBytes(gate, {s.dim, s.features, s.num_groups}, kFeatures / 2, &p.a),
             DescribeBytes(up, {s.dim, s.features, s.num_groups}, kFeatures / 2, &p.a2)});
  return error != cudaSuccess ? error
                              : Launch(ScaledProduct<Op::kScaledSwiglu>, stream, num_sms, p);
}

cudaError_t PreloadFp8() {
  return First(
      {Prepare(ScaledProduct<Op::kScaledForward>), Prepare(ScaledProduct<Op::kScaledSwiglu>)});
}

}  // namespace jaxmoe::gemm

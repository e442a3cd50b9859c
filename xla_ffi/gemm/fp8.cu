// The grouped product of FP8: rows with a scale for each 128 of their numbers, weights with one for
// each 128 x 128. The tensor cores add up 128 products; those sums, times both scales, are added up
// in float32 by ordinary instructions, for the tensor cores keep too few bits of an FP8 sum.
//
// A warpgroup's registers hold the sums of a tile and the products of half of its columns: while it
// scales a half, the tensor cores work for the other warpgroup. That leaves few registers: when the
// compiler has too few, it says so (C7511) and waits after every single product.

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
constexpr int kHalves = 2;

// Where a warpgroup lays out results, kOutTokens at a time.
constexpr int kOutTokens = 64;
constexpr int kHalfPacked = kHalfAccumulators / 2;
constexpr int kHalfOutBytes = kOutTokens * kRowBytes;
static_assert(kMultipliers * kHalfOutBytes + kStages * kScaleBytes <= kMultipliers * kOutBytes);

// d = A B of one stage, for kN columns.
template <int kN>
__device__ __forceinline__ void Products(uint32_t a, uint32_t b, float (&d)[kHalfAccumulators]) {
  constexpr uint32_t kNext = DescriptorStep(kFp8InstructionDepth);
  BeginProducts();
#pragma unroll
  for (int i = 0; i < kRowBytes / kFp8InstructionDepth; ++i) {
    Fp8Product<kN>::Do(d, a + i * kNext, b + i * kNext, i > 0);
  }
  EndProducts();
  WaitProducts<0>();
  TakeFirst<kN / 2>(d);
}

// sum += A B of one stage, for any number of columns: with scales of the columns from the thread's
// first on, and one of the weights.
__device__ __forceinline__ void AddHalf(int columns, uint32_t a, uint32_t b, uint32_t scales,
                                        float weight_scale, float (&sum)[kHalfAccumulators]) {
  float d[kHalfAccumulators];
#define JAXMOE_CASE(n)    \
  case n:                 \
    Products<n>(a, b, d); \
    break;
  switch (columns) {
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
    default:
      return;
  }
#undef JAXMOE_CASE
#pragma unroll
  for (int j = 0; j < kHalfAccumulators / 4; ++j) {
    if (j > 0 && j % 2 == 0 && 8 * j >= columns) break;
    const float2 column = ReadSharedPair(scales + 32 * j);
    const float x = column.x * weight_scale, y = column.y * weight_scale;
    sum[4 * j] += d[4 * j] * x;
    sum[4 * j + 1] += d[4 * j + 1] * y;
    sum[4 * j + 2] += d[4 * j + 2] * x;
    sum[4 * j + 3] += d[4 * j + 3] * y;
  }
}

// Writes the columns of a half: `rows` tokens from `row` on, but for the first `skipped`.
__device__ __forceinline__ void WriteHalf(const Shared& shared, const Place& place,
                                          const float (&sum)[kHalfAccumulators], int row, int rows,
                                          int skipped, __nv_bfloat16* y, int feature, int width) {
  uint32_t packed[kHalfPacked];
#pragma unroll
  for (int i = 0; i < kHalfPacked; ++i) {
    packed[i] = BitsOf(__floats2bfloat162_rn(sum[2 * i], sum[2 * i + 1]));
  }
  const uint32_t out = shared.out + place.group * kHalfOutBytes;
  y += static_cast<int64_t>(row) * width + feature;
#pragma unroll
  for (int i = 0; i < kHalfPacked * 4 / kOutTokens; ++i) {
    const int before = i * kOutTokens;
    if (before >= rows) break;
    WriteTokens<kOutTokens>(out, place, packed + before / 4, min(rows - before, kOutTokens),
                            y + static_cast<int64_t>(before) * width, width, width - feature,
                            i == 0 ? skipped : 0);
  }
}

__device__ __forceinline__ void MultiplyScaledTiles(const Params& p, const Shared& shared) {
  ToldTiles tiles(shared);
  const Place place;
  const int steps = CeilDiv(p.depth, kStepDepth<Op::kScaled>);
  const uint32_t a = Descriptor(shared.A(0) + place.group * kBlockBytes);
  const uint32_t b = Descriptor(shared.B(0));
  const uint32_t scales = shared.Scales(0) + place.lane % 4 * 8;
  Ring<kStages> ring;
  Tile tile;
  while (tiles.Next(&tile)) {
    const int feature = FeatureOf<Op::kScaled>(tile);
    // All lanes have the same; this lets the compiler know, which else would not let products run
    // on after one of another width.
    const int skipped = SkippedOf<Op::kScaled>(tile.row), columns = skipped + tile.rows;
    const int wide = __shfl_sync(kAllLanes, CeilDiv(columns, 8 * kHalves) * 8, 0);
    const int last = __shfl_sync(kAllLanes, CeilDiv(columns, 8) * 8 - wide, 0);
    const float* weight_scale =
        p.weight_scales + (static_cast<int64_t>(tile.group) * CeilDiv(p.features, kScaleBlock) +
                           feature / kScaleBlock) *
                              steps;
    float sum0[kHalfAccumulators], sum1[kHalfAccumulators];
#pragma unroll
    for (int i = 0; i < kHalfAccumulators; ++i) sum0[i] = sum1[i] = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const float of_weights = __ldg(weight_scale + step);
      Wait(shared.Full(ring.at), ring.parity);
      __syncwarp();
      const uint32_t stage = ring.at * DescriptorStep(kStageBytes);
      const uint32_t at = scales - ring.at * kScaleBytes;
      AddHalf(wide, a + stage, b + stage, at, of_weights, sum0);
      AddHalf(last, a + stage, b + stage + wide * DescriptorStep(kRowBytes), at + wide * 4,
              of_weights, sum1);
      Release(shared, ring.at);
      ring.Next();
    }
    const int own = feature + place.group * 64, row = tile.row - skipped;
    WriteHalf(shared, place, sum0, row, min(columns, wide), skipped, p.y, own, p.features);
    WriteHalf(shared, place, sum1, row + wide, columns - wide, 0, p.y, own, p.features);
  }
  WriteUnusedRows(p, tile.row);
}

__global__ void __launch_bounds__(kThreads, 1) ScaledProduct(const __grid_constant__ Params p) {
  const Shared shared(SharedMemory());
  BeginBlock(shared);
  if (IsFeeder()) {
    FeedBlock<Op::kScaled>(p, shared);
  } else {
    TakeRegisters<kTakenRegisters>();
    MultiplyScaledTiles(p, shared);
  }
  EndBlock();
}

}  // namespace

cudaError_t LaunchFp8Forward(cudaStream_t stream, int num_sms, const Shape& s, const void* x,
                             const float* x_scales, const void* w, const float* w_scales,
                             const int32_t* group_sizes, void* y) {
  Params p = MakeParams(s, group_sizes, y, s.features, kFeatures, s.dim);
  p.weight_scales = w_scales;
  const int64_t num_blocks = (s.dim + kScaleBlock - 1) / kScaleBlock;
  const int64_t num_columns = (s.num_rows + 3) / 4 * 4;
  const cudaError_t error =
      First({DescribeBytes(w, {s.dim, s.features, s.num_groups}, kFeatures, &p.a),
             DescribeBytes(x, {s.dim, s.num_rows}, kLoadRows, &p.b),
             DescribeFloats(x_scales, {num_columns, num_blocks}, kMaxColumns, &p.scales)});
  return error != cudaSuccess ? error : Launch(ScaledProduct, stream, num_sms, p);
}

cudaError_t PreloadFp8() { return Prepare(ScaledProduct); }

}  // namespace jaxmoe::gemm

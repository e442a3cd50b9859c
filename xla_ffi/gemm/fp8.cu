// The grouped product of FP8: rows with a scale for each 128 of their numbers, weights with one for
// each 128 x 128. The tensor cores add up 128 products; those sums, times both scales, are added up
// in float32 by ordinary instructions, for the tensor cores keep too few bits of an FP8 sum.
//
// A warpgroup's registers hold the sums of a tile and the products of a third of its columns: while
// it scales a third, the tensor cores work for the other warpgroup. (Halves would leave too few
// registers, and the compiler would then wait after every single product.)

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
constexpr int kThirds = 3;

// Where a warpgroup lays out the results of a third.
constexpr int kThirdRows = CeilDiv(kThirdColumns, 16) * 16;
constexpr int kThirdPacked = kThirdRows / 4;
constexpr int kThirdOutBytes = kThirdRows * kRowBytes;
static_assert(kMultipliers * kThirdOutBytes + kStages * kScaleBytes <= kMultipliers * kOutBytes);

// sum += A B of one stage, for kN columns: with scales of the columns from the thread's first on,
// and one of the weights.
template <int kN>
__device__ __forceinline__ void AddProducts(uint32_t a, uint32_t b, uint32_t scales,
                                            float weight_scale, float (&sum)[kThirdAccumulators]) {
  constexpr uint32_t kNext = DescriptorStep(kFp8InstructionDepth);
  float d[kN / 2];
  BeginProducts();
#pragma unroll
  for (int i = 0; i < kRowBytes / kFp8InstructionDepth; ++i) {
    Fp8Product<kN>::Do(d, a + i * kNext, b + i * kNext, i > 0);
  }
  EndProducts();
  WaitProducts<0>();
  TakeResults(d);
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

// The same for any width that a third may have.
__device__ __forceinline__ void AddThird(int columns, uint32_t a, uint32_t b, uint32_t scales,
                                         float weight_scale, float (&sum)[kThirdAccumulators]) {
#define JAXMOE_CASE(n)                               \
  case n:                                            \
    AddProducts<n>(a, b, scales, weight_scale, sum); \
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
  }
#undef JAXMOE_CASE
}

// How a tile's columns are shared out: two thirds are alike, and the last may be narrower or none.
struct Thirds {
  int wide, last;
  explicit __device__ Thirds(int rows) {
    const int eights = CeilDiv(rows, 8);
    wide = CeilDiv(eights, kThirds) * 8;
    last = max(eights * 8 - 2 * wide, 0);
  }
};

// Writes the columns of a third: `rows` tokens from `row` on, but for the first `skipped`.
__device__ __forceinline__ void WriteThird(const Shared& shared, const Place& place,
                                           const float (&sum)[kThirdAccumulators], int row,
                                           int rows, int skipped, __nv_bfloat16* y, int feature,
                                           int width) {
  if (rows <= 0) return;
  uint32_t packed[kThirdPacked];
#pragma unroll
  for (int i = 0; i < kThirdPacked; ++i) {
    const bool held = i < kThirdAccumulators / 2;
    packed[i] =
        held ? BitsOf(__floats2bfloat162_rn(sum[held ? 2 * i : 0], sum[held ? 2 * i + 1 : 0])) : 0;
  }
  WriteTokens<kThirdRows>(shared.out + place.group * kThirdOutBytes, place, packed, rows,
                          y + static_cast<int64_t>(row) * width + feature, width, width - feature,
                          skipped);
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
    const Thirds thirds(__shfl_sync(kAllLanes, columns, 0));
    const float* weight_scale =
        p.weight_scales + (static_cast<int64_t>(tile.group) * CeilDiv(p.features, kScaleBlock) +
                           feature / kScaleBlock) *
                              steps;
    float sums[kThirds][kThirdAccumulators];
#pragma unroll
    for (int i = 0; i < kThirds * kThirdAccumulators; ++i) {
      sums[i / kThirdAccumulators][i % kThirdAccumulators] = 0;
    }
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const float of_weights = __ldg(weight_scale + step);
      Wait(shared.Full(ring.at), ring.parity);
      __syncwarp();
      const uint32_t stage = ring.at * DescriptorStep(kStageBytes);
#pragma unroll
      for (int i = 0; i < kThirds; ++i) {
        const int before = i * thirds.wide;
        AddThird(i < 2 ? thirds.wide : thirds.last, a + stage,
                 b + stage + before * DescriptorStep(kRowBytes),
                 scales - ring.at * kScaleBytes + before * sizeof(float), of_weights, sums[i]);
      }
      Release(shared, ring.at);
      ring.Next();
    }
#pragma unroll
    for (int i = 0; i < kThirds; ++i) {
      const int before = i * thirds.wide;
      WriteThird(shared, place, sums[i], tile.row - skipped + before,
                 min(columns - before, thirds.wide), i == 0 ? skipped : 0, p.y,
                 feature + place.group * 64, p.features);
    }
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

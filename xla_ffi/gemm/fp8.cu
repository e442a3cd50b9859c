// The grouped product of FP8: rows with a scale for each 128 of their numbers, weights with one for
// each 128 x 128. The tensor cores add up 128 products; those sums, times both scales, are added up
// in float32 by ordinary instructions, for the tensor cores keep too few bits of an FP8 sum.
//
// A warpgroup computes its tile in quarters of the columns: while it scales one, the tensor cores
// have the next. That leaves few registers; when the compiler has too few, it says so (C7511) and
// waits after every single product.

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
// Where a warpgroup lays out the results of a quarter.
constexpr int kQuarterPacked = kQuarterAccumulators / 2;
constexpr int kQuarterOutBytes = kQuarterColumns * kRowBytes;
static_assert(kMultipliers * kQuarterOutBytes + kStages * kScaleBytes <= kMultipliers * kOutBytes);

// A step of the contraction, for a warpgroup.
struct Step {
  uint32_t a, b;    // descriptors of its stage
  uint32_t scales;  // of the columns, from the thread's first on
  float of_weights;
  int stage;
};

// d = A B for quarter kAt, on its way.
template <int kN, int kAt>
__device__ __forceinline__ void Begin(const Step& step, float (&d)[kN / 2]) {
  constexpr uint32_t kNext = DescriptorStep(kFp8InstructionDepth);
  BeginProducts();
#pragma unroll
  for (int i = 0; i < kRowBytes / kFp8InstructionDepth; ++i) {
    Fp8Product<kN>::Do(d, step.a + i * kNext,
                       step.b + kAt * DescriptorStep(kN * kRowBytes) + i * kNext, i > 0);
  }
  EndProducts();
}

// sum += d with the scales of quarter kAt, once all but the latest kPending quarters are there.
template <int kN, int kAt, int kPending>
__device__ __forceinline__ void Add(const Step& step, float (&d)[kN / 2], float (&sum)[kN / 2]) {
  WaitProducts<kPending>();
  TakeResults(d);
#pragma unroll
  for (int j = 0; j < kN / 8; ++j) {
    const float2 column = ReadSharedPair(step.scales + kAt * kN * 4 + 32 * j);
    const float x = column.x * step.of_weights, y = column.y * step.of_weights;
    sum[4 * j] += d[4 * j] * x;
    sum[4 * j + 1] += d[4 * j + 1] * y;
    sum[4 * j + 2] += d[4 * j + 2] * x;
    sum[4 * j + 3] += d[4 * j + 3] * y;
  }
  TakeResults(sum);
}

// Waits for the data of steps, one after the other.
class Steps {
 public:
  __device__ Steps(const Shared& shared, const Place& place)
      : shared_(shared),
        a_(Descriptor(shared.A(0) + place.group * kBlockBytes)),
        b_(Descriptor(shared.B(0))),
        scales_(shared.Scales(0) + place.lane % 4 * 8) {}

  __device__ __forceinline__ Step Next(const float* of_weights) {
    const uint32_t stage = ring_.at * DescriptorStep(kStageBytes);
    const Step step = {a_ + stage, b_ + stage, scales_ - ring_.at * kScaleBytes, __ldg(of_weights),
                       ring_.at};
    Wait(shared_.Full(ring_.at), ring_.parity);
    __syncwarp();
    ring_.Next();
    return step;
  }

 private:
  const Shared shared_;
  const uint32_t a_, b_, scales_;
  Ring<kStages> ring_;
};

// Writes the columns of a quarter: `rows` tokens from `row` on, but for the first `skipped`.
template <int kN>
__device__ __forceinline__ void WriteQuarter(const Shared& shared, const Place& place,
                                             const float (&sum)[kN / 2], int row, int rows,
                                             int skipped, __nv_bfloat16* y, int feature,
                                             int width) {
  if (rows <= 0) return;
  uint32_t packed[kQuarterPacked];
#pragma unroll
  for (int i = 0; i < kQuarterPacked; ++i) {
    const int at = i < kN / 4 ? 2 * i : 0;
    packed[i] = BitsOf(__floats2bfloat162_rn(sum[at], sum[at + 1]));
  }
  WriteTokens<kQuarterColumns>(shared.out + place.group * kQuarterOutBytes, place, packed,
                               min(rows, kN), y + static_cast<int64_t>(row) * width + feature,
                               width, width - feature, skipped);
}

// A tile of up to 4 kN columns.
template <int kN>
__device__ __forceinline__ void MultiplyScaledTile(const Params& p, const Shared& shared,
                                                   const Place& place, const Tile& tile,
                                                   Steps* steps) {
  const int feature = FeatureOf<Op::kScaled>(tile);
  const int num_steps = CeilDiv(p.depth, kStepDepth<Op::kScaled>);
  const float* of_weights =
      p.weight_scales + (static_cast<int64_t>(tile.group) * CeilDiv(p.features, kScaleBlock) +
                         feature / kScaleBlock) *
                            num_steps;
  float sum0[kN / 2], sum1[kN / 2], sum2[kN / 2], sum3[kN / 2], d0[kN / 2], d1[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) sum0[i] = sum1[i] = sum2[i] = sum3[i] = 0;
#pragma unroll 1
  for (int i = 0; i < num_steps; ++i) {
    const Step step = steps->Next(of_weights + i);
    Begin<kN, 0>(step, d0);
    Begin<kN, 1>(step, d1);
    Add<kN, 0, 1>(step, d0, sum0);
    Begin<kN, 2>(step, d0);
    Add<kN, 1, 1>(step, d1, sum1);
    Begin<kN, 3>(step, d1);
    Add<kN, 2, 1>(step, d0, sum2);
    Add<kN, 3, 0>(step, d1, sum3);
    Release(shared, step.stage);
  }

  const int skipped = SkippedOf<Op::kScaled>(tile.row), row = tile.row - skipped;
  const int rows = tile.rows + skipped, own = feature + place.group * 64;
  WriteQuarter<kN>(shared, place, sum0, row, rows, skipped, p.y, own, p.features);
  WriteQuarter<kN>(shared, place, sum1, row + kN, rows - kN, 0, p.y, own, p.features);
  WriteQuarter<kN>(shared, place, sum2, row + 2 * kN, rows - 2 * kN, 0, p.y, own, p.features);
  WriteQuarter<kN>(shared, place, sum3, row + 3 * kN, rows - 3 * kN, 0, p.y, own, p.features);
}

__device__ __forceinline__ void MultiplyScaledTiles(const Params& p, const Shared& shared) {
  ToldTiles tiles(shared);
  const Place place;
  Steps steps(shared, place);
  Tile tile;
  while (tiles.Next(&tile)) {
    const int columns = SkippedOf<Op::kScaled>(tile.row) + tile.rows;
#define JAXMOE_CASE(n)                                     \
  case n:                                                  \
    MultiplyScaledTile<n>(p, shared, place, tile, &steps); \
    break;
    // All lanes have the same; this lets the compiler know.
    switch (__shfl_sync(kAllLanes, CeilDiv(columns, 32) * 8, 0)) {
      JAXMOE_CASE(8)
      JAXMOE_CASE(16)
      JAXMOE_CASE(24)
      JAXMOE_CASE(32)
      JAXMOE_CASE(40)
      JAXMOE_CASE(48)
      JAXMOE_CASE(56)
      JAXMOE_CASE(64)
    }
#undef JAXMOE_CASE
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

// The grouped product of FP8: rows with a scale for each 128 of their numbers, weights with one for
// each 128 x 128. The tensor cores add up 128 products; those sums, times both scales, are added up
// in float32 by ordinary instructions, for the tensor cores keep too few bits of an FP8 sum.
//
// Tokens are the rows of the tensor cores' product here, unlike in kernel.cuh: a thread's results
// lie in two rows, so that it needs two scales a step. As columns they would be some 50, and
// reading them takes as long from shared memory as the products do. The price: a group's tokens
// are computed 64 at a time.
//
// A warpgroup's registers hold the sums of 64 x 256 and the products of half of these: while it
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
constexpr int kHalves = kMaxColumns / kFp8Columns;
constexpr int kOwnRows = kFeatures / kMultipliers;  // of a warpgroup
static_assert(kFp8Columns == kScaleBlock);          // one scale of the weights a half and step

// What a warpgroup computes of a tile: `num_halves` of its features for `rows` tokens, up to 64,
// from `row` of the tile's on. Two warpgroups share few tokens: each takes a half.
struct Part {
  int row, rows, half, num_halves;

  __device__ Part(const Tile& tile, const Place& place) {
    const bool few = tile.rows <= kOwnRows;
    row = few ? 0 : place.group * kOwnRows;
    rows = min(tile.rows - row, kOwnRows);
    half = few ? place.group : 0;
    num_halves = few ? 1 : kHalves;
  }
};

// Scales of a step: of the thread's rows and of the halves.
struct Scales {
  float rows[2], halves[kHalves];
};

// Where a thread finds the scales of a tile's steps.
class ScalesOf {
 public:
  __device__ ScalesOf(const Params& p, int first_row, int feature, int group) {
    const int blocks = CeilDiv(p.depth, kScaleBlock);
    for (int i = 0; i < 2; ++i) {  // there may be no such rows
      const int row = min(first_row + 8 * i, p.groups.capacity - 1);
      rows_[i] = p.row_scales + static_cast<int64_t>(row) * blocks;
    }
    const int of_features = CeilDiv(p.features, kScaleBlock);
    for (int i = 0; i < kHalves; ++i) {
      const int block = min(feature / kScaleBlock + i, of_features - 1);
      halves_[i] = p.weight_scales + (static_cast<int64_t>(group) * of_features + block) * blocks;
    }
  }

  __device__ __forceinline__ Scales At(int step) const {
    return {{__ldg(rows_[0] + step), __ldg(rows_[1] + step)},
            {__ldg(halves_[0] + step), __ldg(halves_[1] + step)}};
  }

 private:
  const float *rows_[2], *halves_[kHalves];
};

// d = A B of one stage, for half of the columns.
__device__ __forceinline__ void Products(uint32_t a, uint32_t b, float (&d)[kFp8Accumulators]) {
  constexpr uint32_t kNext = DescriptorStep(kFp8InstructionDepth);
  BeginProducts();
#pragma unroll
  for (int i = 0; i < kRowBytes / kFp8InstructionDepth; ++i) {
    Fp8Product(d, a + i * kNext, b + i * kNext, i > 0);
  }
  EndProducts();
  WaitProducts<0>();
  TakeResults(d);
}

// sum += d with the scales of both rows.
__device__ __forceinline__ void Add(const float (&d)[kFp8Accumulators], float low, float high,
                                    float (&sum)[kFp8Accumulators]) {
#pragma unroll
  for (int j = 0; j < kFp8Accumulators / 4; ++j) {
    sum[4 * j] += d[4 * j] * low;
    sum[4 * j + 1] += d[4 * j + 1] * low;
    sum[4 * j + 2] += d[4 * j + 2] * high;
    sum[4 * j + 3] += d[4 * j + 3] * high;
  }
}

// Writes a half's features of a warp's tokens, of which there are `rows`: laid out in the warp's
// own part of shared memory first. y points to the first; `features` are left of a row of `width`.
__device__ __forceinline__ void WriteHalf(const Shared& shared, const Place& place,
                                          const float (&sum)[kFp8Accumulators], int rows,
                                          __nv_bfloat16* y, int width, int features) {
  constexpr int kBlocks = kFp8Columns / kBlockColumns, kPieces = kRowBytes / 16;
  constexpr int kWarpBytes = 16 * kRowBytes;
  const uint32_t out =
      shared.out + (place.group * 4 + place.warp) * static_cast<uint32_t>(kBlocks * kWarpBytes);
  __syncwarp();  // the half before has left
#pragma unroll
  for (int j = 0; j < kFp8Columns / 16; ++j) {
    uint32_t packed[kPackedStep];
#pragma unroll
    for (int i = 0; i < kPackedStep; ++i) {
      packed[i] = BitsOf(__floats2bfloat162_rn(sum[8 * j + 2 * i], sum[8 * j + 2 * i + 1]));
    }
    const int piece = 2 * (j % 4) + place.lane / 16;
    StoreMatrices<false>(PieceAddress(out + j / 4 * kWarpBytes, place.lane % 16, piece), packed);
  }
  __syncwarp();
  constexpr int kRowPieces = kBlocks * kPieces;
  const int piece = place.lane % kRowPieces;
  if (8 * piece >= features) return;
  for (int row = place.lane / kRowPieces; row < min(rows, 16); row += 32 / kRowPieces) {
    *reinterpret_cast<uint4*>(y + static_cast<int64_t>(row) * width + 8 * piece) =
        ReadShared(PieceAddress(out + piece / kPieces * kWarpBytes, row, piece % kPieces));
  }
}

template <int kNumHalves>
__device__ __forceinline__ void MultiplyScaledTile(const Params& p, const Shared& shared,
                                                   const Place& place, const Tile& tile,
                                                   const Part& part, Ring* ring) {
  const int steps = StepsOf<Op::kScaled>(p, tile), before = part.row + place.warp * 16;
  const int feature = FeatureOf<Op::kScaled>(tile) + part.half * kFp8Columns;
  const int row = tile.row + before;
  const uint32_t a = Descriptor(shared.A(0) + part.row * kRowBytes);
  const uint32_t b = Descriptor(shared.B(0) + part.half * kFp8Columns * kRowBytes);
  const ScalesOf scales(p, row + place.lane / 4, feature, tile.group);
  float sum[kNumHalves][kFp8Accumulators], d[kFp8Accumulators];
#pragma unroll
  for (int i = 0; i < kNumHalves * kFp8Accumulators; ++i) {
    sum[i / kFp8Accumulators][i % kFp8Accumulators] = 0;
  }
  Scales next = scales.At(0);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const Scales now = next;
    next = scales.At(min(step + 1, steps - 1));
    Wait(shared.Full(ring->at), ring->parity);
    __syncwarp();
    const uint32_t stage = ring->at * DescriptorStep(shared.stage_bytes);
#pragma unroll
    for (int i = 0; i < kNumHalves; ++i) {
      Products(a + stage, b + stage + i * DescriptorStep(kFp8Columns * kRowBytes), d);
      Add(d, now.rows[0] * now.halves[i], now.rows[1] * now.halves[i], sum[i]);
    }
    Release(shared, ring->at);
    ring->Next();
  }
  __nv_bfloat16* y = p.y + static_cast<int64_t>(row) * p.features + feature;
#pragma unroll
  for (int i = 0; i < kNumHalves; ++i) {
    WriteHalf(shared, place, sum[i], part.row + part.rows - before, y + i * kFp8Columns, p.features,
              p.features - feature - i * kFp8Columns);
  }
}

__device__ __forceinline__ void MultiplyScaledTiles(const Params& p, const Shared& shared) {
  ToldTiles tiles(shared);
  const Place place;
  Ring ring(p.stages.num);
  Tile tile;
  while (tiles.Next(&tile)) {
    const Part part(tile, place);
    // All lanes have the same; this lets the compiler know.
    if (__shfl_sync(kAllLanes, part.num_halves, 0) == 1) {
      MultiplyScaledTile<1>(p, shared, place, tile, part, &ring);
    } else {
      MultiplyScaledTile<kHalves>(p, shared, place, tile, part, &ring);
    }
  }
  WriteUnusedRows(p, tile.row);
}

__global__ void __launch_bounds__(kThreads, 1) ScaledProduct(const __grid_constant__ Params p) {
  const Shared shared(SharedMemory(), p.stages);
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

cudaError_t LaunchFp8Forward(const Target& t, const Shape& s, const void* x, const float* x_scales,
                             const void* w, const float* w_scales, const int32_t* group_sizes,
                             void* y) {
  Params p = MakeParams(t, s, group_sizes, y, s.features, kMaxColumns, s.dim);
  p.stages = kStages;
  p.tallest = kFeatures;
  p.row_scales = x_scales;
  p.weight_scales = w_scales;
  const cudaError_t error =
      First({DescribeBytes(x, {s.dim, s.num_rows}, kLoadRows, &p.a),
             DescribeBytes(w, {s.dim, s.features, s.num_groups}, kMaxColumns, &p.b)});
  return error != cudaSuccess ? error : Launch(ScaledProduct, t, p);
}

cudaError_t PreloadFp8() { return Prepare(ScaledProduct); }

}  // namespace jaxmoe::gemm

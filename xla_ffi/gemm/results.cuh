// What a warpgroup does with a finished tile: rounds it to bf16, lays it out in shared memory as it
// lies in device memory, and writes it.

#ifndef JAXMOE_XLA_FFI_GEMM_RESULTS_CUH_
#define JAXMOE_XLA_FFI_GEMM_RESULTS_CUH_

#include <cuda_bf16.h>

#include <cstring>

#include "xla_ffi/gemm/kernel.cuh"

namespace jaxmoe::gemm {

// Pairs of neighbouring columns, in the order of the accumulators; kOutRows columns of them.
constexpr int kPacked = kAccumulators / 2;
constexpr int kPackedHalf = kPacked / 2;
// Packed registers of 16 columns.
constexpr int kPackedStep = 4;

__device__ __forceinline__ uint32_t BitsOf(__nv_bfloat162 pair) {
  uint32_t bits;
  memcpy(&bits, &pair, sizeof(bits));
  return bits;
}
__device__ __forceinline__ __nv_bfloat162 PairOf(uint32_t bits) {
  __nv_bfloat162 pair;
  memcpy(&pair, &bits, sizeof(pair));
  return pair;
}

// A thread's place among the threads that multiply.
struct Place {
  int group, warp, lane, thread;  // warpgroup; the others within it
  __device__ Place()
      : group(threadIdx.x / 128 - 1),
        warp(threadIdx.x / 32 % 4),
        lane(LaneId()),
        thread(threadIdx.x % 128) {}
  __device__ void SyncGroup() const { SyncThreads(1 + group, 128); }
};
__device__ __forceinline__ void SyncMultipliers() {
  SyncThreads(1 + kMultipliers, 128 * kMultipliers);
}

__device__ __forceinline__ void Pack(const float (&d)[kAccumulators], uint32_t (&packed)[kPacked]) {
#pragma unroll
  for (int i = 0; i < kPacked; ++i)
    packed[i] = BitsOf(__floats2bfloat162_rn(d[2 * i], d[2 * i + 1]));
}

// Swizzled address of 16-byte piece `piece` of a row.
__device__ __forceinline__ uint32_t PieceAddress(uint32_t block, int row, int piece) {
  return block + row * kRowBytes + ((piece ^ (row % 8)) * 16);
}

// Writes up to kRows columns of the product as rows of y: 64 features of `rows` tokens, laid out
// at `out`, but for the first `skipped`. y points to the first; `width` is its row length and
// `features` how many of it are left.
template <int kRows>
__device__ __forceinline__ void WriteTokens(uint32_t out, const Place& place,
                                            const uint32_t* packed, int rows, __nv_bfloat16* y,
                                            int width, int features, int skipped = 0) {
  place.SyncGroup();  // the tile before has left
#pragma unroll
  for (int j = 0; j < kRows / 16; ++j) {
    if (16 * j >= rows) break;
    const int row = 16 * j + place.lane / 16 * 8 + place.lane % 8;
    const int piece = 2 * place.warp + place.lane / 8 % 2;
    StoreMatrices<true>(PieceAddress(out, row, piece), packed + kPackedStep * j);
  }
  place.SyncGroup();
  const int piece = place.thread % 8;
  if (8 * piece >= features) return;
  for (int row = place.thread / 8; row < rows; row += 16) {
    if (row < skipped) continue;
    *reinterpret_cast<uint4*>(y + static_cast<int64_t>(row) * width + 8 * piece) =
        ReadShared(PieceAddress(out, row, piece));
  }
}

// Both halves of the columns.
__device__ __forceinline__ void WriteAllTokens(const Shared& shared, const Place& place,
                                               const uint32_t (&packed)[kPacked], const Tile& tile,
                                               __nv_bfloat16* y, int feature, int width) {
  y += static_cast<int64_t>(tile.row) * width + feature;
  const uint32_t out = shared.out + place.group * kOutBytes;
  const int left = width - feature;
  WriteTokens<kOutRows>(out, place, packed, min(tile.rows, kOutRows), y, width, left);
  if (tile.rows <= kOutRows) return;
  y += static_cast<int64_t>(kOutRows) * width;
  WriteTokens<kOutRows>(out, place, packed + kPackedHalf, tile.rows - kOutRows, y, width, left);
}

__device__ __forceinline__ uint32_t Swiglu(uint32_t gate, uint32_t up) {
  const float2 a = __bfloat1622float2(PairOf(gate)), b = __bfloat1622float2(PairOf(up));
  return BitsOf(__floats2bfloat162_rn(__fdividef(a.x * b.x, 1 + __expf(-a.x)),
                                      __fdividef(a.y * b.y, 1 + __expf(-a.y))));
}

// The first warpgroup holds x gate and the second x up, rounded, of the same features. Each gives
// the other half of its columns, and writes the result for the half that it then has of both: of
// those columns that are rows of the tile.
__device__ __forceinline__ void WriteSwiglu(const Shared& shared, const Place& place,
                                            uint32_t (&packed)[kPacked], const Tile& tile,
                                            __nv_bfloat16* y, int feature, int width) {
  const bool first = place.group == 0;
  const int low_rows = min(tile.rows, kOutRows), high_rows = tile.rows - low_rows;
  const int given_rows = first ? high_rows : low_rows, own_rows = first ? low_rows : high_rows;
  const uint32_t given = shared.out + place.group * kOutBytes + place.thread * 16;
  const uint32_t taken = shared.out + (1 - place.group) * kOutBytes + place.thread * 16;
  static_assert(kPackedHalf * 4 * 128 == kOutBytes);
  place.SyncGroup();  // the results before have left
#pragma unroll
  for (int j = 0; j < kOutRows / 16; ++j) {
    if (16 * j >= given_rows) break;
    const uint32_t* low = packed + kPackedStep * j;
    const uint32_t* high = packed + kPackedHalf + kPackedStep * j;
    const uint4 v = {first ? high[0] : low[0], first ? high[1] : low[1], first ? high[2] : low[2],
                     first ? high[3] : low[3]};
    WriteShared(given + j * 2048, v);
  }
  SyncMultipliers();
  uint32_t result[kPackedHalf];
#pragma unroll
  for (int j = 0; j < kOutRows / 16; ++j) {
    if (16 * j >= own_rows) break;
    const uint4 v = ReadShared(taken + j * 2048);
    const uint32_t other[kPackedStep] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int k = 0; k < kPackedStep; ++k) {
      const int i = kPackedStep * j + k;
      const uint32_t own = first ? packed[i] : packed[kPackedHalf + i];
      result[i] = first ? Swiglu(own, other[k]) : Swiglu(other[k], own);
    }
  }
  SyncMultipliers();  // before the place is used for the result
  if (own_rows == 0) return;
  y += static_cast<int64_t>(tile.row + place.group * kOutRows) * width + feature;
  WriteTokens<kOutRows>(shared.out + place.group * kOutBytes, place, result, own_rows, y, width,
                        width - feature);
}

// Writes 64 rows and kMaxColumns columns of a weight's gradient, a block of columns at a time. The
// copy engine leaves out what is beyond the gradient's edges.
__device__ __forceinline__ void WriteGradient(const Shared& shared, const Place& place,
                                              const uint32_t (&packed)[kPacked],
                                              const CUtensorMap& map, int column, int row,
                                              int group) {
  constexpr int kBuffers = kOutBytes / kBlockBytes;
#pragma unroll
  for (int i = 0; i < kMaxColumns / kBlockColumns; ++i) {
    const uint32_t out = shared.out + place.group * kOutBytes + i % kBuffers * kBlockBytes;
    if (place.thread == 0) WaitStoresRead<kBuffers - 1>();
    place.SyncGroup();
#pragma unroll
    for (int j = 0; j < kBlockColumns / 16; ++j) {
      const int piece = j * 2 + place.lane / 16;
      StoreMatrices<false>(PieceAddress(out, 16 * place.warp + place.lane % 16, piece),
                           packed + kPackedStep * (i * kBlockColumns / 16 + j));
    }
    FenceAsync();
    place.SyncGroup();
    if (place.thread == 0) {
      Store(map, column + i * kBlockColumns, row, group, out);
      EndStores();
    }
  }
}

// Rows that belong to no group are zeros. By all multiplying threads of the grid.
__device__ __forceinline__ void WriteZeros(__nv_bfloat16* y, int64_t begin, int64_t end) {
  constexpr int kVector = sizeof(uint4) / sizeof(__nv_bfloat16);
  const int64_t thread = blockIdx.x * int64_t{128 * kMultipliers} + threadIdx.x - 128;
  const int64_t step = int64_t{gridDim.x} * (128 * kMultipliers) * kVector;
  for (int64_t i = begin + thread * kVector; i < end; i += step) {
    *reinterpret_cast<uint4*>(y + i) = uint4{0, 0, 0, 0};
  }
}

__device__ __forceinline__ void WriteUnusedRows(const Params& p, int begin_row) {
  const int64_t begin = static_cast<int64_t>(begin_row) * p.features;
  const int64_t end = static_cast<int64_t>(p.groups.capacity) * p.features;
  WriteZeros(p.y, begin, end);
  if (p.saved[0] == nullptr) return;
  WriteZeros(p.saved[0], begin, end);
  WriteZeros(p.saved[1], begin, end);
}

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_RESULTS_CUH_

// The kernels of the grouped products and their launches.

#include <cuda_runtime.h>

#include "xla_ffi/gemm/kernel.cuh"
#include "xla_ffi/gemm/launch.h"
#include "xla_ffi/gemm/launch_kernel.cuh"
#include "xla_ffi/gemm/results.cuh"
#include "xla_ffi/gemm/tensor_map.h"

namespace jaxmoe::gemm {
namespace {

// Products of a tile's tokens, as wide as they are many.
template <bool kTransposedA>
__device__ __forceinline__ void MultiplyTokens(const Shared& shared, Ring* ring, int steps,
                                               int columns, uint32_t a, uint32_t b,
                                               float (&d)[kAccumulators]) {
#define JAXMOE_CASE(n)                                              \
  case n:                                                           \
    Multiply<n, kTransposedA, false>(shared, ring, steps, a, b, d); \
    break;
  switch (columns) {
    JAXMOE_CASE(16)
    JAXMOE_CASE(32)
    JAXMOE_CASE(48)
    JAXMOE_CASE(64)
    JAXMOE_CASE(80)
    JAXMOE_CASE(96)
    JAXMOE_CASE(112)
    JAXMOE_CASE(128)
    JAXMOE_CASE(144)
    JAXMOE_CASE(160)
    JAXMOE_CASE(176)
    JAXMOE_CASE(192)
    JAXMOE_CASE(208)
    JAXMOE_CASE(224)
    JAXMOE_CASE(240)
    JAXMOE_CASE(256)
  }
#undef JAXMOE_CASE
}

template <int kCount>
__device__ __forceinline__ void ProductsOfRows(float (&d)[kAccumulators], uint32_t a, uint32_t b,
                                               int add) {
  BeginProducts();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    Product<kMaxColumns, true, true>::Do(d, a + i * kDepthStep<true>, b + i * kDepthStep<true>,
                                         i > 0 ? 1 : add);
  }
  EndProducts();
}

// The last step of a group whose rows are no multiple of kDepth: the loaded rows beyond the group
// are the next group's, or anything. Those that an instruction would read become zeros, in both
// factors, for they may hold NaN. Both warpgroups do so in B: they must not wait for each other.
__device__ __forceinline__ void MultiplyRest(const Shared& shared, const Place& place, Ring* ring,
                                             bool add, int rows, uint32_t a, uint32_t b,
                                             float (&d)[kAccumulators]) {
  Wait(shared.Full(ring->at), ring->parity);
  const int instructions = CeilDiv(rows, kInstructionDepth);
  const int extra = instructions * kInstructionDepth - rows;
  constexpr int kPieces = (1 + kMaxColumns / kBlockColumns) * (kRowBytes / 16);
  for (int i = place.thread; i < extra * kPieces; i += 128) {
    const int row = rows + i / kPieces, piece = i % kPieces;
    const int block = piece / (kRowBytes / 16);
    const uint32_t from = block == 0 ? shared.A(ring->at) + place.group * kBlockBytes
                                     : shared.B(ring->at) + (block - 1) * kBlockBytes;
    WriteShared(PieceAddress(from, row, piece % (kRowBytes / 16)), uint4{0, 0, 0, 0});
  }
  FenceAsync();
  place.SyncGroup();
  const uint32_t stage = ring->at * DescriptorStep(shared.stage_bytes);
  switch (instructions) {
    case 1:
      ProductsOfRows<1>(d, a + stage, b + stage, add);
      break;
    case 2:
      ProductsOfRows<2>(d, a + stage, b + stage, add);
      break;
    case 3:
      ProductsOfRows<3>(d, a + stage, b + stage, add);
      break;
    case 4:
      ProductsOfRows<4>(d, a + stage, b + stage, add);
      break;
  }
  WaitProducts<0>();
  Release(shared, ring->at);
  ring->Next();
}

__device__ __forceinline__ void MultiplyRows(const Shared& shared, const Place& place, Ring* ring,
                                             int rows, uint32_t a, uint32_t b,
                                             float (&d)[kAccumulators]) {
  const int whole = rows / kDepth, rest = rows % kDepth;
  if (whole > 0) Multiply<kMaxColumns, true, true>(shared, ring, whole, a, b, d);
  if (rest > 0) MultiplyRest(shared, place, ring, whole > 0, rest, a, b, d);
}

// The multiplying warpgroups: each has 64 of the block's features, and all columns.
template <Op kOp>
__device__ __forceinline__ void MultiplyTiles(const Params& p, const Shared& shared) {
  ToldTiles tiles(shared);
  const Place place;
  constexpr bool kFromRows = kOp == Op::kWeightGrad;
  constexpr bool kTransposedA = !kIsInputGrad<kOp>;
  const uint32_t a = Descriptor(shared.A(0) + place.group * kBlockBytes);
  const uint32_t b = Descriptor(shared.B(0));
  Ring ring(p.stages.num);
  Tile tile;
  float d[kAccumulators];
  uint32_t packed[kPacked];
  while (tiles.Next(&tile)) {
    if constexpr (kFromRows) {
      MultiplyRows(shared, place, &ring, tile.rows, a, b, d);
    } else {
      MultiplyTokens<kTransposedA>(shared, &ring, StepsOf<kOp>(p, tile), ColumnsOf(tile.rows), a, b,
                                   d);
    }
    TakeResults(d);
    Pack(d, packed);
    if (kFromRows && tile.rows == 0) {
#pragma unroll
      for (int i = 0; i < kPacked; ++i) packed[i] = 0;
    }
    const int feature = FeatureOf<kOp>(tile);
    if constexpr (kFromRows) {
      WriteGradient(shared, place, packed, p.out, tile.minor * kMaxColumns,
                    feature + place.group * 64, tile.group);
    } else if constexpr (kOp == Op::kSwiglu) {
      if (p.saved[0] != nullptr) {
        WriteAllTokens(shared, place, packed, tile, p.saved[place.group], feature, p.features);
      }
      WriteSwiglu(shared, place, packed, tile, p.y, feature, p.features);
    } else {
      WriteAllTokens(shared, place, packed, tile, p.y, feature + place.group * 64, p.features);
    }
  }
  if constexpr (kFromRows) {
    if (place.thread == 0) WaitStores();
  } else {
    WriteUnusedRows(p, tile.row);
  }
}

template <Op kOp>
__global__ void __launch_bounds__(kThreads, 1) GroupedProduct(const __grid_constant__ Params p) {
  const Shared shared(SharedMemory(), p.stages);
  BeginBlock(shared);
  if (IsFeeder()) {
    FeedBlock<kOp>(p, shared);
  } else {
    TakeRegisters<kTakenRegisters>();
    MultiplyTiles<kOp>(p, shared);
  }
  EndBlock();
}

}  // namespace

cudaError_t LaunchForward(const Target& t, const Shape& s, const void* x, const void* w,
                          const int32_t* group_sizes, void* y) {
  Params p = MakeParams(t, s, group_sizes, y, s.features, kFeatures, s.dim);
  const cudaError_t error = First({Describe(w, {s.features, s.dim, s.num_groups}, kDepth, &p.a),
                                   Describe(x, {s.dim, s.num_rows}, kLoadRows, &p.b)});
  return error != cudaSuccess ? error : Launch(GroupedProduct<Op::kForward>, t, p);
}

cudaError_t LaunchInputGrad(const Target& t, const Shape& s, const void* d_y, const void* w,
                            const int32_t* group_sizes, void* d_x) {
  Params p = MakeParams(t, s, group_sizes, d_x, s.dim, kFeatures, s.features);
  const cudaError_t error = First({Describe(w, {s.features, s.dim, s.num_groups}, kFeatures, &p.a),
                                   Describe(d_y, {s.features, s.num_rows}, kLoadRows, &p.b)});
  return error != cudaSuccess ? error : Launch(GroupedProduct<Op::kInputGrad>, t, p);
}

cudaError_t LaunchInputGradOfTwo(const Target& t, const Shape& s, const void* d_y, const void* w,
                                 const void* d_y2, const void* w2, const int32_t* group_sizes,
                                 void* d_x) {
  Params p = MakeParams(t, s, group_sizes, d_x, s.dim, kFeatures, s.features);
  const cudaError_t error =
      First({Describe(w, {s.features, s.dim, s.num_groups}, kFeatures, &p.a),
             Describe(w2, {s.features, s.dim, s.num_groups}, kFeatures, &p.a2),
             Describe(d_y, {s.features, s.num_rows}, kLoadRows, &p.b),
             Describe(d_y2, {s.features, s.num_rows}, kLoadRows, &p.b2)});
  return error != cudaSuccess ? error : Launch(GroupedProduct<Op::kInputGradOfTwo>, t, p);
}

cudaError_t LaunchWeightGrad(const Target& t, const Shape& s, const void* x, const void* d_y,
                             const int32_t* group_sizes, void* d_w) {
  Params p = MakeParams(t, s, group_sizes, nullptr, s.dim, kFeatures, 0);
  p.num_minor = CeilDiv(static_cast<int>(s.features), kMaxColumns);
  p.stages = kStages;
  const cudaError_t error =
      First({Describe(x, {s.dim, s.num_rows}, kDepth, &p.a),
             Describe(d_y, {s.features, s.num_rows}, kDepth, &p.b),
             Describe(d_w, {s.features, s.dim, s.num_groups}, kBlockColumns, &p.out)});
  return error != cudaSuccess ? error : Launch(GroupedProduct<Op::kWeightGrad>, t, p);
}

cudaError_t LaunchSwiglu(const Target& t, const Shape& s, const void* x, const void* gate,
                         const void* up, const int32_t* group_sizes, void* y, void* a, void* b) {
  Params p = MakeParams(t, s, group_sizes, y, s.features, kFeatures / 2, s.dim);
  p.saved[0] = static_cast<__nv_bfloat16*>(a);
  p.saved[1] = static_cast<__nv_bfloat16*>(b);
  const cudaError_t error = First({Describe(gate, {s.features, s.dim, s.num_groups}, kDepth, &p.a),
                                   Describe(up, {s.features, s.dim, s.num_groups}, kDepth, &p.a2),
                                   Describe(x, {s.dim, s.num_rows}, kLoadRows, &p.b)});
  return error != cudaSuccess ? error : Launch(GroupedProduct<Op::kSwiglu>, t, p);
}

cudaError_t Preload() {
  return First({Prepare(GroupedProduct<Op::kForward>), Prepare(GroupedProduct<Op::kInputGrad>),
                Prepare(GroupedProduct<Op::kInputGradOfTwo>),
                Prepare(GroupedProduct<Op::kWeightGrad>), Prepare(GroupedProduct<Op::kSwiglu>)});
}

}  // namespace jaxmoe::gemm

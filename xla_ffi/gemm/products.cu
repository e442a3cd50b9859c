// The kernels of the grouped products and their launches.

#include <cuda_runtime.h>

#include <initializer_list>

#include "xla_ffi/gemm/kernel.cuh"
#include "xla_ffi/gemm/launch.h"
#include "xla_ffi/gemm/results.cuh"
#include "xla_ffi/gemm/tensor_map.h"

namespace jaxmoe::gemm {
namespace {

// Products of a tile's tokens, as wide as they are many.
template <bool kTransposedA>
__device__ __forceinline__ void MultiplyTokens(const Shared& shared, Ring<kStages>* ring, int steps,
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

// The last step of a group whose rows are no multiple of kDepth: the loaded rows beyond the group
// are the next group's, or anything. Those that an instruction would read become zeros, in both
// factors, for they may hold NaN. Both warpgroups do so in B: they must not wait for each other.
__device__ __forceinline__ void MultiplyRest(const Shared& shared, const Place& place,
                                             Ring<kStages>* ring, int rows, bool add, uint32_t a,
                                             uint32_t b, float (&d)[kAccumulators]) {
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
  const uint32_t stage = ring->at * DescriptorStep(kStageBytes);
  for (int i = 0; i < instructions; ++i) {
    BeginProducts();
    Product<kMaxColumns, true, true>::Do(d, a + stage + i * kDepthStep<true>,
                                         b + stage + i * kDepthStep<true>, add || i > 0);
  }
  EndProducts();
  WaitProducts<0>();
  TakeResults(d);
  Release(shared, ring->at);
  ring->Next();
}

__device__ __forceinline__ void MultiplyRows(const Shared& shared, const Place& place,
                                             Ring<kStages>* ring, int rows, uint32_t a, uint32_t b,
                                             float (&d)[kAccumulators]) {
  const int whole = rows / kDepth, rest = rows % kDepth;
  if (rows == 0) {
#pragma unroll
    for (int i = 0; i < kAccumulators; ++i) d[i] = 0;
  }
  if (whole > 0) Multiply<kMaxColumns, true, true>(shared, ring, whole, a, b, d);
  if (rest > 0) MultiplyRest(shared, place, ring, rest, whole > 0, a, b, d);
}

// The multiplying warpgroups: each has 64 of the block's features, and all columns.
template <Op kOp>
__device__ void MultiplyTiles(const Params& p, const Shared& shared, Schedule<kOp>* schedule) {
  const Place place;
  constexpr bool kFromRows = kOp == Op::kWeightGrad;
  constexpr bool kTransposedA = kOp != Op::kInputGrad;
  const uint32_t a = Descriptor(shared.A(0) + place.group * kBlockBytes);
  const uint32_t b = Descriptor(shared.B(0));
  Ring<kStages> ring;
  Tile tile;
  float d[kAccumulators];
  uint32_t packed[kPacked];
  while (schedule->Next(&tile)) {
    if constexpr (kFromRows) {
      MultiplyRows(shared, place, &ring, tile.rows, a, b, d);
    } else {
      MultiplyTokens<kTransposedA>(shared, &ring, StepsOf<kOp>(p, tile), ColumnsOf(tile.rows), a, b,
                                   d);
    }
    Pack(d, packed);
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
    const int64_t begin = static_cast<int64_t>(schedule->RowsEnd()) * p.features;
    const int64_t end = static_cast<int64_t>(p.groups.capacity) * p.features;
    WriteZeros(p.y, begin, end);
    if constexpr (kOp == Op::kSwiglu) {
      if (p.saved[0] != nullptr) {
        WriteZeros(p.saved[0], begin, end);
        WriteZeros(p.saved[1], begin, end);
      }
    }
  }
}

__device__ __forceinline__ void InitBarriers(const Shared& shared) {
  for (int i = 0; i < kStages; ++i) {
    InitBarrier(shared.Full(i), 1);
    InitBarrier(shared.Empty(i), kMultiplierWarps * kCluster);
  }
  for (int i = 0; i < kSlots; ++i) {
    InitBarrier(shared.SlotFull(i), 1);
    InitBarrier(shared.SlotEmpty(i), (kMultiplierWarps + 1) * kCluster);
  }
  FenceInit();
}

template <Op kOp>
__global__ void __launch_bounds__(kThreads, 1) GroupedProduct(const __grid_constant__ Params p) {
  const Shared shared(SharedMemory());
  if (threadIdx.x == 0) InitBarriers(shared);
  SyncCluster();
  Schedule<kOp> schedule(p, shared);
  if (threadIdx.x < 128) {
    GiveRegisters<kGivenRegisters>();
    const int warp = threadIdx.x / 32;
    if (warp == 0) Feed<kOp>(p, shared, &schedule);
    if (warp == 1 && RankInCluster() == 0) schedule.Run(p.counter);
  } else {
    TakeRegisters<kTakenRegisters>();
    MultiplyTiles<kOp>(p, shared, &schedule);
  }
  // Others may still write to this block's memory.
  __syncwarp();
  SyncCluster();
}

template <Op kOp>
cudaError_t Prepare() {
  return cudaFuncSetAttribute(GroupedProduct<kOp>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              kSharedBytes);
}

template <Op kOp>
cudaError_t Launch(cudaStream_t stream, int num_sms, const Params& params) {
  cudaError_t error = Prepare<kOp>();
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(params.counter, 0, sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_sms / kCluster * kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, GroupedProduct<kOp>, params);
}

// Params without the tensors: `width` features of the result in tiles of `tile_width` per block.
Params MakeParams(const Shape& shape, const int32_t* group_sizes, int32_t* counter, void* y,
                  int64_t width, int tile_width, int64_t depth) {
  Params p = {};
  p.y = static_cast<__nv_bfloat16*>(y);
  p.counter = counter;
  p.groups = {group_sizes, static_cast<int>(shape.num_groups), static_cast<int>(shape.num_rows)};
  p.features = static_cast<int>(width);
  p.depth = static_cast<int>(depth);
  p.num_major = CeilDiv(p.features, tile_width * kCluster);
  p.num_minor = 1;
  return p;
}

// The first of several calls that failed.
cudaError_t First(std::initializer_list<cudaError_t> errors) {
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t LaunchForward(cudaStream_t stream, int num_sms, const Shape& s, const void* x,
                          const void* w, const int32_t* group_sizes, void* y, int32_t* counter) {
  Params p = MakeParams(s, group_sizes, counter, y, s.features, kFeatures, s.dim);
  const cudaError_t error = First({Describe(w, {s.features, s.dim, s.num_groups}, kDepth, &p.a),
                                   Describe(x, {s.dim, s.num_rows}, kLoadRows, &p.b)});
  return error != cudaSuccess ? error : Launch<Op::kForward>(stream, num_sms, p);
}

cudaError_t LaunchInputGrad(cudaStream_t stream, int num_sms, const Shape& s, const void* d_y,
                            const void* w, const int32_t* group_sizes, void* d_x,
                            int32_t* counter) {
  Params p = MakeParams(s, group_sizes, counter, d_x, s.dim, kFeatures, s.features);
  const cudaError_t error = First({Describe(w, {s.features, s.dim, s.num_groups}, kFeatures, &p.a),
                                   Describe(d_y, {s.features, s.num_rows}, kLoadRows, &p.b)});
  return error != cudaSuccess ? error : Launch<Op::kInputGrad>(stream, num_sms, p);
}

cudaError_t LaunchWeightGrad(cudaStream_t stream, int num_sms, const Shape& s, const void* x,
                             const void* d_y, const int32_t* group_sizes, void* d_w,
                             int32_t* counter) {
  Params p = MakeParams(s, group_sizes, counter, nullptr, s.dim, kFeatures, 0);
  p.num_minor = CeilDiv(static_cast<int>(s.features), kMaxColumns);
  const cudaError_t error =
      First({Describe(x, {s.dim, s.num_rows}, kDepth, &p.a),
             Describe(d_y, {s.features, s.num_rows}, kDepth, &p.b),
             Describe(d_w, {s.features, s.dim, s.num_groups}, kBlockColumns, &p.out)});
  return error != cudaSuccess ? error : Launch<Op::kWeightGrad>(stream, num_sms, p);
}

cudaError_t LaunchSwiglu(cudaStream_t stream, int num_sms, const Shape& s, const void* x,
                         const void* gate, const void* up, const int32_t* group_sizes, void* y,
                         void* a, void* b, int32_t* counter) {
  Params p = MakeParams(s, group_sizes, counter, y, s.features, kFeatures / 2, s.dim);
  p.saved[0] = static_cast<__nv_bfloat16*>(a);
  p.saved[1] = static_cast<__nv_bfloat16*>(b);
  const cudaError_t error = First({Describe(gate, {s.features, s.dim, s.num_groups}, kDepth, &p.a),
                                   Describe(up, {s.features, s.dim, s.num_groups}, kDepth, &p.a2),
                                   Describe(x, {s.dim, s.num_rows}, kLoadRows, &p.b)});
  return error != cudaSuccess ? error : Launch<Op::kSwiglu>(stream, num_sms, p);
}

cudaError_t Preload() {
  return First({Prepare<Op::kForward>(), Prepare<Op::kInputGrad>(), Prepare<Op::kWeightGrad>(),
                Prepare<Op::kSwiglu>()});
}

}  // namespace jaxmoe::gemm

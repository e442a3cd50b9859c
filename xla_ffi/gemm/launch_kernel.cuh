// What all kernels begin and end with, and their launch.

#ifndef JAXMOE_XLA_FFI_GEMM_LAUNCH_KERNEL_CUH_
#define JAXMOE_XLA_FFI_GEMM_LAUNCH_KERNEL_CUH_

#include <cuda_runtime.h>

#include <initializer_list>

#include "xla_ffi/gemm/kernel.cuh"
#include "xla_ffi/gemm/launch.h"
#include "xla_ffi/gemm/tensor_map.h"

namespace jaxmoe::gemm {

__device__ __forceinline__ void InitBarriers(const Shared& shared) {
  for (int i = 0; i < kMaxStages; ++i) {
    InitBarrier(shared.Full(i), 1);
    InitBarrier(shared.Empty(i), kMultiplierWarps * kCluster);
  }
  for (int i = 0; i < kSlots; ++i) {
    InitBarrier(shared.SlotFull(i), 1);
    InitBarrier(shared.SlotEmpty(i), kMultiplierWarps);
  }
  for (int i = 0; i < kNumberSlots; ++i) {
    InitBarrier(shared.NumberFull(i), 1);
    InitBarrier(shared.NumberEmpty(i), max(kCluster - 1, 1));
  }
  FenceInit();
}

// What a block begins with; then its first warpgroup feeds, the others multiply, and all end it.
__device__ __forceinline__ void BeginBlock(const Shared& shared) {
  if (threadIdx.x == 0) InitBarriers(shared);
  SyncCluster();
}
__device__ __forceinline__ bool IsFeeder() { return threadIdx.x < 128; }

template <Op kOp>
__device__ __forceinline__ void FeedBlock(const Params& p, const Shared& shared) {
  GiveRegisters<kGivenRegisters>();
  if (threadIdx.x >= 32) return;
  Schedule<kOp> schedule(p, shared);
  Feed<kOp>(p, shared, &schedule);
}

// Others may still write to this block's memory.
__device__ __forceinline__ void EndBlock() {
  __syncwarp();
  SyncCluster();
}

using Kernel = void (*)(Params);

// Of a kernel, before its first launch.
inline cudaError_t Prepare(Kernel kernel) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
}

inline cudaError_t Launch(Kernel kernel, const Target& target, const Params& params) {
  cudaError_t error = Prepare(kernel);
  if (error == cudaSuccess && params.claims != nullptr) {
    error = cudaMemsetAsync(params.claims, 0, sizeof(*params.claims), target.stream);
  }
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(target.num_sms / kCluster * kCluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = target.stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// Rows of a group, on average, up to which products take more stages of fewer rows.
constexpr int kFewRowsOfGroup = 16;

// Params without the tensors: `width` features of the result in tiles of `tile_width` per block.
inline Params MakeParams(const Target& target, const Shape& shape, const int32_t* group_sizes,
                         void* y, int64_t width, int tile_width, int64_t depth) {
  Params p = {};
  p.y = static_cast<__nv_bfloat16*>(y);
  p.groups = {group_sizes, static_cast<int>(shape.num_groups), static_cast<int>(shape.num_rows)};
  p.features = static_cast<int>(width);
  p.depth = static_cast<int>(depth);
  p.num_major = CeilDiv(p.features, tile_width * kCluster);
  p.num_minor = 1;
  // A group may have more rows than the average: then its weights are read more than once.
  const bool few = shape.num_rows <= kFewRowsOfGroup * shape.num_groups;
  p.stages = few ? kMoreStages : kStages;
  p.tallest = p.stages.rows;
  // Setting the counter to zero takes longer than such a product could gain.
  p.claims = few ? nullptr : target.claims;
  return p;
}

// The first of several calls that failed.
inline cudaError_t First(std::initializer_list<cudaError_t> errors) {
  for (const cudaError_t error : errors) {
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_LAUNCH_KERNEL_CUH_

// The words of CUDA that xla_ffi/gemm uses, for a host compiler and the emulated GPU.

#ifndef JAXMOE_XLA_FFI_TESTS_EMULATED_CUDA_H_
#define JAXMOE_XLA_FFI_TESTS_EMULATED_CUDA_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "xla_ffi/tests/emulated/gpu.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using std::max;
using std::min;

// Types.

struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 value) {
  return {__bfloat162float(value.x), __bfloat162float(value.y)};
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

// A thread's place.

inline struct {
  struct {
    operator unsigned() const { return jaxmoe::emulated::Gpu::Current().Self().thread; }
  } x;
} threadIdx;
inline struct {
  struct {
    operator unsigned() const { return jaxmoe::emulated::Gpu::Current().Self().block_id; }
  } x;
} blockIdx;
inline struct {
  struct {
    operator unsigned() const { return jaxmoe::emulated::Gpu::Current().num_blocks(); }
  } x;
} gridDim;

// Within a warp.

inline void __syncwarp() {
  auto& gpu = jaxmoe::emulated::Gpu::Current();
  gpu.Meet(&gpu.Self().warp->meeting, jaxmoe::emulated::kWarpLanes);
}
// `take` of the values that all lanes give.
template <typename Take>
auto ExchangeInWarp(uint32_t value, Take take) {
  auto& self = jaxmoe::emulated::Gpu::Current().Self();
  self.warp->values[self.thread % jaxmoe::emulated::kWarpLanes] = value;
  __syncwarp();
  const auto taken = take(self.warp->values);
  __syncwarp();
  return taken;
}
inline int __shfl_sync(uint32_t, int value, int lane) {
  return ExchangeInWarp(value, [=](const uint32_t* values) { return int(values[lane]); });
}
inline int __shfl_up_sync(uint32_t, int value, int distance) {
  const int lane = threadIdx.x % jaxmoe::emulated::kWarpLanes;
  return __shfl_sync(0, value, lane < distance ? lane : lane - distance);
}
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  return ExchangeInWarp(vote, [](const uint32_t* values) {
    uint32_t votes = 0;
    for (int lane = 0; lane < jaxmoe::emulated::kWarpLanes; ++lane) votes |= values[lane] << lane;
    return votes;
  });
}
inline int __clz(uint32_t value) { return value == 0 ? 32 : __builtin_clz(value); }
template <typename T>
T __ldg(const T* p) {
  return *p;
}

inline int atomicAdd(int* p, int value) {
  const int before = *p;
  *p += value;
  jaxmoe::emulated::Gpu::Current().Yield();
  return before;
}

// Host interface.

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorSymbolNotFound };
using cudaStream_t = void*;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeClusterDimension };

struct dim3 {
  unsigned x;
  dim3(unsigned size = 1) : x(size) {}  // NOLINT: as the real one
};
struct cudaLaunchAttribute {
  int id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  int numAttrs;
};

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int bytes) {
  return bytes <= static_cast<int>(jaxmoe::emulated::kSharedBytes) ? cudaSuccess
                                                                   : cudaErrorInvalidValue;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
template <typename Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params),
                               const Params& params) {
  static uint32_t seed = 0;
  jaxmoe::emulated::Gpu gpu(config->gridDim.x, config->attrs[0].val.clusterDim.x,
                            config->blockDim.x, seed++);
  gpu.Run([&] { kernel(params); });
  return cudaSuccess;
}

// Tensor maps.

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS, CUDA_ERROR_INVALID_VALUE };
// With their sizes in bytes for values.
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_UINT8 = 1,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 2,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32 = 4
};
enum { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct CUtensorMap {
  char* data;
  cuuint32_t rank;
  cuuint64_t dims[3], strides[2];  // in bytes, of all dimensions but the first
  cuuint32_t box[3];
  cuuint32_t bytes;  // of an element
  bool swizzled;
};

// With the limits of the real one.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                       void* data, const cuuint64_t* dims,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t*, int, CUtensorMapSwizzle swizzle, int,
                                       int) {
  bool fits = rank >= 1 && rank <= 3 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
  *map = {static_cast<char*>(data),
          rank,
          {1, 1, 1},
          {0, 0},
          {1, 1, 1},
          static_cast<cuuint32_t>(type),
          swizzle == CU_TENSOR_MAP_SWIZZLE_128B};
  for (cuuint32_t i = 0; i < rank; ++i) {
    map->dims[i] = dims[i];
    map->box[i] = box[i];
    fits &= dims[i] >= 1 && dims[i] <= cuuint64_t{1} << 32 && box[i] >= 1 && box[i] <= 256;
    if (i + 1 == rank) break;
    map->strides[i] = strides[i];
    fits &= strides[i] % 16 == 0 && strides[i] < cuuint64_t{1} << 40;
  }
  fits &= !map->swizzled || box[0] * map->bytes == 128;
  return fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

#define CUDART_VERSION 13000
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

#endif  // JAXMOE_XLA_FFI_TESTS_EMULATED_CUDA_H_

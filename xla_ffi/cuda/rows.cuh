// Rows as 16-byte vectors: moving them, and arithmetic in float32 on bf16, f16 or f32 elements.

#ifndef JAXMOE_XLA_FFI_CUDA_ROWS_CUH_
#define JAXMOE_XLA_FFI_CUDA_ROWS_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace jaxmoe::cuda {

// Elements of one dtype in a 16-byte vector.
template <typename T>
struct Vector {
  static constexpr int kSize = 16 / sizeof(T);

  __device__ static float ToFloat(float v) { return v; }
  __device__ static float ToFloat(__half v) { return __half2float(v); }
  __device__ static float ToFloat(__nv_bfloat16 v) { return __bfloat162float(v); }
  __device__ static void FromFloat(float v, float* out) { *out = v; }
  __device__ static void FromFloat(float v, __half* out) { *out = __float2half_rn(v); }
  __device__ static void FromFloat(float v, __nv_bfloat16* out) { *out = __float2bfloat16_rn(v); }

  // sum += weight * v, product and sum rounded each, as the reference does.
  __device__ static void AddScaled(uint4 v, float weight, float* sum) {
    const T* in = reinterpret_cast<const T*>(&v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      sum[i] = __fadd_rn(sum[i], __fmul_rn(weight, ToFloat(in[i])));
    }
  }
  __device__ static void Add(uint4 v, float* sum) {
    const T* in = reinterpret_cast<const T*>(&v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum[i] = __fadd_rn(sum[i], ToFloat(in[i]));
  }
  __device__ static uint4 Round(const float* sum) {
    uint4 v;
    T* out = reinterpret_cast<T*>(&v);
#pragma unroll
    for (int i = 0; i < kSize; ++i) FromFloat(sum[i], &out[i]);
    return v;
  }
  __device__ static uint4 Scale(uint4 v, float weight) {
    const T* in = reinterpret_cast<const T*>(&v);
    float product[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) product[i] = __fmul_rn(weight, ToFloat(in[i]));
    return Round(product);
  }
  __device__ static float Dot(uint4 a, uint4 b) {
    const T* x = reinterpret_cast<const T*>(&a);
    const T* y = reinterpret_cast<const T*>(&b);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSize; ++i) sum = fmaf(ToFloat(x[i]), ToFloat(y[i]), sum);
    return sum;
  }
};

__device__ __forceinline__ const uint4* AsVectors(const char* p) {
  return reinterpret_cast<const uint4*>(p);
}
__device__ __forceinline__ uint4* AsVectors(char* p) { return reinterpret_cast<uint4*>(p); }

// Stores that nobody reads soon.
__device__ __forceinline__ void StoreStreaming(uint4* p, const uint4& v) { __stcs(p, v); }

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_ROWS_CUH_

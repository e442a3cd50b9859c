// What the parts of grouped.cu share: problems with drawn sizes of groups, operands on the GPU,
// errors, and timing.

#ifndef JAXMOE_BENCHMARKS_CUDA_GROUPED_CALLS_H_
#define JAXMOE_BENCHMARKS_CUDA_GROUPED_CALLS_H_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "xla_ffi/gemm/launch.h"

namespace jaxmoe::gemm {

using Bf16 = __nv_bfloat16;
constexpr int kCalls = 10;

inline void Check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::printf("CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

__device__ inline float Hash(int64_t i, uint32_t seed) {  // -0.5 to 0.5
  uint32_t h = static_cast<uint32_t>(i * 2654435761u) ^ (seed * 0x9e3779b9u) ^
               static_cast<uint32_t>(i >> 32);
  h ^= h >> 16, h *= 0x85ebca6bu, h ^= h >> 13, h *= 0xc2b2ae35u, h ^= h >> 16;
  return h * 0x1p-32f - 0.5f;
}
// Values of variance 1 from a hash of the place.
static __global__ void Fill(Bf16* data, int64_t n, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    data[i] = __float2bfloat16(Hash(i, seed) * 3.4641f * scale);
  }
}

struct Problem {
  Shape shape;
  std::vector<int32_t> sizes;
};

template <typename T>
T* Allocate(int64_t n, int byte) {
  void* p = nullptr;
  Check(cudaMalloc(&p, n * sizeof(T)));
  Check(cudaMemset(p, byte, n * sizeof(T)));
  return static_cast<T*>(p);
}

inline Bf16* Random(int64_t n, uint32_t seed, float scale) {
  Bf16* p = Allocate<Bf16>(n, 0);
  Fill<<<1024, 256>>>(p, n, seed, scale);
  return p;
}

template <typename T>
std::vector<T> Raw(const T* p, int64_t n) {
  std::vector<T> values(n);
  Check(cudaMemcpy(values.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

inline std::vector<float> ToHost(const Bf16* p, int64_t n) {
  std::vector<Bf16> raw(n);
  Check(cudaMemcpy(raw.data(), p, n * sizeof(Bf16), cudaMemcpyDeviceToHost));
  std::vector<float> values(n);
  for (int64_t i = 0; i < n; ++i) values[i] = __bfloat162float(raw[i]);
  return values;
}

// Largest |got - want| / (|want| + 1); infinite for NaN.
struct Worst {
  double error = 0;
  void Add(double got, double want) {
    const double e = std::abs(got - want) / (std::abs(want) + 1);
    error = e <= error ? error : std::isnan(e) ? INFINITY : e;
  }
};

inline std::vector<int32_t> Dirichlet(int64_t rows, int64_t num_groups, uint32_t seed) {
  std::mt19937 rng(seed);
  std::gamma_distribution<double> gamma(20);
  std::vector<double> share(num_groups);
  double sum = 0;
  for (double& v : share) sum += v = gamma(rng);
  std::vector<int32_t> sizes;
  double before = 0;
  for (const double v : share) {
    const double after = before + v / sum * rows;
    sizes.push_back(static_cast<int32_t>(std::lround(after) - std::lround(before)));
    before = after;
  }
  return sizes;
}

template <typename Launch>
double Microseconds(Launch launch) {
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin));
  Check(cudaEventCreate(&end));
  for (int i = 0; i < 3; ++i) Check(launch());
  Check(cudaEventRecord(begin));
  for (int i = 0; i < kCalls; ++i) Check(launch());
  Check(cudaEventRecord(end));
  Check(cudaEventSynchronize(end));
  float ms = 0;
  Check(cudaEventElapsedTime(&ms, begin, end));
  return ms * 1e3 / kCalls;
}

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_BENCHMARKS_CUDA_GROUPED_CALLS_H_

// Checks the grouped products against plain ones, and times them, without JAX.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I. -o grouped \
//     benchmarks/cuda/grouped.cu xla_ffi/gemm/{products.cu,fp8.cu,tensor_map.cc}
//   ./grouped [check | time | check8 | time8 | beside]; 8: FP8
//
// A time is that of CUDA events around kCalls calls in a row, divided by their number; with
// `beside`, the median of single calls. Data are random (constant data draw less power and run
// faster), sizes of groups from Dirichlet(20).

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "benchmarks/cuda/grouped_calls.h"
#include "xla_ffi/gemm/launch.h"

using namespace jaxmoe::gemm;  // NOLINT: a program, not a header

namespace {

struct Arrays {
  Bf16 *x, *w, *w2, *y, *d_y, *d_x, *d_x2, *d_w, *h, *a, *b;
  int32_t* sizes;
};

// Results begin as NaN, and so do rows of the operands that belong to no group.
Arrays MakeArrays(const Problem& p, bool grads) {
  const Shape& s = p.shape;
  const int64_t rows = s.num_rows, weights = s.num_groups * s.dim * s.features;
  Arrays a = {};
  a.x = Random(rows * s.dim, 1, 1);
  a.w = Random(weights, 2, 1 / std::sqrt(static_cast<float>(s.dim)));
  a.y = Allocate<Bf16>(rows * s.features, 0xff);
  if (grads) {
    a.w2 = Random(weights, 3, 1 / std::sqrt(static_cast<float>(s.dim)));
    a.d_y = Random(rows * s.features, 4, 1);
    a.d_x = Allocate<Bf16>(rows * s.dim, 0xff);
    a.d_x2 = Allocate<Bf16>(rows * s.dim, 0xff);
    a.d_w = Allocate<Bf16>(weights, 0xff);
    a.h = Allocate<Bf16>(rows * s.features, 0xff);
    a.a = Allocate<Bf16>(rows * s.features, 0xff);
    a.b = Allocate<Bf16>(rows * s.features, 0xff);
  }
  int64_t used = 0;
  for (const int32_t size : p.sizes) used += size;
  Check(cudaMemset(a.x + used * s.dim, 0xff, (rows - used) * s.dim * sizeof(Bf16)));
  if (grads) {
    Check(cudaMemset(a.d_y + used * s.features, 0xff, (rows - used) * s.features * sizeof(Bf16)));
  }
  a.sizes = Allocate<int32_t>(s.num_groups, 0);
  Check(cudaMemcpy(a.sizes, p.sizes.data(), s.num_groups * 4, cudaMemcpyHostToDevice));
  return a;
}

void FreeArrays(const Arrays& a) {
  void* const all[] = {a.x, a.w, a.w2, a.y, a.d_y, a.d_x, a.d_x2, a.d_w, a.h, a.a, a.b, a.sizes};
  for (void* p : all) Check(cudaFree(p));
}

void CheckProblem(const char* name, const Problem& p, const Target& t) {
  const Shape& s = p.shape;
  const Arrays a = MakeArrays(p, true);
  for (int call = 0; call < 2; ++call) {  // the second finds what the first has left
    Check(LaunchForward(t, s, a.x, a.w, a.sizes, a.y));
    Check(LaunchInputGrad(t, s, a.d_y, a.w, a.sizes, a.d_x));
    Check(LaunchInputGradOfTwo(t, s, a.d_y, a.w, a.y, a.w2, a.sizes, a.d_x2));
    Check(LaunchWeightGrad(t, s, a.x, a.d_y, a.sizes, a.d_w));
    Check(LaunchSwiglu(t, s, a.x, a.w, a.w2, a.sizes, a.h, a.a, a.b));
  }
  Check(cudaDeviceSynchronize());
  const int64_t rows = s.num_rows, dim = s.dim, features = s.features;
  const int64_t weights = s.num_groups * dim * features;
  const auto x = ToHost(a.x, rows * dim), w = ToHost(a.w, weights), w2 = ToHost(a.w2, weights);
  const auto d_y = ToHost(a.d_y, rows * features), y = ToHost(a.y, rows * features);
  const auto d_x = ToHost(a.d_x, rows * dim), d_x2 = ToHost(a.d_x2, rows * dim);
  const auto d_w = ToHost(a.d_w, weights);
  const auto h = ToHost(a.h, rows * features), ga = ToHost(a.a, rows * features),
             gb = ToHost(a.b, rows * features);
  Worst forward, input, two, weight, swiglu, saved;
  int64_t begin = 0;
  for (int64_t g = 0; g < s.num_groups; ++g) {
    const int64_t end = begin + p.sizes[g];
    const float *wg = &w[g * dim * features], *wu = &w2[g * dim * features];
    std::vector<double> sum(features), sum2(features), total(dim * features);
    for (int64_t r = begin; r < end; ++r) {
      std::fill(sum.begin(), sum.end(), 0);
      std::fill(sum2.begin(), sum2.end(), 0);
      for (int64_t d = 0; d < dim; ++d) {
        const double v = x[r * dim + d];
        double back = 0, back2 = 0;
        for (int64_t f = 0; f < features; ++f) {
          sum[f] += v * wg[d * features + f];
          sum2[f] += v * wu[d * features + f];
          back += double{d_y[r * features + f]} * wg[d * features + f];
          back2 += double{y[r * features + f]} * wu[d * features + f];
          total[d * features + f] += v * d_y[r * features + f];
        }
        input.Add(d_x[r * dim + d], back);
        two.Add(d_x2[r * dim + d], back + back2);
      }
      for (int64_t f = 0; f < features; ++f) {
        forward.Add(y[r * features + f], sum[f]);
        saved.Add(ga[r * features + f], sum[f]);
        saved.Add(gb[r * features + f], sum2[f]);
        swiglu.Add(h[r * features + f], sum[f] / (1 + std::exp(-sum[f])) * sum2[f]);
      }
    }
    for (int64_t i = 0; i < dim * features; ++i) weight.Add(d_w[g * dim * features + i], total[i]);
    begin = end;
  }
  for (int64_t r = begin; r < rows; ++r) {
    for (int64_t d = 0; d < dim; ++d) {
      input.Add(d_x[r * dim + d] == 0 ? 0 : NAN, 0);
      two.Add(d_x2[r * dim + d] == 0 ? 0 : NAN, 0);
    }
    for (int64_t f = 0; f < features; ++f) {
      forward.Add(y[r * features + f] == 0 ? 0 : NAN, 0);
      swiglu.Add(h[r * features + f] == 0 ? 0 : NAN, 0);
      saved.Add(ga[r * features + f] == 0 && gb[r * features + f] == 0 ? 0 : NAN, 0);
    }
  }
  std::printf("%-12s %8.5f %8.5f %8.5f %8.5f %8.5f %8.5f\n", name, forward.error, input.error,
              two.error, weight.error, swiglu.error, saved.error);
  std::fflush(stdout);
  FreeArrays(a);
}

void TimeProblem(const Shape& s, const Target& t) {
  const Problem p = {s, Dirichlet(s.num_rows, s.num_groups, 7)};
  const Arrays a = MakeArrays(p, true);
  const double flops = 2.0 * s.num_rows * s.dim * s.features;
  const double weight_bytes = 2.0 * s.num_groups * s.dim * s.features;
  const auto report = [&](const char* name, double scale, double us) {
    std::printf("%7ld %5ld %5ld %4ld  %-9s %9.1f us %7.1f TFLOP/s  weights %6.0f GB/s\n",
                static_cast<long>(s.num_rows), static_cast<long>(s.dim),
                static_cast<long>(s.features), static_cast<long>(s.num_groups), name, us,
                scale * flops / us * 1e-6, scale * weight_bytes / us * 1e-3);
    std::fflush(stdout);
  };
  report("forward", 1, Microseconds([&] { return LaunchForward(t, s, a.x, a.w, a.sizes, a.y); }));
  report("d_x", 1, Microseconds([&] { return LaunchInputGrad(t, s, a.d_y, a.w, a.sizes, a.d_x); }));
  report("d_x of 2", 2, Microseconds([&] {
           return LaunchInputGradOfTwo(t, s, a.d_y, a.w, a.y, a.w2, a.sizes, a.d_x);
         }));
  report("d_w", 1,
         Microseconds([&] { return LaunchWeightGrad(t, s, a.x, a.d_y, a.sizes, a.d_w); }));
  if (s.features <= 2048) {
    report("swiglu", 2, Microseconds([&] {
             return LaunchSwiglu(t, s, a.x, a.w, a.w2, a.sizes, a.h, nullptr, nullptr);
           }));
    report("swiglu+ab", 2, Microseconds([&] {
             return LaunchSwiglu(t, s, a.x, a.w, a.w2, a.sizes, a.h, a.a, a.b);
           }));
  }
  FreeArrays(a);
}

// FP8 operands: values of variance 1 and scales about 1.
__global__ void FillFp8(__nv_fp8_e4m3* data, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    data[i] = __nv_fp8_e4m3(Hash(i, seed) * 3.4641f);
  }
}
__global__ void FillScales(float* data, int64_t n, uint32_t seed, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
       i += int64_t{gridDim.x} * blockDim.x) {
    data[i] = (1 + Hash(i, seed)) * scale;
  }
}

struct Fp8Arrays {
  __nv_fp8_e4m3 *x, *w;
  float *x_scales, *w_scales;
  Bf16* y;
  int32_t* sizes;
  int64_t blocks, feature_blocks;
};

template <typename T, typename... Args>
T* Filled(void (*fill)(T*, int64_t, Args...), int64_t n, Args... args) {
  T* data = Allocate<T>(n, 0);
  fill<<<1024, 256>>>(data, n, args...);
  return data;
}

Fp8Arrays MakeFp8(const Problem& p) {
  const Shape& s = p.shape;
  Fp8Arrays a = {};
  a.blocks = (s.dim + 127) / 128, a.feature_blocks = (s.features + 127) / 128;
  a.x = Filled(FillFp8, s.num_rows * s.dim, 1u);
  a.x_scales = Filled(FillScales, s.num_rows * a.blocks, 2u, 1.0f);
  a.w = Filled(FillFp8, s.num_groups * s.features * s.dim, 3u);
  a.w_scales = Filled(FillScales, s.num_groups * a.feature_blocks * a.blocks, 4u,
                      1 / std::sqrt(static_cast<float>(s.dim)));
  a.y = Allocate<Bf16>(s.num_rows * s.features, 0xff);
  a.sizes = Allocate<int32_t>(s.num_groups, 0);
  Check(cudaMemcpy(a.sizes, p.sizes.data(), s.num_groups * 4, cudaMemcpyHostToDevice));
  return a;
}

void FreeFp8(const Fp8Arrays& a) {
  void* const all[] = {a.x, a.w, a.x_scales, a.w_scales, a.y, a.sizes};
  for (void* p : all) Check(cudaFree(p));
}

cudaError_t Fp8Forward(const Shape& s, const Target& t, const Fp8Arrays& a) {
  return LaunchFp8Forward(t, s, a.x, a.x_scales, a.w, a.w_scales, a.sizes, a.y);
}

void CheckFp8(const char* name, const Problem& p, const Target& t) {
  const Shape& s = p.shape;
  const Fp8Arrays a = MakeFp8(p);
  for (int call = 0; call < 2; ++call) Check(Fp8Forward(s, t, a));
  Check(cudaDeviceSynchronize());
  const auto y = ToHost(a.y, s.num_rows * s.features);
  const auto raw_x = Raw(a.x, s.num_rows * s.dim);
  const auto raw_w = Raw(a.w, s.num_groups * s.features * s.dim);
  const std::vector<float> x(raw_x.begin(), raw_x.end()), w(raw_w.begin(), raw_w.end());
  const auto x_scales = Raw(a.x_scales, s.num_rows * a.blocks);
  const auto w_scales = Raw(a.w_scales, s.num_groups * a.feature_blocks * a.blocks);
  Worst forward;
  int64_t begin = 0;
  for (int64_t g = 0; g < s.num_groups; begin += p.sizes[g++]) {
    for (int64_t r = begin; r < begin + p.sizes[g]; ++r) {
      for (int64_t f = 0; f < s.features; ++f) {
        double sum = 0;
        for (int64_t d = 0; d < s.dim; ++d) {
          const double scale = double{x_scales[r * a.blocks + d / 128]} *
                               w_scales[(g * a.feature_blocks + f / 128) * a.blocks + d / 128];
          sum += scale * x[r * s.dim + d] * w[(g * s.features + f) * s.dim + d];
        }
        forward.Add(y[r * s.features + f], sum);
      }
    }
  }
  for (int64_t at = begin * s.features; at < s.num_rows * s.features; ++at) {
    forward.Add(y[at] == 0 ? 0 : NAN, 0);
  }
  std::printf("%-12s %8.5f FP8\n", name, forward.error);
  std::fflush(stdout);
  FreeFp8(a);
}

void TimeFp8(const Shape& s, const Target& t) {
  const Problem p = {s, Dirichlet(s.num_rows, s.num_groups, 7)};
  const Fp8Arrays a = MakeFp8(p);
  const double us = Microseconds([&] { return Fp8Forward(s, t, a); });
  std::printf("%7ld %5ld %5ld %4ld  %-9s %9.1f us %7.1f TFLOP/s  weights %6.0f GB/s\n",
              static_cast<long>(s.num_rows), static_cast<long>(s.dim),
              static_cast<long>(s.features), static_cast<long>(s.num_groups), "fp8", us,
              2e-6 * s.num_rows * s.dim * s.features / us,
              1e-3 * s.num_groups * s.dim * s.features / us);
  std::fflush(stdout);
  FreeFp8(a);
}

void TimeCopy() {
  constexpr int64_t kBytes = int64_t{4} << 30;
  char *from = Allocate<char>(kBytes, 1), *to = Allocate<char>(kBytes, 2);
  const double us =
      Microseconds([&] { return cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, 0); });
  std::printf("copy: %.0f GB/s read and written\n", 2 * kBytes / us * 1e-3);
  Check(cudaFree(from));
  Check(cudaFree(to));
}

// Holds a multiprocessor, as a collective does that waits for another device.
__global__ void Hold(int64_t nanoseconds) {
  int64_t begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    __nanosleep(200);
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}

// Of one call, while `held` multiprocessors are held for as long as the call takes by itself.
template <typename Launch>
double MicrosecondsBeside(Launch launch, int held, double us) {
  constexpr int kRepeats = 7, kHeldBytes = 100 << 10;
  Check(cudaFuncSetAttribute(Hold, cudaFuncAttributeMaxDynamicSharedMemorySize, kHeldBytes));
  cudaStream_t other;
  Check(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  cudaEvent_t begin, end;
  Check(cudaEventCreate(&begin));
  Check(cudaEventCreate(&end));
  std::vector<float> times(kRepeats);
  for (float& ms : times) {
    if (held > 0) Hold<<<held, 32, kHeldBytes, other>>>(static_cast<int64_t>(us * 1e3) + 20000);
    Hold<<<1, 32>>>(20000);  // until those are there
    Check(cudaEventRecord(begin));
    Check(launch());
    Check(cudaEventRecord(end));
    Check(cudaDeviceSynchronize());
    Check(cudaEventElapsedTime(&ms, begin, end));
  }
  Check(cudaStreamDestroy(other));
  std::sort(times.begin(), times.end());
  return times[kRepeats / 2] * 1e3;
}

// What a product loses when another kernel has some of the multiprocessors.
void TimeBeside(const Target& t) {
  const Shape s = {32768, 7168, 2048, 128};
  const Arrays a = MakeArrays({s, Dirichlet(s.num_rows, s.num_groups, 7)}, true);
  const Target given = {t.stream, t.num_sms, nullptr};
  std::printf("us of d_w alone, and while other kernels hold multiprocessors for as long\n");
  for (const Target& target : {given, t}) {
    const auto launch = [&] { return LaunchWeightGrad(target, s, a.x, a.d_y, a.sizes, a.d_w); };
    const double alone = MicrosecondsBeside(launch, 0, 0);
    std::printf("%-8s %9.1f", target.claims == nullptr ? "given" : "claimed", alone);
    for (const int held : {1, 8, 24})
      std::printf("  %d: %9.1f", held, MicrosecondsBeside(launch, held, alone));
    std::printf("\n");
  }
  FreeArrays(a);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  cudaDeviceProp device;
  Check(cudaGetDeviceProperties(&device, 0));
  const Target t = {0, device.multiProcessorCount, Allocate<int32_t>(1, 0xff)};
  const Target few = {0, 4, t.claims};
  std::printf("%s, %d multiprocessors\n", device.name, t.num_sms);
  if (what == "check" || what.empty()) {
    std::printf("largest |error| / (|value| + 1); bf16 rounds to %.5f\n", 0x1p-8);
    std::printf("             forward      d_x  d_x of 2      d_w   swiglu  x gate, x up\n");
    CheckProblem("one row", {{1, 8, 8, 1}, {1}}, t);
    CheckProblem("no rows", {{40, 64, 64, 2}, {0, 0}}, t);
    CheckProblem("even", {{512, 256, 256, 2}, {256, 256}}, t);
    CheckProblem("uneven", {{300, 72, 136, 5}, {0, 1, 200, 0, 17}}, t);
    CheckProblem("one huge", {{1100, 128, 200, 3}, {3, 1061, 0}}, t);
    CheckProblem("many", {{999, 264, 72, 70}, Dirichlet(950, 70, 1)}, t);
    CheckProblem("wide", {{600, 136, 520, 3}, Dirichlet(600, 3, 2)}, t);
    CheckProblem("few blocks", {{700, 200, 264, 6}, Dirichlet(650, 6, 3)}, few);
  }
  if (what == "check8" || what.empty()) {
    CheckFp8("one row", {{1, 16, 8, 1}, {1}}, t);
    CheckFp8("no rows", {{40, 64, 64, 2}, {0, 0}}, t);
    CheckFp8("even", {{512, 256, 256, 2}, {256, 256}}, t);
    CheckFp8("uneven", {{300, 144, 136, 5}, {0, 1, 200, 0, 17}}, t);
    CheckFp8("one huge", {{1100, 256, 200, 3}, {3, 1061, 0}}, t);
    CheckFp8("deep", {{200, 2048, 520, 3}, Dirichlet(190, 3, 2)}, t);
    CheckFp8("many", {{999, 272, 72, 70}, Dirichlet(950, 70, 1)}, t);
    CheckFp8("few blocks", {{700, 208, 264, 6}, Dirichlet(650, 6, 3)}, few);
  }
  if (what == "time" || what.empty()) {
    TimeCopy();
    TimeProblem({32768, 7168, 4096, 128}, t);
    TimeProblem({32768, 2048, 7168, 128}, t);
    TimeProblem({32768, 7168, 2048, 128}, t);
    TimeProblem({256, 7168, 4096, 128}, t);
    TimeProblem({256, 2048, 7168, 128}, t);
  }
  if (what == "time8" || what.empty()) {
    TimeFp8({32768, 7168, 4096, 128}, t);
    TimeFp8({32768, 2048, 7168, 128}, t);
    TimeFp8({32768, 7168, 2048, 128}, t);
    TimeFp8({256, 7168, 4096, 128}, t);
    TimeFp8({256, 2048, 7168, 128}, t);
  }
  if (what == "beside" || what.empty()) TimeBeside(t);
  return 0;
}

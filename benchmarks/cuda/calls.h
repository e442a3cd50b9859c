// What the benchmarks of the kernels share: operands on GPUs, two unless DEVICES is defined, drawn
// routings, and timing.

#ifndef JAXMOE_BENCHMARKS_CUDA_CALLS_H_
#define JAXMOE_BENCHMARKS_CUDA_CALLS_H_

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ffi/cuda/groups.h"

namespace jaxmoe::cuda {

#ifndef DEVICES
#define DEVICES 2
#endif
constexpr int kDevices = DEVICES;

struct Shape {
  int tokens, dim, top_k, experts;

  int num_local() const { return experts / kDevices; }
  double row_bytes() const { return dim * 2.0; }
};

inline void CheckCuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

// Device memory for one shape; freed together.
class Arena {
 public:
  ~Arena() {
    for (void* p : all_) cudaFree(p);
  }
  template <typename T>
  T* Zeros(size_t n) {
    void* p = nullptr;
    CheckCuda(cudaMalloc(&p, n * sizeof(T)));
    CheckCuda(cudaMemset(p, 0, n * sizeof(T)));
    all_.push_back(p);
    return static_cast<T*>(p);
  }
  template <typename T>
  T* Copy(const std::vector<T>& host) {
    T* p = Zeros<T>(host.size());
    CheckCuda(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
  }

 private:
  std::vector<void*> all_;
};

// K different experts for each token. The K smallest of -log(u) / p are a draw without replacement
// with probabilities in the ratio of p.
inline std::vector<int32_t> DrawIds(const Shape& s, const std::string& routing, std::mt19937* rng) {
  std::vector<double> inverse(s.experts, 1.0);
  for (int e = 0; e < s.experts; ++e) {
    if (routing == "zipf") inverse[e] = std::pow(e + 1, 1.2);
    if (routing == "hot" && e == 0) inverse[e] = 0.0;
  }
  std::uniform_real_distribution<double> uniform(1e-12, 1.0);
  std::vector<std::pair<double, int32_t>> keys(s.experts);
  std::vector<int32_t> ids;
  for (int t = 0; t < s.tokens; ++t) {
    for (int e = 0; e < s.experts; ++e) keys[e] = {-std::log(uniform(*rng)) * inverse[e], e};
    std::partial_sort(keys.begin(), keys.begin() + s.top_k, keys.end());
    for (int k = 0; k < s.top_k; ++k) ids.push_back(keys[k].second);
  }
  return ids;
}

using Launch = std::function<void(int device)>;

// Microseconds of one call on the slowest device: each device replays a CUDA graph of `num_calls`
// calls between two events; the median of `num_replays` replays.
inline double Time(const std::vector<cudaStream_t>& streams, int num_calls, int num_replays,
                   const Launch& launch) {
  cudaEvent_t begin[kDevices], end[kDevices];
  cudaGraphExec_t graphs[kDevices];
  for (int d = 0; d < kDevices; ++d) {
    CheckCuda(cudaSetDevice(d));
    CheckCuda(cudaEventCreate(&begin[d]));
    CheckCuda(cudaEventCreate(&end[d]));
    CheckCuda(cudaStreamBeginCapture(streams[d], cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < num_calls; ++i) launch(d);
    cudaGraph_t graph;
    CheckCuda(cudaStreamEndCapture(streams[d], &graph));
    CheckCuda(cudaGraphInstantiate(&graphs[d], graph, 0));
    CheckCuda(cudaGraphDestroy(graph));
    CheckCuda(cudaGraphUpload(graphs[d], streams[d]));
  }
  std::vector<double> times;
  for (int replay = -1; replay < num_replays; ++replay) {  // one to warm up
    for (int d = 0; d < kDevices; ++d) {
      CheckCuda(cudaSetDevice(d));
      CheckCuda(cudaEventRecord(begin[d], streams[d]));
      CheckCuda(cudaGraphLaunch(graphs[d], streams[d]));
      CheckCuda(cudaEventRecord(end[d], streams[d]));
    }
    double worst = 0;
    for (int d = 0; d < kDevices; ++d) {
      CheckCuda(cudaSetDevice(d));
      CheckCuda(cudaStreamSynchronize(streams[d]));
      float ms = 0;
      CheckCuda(cudaEventElapsedTime(&ms, begin[d], end[d]));
      worst = std::max(worst, ms * 1e3 / num_calls);
    }
    if (replay >= 0) times.push_back(worst);
  }
  for (int d = 0; d < kDevices; ++d) {
    CheckCuda(cudaGraphExecDestroy(graphs[d]));
    CheckCuda(cudaEventDestroy(begin[d]));
    CheckCuda(cudaEventDestroy(end[d]));
  }
  std::sort(times.begin(), times.end());
  return times[num_replays / 2];
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_BENCHMARKS_CUDA_CALLS_H_

// Times the CUDA kernels on the GPUs of one machine, without JAX.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I. -o kernels \
//     benchmarks/cuda/kernels.cu xla_ffi/cuda/{dispatch.cu,combine.cu,groups.cc}
//   ./kernels [num_sms]
//
// Each figure is the time from CUDA events around 30 calls in a row, divided by 30, on the slower
// device. Routing is uniform, rows are bf16. "floor" is the time that the rows that cross the wire
// take at 371 GB/s.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "xla_ffi/cuda/groups.h"

using namespace jaxmoe::cuda;  // NOLINT: a program, not a header

namespace {

constexpr int kDevices = 2;
constexpr int kCalls = 30;
constexpr double kWireBytesPerUs = 371e3;
constexpr double kCapacityFactor = 1.05;

struct Shape {
  int tokens, dim, top_k, experts;
};
constexpr Shape kShapes[] = {{4096, 7168, 8, 256}, {8192, 7168, 8, 256}, {1024, 7168, 8, 256},
                             {4096, 2048, 8, 128}, {4096, 4096, 2, 8},   {128, 7168, 8, 256},
                             {8, 7168, 8, 256}};

void Check(cudaError_t error) {
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
    Check(cudaMalloc(&p, n * sizeof(T)));
    Check(cudaMemset(p, 0, n * sizeof(T)));
    all_.push_back(p);
    return static_cast<T*>(p);
  }
  template <typename T>
  T* Copy(const std::vector<T>& host) {
    T* p = Zeros<T>(host.size());
    Check(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
    return p;
  }

 private:
  std::vector<void*> all_;
};

struct Calls {
  DispatchArgs dispatch, combine_grad;
  CombineArgs combine, dispatch_grad;
};

std::vector<int32_t> UniformIds(const Shape& s, std::mt19937* rng) {
  std::vector<int32_t> order(s.experts), ids;
  for (int e = 0; e < s.experts; ++e) order[e] = e;
  for (int t = 0; t < s.tokens; ++t) {
    for (int k = 0; k < s.top_k; ++k) {
      std::swap(order[k], order[k + (*rng)() % (s.experts - k)]);
      ids.push_back(order[k]);
    }
  }
  return ids;
}

Calls MakeCalls(const Shape& s, int capacity, const std::vector<int32_t>& ids, Arena* arena) {
  const int local = s.experts / kDevices;
  const size_t row = size_t(s.dim) * 2, choices = size_t(s.tokens) * s.top_k;
  std::mt19937 rng(2);
  std::vector<uint16_t> x(size_t(s.tokens) * s.dim);
  for (uint16_t& v : x) v = 0x3f00 + (rng() & 0xff);  // bf16 from 0.5 to 1
  Calls c = {};
  DispatchArgs& d = c.dispatch;
  d.site = 1;
  d.tokens = reinterpret_cast<char*>(arena->Copy(x));
  d.rows = arena->Zeros<char>(capacity * row);
  d.row_weights = arena->Zeros<float>(capacity);
  d.plan = {arena->Zeros<int32_t>(local),
            arena->Zeros<int32_t>(1),
            arena->Zeros<int32_t>(1),
            arena->Zeros<int32_t>(1),
            arena->Zeros<int32_t>(kDevices * choices),
            arena->Zeros<int32_t>(capacity),
            arena->Zeros<int32_t>(choices)};
  d.expert_ids = arena->Copy(ids);
  d.weights = arena->Copy(std::vector<float>(choices, 0.125f));
  c.combine.site = 2;
  c.combine.rows = d.rows;
  c.combine.row_weights = d.row_weights;
  c.combine.row_map = d.plan.row_map;
  c.combine.tokens = arena->Zeros<char>(s.tokens * row);
  c.dispatch_grad = c.combine;
  c.dispatch_grad.row_weights = nullptr;
  c.dispatch_grad.row_values = d.row_weights;
  c.dispatch_grad.choice_device = d.plan.choice_device;
  c.dispatch_grad.choice_values = arena->Zeros<float>(choices);
  c.combine_grad = d;
  c.combine_grad.rows = arena->Zeros<char>(capacity * row);
  c.combine_grad.row_weights = arena->Zeros<float>(capacity);
  c.combine_grad.choice_device = d.plan.choice_device;
  c.combine_grad.num_rows = d.plan.num_rows;
  c.combine_grad.expert_rows = d.rows;
  c.combine_grad.row_weights_in = d.row_weights;
  return c;
}

// Microseconds of one call of `launch(device)`, the slower device's.
template <typename Launch>
double Time(const std::vector<cudaStream_t>& streams, Launch launch) {
  cudaEvent_t begin[kDevices], end[kDevices];
  for (int d = 0; d < kDevices; ++d) {
    Check(cudaSetDevice(d));
    Check(cudaEventCreate(&begin[d]));
    Check(cudaEventCreate(&end[d]));
  }
  for (int i = -3; i < kCalls; ++i) {  // three to warm up
    for (int d = 0; d < kDevices; ++d) {
      Check(cudaSetDevice(d));
      if (i == 0) Check(cudaEventRecord(begin[d], streams[d]));
      launch(d);
    }
  }
  double worst = 0;
  for (int d = 0; d < kDevices; ++d) {
    Check(cudaSetDevice(d));
    Check(cudaEventRecord(end[d], streams[d]));
  }
  for (int d = 0; d < kDevices; ++d) {
    Check(cudaSetDevice(d));
    Check(cudaStreamSynchronize(streams[d]));
    float ms = 0;
    Check(cudaEventElapsedTime(&ms, begin[d], end[d]));
    worst = std::max(worst, ms * 1e3 / kCalls);
  }
  return worst;
}

void Run(const Shape& s, int64_t uid, int num_sms, const std::vector<cudaStream_t>& streams) {
  const int local = s.experts / kDevices;
  const int capacity = static_cast<int>(s.tokens * s.top_k * kCapacityFactor) + 64;
  const Sizes sizes = {s.tokens, s.top_k, capacity, kDevices, s.experts, local, s.dim * 2};
  OpenPeerToPeer({uid, {kDevices, local, s.tokens, s.top_k, s.dim * 2}, 5.0, num_sms}, {{0, 1}});
  std::mt19937 rng(1);
  Arena arenas[kDevices];
  std::vector<Calls> calls;
  double wire_bytes = 0;
  for (int d = 0; d < kDevices; ++d) {
    Check(cudaSetDevice(d));
    const std::vector<int32_t> ids = UniformIds(s, &rng);
    calls.push_back(MakeCalls(s, capacity, ids, &arenas[d]));
    if (d > 0) continue;
    for (int t = 0; t < s.tokens; ++t) {
      const auto first = ids.begin() + size_t(t) * s.top_k;
      const bool remote = std::any_of(first, first + s.top_k, [&](int id) { return id >= local; });
      wire_bytes += remote ? s.dim * 2.0 : 0.0;
    }
  }
  const auto member = [&](int d) { return FindMember(uid, d); };
  const auto dispatch = [&](int d) {
    const auto m = member(d);
    Check(
        LaunchDispatch(streams[d], m->num_blocks, m->peers, m->layout(), sizes, calls[d].dispatch));
  };
  const auto combine = [&](int d, const CombineArgs& args) {
    const auto m = member(d);
    Check(LaunchCombine(streams[d], m->num_blocks, m->peers, m->layout(), sizes, args,
                        RowType::kBf16));
  };
  const auto combine_grad = [&](int d) {
    const auto m = member(d);
    Check(LaunchCombineGrad(streams[d], m->num_blocks, m->peers, m->layout(), sizes,
                            calls[d].combine_grad, RowType::kBf16));
  };
  std::printf("%6d %6d %3d %4d %8.0f", s.tokens, s.dim, s.top_k, s.experts,
              wire_bytes / kWireBytesPerUs);
  std::printf(" %9.1f", Time(streams, dispatch));
  std::printf(" %9.1f", Time(streams, [&](int d) { combine(d, calls[d].combine); }));
  std::printf(" %11.1f", Time(streams, [&](int d) { combine(d, calls[d].dispatch_grad); }));
  std::printf(" %11.1f", Time(streams, combine_grad));
  std::printf(" %9.1f\n", Time(streams, [&](int d) {
                dispatch(d);
                combine(d, calls[d].combine);
              }));
  std::fflush(stdout);
  for (int d = 0; d < kDevices; ++d) {
    const std::string error = DescribeError(*member(d));
    if (!error.empty()) std::printf("%s\n", error.c_str());
  }
  CloseGroup(uid);
}

}  // namespace

int main(int argc, char** argv) {
  const int num_sms = argc > 1 ? std::atoi(argv[1]) : 0;
  std::vector<cudaStream_t> streams(kDevices);
  for (int d = 0; d < kDevices; ++d) {
    Check(cudaSetDevice(d));
    Check(cudaStreamCreate(&streams[d]));
  }
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0));
  std::printf("%d x %s, %s multiprocessors, us\n", kDevices, properties.name,
              num_sms ? argv[1] : "all");
  std::printf(
      "     T      D   K    E    floor  dispatch   combine  d_dispatch   d_combine      pair\n");
  int64_t uid = 1;
  for (const Shape& shape : kShapes) Run(shape, uid++, num_sms, streams);
  return 0;
}

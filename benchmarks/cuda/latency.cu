// Checks and times the low-latency kernels on two GPUs of one machine, without JAX.
//
//   cd xla_ffi/cuda; nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I../.. -o latency
//     ../../benchmarks/cuda/latency.cu groups.cc *dispatch.cu *combine.cu
//   ./latency [--check | --time] [--fp8] [--quick] [--sms N] [--shape T,D,K,E]
//
// Check: all results have the bits of the throughput kernels' on the same operands, for many sizes,
// routings and kinds of wire, calls of both kinds in turn on one group, whole and split into start
// and done with other calls between, at last in graphs that are replayed with another routing each
// time.
//
// Time: us of one call, see calls.h; rows are bf16, with --fp8 on an FP8 wire, routing is uniform.
// "pair" is dispatch and combine in turn. C is the worst case, R * T * K rows (then dispatch writes
// as many), or with "1.05" 1.05 * T * K + 64 rows. With --quick only the low-latency kernels, and C
// of 1.05. "split" is a start and its done with nothing between.

#include "benchmarks/cuda/latency_check.h"

using namespace jaxmoe;        // NOLINT: a program, not a header
using namespace jaxmoe::cuda;  // NOLINT

namespace {

constexpr int kCalls = 50, kReplays = 9;

__global__ void Nothing(const __grid_constant__ Peers) {}

// What a kernel costs that does nothing, with the usual operands.
void TimeNothing(const std::vector<cudaStream_t>& streams) {
  for (int num_blocks : {16, 132}) {
    const double time = Time(streams, kCalls, kReplays, [&](int d) {
      Nothing<<<num_blocks, 512, 0, streams[d]>>>(Peers{});
      CheckCuda(cudaGetLastError());
    });
    std::printf("an empty kernel of %d blocks: %.1f us\n", num_blocks, time);
  }
}

void TimeShape(const Shape& s, const Wire& wire, int64_t uid, int num_sms, bool quick,
               const std::vector<cudaStream_t>& streams) {
  std::mt19937 rng(1);
  const std::vector<int32_t> ids[kDevices] = {DrawIds(s, "uniform", &rng),
                                              DrawIds(s, "uniform", &rng)};
  for (const bool worst : {false, true}) {
    if (worst && quick) continue;
    const int most = kDevices * s.tokens * s.top_k;
    const int capacity = worst ? most : std::min(most, int(1.05 * s.tokens * s.top_k) + 64);
    const Group group = OpenGroup(s, wire, capacity, uid + worst, num_sms, streams);
    Arena arenas[kDevices];
    std::vector<Operands> o;
    int32_t* pending[kDevices];
    group.OnAll([&](int d) {
      const Inputs inputs = MakeInputs(s, wire, capacity, ids[d], d, &arenas[d]);
      o.push_back(MakeOperands(s, wire, capacity, inputs, &arenas[d]));
      pending[d] = arenas[d].Zeros<int32_t>(4);
    });
    std::printf("%5d %5d %2d %4d %6s", s.tokens, s.dim, s.top_k, s.experts,
                worst ? "worst" : "1.05");
    for (const bool latency : {true, false}) {
      if (!latency && quick) continue;
      const double dispatch = Time(streams, kCalls, kReplays,
                                   [&](int d) { group.Dispatch(d, latency, o[d].dispatch); });
      const double combine =
          Time(streams, kCalls, kReplays, [&](int d) { group.Combine(d, latency, o[d].combine); });
      const double pair = Time(streams, kCalls, kReplays, [&](int d) {
        group.Dispatch(d, latency, o[d].dispatch);
        group.Combine(d, latency, o[d].combine);
      });
      std::printf("   %6.1f %6.1f %6.1f", dispatch, combine, pair);
      if (!latency) continue;
      const double split_dispatch = Time(streams, kCalls, kReplays, [&](int d) {
        group.Dispatch(d, Half::kStart, pending[d], o[d].dispatch);
        group.Dispatch(d, Half::kDone, pending[d], o[d].dispatch);
      });
      const double split_combine = Time(streams, kCalls, kReplays, [&](int d) {
        group.Combine(d, Half::kStart, pending[d], o[d].combine);
        group.Combine(d, Half::kDone, pending[d], o[d].combine);
      });
      std::printf("   %6.1f %6.1f", split_dispatch, split_combine);
    }
    std::printf("\n");
    std::fflush(stdout);
    if (group.Failed()) std::exit(1);
    CloseGroup(uid + worst);
  }
}

}  // namespace

int main(int argc, char** argv) {
  bool check = true, time = true, quick = false;
  int num_sms = 0;
  Wire timed;
  std::vector<Shape> shapes = {{1, 7168, 8, 256},   {8, 7168, 8, 256},    {64, 7168, 8, 256},
                               {128, 7168, 8, 256}, {256, 7168, 8, 256},  {128, 4096, 2, 8},
                               {512, 7168, 8, 256}, {1024, 7168, 8, 256}, {1024, 2048, 8, 64}};
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const std::string value = i + 1 < argc ? argv[i + 1] : "";
    Shape s;
    if (name == "--check") {
      time = false;
    } else if (name == "--time") {
      check = false;
    } else if (name == "--quick") {
      quick = true;
    } else if (name == "--fp8") {
      timed = {kWireAmax, RowType::kBf16, false, false};
    } else if (name == "--sms" && std::atoi(value.c_str()) > 1) {
      num_sms = std::atoi(value.c_str());
      ++i;
    } else if (name == "--shape" && std::sscanf(value.c_str(), "%d,%d,%d,%d", &s.tokens, &s.dim,
                                                &s.top_k, &s.experts) == 4) {
      shapes = {s};
      ++i;
    } else {
      std::fprintf(stderr,
                   "usage: %s [--check | --time] [--fp8] [--quick] [--sms N] [--shape T,D,K,E]\n",
                   argv[0]);
      return 2;
    }
  }
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);  // not while a peer waits
  std::vector<cudaStream_t> streams(kDevices);
  for (int d = 0; d < kDevices; ++d) {
    CheckCuda(cudaSetDevice(d));
    CheckCuda(cudaStreamCreate(&streams[d]));
  }
  if (check && CheckAll(num_sms, streams) != 0) return 1;
  int64_t uid = 1000;
  for (const Shape& s : {Shape{16, 264, 4, 16}, Shape{48, 1032, 4, 64}, Shape{1, 7168, 8, 64}}) {
    if (check && !Stress(s, {}, 1500, uid++, num_sms, streams)) return 1;
  }
  const Wire fp8 = {kWireAmax, RowType::kBf16, false};
  if (check && !Stress({24, 656, 4, 32}, fp8, 1500, uid++, num_sms, streams)) return 1;
  if (!time) return 0;
  cudaDeviceProp properties;
  CheckCuda(cudaGetDeviceProperties(&properties, 0));
  std::printf("%d x %s, %d multiprocessors, wire %s; us\n", kDevices, properties.name,
              num_sms ? num_sms : properties.multiProcessorCount,
              timed.format == kWirePlain ? "bf16" : "FP8");
  TimeNothing(streams);
  std::printf(
      "    T     D  K    E      C   low latency: dispatch combine pair, split: dispatch combine, "
      "throughput: as low latency\n");
  for (const Shape& shape : shapes) TimeShape(shape, timed, uid += 2, num_sms, quick, streams);
  return 0;
}

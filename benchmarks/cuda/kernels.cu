// Times the CUDA kernels on the GPUs of one machine, two unless told otherwise, without JAX.
//
//   nvcc -std=c++17 -O3 -gencode arch=compute_90a,code=sm_90a -I. -o kernels \
//     benchmarks/cuda/kernels.cu xla_ffi/cuda/{dispatch.cu,combine.cu,groups.cc}
//   ./kernels [--sms N] [--routing uniform|zipf|hot] [--shape T,D,K,E] [--wire-dtype bf16|fp8]
//             [--rows-dtype bf16|fp8]
//
// For four GPUs: nvcc -DDEVICES=4 ...
//
// Each figure is the time of one call in us, on the slowest device: each device replays a CUDA
// graph of 20 calls between two events; the median of five replays. Rows are bf16. With an FP8 wire
// dispatch sends tokens in eight bits, and with FP8 rows hands them over so; there are no times of
// other operations then, which have no part in either.
//
// Routing: each token asks for K different experts; `zipf` draws them with probabilities in the
// ratio of 1 / rank^1.2, the most popular experts all on device 0; with `hot` every token asks for
// expert 0, and for others uniformly.
//
// "floor" is the longer of two times: that of the rows that cross the wire, in the busier direction
// at 371 GB/s, and that of the bytes that the busier device must read and write once (tokens, and
// rows up to the capacity) at 3.9 TB/s. Both rates are measured on two H200. "wire" is the rate at
// which rows cross it during dispatch and combine, in GB/s.

#include <cstring>

#include "benchmarks/cuda/calls.h"

using namespace jaxmoe::cuda;  // NOLINT: a program, not a header

namespace {

constexpr int kCalls = 20;
constexpr int kReplays = 5;
constexpr double kWireBytesPerUs = 371e3;
constexpr double kMemoryBytesPerUs = 3.9e6;
constexpr double kCapacityFactor = 1.05;

int NumScales(const Shape& s) { return jaxmoe::quantize::NumBlocks(s.dim); }
double Fp8Bytes(const Shape& s) { return s.dim + 4.0 * NumScales(s); }

struct Options {
  int num_sms = 0;  // 0: all
  std::string routing = "uniform";
  bool fp8_wire = false, fp8_rows = false;
  std::vector<Shape> shapes = {{4096, 7168, 8, 256}, {8192, 7168, 8, 256}, {1024, 7168, 8, 256},
                               {4096, 2048, 8, 128}, {4096, 4096, 2, 8},   {128, 7168, 8, 256},
                               {8, 7168, 8, 256}};
};

// What one routing moves.
struct Traffic {
  int wire_rows = 0;  // in the busiest direction of a device
  int num_rows = 0;   // of the busier device
  int capacity = 0;

  Traffic(const Shape& s, const std::vector<std::vector<int32_t>>& ids) {
    int received[kDevices] = {}, out[kDevices] = {}, in[kDevices] = {};
    for (int d = 0; d < kDevices; ++d) {
      for (int t = 0; t < s.tokens; ++t) {
        bool to[kDevices] = {};
        for (int k = 0; k < s.top_k; ++k) {
          const int device = ids[d][size_t(t) * s.top_k + k] / s.num_local();
          ++received[device];
          to[device] = device != d;
        }
        for (int e = 0; e < kDevices; ++e) {
          out[d] += to[e];
          in[e] += to[e];
        }
      }
    }
    for (int d = 0; d < kDevices; ++d) wire_rows = std::max({wire_rows, out[d], in[d]});
    num_rows = *std::max_element(received, received + kDevices);
    capacity = std::max(int(s.tokens * s.top_k * kCapacityFactor) + 64, num_rows);
  }
};

struct Calls {
  DispatchArgs dispatch, combine_grad;
  CombineArgs combine, dispatch_grad;
};

Calls MakeCalls(const Shape& s, const Options& options, int capacity,
                const std::vector<int32_t>& ids, Arena* arena) {
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
  d.plan = {arena->Zeros<int32_t>(s.num_local()),
            arena->Zeros<int32_t>(1),
            arena->Zeros<int32_t>(1),
            arena->Zeros<int32_t>(1),
            arena->Zeros<int32_t>(kDevices * choices),
            arena->Zeros<int32_t>(capacity),
            arena->Zeros<int32_t>(choices)};
  d.wire = {options.fp8_wire ? jaxmoe::kWireAmax : jaxmoe::kWirePlain, RowType::kBf16, s.dim,
            options.fp8_rows ? arena->Zeros<float>(size_t(capacity) * NumScales(s)) : nullptr};
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
  c.combine_grad.wire = {};
  c.combine_grad.rows = arena->Zeros<char>(capacity * row);
  c.combine_grad.row_weights = arena->Zeros<float>(capacity);
  c.combine_grad.choice_device = d.plan.choice_device;
  c.combine_grad.num_rows = d.plan.num_rows;
  c.combine_grad.expert_rows = d.rows;
  c.combine_grad.row_weights_in = d.row_weights;
  return c;
}

// The launches of one group, on any of its devices.
struct Group {
  int64_t uid;
  Sizes sizes;
  std::vector<cudaStream_t> streams;
  std::vector<Calls> calls;

  void Dispatch(int d) const {
    const auto m = FindMember(uid, d);
    CheckCuda(
        LaunchDispatch(streams[d], m->num_blocks, m->peers, m->layout(), sizes, calls[d].dispatch));
  }
  void CombineGrad(int d) const {
    const auto m = FindMember(uid, d);
    CheckCuda(LaunchCombineGrad(streams[d], m->num_blocks, m->peers, m->layout(), sizes,
                                calls[d].combine_grad, RowType::kBf16));
  }
  void Sum(int d, const CombineArgs& args) const {
    const auto m = FindMember(uid, d);
    CheckCuda(LaunchCombine(streams[d], m->num_blocks, m->peers, m->layout(), sizes, args,
                            RowType::kBf16));
  }
};

void PrintTimes(const Shape& s, const Traffic& traffic, const Group& group) {
  const auto& streams = group.streams;
  const double dispatch = Time(streams, kCalls, kReplays, [&](int d) { group.Dispatch(d); });
  const double combine =
      Time(streams, kCalls, kReplays, [&](int d) { group.Sum(d, group.calls[d].combine); });
  const double dispatch_grad =
      Time(streams, kCalls, kReplays, [&](int d) { group.Sum(d, group.calls[d].dispatch_grad); });
  const double combine_grad = Time(streams, kCalls, kReplays, [&](int d) { group.CombineGrad(d); });
  const double pair = Time(streams, kCalls, kReplays, [&](int d) {
    group.Dispatch(d);
    group.Sum(d, group.calls[d].combine);
  });
  const double wire_bytes = traffic.wire_rows * s.row_bytes();
  const double wire = wire_bytes / kWireBytesPerUs;
  const double row = s.row_bytes() / kMemoryBytesPerUs;
  const double floor_dispatch = std::max(wire, row * (s.tokens + traffic.capacity));
  const double floor_combine = std::max(wire, row * (s.tokens + traffic.num_rows));
  const double floor_combine_grad =
      std::max(wire, row * (s.tokens + traffic.num_rows + traffic.capacity));
  std::printf("%5d %5d %2d %4d", s.tokens, s.dim, s.top_k, s.experts);
  std::printf("  %7.1f (%3.0f)", dispatch, floor_dispatch);
  std::printf("  %7.1f (%3.0f)", combine, floor_combine);
  std::printf("  %7.1f (%3.0f)", dispatch_grad, floor_combine);
  std::printf("  %7.1f (%3.0f)", combine_grad, floor_combine_grad);
  std::printf("  %7.1f  %4.0f %4.0f\n", pair, wire_bytes / dispatch / 1e3,
              wire_bytes / combine / 1e3);
  std::fflush(stdout);
}

void PrintQuantizedTime(const Shape& s, const Options& options, const Traffic& traffic,
                        const Group& group) {
  const double dispatch = Time(group.streams, kCalls, kReplays, [&](int d) { group.Dispatch(d); });
  const double wire_bytes = traffic.wire_rows * Fp8Bytes(s);
  const double made = traffic.capacity * (options.fp8_rows ? Fp8Bytes(s) : s.row_bytes());
  const double memory = (s.tokens * s.row_bytes() + made) / kMemoryBytesPerUs;
  std::printf("%5d %5d %2d %4d  %7.1f (%3.0f) %72s %4.0f\n", s.tokens, s.dim, s.top_k, s.experts,
              dispatch, std::max(wire_bytes / kWireBytesPerUs, memory), "",
              wire_bytes / dispatch / 1e3);
  std::fflush(stdout);
}

void Run(const Shape& s, const Options& options, int64_t uid,
         const std::vector<cudaStream_t>& streams) {
  std::mt19937 rng(1);
  std::vector<std::vector<int32_t>> ids;
  std::vector<int> devices;
  for (int d = 0; d < kDevices; ++d) {
    ids.push_back(DrawIds(s, options.routing, &rng));
    devices.push_back(d);
  }
  const Traffic traffic(s, ids);
  const int local = s.num_local();
  const Sizes sizes = {s.tokens, s.top_k, traffic.capacity, kDevices, s.experts, local, s.dim * 2};
  OpenPeerToPeer({uid, {kDevices, local, s.tokens, s.top_k, s.dim * 2}, 5.0, options.num_sms},
                 {devices});
  Arena arenas[kDevices];
  Group group = {uid, sizes, streams, {}};
  for (int d = 0; d < kDevices; ++d) {
    CheckCuda(cudaSetDevice(d));
    group.calls.push_back(MakeCalls(s, options, traffic.capacity, ids[d], &arenas[d]));
  }
  if (options.fp8_wire) {
    PrintQuantizedTime(s, options, traffic, group);
  } else {
    PrintTimes(s, traffic, group);
  }
  for (int d = 0; d < kDevices; ++d) {
    const std::string error = DescribeError(*FindMember(uid, d));
    if (!error.empty()) std::printf("%s\n", error.c_str());
  }
  CloseGroup(uid);
}

Options ParseOptions(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = argv[i];
    const std::string value = i + 1 < argc ? argv[i + 1] : "";
    Shape s;
    if (name == "--sms" && std::atoi(value.c_str()) > 1) {
      options.num_sms = std::atoi(value.c_str());
    } else if (name == "--routing" && (value == "uniform" || value == "zipf" || value == "hot")) {
      options.routing = value;
    } else if (name == "--wire-dtype" && (value == "bf16" || value == "fp8")) {
      options.fp8_wire = value == "fp8";
    } else if (name == "--rows-dtype" && (value == "bf16" || value == "fp8")) {
      options.fp8_rows = value == "fp8";
    } else if (name == "--shape" && std::sscanf(value.c_str(), "%d,%d,%d,%d", &s.tokens, &s.dim,
                                                &s.top_k, &s.experts) == 4) {
      options.shapes = {s};
    } else {
      std::fprintf(stderr,
                   "usage: %s [--sms N] [--routing uniform|zipf|hot] [--shape T,D,K,E] "
                   "[--wire-dtype bf16|fp8] [--rows-dtype bf16|fp8]\n",
                   argv[0]);
      std::exit(2);
    }
  }
  if (options.fp8_rows && !options.fp8_wire) {
    std::fprintf(stderr, "--rows-dtype fp8 needs --wire-dtype fp8\n");
    std::exit(2);
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  const Options options = ParseOptions(argc, argv);
  std::vector<cudaStream_t> streams(kDevices);
  for (int d = 0; d < kDevices; ++d) {
    CheckCuda(cudaSetDevice(d));
    CheckCuda(cudaStreamCreate(&streams[d]));
  }
  cudaDeviceProp properties;
  CheckCuda(cudaGetDeviceProperties(&properties, 0));
  std::printf("%d x %s, %d multiprocessors, routing %s, %s on the wire, rows in %s; us (floor)\n",
              kDevices, properties.name,
              options.num_sms ? options.num_sms : properties.multiProcessorCount,
              options.routing.c_str(), options.fp8_wire ? "fp8" : "bf16",
              options.fp8_rows ? "fp8" : "bf16");
  std::printf("    T     D  K    E  %13s  %13s  %13s  %13s  %7s  wire GB/s\n", "dispatch",
              "combine", "d_dispatch", "d_combine", "pair");
  int64_t uid = 1;
  for (const Shape& shape : options.shapes) Run(shape, options, uid++, streams);
  return 0;
}

// Operands and results of the low-latency calls, for benchmarks/cuda/latency.cu.

#ifndef JAXMOE_BENCHMARKS_CUDA_LATENCY_CALLS_H_
#define JAXMOE_BENCHMARKS_CUDA_LATENCY_CALLS_H_

#include <cstring>

#include "benchmarks/cuda/calls.h"

namespace jaxmoe::cuda {

// Kinds of calls: throughput, low latency, and that in two halves.
constexpr int kKinds = 3, kSplit = 2, kMostPending = 2;
enum class Half { kStart, kDone };

// How tokens travel, and their dtype.
struct Wire {
  WireFormat format = kWirePlain;
  RowType type = RowType::kBf16;
  bool fp8_rows = false;
  bool special = true;  // tokens have zeros, NaN and infinities among them

  int bytes() const { return type == RowType::kF32 ? 4 : 2; }
};

// A call's operands and results on one device.
struct Operands {
  DispatchArgs dispatch = {};
  CombineArgs combine = {};
  // What the calls write: where, how many bytes, and a name.
  struct Result {
    void* at;
    size_t bytes;
    const char* name;
  };
  std::vector<Result> dispatched, combined;
};

struct Inputs {
  const char* tokens;
  const int32_t* ids;
  const float* weights;
  const char* expert_rows;
};

inline Inputs MakeInputs(const Shape& s, const Wire& wire, int capacity,
                         const std::vector<int32_t>& ids, int seed, Arena* arena) {
  std::mt19937 rng(seed);
  const size_t row = size_t(s.dim) * wire.bytes() / 2;
  std::vector<uint16_t> x(s.tokens * row), rows(capacity * row);
  const auto finite = [&rng] { return uint16_t(0x3c00 + (rng() & 0x83ff)); };  // of both signs
  for (size_t i = 0; i < x.size(); ++i) {
    // All bits, NaN and infinity too, or finite, or zeros: an FP8 wire takes blocks differently.
    const size_t kind = wire.special ? (i / row + i / 64) % 5 : 1;
    x[i] = kind < 1 ? rng() : kind < 4 ? finite() : 0;
  }
  for (uint16_t& v : rows) v = finite();
  std::vector<float> weights(ids.size());
  for (float& w : weights) w = std::uniform_real_distribution<float>(-1, 1)(rng);
  return {reinterpret_cast<char*>(arena->Copy(x)), arena->Copy(ids), arena->Copy(weights),
          reinterpret_cast<char*>(arena->Copy(rows))};
}

inline Operands MakeOperands(const Shape& s, const Wire& wire, int capacity, const Inputs& in,
                             Arena* arena) {
  const size_t row = size_t(s.dim) * wire.bytes(), choices = size_t(s.tokens) * s.top_k;
  Operands o;
  auto result = [&](auto*& p, size_t n, const char* name, std::vector<Operands::Result>* list) {
    p = arena->Zeros<std::remove_reference_t<decltype(*p)>>(n);
    list->push_back({p, n * sizeof(*p), name});
  };
  DispatchArgs& d = o.dispatch;
  d.site = 1;
  d.tokens = in.tokens;
  d.expert_ids = in.ids;
  d.weights = in.weights;
  d.wire.format = wire.format;
  d.wire.type = wire.type;
  d.wire.dim = s.dim;
  result(d.rows, capacity * (wire.fp8_rows ? s.dim : row), "rows", &o.dispatched);
  if (wire.fp8_rows) {
    const size_t scales = capacity * quantize::NumBlocks(s.dim);
    result(d.wire.row_scales, scales, "row_scales", &o.dispatched);
  }
  result(d.row_weights, capacity, "row_weights", &o.dispatched);
  result(d.plan.group_sizes, s.num_local(), "group_sizes", &o.dispatched);
  result(d.plan.num_rows, 1, "num_rows", &o.dispatched);
  result(d.plan.num_dropped, 1, "num_dropped", &o.dispatched);
  result(d.plan.num_invalid, 1, "num_invalid", &o.dispatched);
  result(d.plan.row_map, kDevices * choices, "row_map", &o.dispatched);
  result(d.plan.row_source, capacity, "row_source", &o.dispatched);
  result(d.plan.choice_device, choices, "choice_device", &o.dispatched);
  o.combine.site = 2;
  o.combine.rows = in.expert_rows;
  o.combine.row_weights = d.row_weights;
  o.combine.row_map = d.plan.row_map;
  result(o.combine.tokens, s.tokens * row, "y", &o.combined);
  return o;
}

struct Group {
  int64_t uid;
  Sizes sizes;
  RowType type;
  std::vector<cudaStream_t> streams;

  void Dispatch(int d, bool latency, const DispatchArgs& args) const {
    const auto m = FindMember(uid, d);
    const auto launch = latency ? LaunchLatencyDispatch : LaunchDispatch;
    CheckCuda(launch(streams[d], m->num_blocks, m->peers, m->layout(), sizes, args));
  }
  // The first or second half of a split call; `pending` is of the start.
  void Dispatch(int d, Half part, int32_t* pending, DispatchArgs args) const {
    const auto m = FindMember(uid, d);
    args.pending = pending;
    const auto launch = part == Half::kStart ? LaunchDispatchStart : LaunchDispatchDone;
    CheckCuda(launch(streams[d], m->num_blocks, m->peers, m->layout(), sizes, args));
  }
  void Combine(int d, Half part, int32_t* pending, CombineArgs args) const {
    const auto m = FindMember(uid, d);
    args.pending = pending;
    const auto launch = part == Half::kStart ? LaunchCombineStart : LaunchCombineDone;
    CheckCuda(launch(streams[d], m->num_blocks, m->peers, m->layout(), sizes, args, type));
  }
  void Combine(int d, bool latency, const CombineArgs& args) const {
    const auto m = FindMember(uid, d);
    const auto launch = latency ? LaunchLatencyCombine : LaunchCombine;
    CheckCuda(launch(streams[d], m->num_blocks, m->peers, m->layout(), sizes, args, type));
  }
  template <typename Body>
  void OnAll(Body body) const {
    for (int d = 0; d < kDevices; ++d) {
      CheckCuda(cudaSetDevice(d));
      body(d);
    }
  }
  bool Failed() const {
    bool failed = false;
    OnAll([&](int d) {
      CheckCuda(cudaStreamSynchronize(streams[d]));
      const std::string error = DescribeError(*FindMember(uid, d));
      if (!error.empty()) std::printf("%s\n", error.c_str());
      failed |= !error.empty();
    });
    return failed;
  }
};

inline Group OpenGroup(const Shape& s, const Wire& wire, int capacity, int64_t uid, int num_sms,
                       const std::vector<cudaStream_t>& streams) {
  const int local = s.num_local(), row_bytes = s.dim * wire.bytes();
  OpenPeerToPeer({uid,
                  {kDevices, local, s.tokens, s.top_k, row_bytes, 0, s.tokens, kMostPending},
                  2.0,
                  num_sms},
                 {{0, 1}});
  const Sizes sizes = {s.tokens, s.top_k, capacity, kDevices, s.experts, local, row_bytes};
  return {uid, sizes, wire.type, streams};
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_BENCHMARKS_CUDA_LATENCY_CALLS_H_

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

#include <cstring>

#include "benchmarks/cuda/calls.h"

using namespace jaxmoe;        // NOLINT: a program, not a header
using namespace jaxmoe::cuda;  // NOLINT

namespace {

constexpr int kCalls = 50, kReplays = 9;
constexpr int kPoison = 0xee;
// Kinds of calls: throughput, low latency, and that in two halves.
constexpr int kKinds = 3, kSplit = 2, kMostPending = 2;
enum class CallPart { kStart, kDone };

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

Inputs MakeInputs(const Shape& s, const Wire& wire, int capacity, const std::vector<int32_t>& ids,
                  int seed, Arena* arena) {
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

Operands MakeOperands(const Shape& s, const Wire& wire, int capacity, const Inputs& in,
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
  void Dispatch(int d, CallPart part, int32_t* pending, DispatchArgs args) const {
    const auto m = FindMember(uid, d);
    args.pending = pending;
    const auto launch = part == CallPart::kStart ? LaunchDispatchStart : LaunchDispatchDone;
    CheckCuda(launch(streams[d], m->num_blocks, m->peers, m->layout(), sizes, args));
  }
  void Combine(int d, CallPart part, int32_t* pending, CombineArgs args) const {
    const auto m = FindMember(uid, d);
    args.pending = pending;
    const auto launch = part == CallPart::kStart ? LaunchCombineStart : LaunchCombineDone;
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

Group OpenGroup(const Shape& s, const Wire& wire, int capacity, int64_t uid, int num_sms,
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

struct CheckCase {
  Shape shape;
  double capacity_factor;  // of T * K; 0 is the worst case
  std::string routing;
  Wire wire = {};
};

std::vector<int32_t> CaseIds(const CheckCase& c, int device, std::mt19937* rng) {
  const Shape& s = c.shape;
  std::vector<int32_t> ids = DrawIds(s, c.routing, rng);
  for (int t = 0; t < s.tokens; ++t) {
    for (int k = 0; k < s.top_k; ++k) {
      int32_t& id = ids[size_t(t) * s.top_k + k];
      const unsigned draw = (*rng)() % 10;
      if (c.routing == "idle" && device == 0) id = -1;
      if (c.routing == "masked" && (t % 3 == 1 || draw < 2)) id = -1;
      if (c.routing == "invalid" && draw < 3) id = draw == 0 ? s.experts : draw == 1 ? -7 : 1 << 30;
      if (c.routing == "one_device") id = s.num_local() + id % s.num_local();
      if (c.routing == "duplicates") id = ids[size_t(t) * s.top_k];
    }
  }
  return ids;
}

// Whether the two kinds of kernels give the same bits, several times in turn.
bool Check(const CheckCase& c, int64_t uid, int num_sms, const std::vector<cudaStream_t>& streams) {
  const Shape& s = c.shape;
  const int worst = kDevices * s.tokens * s.top_k;
  const int capacity =
      c.capacity_factor == 0
          ? worst
          : std::min(worst, int(std::ceil(c.capacity_factor * s.tokens * s.top_k)));
  const Group group = OpenGroup(s, c.wire, capacity, uid, num_sms, streams);
  std::mt19937 rng(uid);
  bool same = true;
  for (int round = 0; round < 3 && same; ++round) {
    Arena arenas[kDevices];
    std::vector<Operands> operands[kKinds];
    int32_t* pending[kDevices][kMostPending];
    group.OnAll([&](int d) {
      const Inputs inputs =
          MakeInputs(s, c.wire, capacity, CaseIds(c, d, &rng), round * kDevices + d, &arenas[d]);
      for (auto& kind : operands) {
        kind.push_back(MakeOperands(s, c.wire, capacity, inputs, &arenas[d]));
      }
      for (const auto& kind : operands) {
        for (const auto* list : {&kind[d].dispatched, &kind[d].combined}) {
          for (const auto& r : *list) CheckCuda(cudaMemset(r.at, kPoison, r.bytes));
        }
      }
      for (int32_t*& p : pending[d]) p = arenas[d].Zeros<int32_t>(4);
      CheckCuda(cudaDeviceSynchronize());
    });
    const auto dispatch = [&](CallPart part, int i) {
      group.OnAll(
          [&](int d) { group.Dispatch(d, part, pending[d][i], operands[kSplit][d].dispatch); });
    };
    const auto combine = [&](CallPart part, int i) {
      group.OnAll(
          [&](int d) { group.Combine(d, part, pending[d][i], operands[kSplit][d].combine); });
    };
    const auto run = [&](bool latency) {
      group.OnAll([&](int d) { group.Dispatch(d, latency, operands[latency][d].dispatch); });
      group.OnAll([&](int d) { group.Combine(d, latency, operands[latency][d].combine); });
    };
    run(false);
    for (int i = 0; i <= round; ++i) {
      run(true);
      // Two at once, which end in either order, with whole calls of both kinds between.
      dispatch(CallPart::kStart, 0);
      run(i % 2 == 0);
      dispatch(CallPart::kStart, 1);
      run(i % 2 != 0);
      dispatch(CallPart::kDone, i % 2);
      dispatch(CallPart::kDone, 1 - i % 2);
      combine(CallPart::kStart, 0);
      run(true);
      combine(CallPart::kStart, 1);
      combine(CallPart::kDone, 0);
      combine(CallPart::kDone, 1);
    }
    run(false);
    if (group.Failed()) return false;
    group.OnAll([&](int d) {
      for (const auto list : {&Operands::dispatched, &Operands::combined}) {
        for (size_t i = 0; i < (operands[0][d].*list).size(); ++i) {
          const auto& want = (operands[0][d].*list)[i];
          std::vector<unsigned char> a(want.bytes), b(want.bytes);
          CheckCuda(cudaMemcpy(a.data(), want.at, want.bytes, cudaMemcpyDeviceToHost));
          for (int kind = 1; kind < kKinds; ++kind) {
            CheckCuda(cudaMemcpy(b.data(), (operands[kind][d].*list)[i].at, want.bytes,
                                 cudaMemcpyDeviceToHost));
            if (a == b) continue;
            const size_t at = std::mismatch(a.begin(), a.end(), b.begin()).first - a.begin();
            std::printf(
                "device %d round %d kind %d: %s differs at byte %zu of %zu: %02x, want %02x\n", d,
                round, kind, want.name, at, want.bytes, b[at], a[at]);
            same = false;
          }
        }
      }
    });
  }
  CloseGroup(uid);
  return same;
}

int CheckAll(int num_sms, const std::vector<cudaStream_t>& streams) {
  std::vector<CheckCase> cases;
  for (const char* routing :
       {"uniform", "zipf", "hot", "idle", "masked", "invalid", "one_device", "duplicates"}) {
    cases.push_back({{8, 7168, 8, 256}, 0, routing});
    cases.push_back({{77, 136, 4, 16}, 0.5, routing});
  }
  for (int tokens : {1, 2, 5, 64, 128, 256}) {
    cases.push_back({{tokens, 7168, 8, 256}, 0, "uniform"});
    cases.push_back({{tokens, 4096, 2, 8}, 1.05, "masked"});
    cases.push_back({{tokens, 8, 1, 2}, 0, "uniform"});
    cases.push_back({{tokens, 1032, 32, 64}, 0.8, "zipf"});
    cases.push_back({{tokens, 264, 6, 4096}, 1.0, "uniform"});
  }
  cases.push_back({{1024, 512, 8, 32}, 0, "zipf"});
  cases.push_back({{1000, 1000, 5, 10}, 0.01, "masked"});
  for (const bool fp8_rows : {false, true}) {
    const Wire wire = {kWireAmax, RowType::kBf16, fp8_rows};
    for (int tokens : {1, 8, 77, 256}) {
      cases.push_back({{tokens, 7168, 8, 256}, 0, "uniform", wire});
      cases.push_back({{tokens, 16, 2, 8}, 0.7, "masked", wire});
      cases.push_back(
          {{tokens, 1936, 4, 16}, 1.05, "zipf", {kWirePowerOfTwo, wire.type, fp8_rows}});
      cases.push_back({{tokens, 1040, 3, 12}, 1, "idle", {kWireAmax, RowType::kF16, fp8_rows}});
      cases.push_back(
          {{tokens, 272, 32, 64}, 0.8, "uniform", {kWireAmax, RowType::kF32, fp8_rows}});
      cases.push_back({{tokens, 768, 2, 4}, 0, "hot", {kWirePowerOfTwo, RowType::kF32, fp8_rows}});
    }
  }
  int wrong = 0;
  int64_t uid = 1;
  for (const CheckCase& c : cases) {
    const bool same = Check(c, uid++, num_sms, streams);
    if (same) continue;
    const Shape& s = c.shape;
    std::printf("WRONG: T=%d D=%d K=%d E=%d factor %g %s, wire %d type %d fp8_rows %d\n", s.tokens,
                s.dim, s.top_k, s.experts, c.capacity_factor, c.routing.c_str(), c.wire.format,
                int(c.wire.type), c.wire.fp8_rows);
    std::fflush(stdout);
    if (++wrong > 5) break;
  }
  std::printf("check: %d of %zu cases wrong\n", wrong, cases.size());
  std::fflush(stdout);
  return wrong;
}

__device__ uint32_t Hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// New tokens, choices and weights, the same in every run, after a delay of up to 30 us.
__global__ void Draw(uint32_t* step, int seed, uint32_t* tokens, int num_words, int32_t* ids,
                     float* weights, int num_choices, int num_experts) {
  const uint32_t key = Hash(*step * 2 + seed);
  for (int i = threadIdx.x; i < num_words; i += blockDim.x) tokens[i] = Hash(key + i);
  for (int i = threadIdx.x; i < num_choices; i += blockDim.x) {
    const uint32_t draw = Hash(key ^ i << 8);
    ids[i] = draw % 8 == 0 ? -1 : int32_t(draw / 8 % num_experts);
    weights[i] = (draw >> 16) * 0x1p-16f - 0.5f;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const uint32_t delay = Hash(key) % 4 == 0 ? Hash(key + 1) % 50000 : 0;
  for (const long long begin = clock64(); clock64() - begin < delay;) {
  }
  ++*step;
}

__global__ void Compare(const uint32_t* a, const uint32_t* b, int num_words, uint32_t* wrong) {
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_words; i += stride) {
    if (a[i] != b[i]) atomicAdd(wrong, 1u);
  }
}

// Replays graphs in which every step has tokens and a routing of its own, calls of both kinds in
// three orders, and a comparison of all results. Returns whether all were right.
bool Stress(const Shape& s, const Wire& wire, int num_replays, int64_t uid, int num_sms,
            const std::vector<cudaStream_t>& streams) {
  const int capacity = int(1.2 * s.tokens * s.top_k);
  const Group group = OpenGroup(s, wire, capacity, uid, num_sms, streams);
  const int choices = s.tokens * s.top_k, words = s.tokens * s.dim / 2;
  Arena arenas[kDevices];
  cudaGraphExec_t graphs[kDevices];
  uint32_t *steps[kDevices], *wrong[kDevices];
  group.OnAll([&](int d) {
    Arena& arena = arenas[d];
    const Inputs in = MakeInputs(s, wire, capacity, std::vector<int32_t>(choices), d, &arena);
    const Operands o[kKinds] = {MakeOperands(s, wire, capacity, in, &arena),
                                MakeOperands(s, wire, capacity, in, &arena),
                                MakeOperands(s, wire, capacity, in, &arena)};
    int32_t* pending[kMostPending] = {arena.Zeros<int32_t>(4), arena.Zeros<int32_t>(4)};
    steps[d] = arena.Zeros<uint32_t>(1);
    wrong[d] = arena.Zeros<uint32_t>(1);
    CheckCuda(cudaDeviceSynchronize());
    CheckCuda(cudaStreamBeginCapture(streams[d], cudaStreamCaptureModeThreadLocal));
    // Small letters: low latency. 1 and 2 start a dispatch, 3 and 4 end it; 5 to 8 a combine.
    for (const char* order : {"1dc3D5C7", "1D2dC43c6D58C7", "d1D3c5C7d1c3"}) {
      Draw<<<1, 512, 0, streams[d]>>>(
          steps[d], d, reinterpret_cast<uint32_t*>(const_cast<char*>(in.tokens)), words,
          const_cast<int32_t*>(in.ids), const_cast<float*>(in.weights), choices, s.experts);
      for (const char* call = order; *call; ++call) {
        const bool latency = *call >= 'a';
        if (*call < 'A') {
          const int number = *call - '1', i = number % 2;
          const auto part = number / 2 % 2 == 0 ? CallPart::kStart : CallPart::kDone;
          if (number < 4) {
            group.Dispatch(d, part, pending[i], o[kSplit].dispatch);
          } else {
            group.Combine(d, part, pending[i], o[kSplit].combine);
          }
        } else if (*call == 'd' || *call == 'D') {
          group.Dispatch(d, latency, o[latency].dispatch);
        } else {
          group.Combine(d, latency, o[latency].combine);
        }
      }
      for (const auto list : {&Operands::dispatched, &Operands::combined}) {
        for (size_t i = 0; i < (o[0].*list).size(); ++i) {
          const auto& result = (o[0].*list)[i];
          for (int kind = 1; kind < kKinds; ++kind) {
            Compare<<<16, 512, 0, streams[d]>>>(static_cast<uint32_t*>(result.at),
                                                static_cast<uint32_t*>((o[kind].*list)[i].at),
                                                result.bytes / 4, wrong[d]);
          }
        }
      }
    }
    cudaGraph_t graph;
    CheckCuda(cudaStreamEndCapture(streams[d], &graph));
    CheckCuda(cudaGraphInstantiate(&graphs[d], graph, 0));
    CheckCuda(cudaGraphDestroy(graph));
    CheckCuda(cudaGraphUpload(graphs[d], streams[d]));
  });
  bool right = true;
  for (int i = 0; i < num_replays && right; ++i) {
    group.OnAll([&](int d) { CheckCuda(cudaGraphLaunch(graphs[d], streams[d])); });
    if (i % 100 == 99) right = !group.Failed();
  }
  right &= !group.Failed();
  group.OnAll([&](int d) {
    uint32_t done = 0, count = 0;
    CheckCuda(cudaMemcpy(&done, steps[d], 4, cudaMemcpyDeviceToHost));
    CheckCuda(cudaMemcpy(&count, wrong[d], 4, cudaMemcpyDeviceToHost));
    CheckCuda(cudaGraphExecDestroy(graphs[d]));
    right &= count == 0 && done == 3u * num_replays;
    std::printf("stress T=%d%s, device %d: %u steps, %u words wrong\n", s.tokens,
                wire.format == kWirePlain ? "" : " FP8", d, done, count);
  });
  std::fflush(stdout);
  CloseGroup(uid);
  return right;
}

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
        group.Dispatch(d, CallPart::kStart, pending[d], o[d].dispatch);
        group.Dispatch(d, CallPart::kDone, pending[d], o[d].dispatch);
      });
      const double split_combine = Time(streams, kCalls, kReplays, [&](int d) {
        group.Combine(d, CallPart::kStart, pending[d], o[d].combine);
        group.Combine(d, CallPart::kDone, pending[d], o[d].combine);
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

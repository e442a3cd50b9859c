// Whether the low-latency kernels, whole and in halves, give the bits of the throughput kernels;
// for benchmarks/cuda/latency.cu, which says what is checked.

#ifndef JAXMOE_BENCHMARKS_CUDA_LATENCY_CHECK_H_
#define JAXMOE_BENCHMARKS_CUDA_LATENCY_CHECK_H_

#include "benchmarks/cuda/latency_calls.h"

namespace jaxmoe::cuda {

constexpr int kPoison = 0xee;

struct CheckCase {
  Shape shape;
  double capacity_factor;  // of T * K; 0 is the worst case
  std::string routing;
  Wire wire = {};
};

inline std::vector<int32_t> CaseIds(const CheckCase& c, int device, std::mt19937* rng) {
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
inline bool Check(const CheckCase& c, int64_t uid, int num_sms,
                  const std::vector<cudaStream_t>& streams) {
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
    const auto dispatch = [&](Half part, int i) {
      group.OnAll(
          [&](int d) { group.Dispatch(d, part, pending[d][i], operands[kSplit][d].dispatch); });
    };
    const auto combine = [&](Half part, int i) {
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
      dispatch(Half::kStart, 0);
      run(i % 2 == 0);
      dispatch(Half::kStart, 1);
      run(i % 2 != 0);
      dispatch(Half::kDone, i % 2);
      dispatch(Half::kDone, 1 - i % 2);
      combine(Half::kStart, 0);
      run(true);
      combine(Half::kStart, 1);
      combine(Half::kDone, 0);
      combine(Half::kDone, 1);
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

inline int CheckAll(int num_sms, const std::vector<cudaStream_t>& streams) {
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

__device__ inline uint32_t Hash(uint32_t x) {
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// New tokens, choices and weights, the same in every run, after a delay of up to 30 us.
static __global__ void Draw(uint32_t* step, int seed, uint32_t* tokens, int num_words, int32_t* ids,
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

static __global__ void Compare(const uint32_t* a, const uint32_t* b, int num_words,
                               uint32_t* wrong) {
  const int stride = gridDim.x * blockDim.x;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < num_words; i += stride) {
    if (a[i] != b[i]) atomicAdd(wrong, 1u);
  }
}

// Replays graphs in which every step has tokens and a routing of its own, calls of both kinds in
// three orders, and a comparison of all results. Returns whether all were right.
inline bool Stress(const Shape& s, const Wire& wire, int num_replays, int64_t uid, int num_sms,
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
          const auto part = number / 2 % 2 == 0 ? Half::kStart : Half::kDone;
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

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_BENCHMARKS_CUDA_LATENCY_CHECK_H_

// From rows to tokens: combine, and the gradient of dispatch.
//
// Blocks have two roles (see dispatch.cu for why not warps). Senders sum each peer's tokens over
// this device's rows and send one partial sum per token. Finishers add up this device's own tokens:
// their own rows, and the peers' partial sums as they come, in the order of the devices.

#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/protocol.cuh"
#include "xla_ffi/cuda/rows.cuh"

namespace jaxmoe::cuda {
namespace {

constexpr int kTeamWarps = 8;  // a team handles a chunk
constexpr int kWarpsPerToken = kTeamWarps / kSumChunkTokens;
constexpr int kTeamThreads = kTeamWarps * 32;
constexpr int kTeams = 2;  // of a block
constexpr int kThreads = kTeams * kTeamThreads;
constexpr int kSenderPercent = 45;  // of the blocks: both roles read as much, finishers write more
constexpr int kRowsAtOnce = 2;
constexpr int kVectors = 4;  // of a row that a lane loads at once
constexpr int kStep = 32 * kVectors;

// sum[v] += the token's rows on this device, over vectors base, base + 32 of the row.
template <typename T>
__device__ __forceinline__ void AddRows(const Sizes& sizes, const CombineArgs& args,
                                        int row_of_lane, float weight_of_lane, unsigned rows,
                                        int base, float (&sum)[kVectors][Vector<T>::kSize]) {
  const int n = sizes.row_bytes / 16;
  while (rows != 0) {
    uint4 v[kRowsAtOnce][kVectors];
    float weight[kRowsAtOnce];
    int count = 0;
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (rows == 0) break;
      const int from = __ffs(rows) - 1;
      rows &= rows - 1;
      const int row = __shfl_sync(~0u, row_of_lane, from);
      weight[r] = __shfl_sync(~0u, weight_of_lane, from);
      const uint4* in = AsVectors(args.rows + size_t(row) * sizes.row_bytes);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (base + 32 * j < n) v[r][j] = __ldcs(in + base + 32 * j);
      }
      count = r + 1;
    }
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (r >= count) break;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) Vector<T>::AddScaled(v[r][j], weight[r], sum[j]);
    }
  }
}

// The row of choice k of a token in lane k, or -1, and its weight.
struct TokenRows {
  int row;
  float weight;
  unsigned mask;

  __device__ TokenRows(const Sizes& sizes, const CombineArgs& args, int source, int token) {
    const int lane = threadIdx.x % 32;
    row = -1;
    if (lane < sizes.top_k) {
      row = args.row_map[(source * sizes.num_tokens + token) * sizes.top_k + lane];
    }
    weight = row >= 0 && args.row_weights != nullptr ? args.row_weights[row] : 1.0f;
    mask = __ballot_sync(~0u, row >= 0);
  }
};

template <typename T>
__device__ bool SendPartialSum(const Call& call, const Sizes& sizes, const CombineArgs& args,
                               int peer, int token, int part) {
  const int lane = threadIdx.x % 32;
  const int me = call.peers.rank;
  const TokenRows rows(sizes, args, peer, token);
  if (args.row_values != nullptr && part == 0 && lane < sizes.top_k) {
    auto* values = reinterpret_cast<float*>(call.heap(peer) + call.layout.Weights(call.parity, me));
    values[token * sizes.top_k + lane] = rows.row >= 0 ? args.row_values[rows.row] : 0.0f;
  }
  if (rows.mask == 0) return false;
  uint4* to = AsVectors(call.heap(peer) + call.layout.Row(call.parity, me, token));
  const int n = sizes.row_bytes / 16;
  for (int base = lane + part * kStep; base - lane < n; base += kWarpsPerToken * kStep) {
    float sum[kVectors][Vector<T>::kSize] = {};
    AddRows<T>(sizes, args, rows.row, rows.weight, rows.mask, base, sum);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (base + 32 * j < n) to[base + 32 * j] = Vector<T>::Round(sum[j]);
    }
  }
  return true;
}

template <typename T>
__device__ void Send(const Call& call, const Sizes& sizes, const CombineArgs& args, int num_senders,
                     int team, uint32_t* present) {
  const int warp = threadIdx.x / 32 % kTeamWarps, lane = threadIdx.x % 32;
  const int part = warp % kWarpsPerToken;
  const int chunks = (sizes.num_tokens + kSumChunkTokens - 1) / kSumChunkTokens;
  for (int work = blockIdx.x + num_senders * team; work < chunks * (sizes.num_devices - 1);
       work += num_senders * kTeams) {
    const int peer = (call.peers.rank + 1 + work % (sizes.num_devices - 1)) % sizes.num_devices;
    const int chunk = work / (sizes.num_devices - 1);
    const int token = chunk * kSumChunkTokens + warp / kWarpsPerToken;
    const bool sent =
        token < sizes.num_tokens && SendPartialSum<T>(call, sizes, args, peer, token, part);
    if (lane == 0 && part == 0) present[warp / kWarpsPerToken] = sent;
    BlockBarrier(team + 1, kTeamThreads);
    if (warp == 0) {
      const unsigned mask =
          __ballot_sync(~0u, lane < kSumChunkTokens && present[lane % kSumChunkTokens]);
      if (lane == 0) {
        FenceSystem();
        StoreRelaxed(
            reinterpret_cast<uint64_t*>(call.heap(peer) +
                                        call.layout.ChunkFlag(call.parity, call.peers.rank, chunk)),
            call.epoch << kEpochShift | mask);
      }
    }
    BlockBarrier(team + 1, kTeamThreads);
  }
}

template <typename T>
__device__ void FinishToken(const Call& call, const Sizes& sizes, const CombineArgs& args,
                            int token, int part, const uint64_t* present) {
  const int lane = threadIdx.x % 32;
  const int me = call.peers.rank;
  const TokenRows rows(sizes, args, me, token);
  uint4* to = AsVectors(args.tokens + size_t(token) * sizes.row_bytes);
  const int n = sizes.row_bytes / 16;
  for (int base = lane + part * kStep; base - lane < n; base += kWarpsPerToken * kStep) {
    float total[kVectors][Vector<T>::kSize] = {};
    for (int device = 0; device < sizes.num_devices; ++device) {
      if (device == me) {
        float sum[kVectors][Vector<T>::kSize] = {};
        AddRows<T>(sizes, args, rows.row, rows.weight, rows.mask, base, sum);
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
#pragma unroll
          for (int i = 0; i < Vector<T>::kSize; ++i)
            total[j][i] = __fadd_rn(total[j][i], sum[j][i]);
        }
      } else if (present[device] >> (token % kSumChunkTokens) & 1) {
        const uint4* in = AsVectors(call.own() + call.layout.Row(call.parity, device, token));
#pragma unroll
        for (int j = 0; j < kVectors; ++j) {
          if (base + 32 * j < n) Vector<T>::Add(__ldcg(in + base + 32 * j), total[j]);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (base + 32 * j < n) StoreStreaming(to + base + 32 * j, Vector<T>::Round(total[j]));
    }
  }
}

// A choice's value, from the device that was asked.
__device__ void CollectValues(const Call& call, const Sizes& sizes, const CombineArgs& args,
                              int token) {
  const int lane = threadIdx.x % 32;
  if (lane >= sizes.top_k) return;
  const int choice = token * sizes.top_k + lane;
  const int device = args.choice_device[choice];
  float value = 0.0f;
  if (device == call.peers.rank) {
    const int row = args.row_map[device * sizes.num_choices() + choice];
    if (row >= 0) value = args.row_values[row];
  } else if (device >= 0) {
    value = __ldcg(
        reinterpret_cast<const float*>(call.own() + call.layout.Weights(call.parity, device)) +
        choice);
  }
  args.choice_values[choice] = value;
}

template <typename T>
__device__ void Finish(const Call& call, const Sizes& sizes, const CombineArgs& args, int block,
                       int num_blocks, int team, uint64_t* present) {
  const int warp = threadIdx.x / 32 % kTeamWarps, lane = threadIdx.x % 32;
  const int part = warp % kWarpsPerToken;
  const int chunks = (sizes.num_tokens + kSumChunkTokens - 1) / kSumChunkTokens;
  const Crew crew{team + 1, kTeamThreads, int(threadIdx.x) % kTeamThreads, block, num_blocks};
  for (int chunk = block + num_blocks * team; chunk < chunks; chunk += num_blocks * kTeams) {
    bool ok = true;
    if (warp == 0) {
      for (int device = lane; device < sizes.num_devices; device += 32) {
        if (device == call.peers.rank) continue;
        present[device] =
            call.Wait(reinterpret_cast<const uint64_t*>(
                          call.own() + call.layout.ChunkFlag(call.parity, device, chunk)),
                      kEpochShift, call.epoch, device, kPhaseRows, &ok);
      }
    }
    if (!crew.All(ok)) return;
    const int token = chunk * kSumChunkTokens + warp / kWarpsPerToken;
    if (token < sizes.num_tokens) {
      FinishToken<T>(call, sizes, args, token, part, present);
      if (args.row_values != nullptr && part == 0) CollectValues(call, sizes, args, token);
    }
    crew.Sync();
  }
}

template <typename T>
__global__ __launch_bounds__(kThreads,
                             1) void CombineKernel(const __grid_constant__ Peers peers,
                                                   const __grid_constant__ Layout layout,
                                                   const __grid_constant__ Sizes sizes,
                                                   const __grid_constant__ CombineArgs args,
                                                   const int num_senders) {
  __shared__ uint32_t sent[kTeams][kSumChunkTokens];
  __shared__ uint64_t present[kTeams][kMaxDevices];
  const Call call(peers, layout, args.row_values != nullptr ? kDispatchGrad : kCombine);
  const int team = threadIdx.x / kTeamThreads;
  if (!call.failed()) {
    if (blockIdx.x < num_senders) {
      ExchangeHeaders(call, sizes.num_devices, HeaderHash(call, sizes.num_tokens, args.site));
      Send<T>(call, sizes, args, num_senders, team, sent[team]);
    } else {
      Finish<T>(call, sizes, args, blockIdx.x - num_senders, gridDim.x - num_senders, team,
                present[team]);
    }
  }
  EndCall(call);
}

template <typename T>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const CombineArgs& args) {
  const int num_senders = NumSenders(num_blocks, sizes.num_devices, kSenderPercent);
  CombineKernel<T><<<num_blocks, kThreads, 0, stream>>>(peers, layout, sizes, args, num_senders);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchCombine(cudaStream_t stream, int num_blocks, const Peers& peers,
                          const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                          RowType type) {
  switch (type) {
    case RowType::kBf16:
      return Launch<__nv_bfloat16>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF16:
      return Launch<__half>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF32:
      return Launch<float>(stream, num_blocks, peers, layout, sizes, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxmoe::cuda

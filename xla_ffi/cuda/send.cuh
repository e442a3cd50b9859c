// Sending tokens to the devices that need them: what dispatch and the gradient of combine share.

#ifndef JAXMOE_XLA_FFI_CUDA_SEND_CUH_
#define JAXMOE_XLA_FFI_CUDA_SEND_CUH_

#include "xla_ffi/cuda/bulk.cuh"
#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/protocol.cuh"
#include "xla_ffi/cuda/wire.cuh"

namespace jaxmoe::cuda {

constexpr int kSendBarrier = 2;  // and the next ones

// Copies this device's choices to all peers, one part for each flag.
template <bool kPuts>
__device__ void SendChoices(const Call& call, const Sizes& sizes, const DispatchArgs& args) {
  const int parts = kMetaParts * (sizes.num_devices - 1);
  const int me = call.peers.rank;
  for (int work = blockIdx.x; work < parts; work += gridDim.x) {
    const int part = work % kMetaParts;
    const int peer = (me + 1 + work / kMetaParts) % sizes.num_devices;
    const int per_part = (sizes.num_choices() + kMetaParts - 1) / kMetaParts;
    const int begin = min(part * per_part, sizes.num_choices());
    const int end = min(begin + per_part, sizes.num_choices());
    auto* ids =
        reinterpret_cast<int32_t*>(call.Outbox<kPuts>(peer) + call.layout.Ids(call.parity, me));
    auto* weights =
        reinterpret_cast<float*>(call.Outbox<kPuts>(peer) + call.layout.Weights(call.parity, me));
    for (int i = begin + threadIdx.x; i < end; i += kCopyThreads) {
      ids[i] = args.expert_ids[i];
      weights[i] = args.weights[i];
    }
    __syncthreads();
    if constexpr (kPuts) {
      if (!call.Reaches<kPuts>(peer) && threadIdx.x < 32) {
        FenceSystem();
        PutWarp(ids + begin, ids + begin, (end - begin) * sizeof(*ids), call.peers.pe[peer]);
        PutWarp(weights + begin, weights + begin, (end - begin) * sizeof(*weights),
                call.peers.pe[peer]);
        __syncwarp();
      }
    }
    if (threadIdx.x == 0) {
      FenceSystem();
      call.SetFlag<kPuts>(peer, call.layout.MetaFlag(me, part), call.epoch);
    }
  }
}

// The device that choice k of a token asks for, in lane k; -1 without one and in lanes past K.
template <bool kPlan>
__device__ int DeviceOfChoice(const Sizes& sizes, const DispatchArgs& args, int token) {
  const int lane = threadIdx.x % 32;
  if (lane >= sizes.top_k) return -1;
  const int i = token * sizes.top_k + lane;
  if (!kPlan) return args.choice_device[i];
  const int id = args.expert_ids[i];
  return id >= 0 && id < sizes.num_experts ? id / sizes.num_local_experts : -1;
}

// Lanes whose choice is the first one for its device, which is not `except`.
__device__ inline unsigned FirstForDevices(int device, int except) {
  const unsigned same = __match_any_sync(~0u, device);
  const bool first = threadIdx.x % 32 == __ffs(same) - 1;
  return __ballot_sync(~0u, first && device >= 0 && device != except);
}

// Sends a token to every device that one of its choices asks for; to the own one only if the wire
// changes tokens.
template <bool kPlan, bool kPuts, typename Wire>
__device__ void SendToken(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                          const Wire& wire, CopyRing& ring, int token) {
  const int device = DeviceOfChoice<kPlan>(sizes, args, token);
  const unsigned send = FirstForDevices(device, Wire::kConverts ? -1 : call.peers.rank);
  if (send == 0) return;
  const size_t at = call.layout.Row(call.parity, call.peers.rank, token);
  wire.Send(ring, args.tokens + size_t(token) * sizes.row_bytes, send,
            [&](int i) { return call.Outbox<kPuts>(__shfl_sync(~0u, device, i)) + at; });
}

// Puts a token from this device's outbox to those devices that stores do not reach.
template <bool kPlan>
__device__ void PutToken(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                         int wire_bytes, int token) {
  const int device = DeviceOfChoice<kPlan>(sizes, args, token);
  char* at = call.own() + call.layout.Row(call.parity, call.peers.rank, token);
  for (unsigned rest = FirstForDevices(device, call.peers.rank); rest != 0; rest &= rest - 1) {
    const int peer = __shfl_sync(~0u, device, __ffs(rest) - 1);
    if (!call.Reaches<true>(peer)) PutWarp(at, at, wire_bytes, call.peers.pe[peer]);
  }
}

// How many warps of a block share a chunk. Many senders: as many as it has tokens, so that chunks
// arrive early and nearly in order. Few senders: one, which has all of its tokens under way before
// it waits, or the wire is never full.
__device__ inline int WarpsPerChunk(int num_senders) {
  constexpr int kFewSenders = 8;
  return num_senders > kFewSenders ? kChunkTokens : 1;
}

template <bool kPlan, bool kPuts, typename Wire>
__device__ void SendTokens(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                           const Wire& wire, CopyRing& ring, int sender, int num_senders) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int share = WarpsPerChunk(num_senders);
  const int slot = warp / share, chunks_at_once = kCopyWarps / share;
  const int chunks = (sizes.num_tokens + kChunkTokens - 1) / kChunkTokens;
  for (int chunk = sender + num_senders * slot; chunk < chunks;
       chunk += num_senders * chunks_at_once) {
    const int end = min((chunk + 1) * kChunkTokens, sizes.num_tokens);
    for (int token = chunk * kChunkTokens + warp % share; token < end; token += share) {
      SendToken<kPlan, kPuts>(call, sizes, args, wire, ring, token);
    }
    if (lane == 0) {
      WaitWritten();
      FenceBulk();
    }
    __syncwarp();
    if (share > 1) BlockBarrier(kSendBarrier + slot, share * 32);
    if (warp % share != 0) continue;
    FenceSystem();
    if constexpr (kPuts) {
      for (int token = chunk * kChunkTokens; token < end; ++token) {
        PutToken<kPlan>(call, sizes, args, wire.TokenBytes(), token);
      }
      __syncwarp();
    }
    for (int peer = lane; peer < sizes.num_devices; peer += 32) {
      if (!Wire::kConverts && peer == call.peers.rank) continue;
      call.SetFlag<kPuts>(peer, call.layout.ChunkFlag(call.parity, call.peers.rank, chunk),
                          call.epoch << kEpochShift);
    }
  }
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_SEND_CUH_

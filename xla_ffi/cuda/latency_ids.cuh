// The choices of a low-latency dispatch on their way: from the operands to the peers, and to where
// each block makes its plan. latency.cuh says what a vector of ids is.

#ifndef JAXMOE_XLA_FFI_CUDA_LATENCY_IDS_CUH_
#define JAXMOE_XLA_FFI_CUDA_LATENCY_IDS_CUH_

#include "xla_ffi/cuda/latency.cuh"
#include "xla_ffi/cuda/latency_plan.cuh"
#include "xla_ffi/cuda/latency_wire.cuh"

namespace jaxmoe::cuda {

// A peer's number in the order in which this device turns to them.
__device__ inline int PeerAt(const LatencyCall& call, const Sizes& sizes, int i) {
  const int peer = call.peers.rank + 1 + i;
  return peer < sizes.num_devices ? peer : peer - sizes.num_devices;
}

// Local expert of an id at a device, or kNotMyChoice.
__device__ inline int LocalExpert(const Sizes& sizes, int id, int device) {
  const int local = id - device * sizes.num_local_experts;
  return local >= 0 && local < sizes.num_local_experts ? local : kNotMyChoice;
}

// Tells the peers this device's choices, a share for each block. The constructor loads the first
// ones of a thread.
class IdSender {
 public:
  __device__ IdSender(const DispatchParams& params, int num_blocks)
      : params_(params),
        sizes_(params.sizes),
        all_(Layout::IdVectors(sizes_.num_choices()) * (sizes_.num_devices - 1)),
        stride_(num_blocks * kLatencyThreads),
        number_(blockIdx.x * kLatencyThreads + threadIdx.x) {
    Load();
  }

  __device__ void Send(const LatencyCall& call) {
    while (number_ < all_) {
      const int peer = PeerAt(call, sizes_, turn_);
      uint64_t packed = 0;
#pragma unroll
      for (int j = 0; j < kIdsPerVector; ++j) {
        packed |= uint64_t(LocalExpert(sizes_, ids_[j], peer) & kNoExpert) << (j * kExpertBits);
      }
      StoreVector(call.heap(peer) + call.layout.IdVector(call.parity, call.peers.rank, at_),
                  make_uint4(uint32_t(packed), uint32_t(packed >> 32), uint32_t(call.epoch),
                             uint32_t(call.epoch >> 32)));
      number_ += stride_;
      Load();
    }
  }

 private:
  __device__ void Load() {
    if (number_ >= all_) return;
    turn_ = params_.per_id_vector.Divide(number_, &at_);
#pragma unroll
    for (int j = 0; j < kIdsPerVector; ++j) {
      const int choice = at_ * kIdsPerVector + j;
      ids_[j] = choice < sizes_.num_choices() ? LoadEarly(params_.args.expert_ids + choice) : -1;
    }
  }

  const DispatchParams& params_;
  const Sizes& sizes_;
  const int all_, stride_;
  int number_, turn_, at_;
  int ids_[kIdsPerVector];
};

// Waits for the peers' headers and choices, by all threads of a block.
__device__ inline void ReceiveIds(const LatencyCall& call, const DispatchParams& params,
                                  int32_t* words, bool* ok) {
  const Sizes& sizes = params.sizes;
  const int num_peers = sizes.num_devices - 1;
  const int all = Layout::IdVectors(sizes.num_choices()) * num_peers;
  // The last threads look for the headers.
  for (int i = kLatencyThreads - 1 - threadIdx.x; i < num_peers && *ok; i += kLatencyThreads) {
    const int peer = PeerAt(call, sizes, i);
    Waiting waiting;
    uint64_t header = call.Header(peer);
    while (!call.IsHere(header) && *ok) {
      *ok = call.KeepWaiting(&waiting, peer, kPhaseHeader);
      header = call.Header(peer);
    }
  }
  for (int i = threadIdx.x; i < all && *ok; i += kLatencyThreads) {
    int at;
    const int peer = PeerAt(call, sizes, params.per_id_vector.Divide(i, &at));
    const char* place = call.own() + call.layout.IdVector(call.parity, peer, at);
    Waiting waiting;
    uint4 v = LoadVector(place);
    while ((uint64_t{v.w} << 32 | v.z) != call.epoch && *ok) {
      *ok = call.KeepWaiting(&waiting, peer, kPhaseMeta);
      v = LoadVector(place);
    }
    const uint64_t packed = uint64_t{v.y} << 32 | v.x;
    const int first = at * kIdsPerVector;
#pragma unroll
    for (int j = 0; j < kIdsPerVector; ++j) {
      const int expert = packed >> (j * kExpertBits) & kNoExpert;
      if (first + j < sizes.num_choices()) {
        words[peer * sizes.num_choices() + first + j] = expert == kNoExpert ? kNotMyChoice : expert;
      }
    }
  }
}

// Own choices, for the plan; returns how many of this thread's are invalid.
__device__ inline int ReadOwnChoices(const Sizes& sizes, const DispatchArgs& args, int rank,
                                     int32_t* words) {
  int num_invalid = 0;
  for (int i = threadIdx.x; i < sizes.num_choices(); i += kLatencyThreads) {
    const int id = LoadEarly(args.expert_ids + i);
    words[rank * sizes.num_choices() + i] = LocalExpert(sizes, id, rank);
    num_invalid += id < -1 || id >= sizes.num_experts;
  }
  return num_invalid;
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_LATENCY_IDS_CUH_

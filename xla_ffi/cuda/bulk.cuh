// Bulk copies (TMA): one thread moves a piece of a row through shared memory, and the copy engine
// does the rest. https://docs.nvidia.com/cuda/parallel-thread-execution, cp.async.bulk.
//
// The copy engine is a proxy of its own: its accesses are ordered with ordinary ones only by the
// fences and waits below.

#ifndef JAXMOE_XLA_FFI_CUDA_BULK_CUH_
#define JAXMOE_XLA_FFI_CUDA_BULK_CUH_

#include <cstdint>

namespace jaxmoe::cuda {

__device__ __forceinline__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Ordinary accesses before this come before bulk copies after it.
__device__ __forceinline__ void FenceBulk() { asm volatile("fence.proxy.async;" ::: "memory"); }

// The same for accesses to this block's shared memory alone: it waits for no store to global
// memory.
__device__ __forceinline__ void FenceBulkShared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// A barrier in shared memory whose phase is over after `count` arrivals.
__device__ __forceinline__ void InitBarrier(uint64_t* barrier, int count = 1) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(count)
               : "memory");
}

// What this thread did, or saw at a barrier, comes before what those do who wait for the phase.
__device__ __forceinline__ void Arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SharedAddress(barrier)) : "memory");
}

// How a bulk copy treats the second-level cache: what it moves goes first when room is needed. For
// what this device does not read again in the same call, so that what peers write stays until it is
// read.
__device__ __forceinline__ uint64_t EvictFirst() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Starts copying `bytes` to shared memory; `barrier` completes a phase when they are there.
__device__ __forceinline__ void StartLoad(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier))
      : "memory");
}
__device__ __forceinline__ void StartLoad(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier, uint64_t policy) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)),
      "r"(bytes)
      : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
      "[%1], %2, [%3], %4;" ::"r"(SharedAddress(to)),
      "l"(from), "r"(bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void WaitLoad(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{ .reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again; }" ::"r"(SharedAddress(barrier)),
      "r"(phase)
      : "memory");
}

// Whether the phase is over.
__device__ __forceinline__ bool IsOver(uint64_t* barrier, uint32_t phase) {
  uint32_t over;
  asm volatile(
      "{ .reg .pred p;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p; }"
      : "=r"(over)
      : "r"(SharedAddress(barrier)), "r"(phase)
      : "memory");
  return over != 0;
}

// Starts copying from shared memory; belongs to the thread's next group.
__device__ __forceinline__ void StartStore(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(SharedAddress(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void StartStore(void* to, const void* from, uint32_t bytes,
                                           uint64_t policy) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(to),
      "r"(SharedAddress(from)), "r"(bytes), "l"(policy)
      : "memory");
}
__device__ __forceinline__ void EndGroup() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until all but the `kPending` latest groups have read their shared memory.
template <int kPending>
__device__ __forceinline__ void WaitRead() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Until all groups have written what they copy.
__device__ __forceinline__ void WaitWritten() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// A warp's ring of buffers, driven by one lane: Load pieces in order, at most kBuffers ahead; for
// each piece Loaded, then StartStore from it any number of times, then Next. Other lanes may call
// Loaded and Next as well, for every piece, to read and write it in between.
template <int kBuffers, int kBytes>
class BulkRing {
 public:
  static constexpr int kSharedBytes = kBuffers * kBytes;

  __device__ BulkRing(char* buffers, uint64_t* barriers) : buffers_(buffers), barriers_(barriers) {}

  __device__ void Init() {
    for (int i = 0; i < kBuffers; ++i) InitBarrier(&barriers_[i]);
    FenceBulk();
  }
  __device__ void Load(const char* from, uint32_t bytes) {
    const uint32_t i = NextBuffer();
    StartLoad(buffers_ + i * kBytes, from, bytes, &barriers_[i]);
  }
  __device__ void Load(const char* from, uint32_t bytes, uint64_t policy) {
    const uint32_t i = NextBuffer();
    StartLoad(buffers_ + i * kBytes, from, bytes, &barriers_[i], policy);
  }
  __device__ char* Loaded() {
    const uint32_t i = stored_ % kBuffers;
    WaitLoad(&barriers_[i], stored_ / kBuffers % 2);
    return buffers_ + i * kBytes;
  }
  __device__ void Next() {
    EndGroup();
    ++stored_;
  }

 private:
  __device__ uint32_t NextBuffer() {
    WaitRead<kBuffers - 2>();  // the stores of the piece that had this buffer before
    return loaded_++ % kBuffers;
  }
  char* buffers_;       // [kBuffers][kBytes]
  uint64_t* barriers_;  // [kBuffers]
  uint32_t loaded_ = 0;
  uint32_t stored_ = 0;
};

// A warp's ring of buffers for what it reads itself: all lanes Load pieces in order until the ring
// is Full; for each piece Wait, read, Release.
template <int kBuffers, int kBytes>
class LoadRing {
 public:
  static constexpr int kNumBuffers = kBuffers;
  static constexpr int kSharedBytes = kBuffers * kBytes;

  __device__ LoadRing(char* buffers, uint64_t* barriers)
      : buffers_(buffers), barriers_(barriers), policy_(EvictFirst()) {}

  __device__ void Init() {
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < kBuffers; ++i) InitBarrier(&barriers_[i]);
      FenceBulk();
    }
    __syncwarp();
  }
  __device__ bool Full() const { return num_loaded_ - num_released_ == kBuffers; }
  __device__ void Load(const char* from, uint32_t bytes) {
    if (threadIdx.x % 32 == 0) {
      StartLoad(buffers_ + load_at_ * kBytes, from, bytes, &barriers_[load_at_], policy_);
    }
    load_at_ = load_at_ + 1 == kBuffers ? 0 : load_at_ + 1;
    ++num_loaded_;
  }
  __device__ const uint4* Wait() {
    WaitLoad(&barriers_[wait_at_], phase_);
    return reinterpret_cast<const uint4*>(buffers_ + wait_at_ * kBytes);
  }
  __device__ void Release() {
    __syncwarp();
    if (++wait_at_ == kBuffers) {
      wait_at_ = 0;
      phase_ ^= 1;
    }
    ++num_released_;
  }
  // Waits for all loads; needed before the block ends.
  __device__ void Drain() {
    while (num_released_ != num_loaded_) {
      Wait();
      Release();
    }
  }

 private:
  char* buffers_;       // [kBuffers][kBytes]
  uint64_t* barriers_;  // [kBuffers]
  uint64_t policy_;
  uint32_t load_at_ = 0, wait_at_ = 0, phase_ = 0;
  uint32_t num_loaded_ = 0, num_released_ = 0;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_BULK_CUH_

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

__device__ __forceinline__ void InitBarrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
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

__device__ __forceinline__ void WaitLoad(uint64_t* barrier, uint32_t phase) {
  asm volatile(
      "{ .reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@!p bra again; }" ::"r"(SharedAddress(barrier)),
      "r"(phase)
      : "memory");
}

// Starts copying from shared memory; belongs to the thread's next group.
__device__ __forceinline__ void StartStore(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(SharedAddress(from)), "r"(bytes)
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
// each piece Loaded, then StartStore from it any number of times, then Next.
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
    WaitRead<kBuffers - 2>();  // the stores of the piece that had this buffer before
    const uint32_t i = loaded_++ % kBuffers;
    StartLoad(buffers_ + i * kBytes, from, bytes, &barriers_[i]);
  }
  __device__ const char* Loaded() {
    const uint32_t i = stored_ % kBuffers;
    WaitLoad(&barriers_[i], stored_ / kBuffers % 2);
    return buffers_ + i * kBytes;
  }
  __device__ void Next() {
    EndGroup();
    ++stored_;
  }

 private:
  char* buffers_;       // [kBuffers][kBytes]
  uint64_t* barriers_;  // [kBuffers]
  uint32_t loaded_ = 0;
  uint32_t stored_ = 0;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_BULK_CUH_

// How kernels reach peers that plain stores do not: NVSHMEM's device functions, behind those that
// protocol.cuh declares, so that its headers stay out of the kernels.

#include <nvshmem.h>
#include <nvshmemx.h>

#include "xla_ffi/cuda/protocol.cuh"

namespace jaxmoe::cuda {

__device__ void PutWarp(void* place, const void* source, size_t bytes, int pe) {
  nvshmemx_putmem_nbi_warp(place, source, bytes, pe);
}

__device__ void PutFlag(uint64_t* place, uint64_t value, int pe) {
  nvshmem_fence();
  nvshmemx_signal_op(place, value, NVSHMEM_SIGNAL_SET, pe);
}

__device__ void Quiet() { nvshmem_quiet(); }

}  // namespace jaxmoe::cuda

// The kernels' operands, and the functions that launch them; for host and device code.

#ifndef JAXMOE_XLA_FFI_CUDA_LAUNCH_H_
#define JAXMOE_XLA_FFI_CUDA_LAUNCH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "xla_ffi/common/quantize.h"
#include "xla_ffi/cuda/layout.h"

namespace jaxmoe::cuda {

enum class RowType { kBf16, kF16, kF32 };

// What a kernel knows of its group; passed by value.
struct Peers {
  int puts;  // 1 if a heap is null
  int rank;
  uint64_t timeout_ns;
  ErrorRecord* error;
  char* heap[kMaxDevices];  // [R] base of each device's heap; null if plain stores do not reach it
  int pe[kMaxDevices];      // [R] number of its process in the NVSHMEM world
};

// Sizes of one call.
struct Sizes {
  int num_tokens;  // T
  int top_k;       // K
  int capacity;    // C
  int num_devices, num_experts, num_local_experts;
  int row_bytes;

  JAXMOE_HOST_DEVICE int num_choices() const { return num_tokens * top_k; }
};

struct PlanArrays {
  int32_t* group_sizes;    // [L]
  int32_t* num_rows;       // []
  int32_t* num_dropped;    // []
  int32_t* num_invalid;    // []
  int32_t* row_map;        // [R, T, K]
  int32_t* row_source;     // [C]
  int32_t* choice_device;  // [T, K]
};

// How tokens travel, and the rows that are made of them.
struct WireArgs {
  WireFormat format;  // the gradient: kWirePlain
  RowType type;       // of the tokens
  int dim;            // D; with an FP8 wire a multiple of 16
  float* row_scales;  // [C, ceil(D / 128)] out: of rows that are handed over in FP8; else null
};

// dispatch and the gradient of combine. The latter reads row_map from `plan`.
struct DispatchArgs {
  uint32_t site;
  const char* tokens;  // [T, D] x or d_y
  char* rows;          // [C, D] out: rows or d_rows
  float* row_weights;  // [C] out: row_weights or d_row_weights
  PlanArrays plan;     // dispatch: out
  WireArgs wire;
  const int32_t* expert_ids;     // [T, K] dispatch
  const float* weights;          // [T, K] dispatch
  const int32_t* choice_device;  // [T, K] gradient
  const int32_t* num_rows;       // [] gradient
  const char* expert_rows;       // [C, D] gradient
  const float* row_weights_in;   // [C] gradient
  int32_t* pending;              // [4] split: out of the start, and what the done goes by
};

// combine and the gradient of dispatch.
struct CombineArgs {
  uint32_t site;
  const char* rows;              // [C, D]
  const float* row_weights;      // [C] factors; null for all one
  const float* row_values;       // [C] gradient: goes to the choices
  const int32_t* row_map;        // [R, T, K]
  const int32_t* choice_device;  // [T, K] gradient
  char* tokens;                  // [T, D] out
  float* choice_values;          // [T, K] out, gradient
  int32_t* pending;              // [4] split: as in dispatch
};

// Blocks that send, of `num_blocks`: `percent` of them, but eight where there are few, since that
// many are what the wire takes. None on one device; otherwise at least one, and one is left for the
// rest.
inline int NumSenders(int num_blocks, int num_devices, int percent) {
  if (num_devices == 1) return 0;
  const int few = num_blocks / 3 < 8 ? num_blocks / 3 : 8;
  const int share = num_blocks * percent / 100;
  const int wanted = share > few ? share : few;
  return wanted < 1 ? 1 : wanted;
}

cudaError_t LaunchDispatch(cudaStream_t stream, int num_blocks, const Peers& peers,
                           const Layout& layout, const Sizes& sizes, const DispatchArgs& args);
cudaError_t LaunchCombineGrad(cudaStream_t stream, int num_blocks, const Peers& peers,
                              const Layout& layout, const Sizes& sizes, const DispatchArgs& args,
                              RowType type);
// combine, or the gradient of dispatch if `args.row_values` is not null.
cudaError_t LaunchCombine(cudaStream_t stream, int num_blocks, const Peers& peers,
                          const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                          RowType type);

// dispatch and combine by the low-latency kernels, whether or not `sizes` are those they pay for.
// All devices of a call must take the same kernels.
cudaError_t LaunchLatencyDispatch(cudaStream_t stream, int num_blocks, const Peers& peers,
                                  const Layout& layout, const Sizes& sizes,
                                  const DispatchArgs& args);
cudaError_t LaunchLatencyCombine(cudaStream_t stream, int num_blocks, const Peers& peers,
                                 const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                                 RowType type);

// The two halves of those, for calls of which other work lies between sending and receiving. A
// start needs no results but `pending`, a done all operands of the whole call.
cudaError_t LaunchDispatchStart(cudaStream_t stream, int num_blocks, const Peers& peers,
                                const Layout& layout, const Sizes& sizes, const DispatchArgs& args);
cudaError_t LaunchDispatchDone(cudaStream_t stream, int num_blocks, const Peers& peers,
                               const Layout& layout, const Sizes& sizes, const DispatchArgs& args);
cudaError_t LaunchCombineStart(cudaStream_t stream, int num_blocks, const Peers& peers,
                               const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                               RowType type);
cudaError_t LaunchCombineDone(cudaStream_t stream, int num_blocks, const Peers& peers,
                              const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                              RowType type);

// Whether a call takes the low-latency kernels, which need plain stores to all peers.
inline bool TakesLatencyKernels(const Peers& peers, const Layout& layout, const Sizes& sizes) {
  return !peers.puts && sizes.num_tokens <= layout.latency_tokens;
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_LAUNCH_H_

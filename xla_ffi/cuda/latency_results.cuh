// What a low-latency dispatch writes beside the rows that it has, and instead of them.

#ifndef JAXMOE_XLA_FFI_CUDA_LATENCY_RESULTS_CUH_
#define JAXMOE_XLA_FFI_CUDA_LATENCY_RESULTS_CUH_

#include "xla_ffi/cuda/latency_plan.cuh"
#include "xla_ffi/cuda/latency_wire.cuh"

namespace jaxmoe::cuda {

// Of the grid's warps that share a role, block by block: neighbours are in different blocks.
struct Worker {
  int number, num_workers;
  bool in_last_block;

  __device__ Worker(int block, int num_blocks)
      : number(threadIdx.x / 32 * num_blocks + block),
        num_workers(num_blocks * kLatencyWarps),
        in_last_block(block == num_blocks - 1) {}
  __device__ bool IsLast() const { return number == num_workers - 1; }
};

// Bytes and scales of a row as it is handed over.
__device__ inline int RowBytes(const Sizes& sizes, const DispatchArgs& args) {
  return args.wire.row_scales == nullptr ? sizes.row_bytes : args.wire.dim;
}
__device__ inline int NumScales(const DispatchArgs& args) {
  return args.wire.row_scales == nullptr ? 0 : int(quantize::NumBlocks(args.wire.dim));
}

// Zeros behind the last row, and the plan's entries there; a share for each thread.
__device__ inline void EmptyTail(const Sizes& sizes, const DispatchArgs& args, int num_rows,
                                 int thread, int num_threads) {
  const int vectors = RowBytes(sizes, args) / 16, scales = NumScales(args);
  uint4* rows = AsVectors(args.rows) + size_t(num_rows) * vectors;
  const int64_t end = int64_t{sizes.capacity - num_rows} * vectors;
  for (int64_t i = thread; i < end; i += num_threads) {
    StoreStreaming(rows + i, make_uint4(0, 0, 0, 0));
  }
  for (int r = num_rows + thread; r < sizes.capacity; r += num_threads) {
    args.plan.row_source[r] = -1;
    args.row_weights[r] = 0.0f;
    for (int i = 0; i < scales; ++i) args.wire.row_scales[size_t(r) * scales + i] = 0.0f;
  }
}

// The rest of the results, by warps that have nothing else to do if there are enough. `num_invalid`
// is what this thread has counted.
__device__ inline void WriteRest(const DispatchParams& params, const LocalPlan& plan,
                                 int num_invalid, const Worker& worker) {
  const Sizes& sizes = params.sizes;
  const PlanArrays& arrays = params.args.plan;
  const int lane = threadIdx.x % 32;
  int jobs = sizes.num_tokens * params.pieces * sizes.num_devices;
  if (jobs > worker.num_workers / 2) jobs = 0;
  if (worker.number >= jobs) {
    EmptyTail(sizes, params.args, plan.num_rows(), (worker.number - jobs) * 32 + lane,
              (worker.num_workers - jobs) * 32);
  }
  if (!worker.in_last_block) return;
  __shared__ int invalid[kLatencyWarps];
  num_invalid = __reduce_add_sync(~0u, num_invalid);
  if (lane == 0) invalid[threadIdx.x / 32] = num_invalid;
  __syncthreads();
  const int thread = kLatencyThreads - 1 - threadIdx.x;
  for (int e = thread; e < sizes.num_local_experts; e += kLatencyThreads) {
    arrays.group_sizes[e] = plan.GroupSize(e);
  }
  if (thread == 0) {
    *arrays.num_rows = plan.num_rows();
    *arrays.num_dropped = plan.num_addressed() - plan.num_rows();
    for (int w = 1; w < kLatencyWarps; ++w) invalid[0] += invalid[w];
    *arrays.num_invalid = invalid[0];
  }
}

// Where there is no plan: NaN, and a plan without rows; a share for each block.
static __device__ __noinline__ void Poison(const Sizes& sizes, const DispatchArgs& args,
                                           int num_blocks) {
  const auto fill = [num_blocks](auto* array, size_t n, auto value) {
    const size_t stride = size_t(num_blocks) * kLatencyThreads;
    for (size_t i = blockIdx.x * kLatencyThreads + threadIdx.x; i < n; i += stride) {
      array[i] = value;
    }
  };
  fill(AsVectors(args.rows), size_t(sizes.capacity) * (RowBytes(sizes, args) / 16),
       make_uint4(~0u, ~0u, ~0u, ~0u));
  fill(args.wire.row_scales, size_t(sizes.capacity) * NumScales(args), __int_as_float(-1));
  fill(args.row_weights, sizes.capacity, __int_as_float(-1));
  fill(args.plan.group_sizes, sizes.num_local_experts, 0);
  fill(args.plan.num_rows, 1, 0);
  fill(args.plan.num_dropped, 1, 0);
  fill(args.plan.num_invalid, 1, 0);
  fill(args.plan.row_map, size_t(sizes.num_devices) * sizes.num_choices(), -1);
  fill(args.plan.row_source, sizes.capacity, -1);
  fill(args.plan.choice_device, sizes.num_choices(), -1);
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_LATENCY_RESULTS_CUH_

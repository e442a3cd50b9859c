// The routing plan on the device; jaxmoe/reference.py specifies it.
//
// Positions come from counts, never from atomics on positions: choices are cut into contiguous
// ranges, one for each warp of the grid in order, and every warp counts its range per expert. A
// choice's row is the rows of earlier experts, plus the same expert's rows in earlier warps, plus
// those before it in its warp.

#ifndef JAXMOE_XLA_FFI_CUDA_PLAN_CUH_
#define JAXMOE_XLA_FFI_CUDA_PLAN_CUH_

#include <climits>

#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/protocol.cuh"

namespace jaxmoe::cuda {

// Choices that all devices made; own ones from the operands, others from the heap.
struct Choices {
  const Call& call;
  const Sizes& sizes;
  const int32_t* own_ids;
  const float* own_weights;

  __device__ int32_t Id(int s, int i) const {
    if (s == call.peers.rank) return own_ids[i];
    return __ldcg(reinterpret_cast<const int32_t*>(call.own() + call.layout.Ids(call.parity, s)) +
                  i);
  }
  __device__ float Weight(int s, int i) const {
    if (s == call.peers.rank) return own_weights[i];
    return __ldcg(reinterpret_cast<const float*>(call.own() + call.layout.Weights(call.parity, s)) +
                  i);
  }
  // The local expert of a choice, or -1. `choice` counts over all devices.
  __device__ int LocalExpert(int choice) const {
    const int s = choice / sizes.num_choices();
    const int id = Id(s, choice - s * sizes.num_choices());
    const int local = id - call.peers.rank * sizes.num_local_experts;
    return local >= 0 && local < sizes.num_local_experts ? local : -1;
  }
  // Its place in the order (choice, token, source), by which choices are kept.
  __device__ int Priority(int choice) const {
    const int s = choice / sizes.num_choices();
    const int i = choice - s * sizes.num_choices();
    const int t = i / sizes.top_k;
    return ((i - t * sizes.top_k) * sizes.num_tokens + t) * sizes.num_devices + s;
  }
  // Whether the choice at this place in that order is for this device.
  __device__ bool OwnAtPriority(int priority) const {
    const int s = priority % sizes.num_devices;
    const int rest = priority / sizes.num_devices;
    const int t = rest % sizes.num_tokens;
    const int k = rest / sizes.num_tokens;
    return LocalExpert(s * sizes.num_choices() + t * sizes.top_k + k) >= 0;
  }
};

// The first priority that is dropped when more than `capacity` choices came: the place of choice
// number `capacity` (from 0) among this device's in the order of priorities. All of the crew get
// it. Rare and therefore simple: every block counts on its own.
__device__ inline int FirstDropped(const Choices& choices, const Crew& crew, int* scratch) {
  const int total = choices.sizes.num_devices * choices.sizes.num_choices();
  const int per_thread = (total + crew.num_threads - 1) / crew.num_threads;
  const int begin = min(crew.thread * per_thread, total), end = min(begin + per_thread, total);
  int count = 0;
  for (int p = begin; p < end; ++p) count += choices.OwnAtPriority(p);
  scratch[crew.thread] = count;
  crew.Sync();
  int before = 0;
  for (int i = 0; i < crew.thread; ++i) before += scratch[i];
  crew.Sync();
  const int capacity = choices.sizes.capacity;
  if (before <= capacity && capacity < before + count) {
    for (int p = begin; p < end; ++p) {
      if (!choices.OwnAtPriority(p)) continue;
      if (before++ == capacity) scratch[0] = p;
    }
  }
  crew.Sync();
  const int first_dropped = scratch[0];
  crew.Sync();
  return first_dropped;
}

// Counts this warp's range into `counts` [L]. Choices at `first_dropped` or later do not count.
__device__ inline void CountRange(const Choices& choices, int begin, int end, int first_dropped,
                                  int32_t* counts) {
  const int lane = threadIdx.x % 32;
  for (int e = lane; e < choices.sizes.num_local_experts; e += 32) counts[e] = 0;
  __syncwarp();
  for (int base = begin; base < end; base += 32) {
    const int choice = base + lane;
    int expert = choice < end ? choices.LocalExpert(choice) : -1;
    if (expert >= 0 && choices.Priority(choice) >= first_dropped) expert = -1;
    const unsigned same = __match_any_sync(~0u, expert);
    if (expert >= 0 && lane == __ffs(same) - 1) counts[expert] += __popc(same);
    __syncwarp();
  }
}

// Exclusive sums of counts[0 … n) in place by one warp; returns the total.
__device__ inline int WarpExclusiveSums(int32_t* counts, int n) {
  const int lane = threadIdx.x % 32;
  int total = 0;
  for (int base = 0; base < n; base += 32) {
    const int i = base + lane;
    const int value = i < n ? counts[i] : 0;
    int sum = value;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, sum, offset);
      if (lane >= offset) sum += other;
    }
    if (i < n) counts[i] = total + sum - value;
    total += __shfl_sync(~0u, sum, 31);
  }
  return total;
}

// What describes the device's own choices; a share for each block. Invalid ones are rare, and
// counted in Control until the plan is complete.
__device__ inline void DescribeOwnChoices(const Choices& choices, const PlanArrays& plan,
                                          const Crew& crew) {
  const Sizes& sizes = choices.sizes;
  for (int i = crew.block * crew.num_threads + crew.thread; i < sizes.num_choices();
       i += crew.num_blocks * crew.num_threads) {
    const int id = choices.own_ids[i];
    const bool valid = id >= 0 && id < sizes.num_experts;
    plan.choice_device[i] = valid ? id / sizes.num_local_experts : -1;
    if (!valid && id != -1) atomicAdd(&choices.call.control()->num_invalid, 1u);
  }
}

// Rows of earlier blocks and of all blocks for each expert, from block_counts [num_blocks][L].
__device__ inline void SumBlockCounts(const int32_t* block_counts, int num_blocks, int num_local,
                                      const Crew& crew, int32_t* before, int32_t* total) {
  constexpr int kAtOnce = 8;  // loads in flight: the latency is what this takes
  for (int e = crew.thread; e < num_local; e += crew.num_threads) before[e] = total[e] = 0;
  crew.Sync();
  const int groups = max(crew.num_threads / num_local, 1);
  for (int i = crew.thread; i < groups * num_local; i += crew.num_threads) {
    const int group = i / num_local, e = i - group * num_local;
    int earlier = 0, sum = 0;
    for (int first = group; first < num_blocks; first += groups * kAtOnce) {
      int32_t counts[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int b = first + groups * j;
        counts[j] = b < num_blocks ? __ldcg(&block_counts[b * num_local + e]) : 0;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + groups * j < crew.block) earlier += counts[j];
        sum += counts[j];
      }
    }
    atomicAdd(&before[e], earlier);
    atomicAdd(&total[e], sum);
  }
  crew.Sync();
}

// Makes the plan and the row weights with all crews. `shared` has (warps of the crew + 2) * L
// + threads of the crew words. Returns the number of rows.
__device__ inline int MakePlan(const Choices& choices, const PlanArrays& plan, float* row_weights,
                               const Crew& crew, int32_t* shared, bool* ok) {
  const Call& call = choices.call;
  const Sizes& sizes = choices.sizes;
  const int num_local = sizes.num_local_experts;
  int32_t* warp_counts = shared + crew.warp() * num_local;
  int32_t* base =
      shared + crew.num_warps() * num_local;  // [L] rows of earlier blocks, then offsets
  int32_t* total = base + num_local;          // [L]
  int32_t* scratch = total + num_local;       // [threads]
  int32_t* block_counts = reinterpret_cast<int32_t*>(call.own() + call.layout.block_counts);

  const int all = sizes.num_devices * sizes.num_choices();
  const int num_warps = crew.num_blocks * crew.num_warps();
  // Whole steps of 32, so that only some blocks have choices when there are few.
  const int per_warp = ((all + num_warps - 1) / num_warps + 31) / 32 * 32;
  const int per_block = per_warp * crew.num_warps();
  const int num_counting = (all + per_block - 1) / per_block;
  const int warp = crew.block * crew.num_warps() + crew.warp();
  const int begin = min(warp * per_warp, all), end = min(begin + per_warp, all);

  int first_dropped = INT_MAX;
  int num_rows = 0, num_addressed = 0;
  for (int round = 0; round < 2; ++round) {  // the second one only if choices are dropped
    CountRange(choices, begin, end, first_dropped, warp_counts);
    crew.Sync();
    for (int e = crew.thread; crew.block < num_counting && e < num_local; e += crew.num_threads) {
      int sum = 0;
      for (int w = 0; w < crew.num_warps(); ++w) sum += shared[w * num_local + e];
      block_counts[crew.block * num_local + e] = sum;
    }
    *ok = GridBarrier(call, crew, *ok);
    if (!*ok) return 0;
    SumBlockCounts(block_counts, num_counting, num_local, crew, base, total);
    if (crew.block == 0) {
      for (int e = crew.thread; e < num_local; e += crew.num_threads)
        plan.group_sizes[e] = total[e];
      crew.Sync();
    }
    if (crew.warp() == 0) {
      const int sum = WarpExclusiveSums(total, num_local);
      if (crew.thread == 0) scratch[0] = sum;
    }
    crew.Sync();
    num_rows = scratch[0];
    crew.Sync();
    if (round == 0) num_addressed = num_rows;
    if (num_rows <= sizes.capacity) break;
    first_dropped = FirstDropped(choices, crew, scratch);
    *ok = GridBarrier(call, crew, *ok);  // everybody has read the counts
    if (!*ok) return 0;
  }

  // From counts to first rows, for each warp and expert.
  for (int e = crew.thread; e < num_local; e += crew.num_threads) {
    int row = total[e] + base[e];
    for (int w = 0; w < crew.num_warps(); ++w) {
      const int count = shared[w * num_local + e];
      shared[w * num_local + e] = row;
      row += count;
    }
  }
  crew.Sync();
  const int lane = threadIdx.x % 32;
  for (int from = begin; from < end; from += 32) {
    const int choice = from + lane;
    int expert = choice < end ? choices.LocalExpert(choice) : -1;
    if (expert >= 0 && choices.Priority(choice) >= first_dropped) expert = -1;
    const unsigned same = __match_any_sync(~0u, expert);
    int row = -1;
    if (expert >= 0) row = warp_counts[expert] + __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (expert >= 0 && lane == __ffs(same) - 1) warp_counts[expert] += __popc(same);
    __syncwarp();
    if (choice < end) plan.row_map[choice] = row;
    if (row >= 0) {
      const int s = choice / sizes.num_choices();
      plan.row_source[row] = choice;
      row_weights[row] = choices.Weight(s, choice - s * sizes.num_choices());
    }
  }
  const int stride = crew.num_blocks * crew.num_threads;
  for (int r = num_rows + crew.block * crew.num_threads + crew.thread; r < sizes.capacity;
       r += stride) {
    plan.row_source[r] = -1;
    row_weights[r] = 0.0f;
  }
  if (crew.block == 0 && crew.thread == 0) {
    *plan.num_rows = num_rows;
    *plan.num_dropped = num_addressed - num_rows;
    *plan.num_invalid = *reinterpret_cast<volatile uint32_t*>(&call.control()->num_invalid);
    call.control()->num_invalid = 0;
  }
  return num_rows;
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_PLAN_CUH_

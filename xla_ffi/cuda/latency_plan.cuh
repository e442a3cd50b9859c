// The routing plan in one block's shared memory: every block of a low-latency dispatch makes it for
// itself, which is quicker than a barrier of the grid. jaxmoe/reference.py specifies it.
//
// As in plan.cuh, positions come from counts: the choices of all devices are cut into one range for
// each warp, and a choice's row is the rows of earlier experts, plus the same expert's in earlier
// ranges, plus those before it in its range. If there are few choices, each warp rather counts for
// its token's own choices how many of all come before them.

#ifndef JAXMOE_XLA_FFI_CUDA_LATENCY_PLAN_CUH_
#define JAXMOE_XLA_FFI_CUDA_LATENCY_PLAN_CUH_

#include <climits>

#include "xla_ffi/cuda/latency.cuh"

namespace jaxmoe::cuda {

constexpr int kExpertBits = 12;
constexpr int kNoExpert = (1 << kExpertBits) - 1;
// Instead of a local expert.
constexpr int kNotMyChoice = -1, kDroppedChoice = -2;
static_assert(kMaxLocalExperts <= kNoExpert, "an id for none");
static_assert(kExpertBits * kIdsPerVector < 64, "beside the epoch");
static_assert(kMaxLatencyChoices / kLatencyWarps <= 1 << (31 - kExpertBits), "number in a range");

// Marks as dropped the choices that come after number C of this device's (from 0) in the order
// (choice, token, device). By all threads of a block; `words` is that of LocalPlan. Rare and
// therefore simple, and not inline.
static __device__ __noinline__ void Drop(const Sizes& sizes, int32_t* words, int32_t* scratch) {
  const int num = sizes.num_devices * sizes.num_choices();
  const auto choice_at = [&](int priority) {
    const int rest = priority / sizes.num_devices, s = priority - rest * sizes.num_devices;
    const int k = rest / sizes.num_tokens, t = rest - k * sizes.num_tokens;
    return s * sizes.num_choices() + t * sizes.top_k + k;
  };
  const int per_thread = (num + kLatencyThreads - 1) / kLatencyThreads;
  const int begin = min(int(threadIdx.x) * per_thread, num), end = min(begin + per_thread, num);
  int count = 0;
  for (int p = begin; p < end; ++p) count += words[choice_at(p)] >= 0;
  scratch[threadIdx.x] = count;
  __syncthreads();
  int before = 0;
  for (int i = 0; i < threadIdx.x; ++i) before += scratch[i];
  for (int p = begin; p < end; ++p) {
    int32_t& word = words[choice_at(p)];
    if (word >= 0 && before++ >= sizes.capacity) word = kDroppedChoice;
  }
  __syncthreads();
}

// By all threads of a block, in this order: the words are written, Make, then the rest.
class LocalPlan {
 public:
  static int SharedBytes(const Sizes& sizes) {
    return 4 * (sizes.num_devices * sizes.num_choices() +
                (kLatencyWarps + 1) * sizes.num_local_experts + kLatencyThreads + 1);
  }

  __device__ LocalPlan(const Sizes& sizes, int32_t* shared)
      : sizes_(sizes),
        num_choices_(sizes.num_devices * sizes.num_choices()),
        words_(shared),
        before_(words_ + num_choices_),
        first_(before_ + kLatencyWarps * sizes.num_local_experts),
        scratch_(first_ + sizes.num_local_experts) {
    const int per_warp = (num_choices_ + kLatencyWarps - 1) / kLatencyWarps;
    range_bits_ = per_warp <= 32 ? 5 : 32 - __clz(per_warp - 1);
  }

  // Of each choice (device, token, choice) the local expert, or kNotMyChoice. Later also the
  // choice's number of its expert in its range.
  __device__ int32_t* words() { return words_; }
  __device__ bool IsMine(int choice) const { return words_[choice] != kNotMyChoice; }
  // The rows of a token's choices, `first` being its first one: of choice k in lane k, -1 if it has
  // none and in lanes past K. By all lanes of a warp.
  __device__ int Row(int first) const {
    const int k = threadIdx.x % 32;
    if (few_) return RowOfFew(first);
    const int word = k < sizes_.top_k ? words_[first + k] : kNotMyChoice;
    if (word < 0) return -1;
    const int expert = word & kNoExpert;
    return first_[expert] +
           before_[((first + k) >> range_bits_) * sizes_.num_local_experts + expert] +
           (word >> kExpertBits);
  }
  __device__ int num_rows() const { return num_rows_; }
  __device__ int num_addressed() const { return num_addressed_; }  // and not all kept
  __device__ int GroupSize(int expert) const {
    if (few_) {
      int count = 0;
      for (int i = 0; i < num_choices_; ++i) count += words_[i] == expert;
      return count;
    }
    const int next = expert + 1 < sizes_.num_local_experts ? first_[expert + 1] : num_rows_;
    return next - first_[expert];
  }

  __device__ void Make() {
    few_ = num_choices_ <= kFew;
    if (few_) {
      num_rows_ = CountFew();
      num_addressed_ = num_rows_;
      few_ = num_rows_ <= sizes_.capacity;
      if (few_) return;
      __syncthreads();  // the words change
    }
    for (int round = 0;; ++round) {  // the second one only if choices are dropped
      CountRange(threadIdx.x / 32);
      __syncthreads();
      SumRanges();
      __syncthreads();
      if (threadIdx.x < 32) SumExperts();
      __syncthreads();
      num_rows_ = scratch_[kLatencyThreads];
      if (round == 0) num_addressed_ = num_rows_;
      if (num_rows_ <= sizes_.capacity || round == 1) return;
      Drop(sizes_, words_, scratch_);
    }
  }

 private:
  static constexpr int kFew = 256;

  __device__ int CountFew() const {
    int count = 0;
    for (int i = threadIdx.x % 32; i < num_choices_; i += 32) count += words_[i] >= 0;
    return __reduce_add_sync(~0u, count);
  }

  // As many lanes as there are choices, rounded up, go through a share of all choices each.
  __device__ int RowOfFew(int first) const {
    const int lane = threadIdx.x % 32;
    const int width = sizes_.top_k == 1 ? 1 : 1 << (32 - __clz(sizes_.top_k - 1));
    const int k = lane & (width - 1);
    const int word = k < sizes_.top_k ? words_[first + k] : kNotMyChoice;
    const uint32_t key = KeyOf(word, first + k);
    int before = 0;
#pragma unroll 4
    for (int i = lane / width; i < num_choices_; i += 32 / width) {
      before += KeyOf(words_[i], i) < key;
    }
    for (int offset = width; offset < 32; offset *= 2) {
      before += __shfl_xor_sync(~0u, before, offset);
    }
    return word >= 0 && lane < sizes_.top_k ? before : -1;
  }
  // Choices in the order of their rows; those of other devices come last.
  __device__ static uint32_t KeyOf(int word, int choice) {
    return uint32_t(word) << 16 | uint32_t(choice);
  }

  __device__ void CountRange(int warp) {
    const int begin = warp << range_bits_, lane = threadIdx.x % 32;
    const int end = min(begin + (1 << range_bits_), num_choices_);
    if (begin >= end) return;
    int32_t* counts = before_ + warp * sizes_.num_local_experts;
    for (int e = lane; e < sizes_.num_local_experts; e += 32) counts[e] = 0;
    __syncwarp();
#pragma unroll 1
    for (int base = begin; base < end; base += 32) {
      const int i = base + lane;
      const int word = i < end ? words_[i] : kNotMyChoice;
      const int expert = word < 0 ? -1 : word & kNoExpert;
      const unsigned same = __match_any_sync(~0u, expert);
      const int earlier = expert < 0 ? 0 : counts[expert];
      __syncwarp();
      if (expert >= 0) {
        words_[i] = (earlier + __popc(same & ((1u << lane) - 1))) << kExpertBits | expert;
        if (lane == __ffs(same) - 1) counts[expert] = earlier + __popc(same);
      }
      __syncwarp();
    }
  }

  // From counts to those of earlier ranges; the sums of all ranges to first_.
  __device__ void SumRanges() {
    const int num_ranges = (num_choices_ + (1 << range_bits_) - 1) >> range_bits_;
    for (int e = threadIdx.x; e < sizes_.num_local_experts; e += kLatencyThreads) {
      int32_t counts[kLatencyWarps];
#pragma unroll
      for (int w = 0; w < kLatencyWarps; ++w) {
        counts[w] = w < num_ranges ? before_[w * sizes_.num_local_experts + e] : 0;
      }
      int sum = 0;
#pragma unroll
      for (int w = 0; w < kLatencyWarps; ++w) {
        if (w < num_ranges) before_[w * sizes_.num_local_experts + e] = sum;
        sum += counts[w];
      }
      first_[e] = sum;
    }
  }

  // From sums of experts to those of earlier experts, by one warp.
  __device__ void SumExperts() {
    const int lane = threadIdx.x, num = sizes_.num_local_experts;
    const int per_lane = (num + 31) / 32;
    const int begin = min(lane * per_lane, num), end = min(begin + per_lane, num);
    int sum = 0;
    for (int e = begin; e < end; ++e) sum += first_[e];
    int up_to = sum;
    for (int offset = 1; offset < 32; offset *= 2) {
      const int other = __shfl_up_sync(~0u, up_to, offset);
      if (lane >= offset) up_to += other;
    }
    if (lane == 31) scratch_[kLatencyThreads] = up_to;
    int before = up_to - sum;
    for (int e = begin; e < end; ++e) {
      const int count = first_[e];
      first_[e] = before;
      before += count;
    }
  }

  const Sizes& sizes_;
  const int num_choices_;
  int32_t* words_;    // [R, T, K]
  int32_t* before_;   // [warps][L]
  int32_t* first_;    // [L] row of each expert
  int32_t* scratch_;  // [threads + 1]
  int range_bits_;
  int num_rows_, num_addressed_;
  bool few_;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_LATENCY_PLAN_CUH_

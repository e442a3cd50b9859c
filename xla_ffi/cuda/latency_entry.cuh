// How low-latency calls begin and end: whole, or split into two kernels.
//
// Whole calls. The epoch is read by one thread of each block, which then counts itself in
// Control::entered. So the block that counts last knows that all have read it, and sets it to this
// call's; nobody waits for that, nor for the others' end. The count wraps to zero by itself.
//
// Split calls. A start sends what a whole call sends, a done waits for it and makes the results;
// other calls may lie between. They are numbered apart from the others (Control::started), for the
// halves of those are reused before a done may come. A start tells its number to its done by an
// operand, and takes part number mod P of the regions; Control::pending says which parts are in
// use.
//
// Why P = 2 + 2M parts suffice. A start fails unless of all numbers before the last M all are done
// on its device (here: start(n), done(n) are over or in order on the stream). So when device a
// starts n, its done(n - 1 - M) is over, in which it saw b's header of that number; b had stored it
// in start(n - 1 - M), hence after all its done up to n - 2 - 2M. What lies in the part of n at b
// is of n - P = n - 2 - 2M or earlier: read and cleared. Whole calls and split ones use different
// parts, and each kind has the argument of its own.
//
// Failures on a device, without any wait: a start while more than M are pending, or a done whose
// number is not pending or whose start was of another operation or size.

#ifndef JAXMOE_XLA_FFI_CUDA_LATENCY_ENTRY_CUH_
#define JAXMOE_XLA_FFI_CUDA_LATENCY_ENTRY_CUH_

#include "xla_ffi/cuda/latency.cuh"

namespace jaxmoe::cuda {

static_assert(offsetof(Control, epoch) == 0 && offsetof(Control, failed) == 8, "loaded together");
static_assert(offsetof(Control, started) % 16 == 0 &&
                  offsetof(Control, pending) == offsetof(Control, started) + 8,
              "loaded together");

// What happens in a kernel of a low-latency call.
enum class CallPart { kWhole, kStart, kDone };

// What a start tells its done.
struct Pending {
  uint64_t number;
  uint32_t hash;  // of the header
  int32_t num_tokens;
};
static_assert(sizeof(Pending) == 16, "the operand has four words");

// Of a call that is split, by one thread: whether it may begin. Fails the group if not. Not inline,
// as CheckWaiting is not.
template <CallPart kPart, typename Args>
__device__ __noinline__ bool MayBegin(const LatencyParams<Args>& params, int operation,
                                      const Pending& pending, uint64_t started, uint64_t parts) {
  const Layout& layout = params.layout;
  const uint64_t number = pending.number;
  const int part = layout.SplitPart(number);
  const LatencyCall call(params, operation, number, part);
  if (kPart == CallPart::kStart) {
    uint64_t latest = 0;
    for (int i = 1; i <= layout.max_pending && i < number; ++i) {
      latest |= uint64_t{1} << layout.SplitPart(number - i);
    }
    if ((parts & ~latest) == 0) return true;
    call.Fail(call.peers.rank, kPhaseStart, layout.max_pending, __popcll(parts));
    return false;
  }
  const bool recent =
      number <= started && number + Layout::NumSplitParts(layout.max_pending) > started;
  if (!recent || (parts >> part & 1) == 0) {
    call.Fail(call.peers.rank, kPhaseDone, started, number);
    return false;
  }
  const bool same = pending.hash >> kHeaderOperationShift == uint32_t(operation) &&
                    pending.num_tokens == params.sizes.num_tokens;
  if (!same) call.Fail(call.peers.rank, kPhaseDone, started, number, true);
  return same;
}

// The call that was entered.
template <CallPart kPart, typename Args>
__device__ __forceinline__ LatencyCall CallOf(const LatencyParams<Args>& params, int operation,
                                              const Entry& entry) {
  const uint64_t number = entry.number;
  const int part = kPart == CallPart::kWhole ? int(number & 1) : entry.part;
  LatencyCall call(params, operation, number, part);
  if (kPart == CallPart::kDone) {
    call.hash = entry.hash;
  } else {
    call.MakeHash(params, kPart == CallPart::kWhole ? kLatencySite : kSplitSite);
  }
  return call;
}

// By all threads of a block; what they started to load before is on its way meanwhile, and
// `between` is called by all warps but one. The result is for LeaveCall.
template <CallPart kPart, typename Args, typename Between>
__device__ __forceinline__ uint32_t EnterCall(const LatencyParams<Args>& params, int operation,
                                              Entry* entry, Between between) {
  auto* control = reinterpret_cast<Control*>(params.own + params.layout.control);
  uint32_t order = 0;
  if (threadIdx.x >= kLatencyThreads - 32) {
    if (threadIdx.x == kLatencyThreads - 32) {
      Pending pending = {};
      if (kPart == CallPart::kDone)
        pending = *reinterpret_cast<const Pending*>(params.args.pending);
      const uint4 v = LoadVector(reinterpret_cast<const char*>(control));
      uint32_t wait = v.z >> 1;
      entry->failed = v.z != 0;
      if (kPart == CallPart::kWhole) {
        entry->number = (uint64_t{v.y} << 32 | v.x) + 1;
      } else {
        const uint4 w = LoadVector(reinterpret_cast<const char*>(&control->started));
        const uint64_t started = uint64_t{w.y} << 32 | w.x, parts = uint64_t{w.w} << 32 | w.z;
        if (kPart == CallPart::kStart) pending.number = started + 1;
        entry->number = pending.number;
        entry->part = params.layout.SplitPart(pending.number);
        entry->hash = pending.hash;
        wait += (w.y >> 31) + (w.w >> 31);
        if (!entry->failed) {
          entry->failed = !MayBegin<kPart>(params, operation, pending, started, parts);
        }
      }
      // The operand, whose value is the number of blocks, waits for the loads; so does the count.
      order = atomicInc(&control->entered, gridDim.x - 1 + wait);
    }
  } else {
    between();
  }
  __syncthreads();
  return order;
}

// By all threads of a block.
template <CallPart kPart, typename Args>
__device__ __forceinline__ void LeaveCall(const LatencyParams<Args>& params,
                                          const LatencyCall& call, const Entry& entry,
                                          uint32_t order) {
  if (threadIdx.x != kLatencyThreads - 32 || order != gridDim.x - 1) return;
  auto* control = reinterpret_cast<Control*>(params.own + params.layout.control);
  if (kPart == CallPart::kWhole) {
    control->epoch = entry.number;
    return;
  }
  const uint64_t bit = uint64_t{1} << entry.part;
  if (kPart == CallPart::kDone) {
    if (!entry.failed) control->pending &= ~bit;
  } else {
    *reinterpret_cast<Pending*>(params.args.pending) = {entry.failed ? 0 : entry.number, call.hash,
                                                        params.sizes.num_tokens};
    if (entry.failed) return;
    control->started = entry.number;
    control->pending |= bit;
  }
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_LATENCY_ENTRY_CUH_

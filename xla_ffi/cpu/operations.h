// The work of each operation on host memory: what a device offers to devices of other processes,
// and what it makes of what the devices offer. jaxmoe/reference.py specifies the results.

#ifndef JAXMOE_XLA_FFI_CPU_OPERATIONS_H_
#define JAXMOE_XLA_FFI_CPU_OPERATIONS_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "xla_ffi/common/config.h"

namespace jaxmoe {

// The operands and results of one device, in the order of the custom call's (jaxmoe/_ffi.py)
// without the first operand.
struct Buffers {
  std::vector<const void*> in;
  std::vector<void*> out;
};

// What source device `s` of an exchange has for one destination device: its operands if it is in
// this process, otherwise its part of a Payload.
struct Source {
  const Buffers* local = nullptr;
  const char* payload = nullptr;
};

// How a device lays out for another process what that process' devices need of it. The operations
// that go from tokens to rows offer the tokens, once for all destinations. Those that go from rows
// to tokens offer each destination its own partial sums.
class Payload {
 public:
  Payload(Operation op, const CallShape& shape) : op_(op), shape_(shape) {}

  // Bytes with `num_destinations` devices in other processes.
  size_t Bytes(size_t num_destinations) const;
  // Where the n-th of these destinations finds its part.
  size_t Offset(size_t n) const { return PerDestination() ? n * PartBytes() : 0; }

  // [T, D] tokens or partial sums, with an FP8 wire [T, D] codes and [T, ceil(D / 128)] float32
  // scales instead; [T, K] int32 ids, [T, K] float32 values of choices.
  size_t TokensOffset() const { return 0; }
  size_t ScalesOffset() const { return Align(shape_.num_tokens * TokenBytes()); }
  size_t IdsOffset() const { return ScalesOffset() + Align(ScaleBytes()); }
  size_t ChoicesOffset() const {
    return IdsOffset() + (op_ == Operation::kDispatch ? Align(ChoiceBytes()) : 0);
  }

 private:
  static size_t Align(size_t n) { return (n + 63) / 64 * 64; }
  bool Quantized() const { return op_ == Operation::kDispatch && shape_.wire != kWirePlain; }
  size_t TokenBytes() const { return Quantized() ? shape_.dim : shape_.row_bytes(); }
  size_t ScaleBytes() const {
    return Quantized() ? shape_.num_tokens * shape_.num_scales() * sizeof(float) : 0;
  }
  size_t ChoiceBytes() const { return shape_.num_choices() * 4; }
  bool PerDestination() const {
    return op_ == Operation::kCombine || op_ == Operation::kDispatchGrad;
  }
  size_t PartBytes() const { return ChoicesOffset() + Align(ChoiceBytes()); }

  Operation op_;
  CallShape shape_;
};

// Writes a device's payload for the given destinations, which are ranks in other processes.
void WritePayload(Operation op, const CallShape& shape, const Buffers& own,
                  const std::vector<int64_t>& destinations, char* payload);

using Tasks = std::vector<std::function<void()>>;

// The work of device `rank` in two steps: every task of the first is finished, on all devices of
// the process, before one of the second begins. Tasks of a step are independent. `sources` and
// `own` must live until all have run.
struct Work {
  Tasks first;
  Tasks second;
};
Work MakeWork(Operation op, const CallShape& shape, int64_t rank, const Buffers& own,
              const std::vector<Source>& sources);

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_OPERATIONS_H_

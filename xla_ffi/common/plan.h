// The routing plan of one device. jaxmoe/plan.py documents the arrays, jaxmoe/reference.py
// specifies them; this is the same for host memory.

#ifndef JAXMOE_XLA_FFI_COMMON_PLAN_H_
#define JAXMOE_XLA_FFI_COMMON_PLAN_H_

#include <cstdint>
#include <vector>

#include "xla_ffi/common/config.h"

namespace jaxmoe {

struct PlanOutputs {
  int32_t* group_sizes;    // [L]
  int32_t* num_rows;       // []
  int32_t* num_dropped;    // []
  int32_t* num_invalid;    // []
  int32_t* row_map;        // [R, T, K]
  int32_t* row_source;     // [C]
  int32_t* choice_device;  // [T, K]
};

// Fills the plan of device `rank`. `ids[s]` points to source device s' expert ids [T, K]. Ids may
// hold anything: those outside [0, E) belong to no device, and those of this device's own tokens
// that are not -1 either are counted in num_invalid.
//
// Postcondition: every word of the outputs is written. Rows are in the order (local expert, source
// device, token, choice); of more than C choices the first C in the order (choice, token, source)
// stay.
void BuildPlan(const CallShape& shape, int64_t rank, const std::vector<const int32_t*>& ids,
               const PlanOutputs& out);

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_COMMON_PLAN_H_

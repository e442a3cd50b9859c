// Arithmetic on rows of bf16, f16 or f32 with float32 in between. The summation rule that these
// functions serve is written down in jaxmoe/reference.py.

#ifndef JAXMOE_XLA_FFI_CPU_ROWS_H_
#define JAXMOE_XLA_FFI_CPU_ROWS_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

// Functions for rows of one dtype; `n` counts elements.
struct RowMath {
  // sum[i] += weight * row[i], the product and the sum rounded to float32 each.
  void (*add_scaled)(const void* row, float weight, float* sum, int64_t n);
  // sum[i] += row[i].
  void (*add)(const void* row, float* sum, int64_t n);
  // row[i] = value[i], rounded to nearest even.
  void (*store)(const float* value, void* row, int64_t n);
  // row[i] = weight * in[i].
  void (*scale)(const void* in, float weight, void* row, int64_t n);
  // The dot product in float32, in an order that does not depend on the machine.
  float (*dot)(const void* a, const void* b, int64_t n);
};

// Null for a dtype other than BF16, F16 and F32.
const RowMath* RowMathFor(xla::ffi::DataType dtype);

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_ROWS_H_

// Tokens to FP8 and back on host memory; xla_ffi/common/quantize.h has the arithmetic.

#ifndef JAXMOE_XLA_FFI_CPU_QUANTIZE_H_
#define JAXMOE_XLA_FFI_CPU_QUANTIZE_H_

#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/common/quantize.h"

namespace jaxmoe {

// Functions for tokens of one dtype, with `dim` numbers and a scale for each block of them.
struct WireMath {
  void (*quantize)(const void* token, int64_t dim, bool power_of_two, uint8_t* codes,
                   float* scales);
  void (*dequantize)(const uint8_t* codes, const float* scales, int64_t dim, void* row);
};

// Null for a dtype other than BF16, F16 and F32.
const WireMath* WireMathFor(xla::ffi::DataType dtype);

// The row and scales to hand over in FP8 of what came over the wire.
void HandOver(const uint8_t* codes, const float* scales, int64_t dim, uint8_t* row,
              float* row_scales);

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_QUANTIZE_H_

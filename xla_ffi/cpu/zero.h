// Zeroing large buffers.

#ifndef JAXMOE_XLA_FFI_CPU_ZERO_H_
#define JAXMOE_XLA_FFI_CPU_ZERO_H_

#include <cstddef>

namespace jaxmoe {

// Sets `bytes` bytes from `begin` on to zero. Whole pages are given back to the system, which maps
// zeros in when they are touched: the unused tail of a worst-case buffer, mostly of fresh memory,
// then costs neither time nor memory.
void FillZero(char* begin, size_t bytes);

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_ZERO_H_

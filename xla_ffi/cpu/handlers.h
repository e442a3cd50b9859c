// The CPU implementations of the custom calls, for registration with XLA.

#ifndef JAXMOE_XLA_FFI_CPU_HANDLERS_H_
#define JAXMOE_XLA_FFI_CPU_HANDLERS_H_

#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

// What a compiled call keeps, one object for all devices that run it.
struct CallState {
  static xla::ffi::TypeId id;
  static xla::ffi::TypeInfo info;
  int32_t instance;  // which of the compiled calls with the same config this is
};

struct HandlerEntry {
  const char* target;
  XLA_FFI_Handler* instantiate;
  XLA_FFI_Handler* execute;
};

const std::vector<HandlerEntry>& CpuHandlers();

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_HANDLERS_H_

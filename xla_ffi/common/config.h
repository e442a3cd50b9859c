// The static configuration of a custom call and the sizes that its buffers bring.

#ifndef JAXMOE_XLA_FFI_COMMON_CONFIG_H_
#define JAXMOE_XLA_FFI_COMMON_CONFIG_H_

#include <cstddef>
#include <cstdint>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/common/quantize.h"

namespace jaxmoe {

enum class Operation : int32_t { kDispatch, kCombine, kDispatchGrad, kCombineGrad };

inline const char* Name(Operation op) {
  static constexpr const char* kNames[] = {"jaxmoe_dispatch", "jaxmoe_combine",
                                           "jaxmoe_dispatch_grad", "jaxmoe_combine_grad"};
  return kNames[static_cast<int>(op)];
}

// The call of dispatch that hands rows over in FP8: the same operation, with a further result.
constexpr const char* kDispatchFp8Rows = "jaxmoe_dispatch_fp8_rows";

// The attribute `config` of every call. jaxmoe/_ffi.py declares the same fields as CONFIG_FIELDS.
struct CallConfig {
  int64_t group;        // uid of the ExpertParallel group
  int64_t site;         // the call's name, hashed
  int64_t num_devices;  // R
  int64_t num_experts;  // E
  int64_t top_k;        // K
  int64_t wire;         // a WireFormat: how dispatch sends tokens
};

// Sizes of one call, the same on all of its devices.
struct CallShape {
  int64_t num_tokens;            // T
  int64_t top_k;                 // K
  int64_t dim;                   // D
  int64_t capacity;              // C
  int64_t num_devices;           // R
  int64_t num_experts;           // E
  int64_t num_local_experts;     // L
  xla::ffi::DataType dtype;      // of tokens and rows
  WireFormat wire = kWirePlain;  // dispatch only
  bool fp8_rows = false;         // dispatch hands rows over as they came

  int64_t num_choices() const { return num_tokens * top_k; }
  size_t row_bytes() const { return static_cast<size_t>(dim) * xla::ffi::ByteWidth(dtype); }
  int64_t num_scales() const { return quantize::NumBlocks(dim); }

  bool operator==(const CallShape& o) const {
    return num_tokens == o.num_tokens && top_k == o.top_k && dim == o.dim &&
           capacity == o.capacity && num_devices == o.num_devices && num_experts == o.num_experts &&
           num_local_experts == o.num_local_experts && dtype == o.dtype && wire == o.wire &&
           fp8_rows == o.fp8_rows;
  }
};

}  // namespace jaxmoe

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jaxmoe::CallConfig,
                                      ::xla::ffi::StructMember<int64_t>("group"),
                                      ::xla::ffi::StructMember<int64_t>("site"),
                                      ::xla::ffi::StructMember<int64_t>("num_devices"),
                                      ::xla::ffi::StructMember<int64_t>("num_experts"),
                                      ::xla::ffi::StructMember<int64_t>("top_k"),
                                      ::xla::ffi::StructMember<int64_t>("wire"));

#endif  // JAXMOE_XLA_FFI_COMMON_CONFIG_H_

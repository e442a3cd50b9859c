// Numbers of the dtypes that rows have, and float32.

#ifndef JAXMOE_XLA_FFI_CPU_ELEMENTS_H_
#define JAXMOE_XLA_FFI_CPU_ELEMENTS_H_

#include <cstdint>
#include <cstring>

// Several versions of each function, picked by the loader for the machine's vector instructions.
// None may fuse a product with a sum (-ffp-contract=off), so that all give the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(JAXMOE_NO_CLONES)
#define JAXMOE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define JAXMOE_CLONES
#endif

namespace jaxmoe {

struct BFloat16 {
  uint16_t bits;
};

inline float ToFloat(float v) { return v; }
inline float ToFloat(_Float16 v) { return static_cast<float>(v); }
inline float ToFloat(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

inline void FromFloat(float v, float* out) { *out = v; }
inline void FromFloat(float v, _Float16* out) { *out = static_cast<_Float16>(v); }
inline void FromFloat(float v, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof(bits));
  const uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;  // nearest, ties to even
  const uint32_t quiet_nan = (bits >> 16) | 0x40;
  out->bits = static_cast<uint16_t>(v != v ? quiet_nan : rounded);
}

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_ELEMENTS_H_

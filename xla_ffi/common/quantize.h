// FP8 on the wire: the arithmetic of one block, for host and device code. jaxmoe/wire.py specifies
// it; these functions give the same bits on every compiler, with or without subnormal numbers.

#ifndef JAXMOE_XLA_FFI_COMMON_QUANTIZE_H_
#define JAXMOE_XLA_FFI_COMMON_QUANTIZE_H_

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define JAXMOE_SHARED __host__ __device__ inline
#else
#define JAXMOE_SHARED inline
#endif

namespace jaxmoe {

// How dispatch sends tokens: in their own dtype, or in e4m3 with scales of either kind.
// jaxmoe/_ffi.py counts alike.
enum WireFormat : int32_t { kWirePlain, kWireAmax, kWirePowerOfTwo };

namespace quantize {

constexpr int kBlock = 128;  // numbers that share a scale

// Bits of float32 numbers.
constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
constexpr uint32_t kMantissa = 0x7fffff, kOne = 0x800000;
constexpr uint32_t kLostBits = 20;            // of a float32 mantissa, in e4m3
constexpr uint32_t kInverse448 = 0x3b124925;  // 1/448, rounded
constexpr uint32_t kMantissaOf448 = 0x600000;
constexpr uint32_t kLeastExponent = 127 - 116;
// Codes. In a block with a NaN or an infinity kMinus means NaN, and the two NaNs the infinities.
constexpr uint32_t kNan = 0x7f, kLargest = 0x7e, k240 = 0x77, kMinus = 0x80;

JAXMOE_SHARED constexpr int64_t NumBlocks(int64_t dim) { return (dim + kBlock - 1) / kBlock; }

JAXMOE_SHARED float Float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}
JAXMOE_SHARED uint32_t Bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(bits));
  return bits;
}

// Bits of the scale of a block whose largest finite magnitude has the bits `amax`.
JAXMOE_SHARED uint32_t ScaleOf(uint32_t amax, bool power_of_two) {
  if (power_of_two) {
    const uint32_t above = (amax + (kMantissa - kMantissaOf448)) >> 23;  // 448 is 1.75 * 2^8
    return ((above > kLeastExponent + 8 ? above : kLeastExponent + 8) - 8) << 23;
  }
  const uint32_t scale = Bits(Float(amax) * Float(kInverse448));
  const uint32_t least = kLeastExponent << 23;
  return scale > least ? scale : least;
}

// The largest code whose value is finite in a dtype with `max_exponent` (of numbers below 2 to it).
JAXMOE_SHARED uint32_t LargestCode(uint32_t scale, int max_exponent) {
  return scale == uint32_t(max_exponent - 8 + 127) << 23 ? k240 : kLargest;
}

JAXMOE_SHARED uint32_t ShiftRounded(uint32_t n, uint32_t shift) {
  return (n + ((1u << (shift - 1)) - 1) + ((n >> shift) & 1)) >> shift;
}

// The code of a y >= 0 up to 449, rounded to nearest even.
JAXMOE_SHARED uint32_t Encode(float y) {
  const uint32_t bits = Bits(y), exponent = bits >> 23;
  const uint32_t normal = ShiftRounded(bits, kLostBits) - ((127 - 7) << 3);
  // Below 2^-6 a code counts units of 2^-9; y has m 2^(exponent - 141) of them.
  const uint32_t wanted = 141 - (exponent < 121 ? exponent : 121);
  const uint32_t small = ShiftRounded((bits & kMantissa) | kOne, wanted < 25 ? wanted : 25);
  return exponent < 127 - 6 ? small : normal;
}

// The code of a number of a finite block.
JAXMOE_SHARED uint32_t CodeOf(uint32_t bits, float inverse, uint32_t largest) {
  const uint32_t code = Encode(Float(bits & kMagnitude) * inverse);
  return (code < largest ? code : largest) | (bits >> 24 & kMinus);
}

// Likewise of one with a NaN or an infinity.
JAXMOE_SHARED uint32_t SpecialCodeOf(uint32_t bits, float inverse, uint32_t largest) {
  const uint32_t magnitude = bits & kMagnitude;
  if (magnitude > kInfinity) return kMinus;
  if (magnitude == kInfinity) return (bits >> 24 & kMinus) | kNan;
  const uint32_t code = CodeOf(bits, inverse, largest);
  return code == kMinus ? 0 : code;
}

// The number that a code of a finite block stands for, without its scale.
JAXMOE_SHARED float ValueOf(uint32_t code) {
  const uint32_t magnitude = code & ~kMinus, minus = (code & kMinus) << 24;
  // Normal: the same exponent and mantissa. Subnormal: units of 2^-9.
  const float normal = Float((magnitude << kLostBits) + ((127 - 7) << 23));
  const float small = static_cast<float>(magnitude) * Float((127 - 9) << 23);
  return Float(Bits(magnitude < 8 ? small : normal) | minus);
}

// Likewise in a block with a NaN or an infinity, with its scale.
JAXMOE_SHARED float SpecialNumberOf(uint32_t code, float scale) {
  if (code == kMinus) return Float(kInfinity | kOne >> 1);
  if ((code & kNan) == kNan) return Float(kInfinity | (code & kMinus) << 24);
  return ValueOf(code) * scale;
}

// The code of a row in FP8, which has no infinity, for one of such a block.
JAXMOE_SHARED uint32_t HandedOver(uint32_t special_code) {
  return special_code == kMinus ? kNan : special_code;
}

}  // namespace quantize
}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_COMMON_QUANTIZE_H_

#include "xla_ffi/cpu/quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "xla_ffi/cpu/elements.h"

namespace jaxmoe {
namespace {

using quantize::kBlock;

constexpr int MaxExponent(_Float16) { return 16; }
template <typename T>
constexpr int MaxExponent(T) {
  return 128;
}

template <typename T>
inline __attribute__((always_inline)) void QuantizeBlock(const T* in, int n, bool power_of_two,
                                                         uint8_t* codes, float* scale) {
  uint32_t bits[kBlock], amax = 0, special = 0;
  for (int i = 0; i < n; ++i) {
    bits[i] = quantize::Bits(ToFloat(in[i]));
    const uint32_t magnitude = bits[i] & quantize::kMagnitude;
    const bool finite = magnitude < quantize::kInfinity;
    special |= !finite;
    amax = std::max(amax, finite ? magnitude : 0);
  }
  const uint32_t scale_bits = quantize::ScaleOf(amax, power_of_two);
  const uint32_t largest = quantize::LargestCode(scale_bits, MaxExponent(T{}));
  const float inverse = 1.0f / quantize::Float(scale_bits);
  *scale = quantize::Float(scale_bits | special << 31);
  if (special) {
    for (int i = 0; i < n; ++i) {
      codes[i] = static_cast<uint8_t>(quantize::SpecialCodeOf(bits[i], inverse, largest));
    }
    return;
  }
  for (int i = 0; i < n; ++i) {
    codes[i] = static_cast<uint8_t>(quantize::CodeOf(bits[i], inverse, largest));
  }
}

template <typename T>
inline __attribute__((always_inline)) void Quantize(const void* token, int64_t dim,
                                                    bool power_of_two, uint8_t* codes,
                                                    float* scales) {
  const T* in = static_cast<const T*>(token);
  for (int64_t at = 0; at < dim; at += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, dim - at));
    QuantizeBlock(in + at, n, power_of_two, codes + at, scales + at / kBlock);
  }
}

template <typename T>
inline __attribute__((always_inline)) void Dequantize(const uint8_t* codes, const float* scales,
                                                      int64_t dim, void* row) {
  T* out = static_cast<T*>(row);
  for (int64_t at = 0; at < dim; at += kBlock) {
    const int64_t end = std::min(at + kBlock, dim);
    const float signed_scale = scales[at / kBlock], scale = std::fabs(signed_scale);
    if (std::signbit(signed_scale)) {
      for (int64_t i = at; i < end; ++i) {
        FromFloat(quantize::SpecialNumberOf(codes[i], scale), &out[i]);
      }
      continue;
    }
    for (int64_t i = at; i < end; ++i) FromFloat(quantize::ValueOf(codes[i]) * scale, &out[i]);
  }
}

// target_clones takes no templates: one plain function for each dtype.
#define JAXMOE_WIRE_MATH(name, T)                                                             \
  JAXMOE_CLONES void Quantize##name(const void* token, int64_t dim, bool power_of_two,        \
                                    uint8_t* codes, float* scales) {                          \
    Quantize<T>(token, dim, power_of_two, codes, scales);                                     \
  }                                                                                           \
  JAXMOE_CLONES void Dequantize##name(const uint8_t* codes, const float* scales, int64_t dim, \
                                      void* row) {                                            \
    Dequantize<T>(codes, scales, dim, row);                                                   \
  }                                                                                           \
  const WireMath k##name = {Quantize##name, Dequantize##name};

JAXMOE_WIRE_MATH(Bf16, BFloat16)
JAXMOE_WIRE_MATH(F16, _Float16)
JAXMOE_WIRE_MATH(F32, float)

}  // namespace

const WireMath* WireMathFor(xla::ffi::DataType dtype) {
  switch (dtype) {
    case xla::ffi::DataType::BF16:
      return &kBf16;
    case xla::ffi::DataType::F16:
      return &kF16;
    case xla::ffi::DataType::F32:
      return &kF32;
    default:
      return nullptr;
  }
}

void HandOver(const uint8_t* codes, const float* scales, int64_t dim, uint8_t* row,
              float* row_scales) {
  std::memcpy(row, codes, dim);
  for (int64_t b = 0; b < quantize::NumBlocks(dim); ++b) {
    row_scales[b] = std::fabs(scales[b]);
    if (!std::signbit(scales[b])) continue;
    const int64_t end = std::min((b + 1) * kBlock, dim);
    for (int64_t i = b * kBlock; i < end; ++i) {
      row[i] = static_cast<uint8_t>(quantize::HandedOver(row[i]));
    }
  }
}

}  // namespace jaxmoe

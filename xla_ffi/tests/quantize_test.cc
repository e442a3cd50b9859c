// Tokens to FP8 and back: exact values of the format's definition (jaxmoe/wire.py), which every
// version of a function must give (see elements.h), with subnormal numbers or without.

#include "xla_ffi/cpu/quantize.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "xla_ffi/tests/check.h"

namespace jaxmoe {
namespace {

using Codes = std::vector<uint8_t>;
using Floats = std::vector<float>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const WireMath& F32() { return *WireMathFor(xla::ffi::DataType::F32); }

struct Quantized {
  Codes codes;
  Floats scales;
};

Quantized Quantize(const Floats& token, bool power_of_two) {
  const int64_t dim = static_cast<int64_t>(token.size());
  Quantized q = {Codes(dim, 0xAA), Floats(quantize::NumBlocks(dim), -77.0f)};
  F32().quantize(token.data(), dim, power_of_two, q.codes.data(), q.scales.data());
  return q;
}

Floats Dequantize(const Quantized& q) {
  Floats row(q.codes.size(), -77.0f);
  F32().dequantize(q.codes.data(), q.scales.data(), static_cast<int64_t>(row.size()), row.data());
  return row;
}

// What an e4m3 code stands for, from its fields.
double Value(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

TEST(EveryCodeIsItsValue) {
  for (int code = 0; code < 256; ++code) {
    if ((code & 0x7f) == 0x7f) continue;
    CHECK_EQ(static_cast<double>(quantize::ValueOf(code)), Value(static_cast<uint8_t>(code)));
  }
}

// With 448 in a block the scale is one, and all codes but the NaNs come out again.
TEST(WhatFp8HoldsIsExact) {
  Floats token;
  for (int code = 0; code < 256; ++code) {
    token.push_back((code & 0x7f) == 0x7f ? 448.0f : static_cast<float>(Value(code)));
  }
  const Quantized q = Quantize(token, true);
  for (float scale : q.scales) CHECK_EQ(scale, 1.0f);
  const Floats row = Dequantize(q);
  for (size_t i = 0; i < token.size(); ++i) CHECK_EQ(row[i], token[i]);
}

TEST(HalvesGoToEven) {
  const Floats token = {448.0f, 17.0f, 19.0f, -17.0f, 0x1p-10f, 3 * 0x1p-10f, 0x1.000002p-10f};
  const Floats want = {448.0f, 16.0f, 20.0f, -16.0f, 0.0f, 0x1p-8f, 0x1p-9f};
  const Floats row = Dequantize(Quantize(token, true));
  for (size_t i = 0; i < want.size(); ++i) CHECK_EQ(row[i], want[i]);
}

TEST(ScalesAreOfEachBlock) {
  Floats token(300, 0.0f);
  token[5] = 448.0f;
  token[200] = -1.0f;
  const Quantized q = Quantize(token, false);
  CHECK_EQ(q.scales.size(), size_t{3});
  CHECK_EQ(q.scales[0], 448.0f * (1.0f / 448.0f));
  CHECK_EQ(q.scales[1], 1.0f / 448.0f);
  CHECK_EQ(q.scales[2], 0x1p-116f);  // of zeros
  CHECK_EQ(int{q.codes[200]}, 0xfe);
  CHECK_EQ(int{q.codes[299]}, 0);
}

TEST(NumbersThatAreNotFinite) {
  const Floats token = {1.0f, kNan, -kInf, kInf, -0.0f, -448.0f};
  const Quantized q = Quantize(token, true);
  CHECK_EQ(q.scales[0], -1.0f);
  const Floats row = Dequantize(q);
  CHECK(std::isnan(row[1]));
  for (size_t i : {0, 2, 3, 4, 5}) CHECK_EQ(row[i], token[i]);
  Codes codes(token.size());
  float scale = 0.0f;
  HandOver(q.codes.data(), q.scales.data(), static_cast<int64_t>(token.size()), codes.data(),
           &scale);
  CHECK_EQ(scale, 1.0f);
  for (size_t i : {1, 2, 3}) CHECK_EQ(codes[i] & 0x7f, 0x7f);
  CHECK_EQ(int{codes[2]}, 0xff);
  for (size_t i : {0, 4, 5}) CHECK_EQ(codes[i], q.codes[i]);
}

#if defined(__x86_64__)
// XLA's threads flush subnormal numbers to zero, others do not: rows must not depend on it.
TEST(SubnormalNumbersChangeNothing) {
  std::mt19937 random(1);
  for (int round = 0; round < 50; ++round) {
    Floats token(256);
    for (float& x : token) {
      const uint32_t bits = random() >> (round % 3 == 0 ? 8 : 0);  // some blocks are all subnormal
      std::memcpy(&x, &bits, sizeof(x));
    }
    for (bool power_of_two : {false, true}) {
      const Quantized q = Quantize(token, power_of_two);
      const Floats row = Dequantize(q);
      const unsigned mode = _mm_getcsr();
      _mm_setcsr(mode | 0x8040);  // flush results, take subnormal operands as zeros
      const Quantized flushed = Quantize(token, power_of_two);
      const Floats flushed_row = Dequantize(flushed);
      _mm_setcsr(mode);
      CHECK(flushed.codes == q.codes);
      CHECK(std::memcmp(flushed.scales.data(), q.scales.data(), 2 * sizeof(float)) == 0);
      CHECK(std::memcmp(flushed_row.data(), row.data(), 256 * sizeof(float)) == 0);
    }
  }
}
#endif

}  // namespace
}  // namespace jaxmoe

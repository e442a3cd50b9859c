// Arithmetic on rows: exact values, so that every version of a function (see rows.cc) must give
// them, whichever the machine picks.

#include "xla_ffi/cpu/rows.h"

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "xla_ffi/tests/check.h"

namespace jaxmoe {
namespace {

using xla::ffi::DataType;
using Halves = std::vector<uint16_t>;
using Floats = std::vector<float>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const RowMath& F32() { return *RowMathFor(DataType::F32); }
const RowMath& F16() { return *RowMathFor(DataType::F16); }
const RowMath& Bf16() { return *RowMathFor(DataType::BF16); }

// Lengths around the widths of vector registers and of the lanes of `dot`.
const std::vector<int64_t> kLengths = {1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 100, 257};

float Bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t BitsOf(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

Halves Stored(const RowMath& math, const Floats& values) {
  Halves row(values.size(), 0xAAAA);
  math.store(values.data(), row.data(), static_cast<int64_t>(values.size()));
  return row;
}

Floats Loaded(const RowMath& math, const Halves& row) {
  Floats values(row.size(), 0.0f);
  math.add(row.data(), values.data(), static_cast<int64_t>(row.size()));
  return values;
}

Floats Random(std::mt19937& random, int64_t n) {
  std::uniform_real_distribution<float> uniform(-2.0f, 2.0f);
  Floats values(static_cast<size_t>(n));
  for (float& value : values) value = uniform(random);
  return values;
}

TEST(Bf16RoundsToNearestEven) {
  const Floats values = {Bits(0x3F808000),
                         Bits(0x3F818000),
                         Bits(0x3F808001),
                         Bits(0x3F817FFF),
                         Bits(0xBF818000),
                         0.0f,
                         -0.0f};
  CHECK_EQ(Stored(Bf16(), values),
           (Halves{0x3F80, 0x3F82, 0x3F81, 0x3F81, 0xBF82, 0x0000, 0x8000}));
}

TEST(Bf16KeepsInfinitiesOverflowsToThemAndRoundsDenormals) {
  CHECK_EQ(Stored(Bf16(), {kInf, -kInf, std::numeric_limits<float>::max()}),
           (Halves{0x7F80, 0xFF80, 0x7F80}));
  CHECK_EQ(Stored(Bf16(), {Bits(0x00000001), Bits(0x00008000), Bits(0x00008001), Bits(0x00018000)}),
           (Halves{0x0000, 0x0000, 0x0001, 0x0002}));
  CHECK_EQ(BitsOf(Loaded(Bf16(), {0x0001})[0]), 0x00010000u);
}

TEST(F16RoundsToNearestEven) {
  // 1 + 2^-11 lies between 1 and 1 + 2^-10, 1 + 3 * 2^-11 between 1 + 2^-10 and 1 + 2^-9.
  const Floats values = {1.0f + 0x1p-11f, 1.0f + 0x3p-11f, 1.0f + 0x1p-11f + 0x1p-20f, -2.0f,
                         -0.0f};
  CHECK_EQ(Stored(F16(), values), (Halves{0x3C00, 0x3C02, 0x3C01, 0xC000, 0x8000}));
}

TEST(F16KeepsInfinitiesOverflowsToThemAndRoundsDenormals) {
  CHECK_EQ(Stored(F16(), {kInf, -kInf, 65504.0f, 65519.0f, 65520.0f}),
           (Halves{0x7C00, 0xFC00, 0x7BFF, 0x7BFF, 0x7C00}));
  CHECK_EQ(Stored(F16(), {0x1p-24f, 0x1p-25f, 0x3p-25f, 0x1p-26f}),
           (Halves{0x0001, 0x0000, 0x0002, 0x0000}));
  CHECK_EQ(Loaded(F16(), {0x0001, 0x83FF}), (Floats{0x1p-24f, -0x3FFp-24f}));
}

TEST(NansStayNans) {
  // The second one would round to infinity if it were a number.
  for (const float nan : {kNan, Bits(0x7F800001), Bits(0xFFFFFFFF)}) {
    for (const RowMath* math : {&Bf16(), &F16()}) {
      CHECK(std::isnan(Loaded(*math, Stored(*math, {nan}))[0]));
    }
  }
}

TEST(EveryHalfSurvivesARoundTrip) {
  Halves all(1 << 16);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  for (const RowMath* math : {&Bf16(), &F16()}) {
    const Floats values = Loaded(*math, all);
    const Halves back = Stored(*math, values);
    for (size_t i = 0; i < all.size(); ++i) {
      // The sum 0 + -0 is 0: that sign is `add`'s to lose.
      if (!std::isnan(values[i]) && values[i] != 0.0f) CHECK_EQ(back[i], all[i]);
    }
  }
}

TEST(AddScaledRoundsTheProductBeforeTheSum) {
  // w * x = 1 + 2^-11 + 2^-24 exactly, 1 + 2^-11 when rounded: only a fused sum keeps the rest.
  const float weight = 1.0f + 0x1p-12f;
  for (const int64_t n : kLengths) {
    const Floats row(static_cast<size_t>(n), weight);
    Floats sum(static_cast<size_t>(n), -(1.0f + 0x1p-11f));
    F32().add_scaled(row.data(), weight, sum.data(), n);
    CHECK_EQ(sum, Floats(static_cast<size_t>(n), 0.0f));
  }
}

TEST(ScaleRoundsOnce) {
  // 3 * (1 + 2^-7) = 3.0234375 lies between the bf16 numbers 3.015625 and 3.03125.
  const Halves row(17, 0x3F81);
  Halves scaled(17, 0xAAAA);
  Bf16().scale(row.data(), 3.0f, scaled.data(), 17);
  CHECK_EQ(scaled, Halves(17, 0x4042));
}

TEST(FunctionsWriteNothingPastTheirEnd) {
  for (const int64_t n : kLengths) {
    const auto size = static_cast<size_t>(n);
    const Halves row(size, 0x3C00);
    Halves out(size + 1, 0xAAAA);
    Floats sum(size + 1, 5.0f);
    F16().scale(row.data(), 2.0f, out.data(), n);
    CHECK_EQ(out[size - 1], 0x4000);
    CHECK_EQ(out[size], 0xAAAA);
    F16().store(Floats(size, 1.0f).data(), out.data(), n);
    CHECK_EQ(out[size - 1], 0x3C00);
    CHECK_EQ(out[size], 0xAAAA);
    F16().add(row.data(), sum.data(), n);
    F16().add_scaled(row.data(), 2.0f, sum.data(), n);
    CHECK_EQ(sum[size - 1], 8.0f);
    CHECK_EQ(sum[size], 5.0f);
  }
}

// Lane j of 16 sums the products j, j + 16, ...; then lanes are added in halves.
float DotInStatedOrder(const Floats& a, const Floats& b) {
  volatile float lanes[16] = {};  // volatile: one rounding after the other
  for (size_t i = 0; i < a.size(); ++i) {
    const volatile float product = a[i] * b[i];
    lanes[i % 16] = lanes[i % 16] + product;
  }
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] = lanes[j] + lanes[j + width];
  }
  return lanes[0];
}

TEST(DotSumsInItsStatedOrder) {
  std::mt19937 random(1);
  for (const int64_t n : kLengths) {
    const Floats a = Random(random, n), b = Random(random, n);
    CHECK_EQ(F32().dot(a.data(), b.data(), n), DotInStatedOrder(a, b));
    for (const RowMath* math : {&Bf16(), &F16()}) {
      const Halves x = Stored(*math, a), y = Stored(*math, b);
      CHECK_EQ(math->dot(x.data(), y.data(), n),
               DotInStatedOrder(Loaded(*math, x), Loaded(*math, y)));
    }
  }
}

TEST(RowsMayLieAtAnyMultipleOfTheirElementSize) {
  alignas(64) uint16_t memory[40] = {};
  for (int64_t i = 0; i < 33; ++i) memory[1 + i] = 0x3C00;
  Floats sum(33, 0.0f);
  F16().add(memory + 1, sum.data(), 33);
  CHECK_EQ(sum, Floats(33, 1.0f));
  CHECK_EQ(F16().dot(memory + 1, memory + 1, 33), 33.0f);
}

TEST(OtherDtypesHaveNoArithmetic) { CHECK(RowMathFor(DataType::S32) == nullptr); }

}  // namespace
}  // namespace jaxmoe

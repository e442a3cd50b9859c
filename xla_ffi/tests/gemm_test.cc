// The kernels of xla_ffi/gemm on an emulated GPU, against sums in double.

// clang-format off: the emulated instructions take the place of the real ones.
#include "xla_ffi/tests/emulated/instructions.h"
#include "xla_ffi/gemm/products.cu"
#include "xla_ffi/gemm/fp8.cu"
#include "xla_ffi/gemm/tensor_map.cc"
#include "xla_ffi/tests/check.h"
// clang-format on

namespace jaxmoe::gemm {
namespace {

constexpr int kNumSms = 4;
constexpr Target kTarget = {nullptr, kNumSms, nullptr};
constexpr uint16_t kNan = 0xffff;

// Values of an array on the "device"; kernels want more alignment than malloc gives.
class Array {
 public:
  Array(int64_t size, std::mt19937* random) : Array(size) {
    std::normal_distribution<float> normal;
    for (__nv_bfloat16& value : values_) value = __float2bfloat16(normal(*random));
  }
  explicit Array(int64_t size) : values_(size, __nv_bfloat16{kNan}) {}

  void Poison(int64_t begin) { std::fill(values_.begin() + begin, values_.end(), Nan()); }
  double operator[](int64_t i) const { return __bfloat162float(values_[i]); }
  void* data() { return values_.data(); }

 private:
  static __nv_bfloat16 Nan() { return {kNan}; }
  std::vector<__nv_bfloat16> values_;
};

// Largest |got - want| / (|want| + 1); huge for NaN.
class Worst {
 public:
  void Add(double got, double want) {
    const double error = std::abs(got - want) / (std::abs(want) + 1);
    worst_ = error <= worst_ ? worst_ : std::isnan(error) ? 1e9 : error;
  }
  double value() const { return worst_; }

 private:
  double worst_ = 0;
};

// A result is a sum in float32, rounded once: by no more than 1 / 256.
constexpr double kRounding = 1.0 / 250;

struct Problem {
  Shape shape;
  std::vector<int32_t> sizes;

  int64_t NumUsedRows() const {
    int64_t rows = 0;
    for (const int32_t size : sizes) rows += size;
    return rows;
  }
};

// Arrays of all products of a problem. Rows that belong to no group, and results, begin as NaN.
struct Arrays {
  Arrays(const Problem& p, std::mt19937* random)
      : x(p.shape.num_rows * p.shape.dim, random),
        d_y(p.shape.num_rows * p.shape.features, random),
        w(p.shape.num_groups * p.shape.dim * p.shape.features, random),
        up(p.shape.num_groups * p.shape.dim * p.shape.features, random),
        y(p.shape.num_rows * p.shape.features),
        h(p.shape.num_rows * p.shape.features),
        a(p.shape.num_rows * p.shape.features),
        b(p.shape.num_rows * p.shape.features),
        d_x(p.shape.num_rows * p.shape.dim),
        d_x2(p.shape.num_rows * p.shape.dim),
        d_w(p.shape.num_groups * p.shape.dim * p.shape.features) {
    x.Poison(p.NumUsedRows() * p.shape.dim);
    d_y.Poison(p.NumUsedRows() * p.shape.features);
  }
  Array x, d_y, w, up, y, h, a, b, d_x, d_x2, d_w;
};

// Whether blocks claim their tiles, or have them from the start.
enum class Tiling { kClaimed, kGiven };

void Launch(const Problem& p, Tiling tiling, Arrays* on) {
  const Shape& s = p.shape;
  const int32_t* sizes = p.sizes.data();
  int32_t claims = 123;  // whatever was there before
  const Target t = {nullptr, kNumSms, tiling == Tiling::kClaimed ? &claims : nullptr};
  CHECK(LaunchForward(t, s, on->x.data(), on->w.data(), sizes, on->y.data()) == cudaSuccess);
  CHECK(LaunchInputGrad(t, s, on->d_y.data(), on->w.data(), sizes, on->d_x.data()) == cudaSuccess);
  CHECK(LaunchInputGradOfTwo(t, s, on->d_y.data(), on->w.data(), on->y.data(), on->up.data(), sizes,
                             on->d_x2.data()) == cudaSuccess);
  CHECK(LaunchWeightGrad(t, s, on->x.data(), on->d_y.data(), sizes, on->d_w.data()) == cudaSuccess);
  CHECK(LaunchSwiglu(t, s, on->x.data(), on->w.data(), on->up.data(), sizes, on->h.data(),
                     on->a.data(), on->b.data()) == cudaSuccess);
}

// A group's products, row by row.
struct Errors {
  Worst forward, input_grad, input_grad_of_two, weight_grad, swiglu, saved;

  void AddGroup(const Shape& s, const Arrays& on, int64_t group, int64_t begin, int64_t end) {
    const int64_t first = group * s.dim * s.features;
    std::vector<double> d_w(s.dim * s.features);
    for (int64_t row = begin; row < end; ++row) {
      std::vector<double> gate(s.features), up(s.features);
      for (int64_t d = 0; d < s.dim; ++d) {
        const double x = on.x[row * s.dim + d];
        double d_x = 0, d_x2 = 0;
        for (int64_t f = 0; f < s.features; ++f) {
          const double w = on.w[first + d * s.features + f], d_y = on.d_y[row * s.features + f];
          gate[f] += x * w;
          up[f] += x * on.up[first + d * s.features + f];
          d_x += d_y * w;
          d_x2 += on.y[row * s.features + f] * on.up[first + d * s.features + f];
          d_w[d * s.features + f] += x * d_y;
        }
        input_grad.Add(on.d_x[row * s.dim + d], d_x);
        input_grad_of_two.Add(on.d_x2[row * s.dim + d], d_x + d_x2);
      }
      for (int64_t f = 0; f < s.features; ++f) {
        const int64_t at = row * s.features + f;
        forward.Add(on.y[at], gate[f]);
        saved.Add(on.a[at], gate[f]);
        saved.Add(on.b[at], up[f]);
        // From the rounded values: SwiGLU may amplify what their rounding did.
        swiglu.Add(on.h[at], on.a[at] / (1 + std::exp(-on.a[at])) * on.b[at]);
      }
    }
    for (size_t i = 0; i < d_w.size(); ++i) weight_grad.Add(on.d_w[first + i], d_w[i]);
  }

  void AddUnused(const Shape& s, const Arrays& on, int64_t begin) {
    for (int64_t i = begin * s.dim; i < s.num_rows * s.dim; ++i) {
      CHECK(on.d_x[i] == 0 && on.d_x2[i] == 0);
    }
    for (int64_t i = begin * s.features; i < s.num_rows * s.features; ++i) {
      CHECK(on.y[i] == 0 && on.h[i] == 0 && on.a[i] == 0 && on.b[i] == 0);
    }
  }
};

void CheckProducts(const Problem& p, Tiling tiling = Tiling::kClaimed) {
  std::mt19937 random(1);
  Arrays arrays(p, &random);
  Launch(p, tiling, &arrays);
  Errors errors;
  int64_t begin = 0;
  for (int64_t group = 0; group < p.shape.num_groups; ++group) {
    errors.AddGroup(p.shape, arrays, group, begin, begin + p.sizes[group]);
    begin += p.sizes[group];
  }
  errors.AddUnused(p.shape, arrays, begin);
  CHECK(errors.forward.value() < kRounding);
  CHECK(errors.input_grad.value() < kRounding);
  CHECK(errors.input_grad_of_two.value() < kRounding);
  CHECK(errors.weight_grad.value() < kRounding);
  CHECK(errors.saved.value() < kRounding);
  CHECK(errors.swiglu.value() < kRounding);
}

TEST(OneRow) { CheckProducts({{1, 8, 8, 1}, {1}}); }
TEST(NoRows) { CheckProducts({{40, 64, 64, 2}, {0, 0}}); }
TEST(WholeTiles) { CheckProducts({{256, 64, 128, 2}, {128, 128}}); }
TEST(UnevenAndEmptyGroupsAndRowsLeftOver) {
  CheckProducts({{140, 72, 136, 5}, {0, 1, 100, 0, 17}});
}
TEST(TilesGivenFromTheStart) {
  CheckProducts({{140, 72, 136, 5}, {0, 1, 100, 0, 17}}, Tiling::kGiven);
}
TEST(ManyTiles) { CheckProducts({{90, 1032, 520, 6}, {11, 0, 23, 1, 17, 29}}); }
TEST(OneHugeGroup) { CheckProducts({{290, 16, 72, 3}, {3, 277, 0}}); }
TEST(FewRowsOnAverageAndOneHugeGroup) {
  static_assert(220 <= 20 * kFewRowsOfGroup && 187 > 2 * kFewRows);
  Problem p = {{220, 648, 72, 20}, {3, 187, 0, 1, 17}};
  p.sizes.resize(20);
  CheckProducts(p);
}
TEST(MoreStepsThanStages) { CheckProducts({{40, 328, 264, 2}, {20, 13}}); }
TEST(EveryWidthOfTheProduct) {
  Problem p = {{0, 16, 8, 16}, {}};
  for (int columns = 16; columns <= kMaxColumns; columns += 16) {
    p.sizes.push_back(columns - 5);
  }
  p.shape.num_rows = p.NumUsedRows();
  CheckProducts(p);
}
TEST(MoreGroupsThanLanes) {
  Problem p = {{0, 8, 16, 70}, {}};
  for (int group = 0; group < 70; ++group) p.sizes.push_back(group * 7 % 5);
  p.shape.num_rows = p.NumUsedRows() + 3;
  CheckProducts(p);
}

TEST(SizesBeyondTheRowsAreCutOff) {
  Problem p = {{20, 8, 8, 3}, {15, 30, 9}};
  std::mt19937 random(1);
  Array x(20 * 8, &random), w(3 * 8 * 8, &random), y(20 * 8);
  CHECK(LaunchForward(kTarget, p.shape, x.data(), w.data(), p.sizes.data(), y.data()) ==
        cudaSuccess);
  for (int64_t i = 0; i < 20 * 8; ++i) CHECK(!std::isnan(y[i]));
}

TEST(WidthsThatTheCopyEngineCannotAddressAreRefused) {
  std::mt19937 random(1);
  Array x(4 * 12, &random), w(12 * 8, &random), y(4 * 8);
  const int32_t size = 4;
  CHECK(LaunchForward(kTarget, {4, 12, 8, 1}, x.data(), w.data(), &size, y.data()) != cudaSuccess);
}

// FP8 operands of values and scales that make every sum exact, as are the same sums in double.
class Fp8Arrays {
 public:
  Fp8Arrays(const Shape& s, std::mt19937* random)
      : shape(s),
        blocks((s.dim + kScaleBlock - 1) / kScaleBlock),
        feature_blocks((s.features + kScaleBlock - 1) / kScaleBlock),
        x(Codes(s.num_rows * s.dim, random)),
        w(Codes(s.num_groups * s.features * s.dim, random)),
        x_scales(Scales(s.num_rows * blocks, random)),
        w_scales(Scales(s.num_groups * feature_blocks * blocks, random)) {}

  // Of row `row` with feature `feature` of group `group`.
  double Sum(int64_t group, int64_t row, int64_t feature) const {
    double sum = 0;
    for (int64_t d = 0; d < shape.dim; ++d) {
      const int64_t block = d / kScaleBlock;
      const int64_t of_w = (group * feature_blocks + feature / kScaleBlock) * blocks + block;
      sum += double{FromFp8(x[row * shape.dim + d])} * x_scales[row * blocks + block] *
             FromFp8(w[(group * shape.features + feature) * shape.dim + d]) * w_scales[of_w];
    }
    return sum;
  }

  const Shape shape;
  const int64_t blocks, feature_blocks;
  std::vector<uint8_t> x, w;
  std::vector<float> x_scales, w_scales;

 private:
  // -2, -1, 0, 1 or 2.
  static std::vector<uint8_t> Codes(int64_t size, std::mt19937* random) {
    static const uint8_t kCodes[] = {0xc0, 0xb8, 0, 0x38, 0x40};
    std::vector<uint8_t> codes(size);
    for (uint8_t& code : codes) code = kCodes[(*random)() % 5];
    return codes;
  }
  static std::vector<float> Scales(int64_t size, std::mt19937* random) {
    std::vector<float> scales(size);
    for (float& scale : scales) scale = std::ldexp(1.0f, static_cast<int>((*random)() % 4) - 2);
    return scales;
  }
};

void CheckFp8(const Problem& p) {
  std::mt19937 random(2);
  Fp8Arrays on(p.shape, &random);
  const Shape& s = p.shape;
  constexpr uint8_t kFp8Nan = 0x7f;  // in rows that belong to no group
  std::fill(on.x.begin() + p.NumUsedRows() * s.dim, on.x.end(), kFp8Nan);
  Array y(s.num_rows * s.features);
  int32_t claims = 123;
  CHECK(LaunchFp8Forward({nullptr, kNumSms, &claims}, s, on.x.data(), on.x_scales.data(),
                         on.w.data(), on.w_scales.data(), p.sizes.data(), y.data()) == cudaSuccess);
  Worst worst;
  int64_t row = 0;
  for (int64_t group = 0; group < s.num_groups; ++group) {
    for (const int64_t end = row + p.sizes[group]; row < end; ++row) {
      for (int64_t f = 0; f < s.features; ++f) {
        worst.Add(y[row * s.features + f], on.Sum(group, row, f));
      }
    }
  }
  for (int64_t i = row * s.features; i < s.num_rows * s.features; ++i) CHECK(y[i] == 0);
  CHECK(worst.value() < kRounding);
}

TEST(Fp8OneRow) { CheckFp8({{1, 16, 8, 1}, {1}}); }
TEST(Fp8UnevenGroups) { CheckFp8({{60, 144, 200, 4}, {0, 1, 40, 13}}); }
TEST(Fp8MoreStepsThanStages) { CheckFp8({{20, 656, 72, 2}, {9, 7}}); }
TEST(Fp8ManyHeights) {
  Problem p = {{0, 16, 8, 2 * kFeatures / 8 + 1}, {}};
  for (int rows = 8; rows <= 2 * kFeatures + 8; rows += 8) p.sizes.push_back(rows - 3);
  p.shape.num_rows = p.NumUsedRows();
  CheckFp8(p);
}

}  // namespace
}  // namespace jaxmoe::gemm

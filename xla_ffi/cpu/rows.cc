#include "xla_ffi/cpu/rows.h"

#include "xla_ffi/cpu/elements.h"

namespace jaxmoe {
namespace {

template <typename T>
inline __attribute__((always_inline)) void AddScaled(const void* row, float weight, float* sum,
                                                     int64_t n) {
  const T* in = static_cast<const T*>(row);
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * ToFloat(in[i]);
}

template <typename T>
inline __attribute__((always_inline)) void Add(const void* row, float* sum, int64_t n) {
  const T* in = static_cast<const T*>(row);
  for (int64_t i = 0; i < n; ++i) sum[i] += ToFloat(in[i]);
}

template <typename T>
inline __attribute__((always_inline)) void Store(const float* value, void* row, int64_t n) {
  T* out = static_cast<T*>(row);
  for (int64_t i = 0; i < n; ++i) FromFloat(value[i], &out[i]);
}

template <typename T>
inline __attribute__((always_inline)) void Scale(const void* in, float weight, void* row,
                                                 int64_t n) {
  const T* from = static_cast<const T*>(in);
  T* out = static_cast<T*>(row);
  for (int64_t i = 0; i < n; ++i) FromFloat(weight * ToFloat(from[i]), &out[i]);
}

template <typename T>
inline __attribute__((always_inline)) float Dot(const void* a, const void* b, int64_t n) {
  constexpr int kLanes = 16;  // fixed, so that the order of summation is, too
  const T* x = static_cast<const T*>(a);
  const T* y = static_cast<const T*>(b);
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] += ToFloat(x[i + j]) * ToFloat(y[i + j]);
  }
  for (int j = 0; i + j < n; ++j) lanes[j] += ToFloat(x[i + j]) * ToFloat(y[i + j]);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
  }
  return lanes[0];
}

// target_clones takes no templates: one plain function for each dtype.
#define JAXMOE_ROW_MATH(name, T)                                                                \
  JAXMOE_CLONES void AddScaled##name(const void* row, float weight, float* sum, int64_t n) {    \
    AddScaled<T>(row, weight, sum, n);                                                          \
  }                                                                                             \
  JAXMOE_CLONES void Add##name(const void* row, float* sum, int64_t n) { Add<T>(row, sum, n); } \
  JAXMOE_CLONES void Store##name(const float* value, void* row, int64_t n) {                    \
    Store<T>(value, row, n);                                                                    \
  }                                                                                             \
  JAXMOE_CLONES void Scale##name(const void* in, float weight, void* row, int64_t n) {          \
    Scale<T>(in, weight, row, n);                                                               \
  }                                                                                             \
  JAXMOE_CLONES float Dot##name(const void* a, const void* b, int64_t n) {                      \
    return Dot<T>(a, b, n);                                                                     \
  }                                                                                             \
  const RowMath k##name = {AddScaled##name, Add##name, Store##name, Scale##name, Dot##name};

JAXMOE_ROW_MATH(Bf16, BFloat16)
JAXMOE_ROW_MATH(F16, _Float16)
JAXMOE_ROW_MATH(F32, float)

}  // namespace

const RowMath* RowMathFor(xla::ffi::DataType dtype) {
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

}  // namespace jaxmoe

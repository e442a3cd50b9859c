// The custom calls of the grouped products.

#include <algorithm>
#include <cstdint>
#include <string>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/gemm/launch.h"

namespace ffi = xla::ffi;

namespace jaxmoe::gemm {
namespace {

using Matrix = ffi::Buffer<ffi::BF16, 2>;
using Weights = ffi::Buffer<ffi::BF16, 3>;
using Ints = ffi::Buffer<ffi::S32, 1>;
using Claims = ffi::Buffer<ffi::S32, 1>;
using Fp8 = ffi::AnyBuffer;  // XLA's header has no native type for F8E4M3FN
using RowScales = ffi::Buffer<ffi::F32, 2>;
using WeightScales = ffi::Buffer<ffi::F32, 3>;
using MatrixOut = ffi::ResultBuffer<ffi::BF16, 2>;
using WeightsOut = ffi::ResultBuffer<ffi::BF16, 3>;
using ClaimsOut = ffi::ResultBuffer<ffi::S32, 1>;

ffi::Error Status(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jaxmoe: grouped product: launch failed: ") +
                              cudaGetErrorString(error));
}

// The whole device. The last result of every call is `claims`, of no use to the caller: unlike
// scratch memory it is this call's alone in a command buffer, too.
ffi::ErrorOr<Target> TargetOf(cudaStream_t stream, int32_t device, ClaimsOut claims) {
  Target target = {stream, 0, claims->typed_data()};
  if (claims->element_count() != 1) {
    return ffi::Unexpected(
        ffi::Error::InvalidArgument("jaxmoe: grouped product: the last result must be one number"));
  }
  const cudaError_t error =
      cudaDeviceGetAttribute(&target.num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return ffi::Unexpected(Status(error));
  return target;
}

// The sizes that rows, weights and results agree on. Python has checked them; this guards the
// kernels against another caller.
ffi::ErrorOr<Shape> ShapeOf(const ffi::Span<const int64_t>& rows, int64_t features,
                            const ffi::Span<const int64_t>& weights, const Ints& group_sizes) {
  const Shape shape = {rows[0], weights[1], weights[2], weights[0]};
  const bool transposed = rows[1] == shape.features && features == shape.dim;
  const bool straight = rows[1] == shape.dim && features == shape.features;
  if ((!straight && !transposed) || group_sizes.dimensions()[0] != shape.num_groups) {
    return ffi::Unexpected(ffi::Error::InvalidArgument("jaxmoe: grouped product: sizes disagree"));
  }
  if (shape.dim % 8 != 0 || shape.features % 8 != 0) {
    return ffi::Unexpected(ffi::Error::InvalidArgument(
        "jaxmoe: grouped product: widths must be multiples of 8, got " + std::to_string(shape.dim) +
        " and " + std::to_string(shape.features)));
  }
  return shape;
}

ffi::Error Forward(cudaStream_t stream, int32_t device, Matrix x, Weights w, Ints group_sizes,
                   MatrixOut y, ClaimsOut claims) {
  const auto shape = ShapeOf(x.dimensions(), y->dimensions()[1], w.dimensions(), group_sizes);
  if (shape.has_error()) return shape.error();
  const auto target = TargetOf(stream, device, claims);
  if (target.has_error()) return target.error();
  return Status(LaunchForward(*target, *shape, x.typed_data(), w.typed_data(),
                              group_sizes.typed_data(), y->typed_data()));
}

ffi::Error InputGrad(cudaStream_t stream, int32_t device, Matrix d_y, Weights w, Ints group_sizes,
                     MatrixOut d_x, ClaimsOut claims) {
  const auto shape = ShapeOf(d_y.dimensions(), d_x->dimensions()[1], w.dimensions(), group_sizes);
  if (shape.has_error()) return shape.error();
  const auto target = TargetOf(stream, device, claims);
  if (target.has_error()) return target.error();
  return Status(LaunchInputGrad(*target, *shape, d_y.typed_data(), w.typed_data(),
                                group_sizes.typed_data(), d_x->typed_data()));
}

ffi::Error InputGradOfTwo(cudaStream_t stream, int32_t device, Matrix d_y, Weights w, Matrix d_y2,
                          Weights w2, Ints group_sizes, MatrixOut d_x, ClaimsOut claims) {
  const auto shape = ShapeOf(d_y.dimensions(), d_x->dimensions()[1], w.dimensions(), group_sizes);
  if (shape.has_error()) return shape.error();
  const auto same = [](const auto& a, const auto& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end());
  };
  if (!same(d_y2.dimensions(), d_y.dimensions()) || !same(w2.dimensions(), w.dimensions())) {
    return ffi::Error::InvalidArgument("jaxmoe: grouped product: the pairs' sizes disagree");
  }
  const auto target = TargetOf(stream, device, claims);
  if (target.has_error()) return target.error();
  return Status(LaunchInputGradOfTwo(*target, *shape, d_y.typed_data(), w.typed_data(),
                                     d_y2.typed_data(), w2.typed_data(), group_sizes.typed_data(),
                                     d_x->typed_data()));
}

ffi::Error WeightGrad(cudaStream_t stream, int32_t device, Matrix x, Matrix d_y, Ints group_sizes,
                      WeightsOut d_w, ClaimsOut claims) {
  const auto shape = ShapeOf(x.dimensions(), d_y.dimensions()[1], d_w->dimensions(), group_sizes);
  if (shape.has_error()) return shape.error();
  const auto target = TargetOf(stream, device, claims);
  if (target.has_error()) return target.error();
  return Status(LaunchWeightGrad(*target, *shape, x.typed_data(), d_y.typed_data(),
                                 group_sizes.typed_data(), d_w->typed_data()));
}

ffi::Error SwigluSaving(cudaStream_t stream, int32_t device, Matrix x, Weights gate, Weights up,
                        Ints group_sizes, MatrixOut y, MatrixOut a, MatrixOut b, ClaimsOut claims) {
  const auto shape = ShapeOf(x.dimensions(), y->dimensions()[1], gate.dimensions(), group_sizes);
  if (shape.has_error()) return shape.error();
  const auto target = TargetOf(stream, device, claims);
  if (target.has_error()) return target.error();
  return Status(LaunchSwiglu(*target, *shape, x.typed_data(), gate.typed_data(), up.typed_data(),
                             group_sizes.typed_data(), y->typed_data(), a->typed_data(),
                             b->typed_data()));
}

ffi::Error Swiglu(cudaStream_t stream, int32_t device, Matrix x, Weights gate, Weights up,
                  Ints group_sizes, MatrixOut y, ClaimsOut claims) {
  const auto shape = ShapeOf(x.dimensions(), y->dimensions()[1], gate.dimensions(), group_sizes);
  if (shape.has_error()) return shape.error();
  const auto target = TargetOf(stream, device, claims);
  if (target.has_error()) return target.error();
  return Status(LaunchSwiglu(*target, *shape, x.typed_data(), gate.typed_data(), up.typed_data(),
                             group_sizes.typed_data(), y->typed_data(), nullptr, nullptr));
}

bool Fit(const Shape& s, const RowScales& x_scales, const WeightScales& w_scales) {
  const auto blocks = [](int64_t width) { return (width + 127) / 128; };
  const auto x = x_scales.dimensions();
  const auto w = w_scales.dimensions();
  return x[0] == s.num_rows && x[1] == blocks(s.dim) && w[0] == s.num_groups &&
         w[1] == blocks(s.features) && w[2] == blocks(s.dim);
}

ffi::Error Fp8Forward(cudaStream_t stream, int32_t device, Fp8 x, RowScales x_scales, Fp8 w,
                      WeightScales w_scales, Ints group_sizes, MatrixOut y, ClaimsOut claims) {
  const auto of_w = w.dimensions();
  if (x.element_type() != ffi::F8E4M3FN || w.element_type() != ffi::F8E4M3FN ||
      x.dimensions().size() != 2 || of_w.size() != 3) {
    return ffi::Error::InvalidArgument(
        "jaxmoe: grouped FP8 product: rows [C, D] and weights [L, F, D] must be float8_e4m3fn");
  }
  const Shape shape = {x.dimensions()[0], of_w[2], of_w[1], of_w[0]};
  if (x.dimensions()[1] != shape.dim || y->dimensions()[1] != shape.features ||
      group_sizes.dimensions()[0] != shape.num_groups || !Fit(shape, x_scales, w_scales)) {
    return ffi::Error::InvalidArgument("jaxmoe: grouped FP8 product: sizes disagree");
  }
  if (shape.dim % 16 != 0 || shape.features % 8 != 0) {
    return ffi::Error::InvalidArgument(
        "jaxmoe: grouped FP8 product: rows must have a multiple of 16 numbers and results of 8, "
        "got " +
        std::to_string(shape.dim) + " and " + std::to_string(shape.features));
  }
  const auto target = TargetOf(stream, device, claims);
  if (target.has_error()) return target.error();
  return Status(LaunchFp8Forward(*target, shape, x.untyped_data(), x_scales.typed_data(),
                                 w.untyped_data(), w_scales.typed_data(), group_sizes.typed_data(),
                                 y->typed_data()));
}

// What every call begins with.
auto BindCall() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().Ctx<ffi::DeviceOrdinal>();
}

}  // namespace
}  // namespace jaxmoe::gemm

#define JAXMOE_EXPORT extern "C" __attribute__((visibility("default")))

#define JAXMOE_HANDLER(symbol, function, binding)                        \
  JAXMOE_EXPORT XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame);         \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, jaxmoe::gemm::function, binding, \
                                {ffi::Traits::kCmdBufferCompatible})

JAXMOE_HANDLER(jaxmoe_grouped_matmul, Forward,
               jaxmoe::gemm::BindCall()
                   .Arg<jaxmoe::gemm::Matrix>()   // x [C, D]
                   .Arg<jaxmoe::gemm::Weights>()  // w [L, D, F]
                   .Arg<jaxmoe::gemm::Ints>()     // group_sizes [L]
                   .Ret<jaxmoe::gemm::Matrix>()   // y [C, F]
                   .Ret<jaxmoe::gemm::Claims>());

JAXMOE_HANDLER(jaxmoe_grouped_input_grad, InputGrad,
               jaxmoe::gemm::BindCall()
                   .Arg<jaxmoe::gemm::Matrix>()   // d_y [C, F]
                   .Arg<jaxmoe::gemm::Weights>()  // w [L, D, F]
                   .Arg<jaxmoe::gemm::Ints>()     // group_sizes [L]
                   .Ret<jaxmoe::gemm::Matrix>()   // d_x [C, D]
                   .Ret<jaxmoe::gemm::Claims>());

JAXMOE_HANDLER(jaxmoe_grouped_input_grad_of_two, InputGradOfTwo,
               jaxmoe::gemm::BindCall()
                   .Arg<jaxmoe::gemm::Matrix>()   // d_y [C, F]
                   .Arg<jaxmoe::gemm::Weights>()  // w [L, D, F]
                   .Arg<jaxmoe::gemm::Matrix>()   // another d_y
                   .Arg<jaxmoe::gemm::Weights>()  // and its w
                   .Arg<jaxmoe::gemm::Ints>()     // group_sizes [L]
                   .Ret<jaxmoe::gemm::Matrix>()   // d_x [C, D]
                   .Ret<jaxmoe::gemm::Claims>());

JAXMOE_HANDLER(jaxmoe_grouped_weight_grad, WeightGrad,
               jaxmoe::gemm::BindCall()
                   .Arg<jaxmoe::gemm::Matrix>()   // x [C, D]
                   .Arg<jaxmoe::gemm::Matrix>()   // d_y [C, F]
                   .Arg<jaxmoe::gemm::Ints>()     // group_sizes [L]
                   .Ret<jaxmoe::gemm::Weights>()  // d_w [L, D, F]
                   .Ret<jaxmoe::gemm::Claims>());

JAXMOE_HANDLER(jaxmoe_grouped_swiglu, Swiglu,
               jaxmoe::gemm::BindCall()
                   .Arg<jaxmoe::gemm::Matrix>()   // x [C, D]
                   .Arg<jaxmoe::gemm::Weights>()  // gate [L, D, F]
                   .Arg<jaxmoe::gemm::Weights>()  // up [L, D, F]
                   .Arg<jaxmoe::gemm::Ints>()     // group_sizes [L]
                   .Ret<jaxmoe::gemm::Matrix>()   // y [C, F]
                   .Ret<jaxmoe::gemm::Claims>());

JAXMOE_HANDLER(jaxmoe_grouped_swiglu_saving, SwigluSaving,
               jaxmoe::gemm::BindCall()
                   .Arg<jaxmoe::gemm::Matrix>()   // x [C, D]
                   .Arg<jaxmoe::gemm::Weights>()  // gate [L, D, F]
                   .Arg<jaxmoe::gemm::Weights>()  // up [L, D, F]
                   .Arg<jaxmoe::gemm::Ints>()     // group_sizes [L]
                   .Ret<jaxmoe::gemm::Matrix>()   // y [C, F]
                   .Ret<jaxmoe::gemm::Matrix>()   // x gate [C, F]
                   .Ret<jaxmoe::gemm::Matrix>()   // x up [C, F]
                   .Ret<jaxmoe::gemm::Claims>());

JAXMOE_HANDLER(jaxmoe_grouped_fp8, Fp8Forward,
               jaxmoe::gemm::BindCall()
                   .Arg<jaxmoe::gemm::Fp8>()           // x [C, D]
                   .Arg<jaxmoe::gemm::RowScales>()     // [C, ceil(D / 128)]
                   .Arg<jaxmoe::gemm::Fp8>()           // w [L, F, D]
                   .Arg<jaxmoe::gemm::WeightScales>()  // [L, ceil(F / 128), ceil(D / 128)]
                   .Arg<jaxmoe::gemm::Ints>()          // group_sizes [L]
                   .Ret<jaxmoe::gemm::Matrix>()        // y [C, F]
                   .Ret<jaxmoe::gemm::Claims>());

// Loads the kernels on a device: left to the first launch, that could happen while a kernel of a
// group waits for a peer whose host thread waits for this one. Returns CUDA's error code.
JAXMOE_EXPORT int jaxmoe_grouped_preload(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = jaxmoe::gemm::Preload();
  if (error == cudaSuccess) error = jaxmoe::gemm::PreloadFp8();
  const cudaError_t restored = cudaSetDevice(before);
  return error != cudaSuccess ? error : restored;
}

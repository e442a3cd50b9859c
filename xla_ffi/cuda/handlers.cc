// The CUDA implementations of the custom calls, and the C interface that Python opens groups with.

#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"
#include "xla_ffi/common/config.h"
#include "xla_ffi/cuda/groups.h"
#include "xla_ffi/cuda/launch.h"

namespace ffi = xla::ffi;

namespace jaxmoe::cuda {
namespace {

using Config = CallConfig;
using Rows = ffi::AnyBuffer;
using Weights = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using RowsOut = ffi::Result<ffi::AnyBuffer>;
using WeightsOut = ffi::ResultBuffer<ffi::F32>;
using IntsOut = ffi::ResultBuffer<ffi::S32>;

const char* Bytes(const Rows& rows) { return static_cast<const char*>(rows.untyped_data()); }
char* Bytes(RowsOut& rows) { return static_cast<char*>(rows->untyped_data()); }

ffi::ErrorOr<RowType> TypeOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return RowType::kBf16;
    case ffi::DataType::F16:
      return RowType::kF16;
    case ffi::DataType::F32:
      return RowType::kF32;
    default:
      return ffi::Unexpected(ffi::Error::InvalidArgument("jaxmoe: expected bf16, f16 or f32 rows"));
  }
}

// Whether XLA records this call rather than runs it.
bool IsRecorded(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) == cudaSuccess &&
         status == cudaStreamCaptureStatusActive;
}

// The group's member for this device, unless the group is closed or has failed.
ffi::ErrorOr<std::shared_ptr<const Member>> MemberOf(const Config& config, int32_t device,
                                                     cudaStream_t stream) {
  auto member = FindMember(config.group, device);
  if (member == nullptr) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                                      "jaxmoe: the program uses a group that was closed. Keep the "
                                      "ExpertParallel alive as long as "
                                      "programs compiled with it run."));
  }
  // XLA runs what it could not record, without a word: better that the kernels give NaN.
  if (IsRecorded(stream)) return member;
  // Of any device of this process: its peers would wait for it in vain.
  const std::string error = RaiseGroupError(config.group);
  if (!error.empty()) return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kDeadlineExceeded, error));
  return member;
}

Sizes SizesOf(const Config& config, int64_t num_tokens, int64_t capacity, int64_t dim,
              ffi::DataType dtype) {
  Sizes sizes;
  sizes.num_tokens = static_cast<int>(num_tokens);
  sizes.top_k = static_cast<int>(config.top_k);
  sizes.capacity = static_cast<int>(capacity);
  sizes.num_devices = static_cast<int>(config.num_devices);
  sizes.num_experts = static_cast<int>(config.num_experts);
  sizes.num_local_experts = static_cast<int>(config.num_experts / config.num_devices);
  sizes.row_bytes = static_cast<int>(dim * ffi::ByteWidth(dtype));
  return sizes;
}

ffi::Error Status(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jaxmoe: launch failed: ") + cudaGetErrorString(error));
}

// The halves of a split call, and what its kernels cannot take.
ffi::Error CheckSplit(const Member& m, const Layout& layout, const Sizes& sizes) {
  if (layout.max_pending > 0 && TakesLatencyKernels(m.peers, layout, sizes)) {
    return ffi::Error::Success();
  }
  return ffi::Error::InvalidArgument(
      "jaxmoe: a split call of " + std::to_string(sizes.num_tokens) +
      " tokens, but the group has " +
      std::to_string(layout.max_pending > 0 && !m.peers.puts ? layout.latency_tokens : 0) +
      " as the most");
}

ffi::ErrorOr<DispatchArgs> DispatchOperands(const Config& config, const Rows& x,
                                            const Ints& expert_ids, const Weights& weights,
                                            float* row_scales) {
  auto type = TypeOf(x.element_type());
  if (type.has_error()) return ffi::Unexpected(type.error());
  DispatchArgs args = {};
  args.site = static_cast<uint32_t>(config.site);
  args.tokens = Bytes(x);
  args.expert_ids = expert_ids.typed_data();
  args.weights = weights.typed_data();
  args.wire = {static_cast<WireFormat>(config.wire), *type, static_cast<int>(x.dimensions()[1]),
               row_scales};
  return args;
}

// With `row_scales` the rows are handed over in FP8. With `pending` the second half of a split
// call.
ffi::Error DispatchRows(cudaStream_t stream, int32_t device, const Config& config, const Rows& x,
                        const Ints& expert_ids, const Weights& weights, RowsOut rows,
                        WeightsOut row_weights, IntsOut group_sizes, IntsOut num_rows,
                        IntsOut num_dropped, IntsOut num_invalid, IntsOut row_map,
                        IntsOut row_source, IntsOut choice_device, float* row_scales,
                        const Ints* pending = nullptr) {
  auto operands = DispatchOperands(config, x, expert_ids, weights, row_scales);
  if (operands.has_error()) return operands.error();
  auto member = MemberOf(config, device, stream);
  if (member.has_error()) return member.error();
  DispatchArgs args = *operands;
  args.rows = Bytes(rows);
  args.row_weights = row_weights->typed_data();
  args.plan = {group_sizes->typed_data(),  num_rows->typed_data(), num_dropped->typed_data(),
               num_invalid->typed_data(),  row_map->typed_data(),  row_source->typed_data(),
               choice_device->typed_data()};
  const Sizes sizes = SizesOf(config, x.dimensions()[0], row_weights->dimensions()[0],
                              x.dimensions()[1], x.element_type());
  const Member& m = **member;
  const Layout layout = m.layout();
  auto launch =
      TakesLatencyKernels(m.peers, layout, sizes) ? LaunchLatencyDispatch : LaunchDispatch;
  if (pending != nullptr) {
    if (auto error = CheckSplit(m, layout, sizes); error.failure()) return error;
    args.pending = const_cast<int32_t*>(pending->typed_data());
    launch = LaunchDispatchDone;
  }
  return Status(launch(stream, m.num_blocks, m.peers, layout, sizes, args));
}

ffi::Error Dispatch(cudaStream_t stream, int32_t device, Config config, Ints, Rows x,
                    Ints expert_ids, Weights weights, RowsOut rows, WeightsOut row_weights,
                    IntsOut group_sizes, IntsOut num_rows, IntsOut num_dropped, IntsOut num_invalid,
                    IntsOut row_map, IntsOut row_source, IntsOut choice_device) {
  return DispatchRows(stream, device, config, x, expert_ids, weights, rows, row_weights,
                      group_sizes, num_rows, num_dropped, num_invalid, row_map, row_source,
                      choice_device, nullptr);
}

ffi::Error DispatchFp8Rows(cudaStream_t stream, int32_t device, Config config, Ints, Rows x,
                           Ints expert_ids, Weights weights, RowsOut rows, WeightsOut row_weights,
                           IntsOut group_sizes, IntsOut num_rows, IntsOut num_dropped,
                           IntsOut num_invalid, IntsOut row_map, IntsOut row_source,
                           IntsOut choice_device, WeightsOut row_scales) {
  return DispatchRows(stream, device, config, x, expert_ids, weights, rows, row_weights,
                      group_sizes, num_rows, num_dropped, num_invalid, row_map, row_source,
                      choice_device, row_scales->typed_data());
}

ffi::Error DispatchStart(cudaStream_t stream, int32_t device, Config config, Ints, Rows x,
                         Ints expert_ids, Weights weights, IntsOut pending) {
  auto operands = DispatchOperands(config, x, expert_ids, weights, nullptr);
  if (operands.has_error()) return operands.error();
  auto member = MemberOf(config, device, stream);
  if (member.has_error()) return member.error();
  DispatchArgs args = *operands;
  args.pending = pending->typed_data();
  const Sizes sizes = SizesOf(config, x.dimensions()[0], 0, x.dimensions()[1], x.element_type());
  const Member& m = **member;
  const Layout layout = m.layout();
  if (auto error = CheckSplit(m, layout, sizes); error.failure()) return error;
  return Status(LaunchDispatchStart(stream, m.num_blocks, m.peers, layout, sizes, args));
}

ffi::Error DispatchDone(cudaStream_t stream, int32_t device, Config config, Ints, Ints pending,
                        Rows x, Ints expert_ids, Weights weights, RowsOut rows,
                        WeightsOut row_weights, IntsOut group_sizes, IntsOut num_rows,
                        IntsOut num_dropped, IntsOut num_invalid, IntsOut row_map,
                        IntsOut row_source, IntsOut choice_device) {
  return DispatchRows(stream, device, config, x, expert_ids, weights, rows, row_weights,
                      group_sizes, num_rows, num_dropped, num_invalid, row_map, row_source,
                      choice_device, nullptr, &pending);
}

ffi::Error DispatchFp8RowsDone(cudaStream_t stream, int32_t device, Config config, Ints,
                               Ints pending, Rows x, Ints expert_ids, Weights weights, RowsOut rows,
                               WeightsOut row_weights, IntsOut group_sizes, IntsOut num_rows,
                               IntsOut num_dropped, IntsOut num_invalid, IntsOut row_map,
                               IntsOut row_source, IntsOut choice_device, WeightsOut row_scales) {
  return DispatchRows(stream, device, config, x, expert_ids, weights, rows, row_weights,
                      group_sizes, num_rows, num_dropped, num_invalid, row_map, row_source,
                      choice_device, row_scales->typed_data(), &pending);
}

// With `part` one half of a split call.
ffi::Error LaunchSum(cudaStream_t stream, int32_t device, const Config& config, const Rows& rows,
                     const Ints& row_map, CombineArgs args,
                     decltype(&LaunchCombine) part = nullptr) {
  auto member = MemberOf(config, device, stream);
  if (member.has_error()) return member.error();
  auto type = TypeOf(rows.element_type());
  if (type.has_error()) return type.error();
  args.site = static_cast<uint32_t>(config.site);
  args.rows = Bytes(rows);
  args.row_map = row_map.typed_data();
  const Sizes sizes = SizesOf(config, row_map.dimensions()[1], rows.dimensions()[0],
                              rows.dimensions()[1], rows.element_type());
  const Member& m = **member;
  const Layout layout = m.layout();
  const bool gradient = args.row_values != nullptr;
  auto launch = !gradient && TakesLatencyKernels(m.peers, layout, sizes) ? LaunchLatencyCombine
                                                                         : LaunchCombine;
  if (part != nullptr) {
    if (auto error = CheckSplit(m, layout, sizes); error.failure()) return error;
    launch = part;
  }
  return Status(launch(stream, m.num_blocks, m.peers, layout, sizes, args, *type));
}

ffi::Error Combine(cudaStream_t stream, int32_t device, Config config, Ints, Rows expert_rows,
                   Weights row_weights, Ints row_map, RowsOut y) {
  CombineArgs args = {};
  args.row_weights = row_weights.typed_data();
  args.tokens = Bytes(y);
  return LaunchSum(stream, device, config, expert_rows, row_map, args);
}

ffi::Error CombineStart(cudaStream_t stream, int32_t device, Config config, Ints, Rows expert_rows,
                        Weights row_weights, Ints row_map, IntsOut pending) {
  CombineArgs args = {};
  args.row_weights = row_weights.typed_data();
  args.pending = pending->typed_data();
  return LaunchSum(stream, device, config, expert_rows, row_map, args, LaunchCombineStart);
}

ffi::Error CombineDone(cudaStream_t stream, int32_t device, Config config, Ints, Ints pending,
                       Rows expert_rows, Weights row_weights, Ints row_map, RowsOut y) {
  CombineArgs args = {};
  args.row_weights = row_weights.typed_data();
  args.pending = const_cast<int32_t*>(pending.typed_data());
  args.tokens = Bytes(y);
  return LaunchSum(stream, device, config, expert_rows, row_map, args, LaunchCombineDone);
}

ffi::Error DispatchGrad(cudaStream_t stream, int32_t device, Config config, Ints, Rows d_rows,
                        Weights d_row_weights, Ints row_map, Ints choice_device, RowsOut d_x,
                        WeightsOut d_weights) {
  CombineArgs args = {};
  args.row_values = d_row_weights.typed_data();
  args.choice_device = choice_device.typed_data();
  args.tokens = Bytes(d_x);
  args.choice_values = d_weights->typed_data();
  return LaunchSum(stream, device, config, d_rows, row_map, args);
}

ffi::Error CombineGrad(cudaStream_t stream, int32_t device, Config config, Ints, Rows d_y,
                       Rows expert_rows, Weights row_weights, Ints row_source, Ints row_map,
                       Ints choice_device, Ints num_rows, RowsOut d_rows,
                       WeightsOut d_row_weights) {
  static_cast<void>(row_source);
  auto member = MemberOf(config, device, stream);
  if (member.has_error()) return member.error();
  auto type = TypeOf(d_y.element_type());
  if (type.has_error()) return type.error();
  DispatchArgs args = {};
  args.site = static_cast<uint32_t>(config.site);
  args.tokens = Bytes(d_y);
  args.rows = Bytes(d_rows);
  args.row_weights = d_row_weights->typed_data();
  args.plan.row_map = row_map.typed_data();
  args.choice_device = choice_device.typed_data();
  args.num_rows = num_rows.typed_data();
  args.expert_rows = Bytes(expert_rows);
  args.row_weights_in = row_weights.typed_data();
  const Sizes sizes = SizesOf(config, d_y.dimensions()[0], row_weights.dimensions()[0],
                              d_y.dimensions()[1], d_y.element_type());
  const Member& m = **member;
  return Status(LaunchCombineGrad(stream, m.num_blocks, m.peers, m.layout(), sizes, args, *type));
}

// What every call begins with.
auto BindCall() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::PlatformStream<cudaStream_t>>()
      .Ctx<ffi::DeviceOrdinal>()
      .Attr<Config>("config")
      .Arg<Ints>();  // where: used on the host only
}

template <typename Binding>
auto BindDispatch(Binding call) {
  return std::move(call)
      .template Arg<Rows>()     // x [T, D]
      .template Arg<Ints>()     // expert_ids [T, K]
      .template Arg<Weights>()  // weights [T, K]
      .template Ret<Rows>()     // rows [C, D]
      .template Ret<Weights>()  // row_weights [C]
      .template Ret<Ints>()     // group_sizes [L]
      .template Ret<Ints>()     // num_rows []
      .template Ret<Ints>()     // num_dropped []
      .template Ret<Ints>()     // num_invalid []
      .template Ret<Ints>()     // row_map [R, T, K]
      .template Ret<Ints>()     // row_source [C]
      .template Ret<Ints>();    // choice_device [T, K]
}

// Copies a message into the caller's buffer.
int Report(const std::exception& error, char* message, int size) {
  std::strncpy(message, error.what(), size - 1);
  message[size - 1] = '\0';
  return 1;
}

}  // namespace
}  // namespace jaxmoe::cuda

#define JAXMOE_EXPORT extern "C" __attribute__((visibility("default")))

#define JAXMOE_HANDLER(symbol, function, binding)                \
  JAXMOE_EXPORT XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame); \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, jaxmoe::cuda::function, binding)

// A call that XLA may record in a command buffer; see `_call` of jaxmoe/_ffi.py.
#define JAXMOE_RECORDED_HANDLER(symbol, function, binding)               \
  JAXMOE_EXPORT XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame);         \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, jaxmoe::cuda::function, binding, \
                                {ffi::Traits::kCmdBufferCompatible})

#define JAXMOE_BOTH_HANDLERS(symbol, function, binding) \
  JAXMOE_HANDLER(symbol, function, binding);            \
  JAXMOE_RECORDED_HANDLER(symbol##_recorded, function, binding)

JAXMOE_BOTH_HANDLERS(jaxmoe_dispatch, Dispatch,
                     jaxmoe::cuda::BindDispatch(jaxmoe::cuda::BindCall()));

JAXMOE_BOTH_HANDLERS(jaxmoe_dispatch_fp8_rows, DispatchFp8Rows,
                     jaxmoe::cuda::BindDispatch(jaxmoe::cuda::BindCall())
                         .Ret<ffi::Buffer<ffi::F32>>());  // row_scales [C, ceil(D / 128)]

JAXMOE_BOTH_HANDLERS(jaxmoe_combine, Combine,
                     jaxmoe::cuda::BindCall()
                         .Arg<ffi::AnyBuffer>()         // expert_rows [C, D]
                         .Arg<ffi::Buffer<ffi::F32>>()  // row_weights [C]
                         .Arg<ffi::Buffer<ffi::S32>>()  // row_map [R, T, K]
                         .Ret<ffi::AnyBuffer>());       // y [T, D]

// What a start hands to its done: pending [4].
JAXMOE_RECORDED_HANDLER(jaxmoe_dispatch_start, DispatchStart,
                        jaxmoe::cuda::BindCall()
                            .Arg<ffi::AnyBuffer>()           // x [T, D]
                            .Arg<ffi::Buffer<ffi::S32>>()    // expert_ids [T, K]
                            .Arg<ffi::Buffer<ffi::F32>>()    // weights [T, K]
                            .Ret<ffi::Buffer<ffi::S32>>());  // pending

JAXMOE_RECORDED_HANDLER(
    jaxmoe_dispatch_done, DispatchDone,
    jaxmoe::cuda::BindDispatch(
        jaxmoe::cuda::BindCall().Arg<ffi::Buffer<ffi::S32>>()));  // pending first

JAXMOE_RECORDED_HANDLER(
    jaxmoe_dispatch_fp8_rows_done, DispatchFp8RowsDone,
    jaxmoe::cuda::BindDispatch(jaxmoe::cuda::BindCall().Arg<ffi::Buffer<ffi::S32>>())
        .Ret<ffi::Buffer<ffi::F32>>());  // row_scales

JAXMOE_RECORDED_HANDLER(jaxmoe_combine_start, CombineStart,
                        jaxmoe::cuda::BindCall()
                            .Arg<ffi::AnyBuffer>()           // expert_rows [C, D]
                            .Arg<ffi::Buffer<ffi::F32>>()    // row_weights [C]
                            .Arg<ffi::Buffer<ffi::S32>>()    // row_map [R, T, K]
                            .Ret<ffi::Buffer<ffi::S32>>());  // pending

JAXMOE_RECORDED_HANDLER(jaxmoe_combine_done, CombineDone,
                        jaxmoe::cuda::BindCall()
                            .Arg<ffi::Buffer<ffi::S32>>()  // pending
                            .Arg<ffi::AnyBuffer>()         // expert_rows [C, D]
                            .Arg<ffi::Buffer<ffi::F32>>()  // row_weights [C]
                            .Arg<ffi::Buffer<ffi::S32>>()  // row_map [R, T, K]
                            .Ret<ffi::AnyBuffer>());       // y [T, D]

JAXMOE_HANDLER(jaxmoe_dispatch_grad, DispatchGrad,
               jaxmoe::cuda::BindCall()
                   .Arg<ffi::AnyBuffer>()           // d_rows [C, D]
                   .Arg<ffi::Buffer<ffi::F32>>()    // d_row_weights [C]
                   .Arg<ffi::Buffer<ffi::S32>>()    // row_map [R, T, K]
                   .Arg<ffi::Buffer<ffi::S32>>()    // choice_device [T, K]
                   .Ret<ffi::AnyBuffer>()           // d_x [T, D]
                   .Ret<ffi::Buffer<ffi::F32>>());  // d_weights [T, K]

JAXMOE_HANDLER(jaxmoe_combine_grad, CombineGrad,
               jaxmoe::cuda::BindCall()
                   .Arg<ffi::AnyBuffer>()           // d_y [T, D]
                   .Arg<ffi::AnyBuffer>()           // expert_rows [C, D]
                   .Arg<ffi::Buffer<ffi::F32>>()    // row_weights [C]
                   .Arg<ffi::Buffer<ffi::S32>>()    // row_source [C]
                   .Arg<ffi::Buffer<ffi::S32>>()    // row_map [R, T, K]
                   .Arg<ffi::Buffer<ffi::S32>>()    // choice_device [T, K]
                   .Arg<ffi::Buffer<ffi::S32>>()    // num_rows []
                   .Ret<ffi::AnyBuffer>()           // d_rows [C, D]
                   .Ret<ffi::Buffer<ffi::F32>>());  // d_row_weights [C]

// Bytes of one device's heap.
JAXMOE_EXPORT int64_t jaxmoe_cuda_heap_bytes(const jaxmoe::cuda::GroupSizes* sizes) {
  return static_cast<int64_t>(jaxmoe::cuda::Layout(*sizes).bytes);
}

// `devices` is [num_slices][R]. Returns 0, or 1 with a message.
JAXMOE_EXPORT int jaxmoe_cuda_open_p2p(int64_t uid, const jaxmoe::cuda::GroupSizes* sizes,
                                       int num_slices, const int32_t* devices,
                                       double timeout_seconds, int num_sms, char* message,
                                       int message_size) {
  try {
    std::vector<std::vector<int>> slices;
    for (int i = 0; i < num_slices; ++i, devices += sizes->num_devices) {
      slices.emplace_back(devices, devices + sizes->num_devices);
    }
    jaxmoe::cuda::OpenPeerToPeer({uid, *sizes, timeout_seconds, num_sms}, slices);
    return 0;
  } catch (const std::exception& error) {
    return jaxmoe::cuda::Report(error, message, message_size);
  }
}

JAXMOE_EXPORT void jaxmoe_cuda_close(int64_t uid) { jaxmoe::cuda::CloseGroup(uid); }

// Waits for the failure of a group. 1 with its message and uid, which is given once; 0 when the
// time is up.
JAXMOE_EXPORT int jaxmoe_cuda_wait_failure(double seconds, int64_t* uid, char* message, int size) {
  const jaxmoe::cuda::Failure failure = jaxmoe::cuda::WaitFailure(seconds);
  if (failure.message.empty()) return 0;
  *uid = failure.uid;
  return jaxmoe::cuda::Report(std::runtime_error(failure.message), message, size);
}

// 1 once a custom call has raised the failure.
JAXMOE_EXPORT int jaxmoe_cuda_was_raised(int64_t uid) { return jaxmoe::cuda::WasRaised(uid); }

#include "xla_ffi/cpu/handlers.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>

#include "xla_ffi/common/config.h"
#include "xla_ffi/cpu/group.h"
#include "xla_ffi/cpu/rows.h"
#include "xla_ffi/cpu/threads.h"

namespace jaxmoe {
namespace ffi = xla::ffi;

ffi::TypeId CallState::id = {};
ffi::TypeInfo CallState::info = ffi::MakeTypeInfo<CallState>();

namespace {

using State = ffi::State<CallState>;
using Config = CallConfig;
using Rows = ffi::AnyBuffer;
using Weights = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using RowsOut = ffi::Result<ffi::AnyBuffer>;
using WeightsOut = ffi::ResultBuffer<ffi::F32>;
using IntsOut = ffi::ResultBuffer<ffi::S32>;

// Calls that Python could not tell apart (a function that is called twice) are different compiled
// calls, and devices may run them in different orders. Processes that compile the same programs
// count them alike.
ffi::ErrorOr<std::unique_ptr<CallState>> Instantiate(Config config) {
  static auto* mutex = new std::mutex;
  static auto* counts = new std::map<std::pair<int64_t, int64_t>, int32_t>;
  std::lock_guard<std::mutex> lock(*mutex);
  auto state = std::make_unique<CallState>();
  state->instance = (*counts)[{config.group, config.site}]++;
  return state;
}

ffi::Future Failed(const std::string& message) {
  ffi::Promise promise;
  promise.SetError(ffi::Error(ffi::ErrorCode::kFailedPrecondition, message));
  return ffi::Future(promise);
}

// Joins the devices' call. `where` is [rank, slice].
ffi::Future Arrive(Operation op, ffi::RunId run, int32_t device, const CallState* state,
                   const Config& config, const Ints& where, const CallShape& shape,
                   Buffers buffers) {
  const std::string name = Name(op);
  std::shared_ptr<Group> group = Group::Find(config.group);
  if (group == nullptr) {
    return Failed(name +
                  ": the program uses a group that was closed. Keep the ExpertParallel "
                  "alive as long as programs compiled with it run.");
  }
  if (RowMathFor(shape.dtype) == nullptr) {
    return Failed(name + ": expected bf16, f16 or f32 rows");
  }
  const int64_t rank = where.typed_data()[0];
  const int32_t slice = where.typed_data()[1];
  if (rank < 0 || rank >= shape.num_devices || slice < 0 || slice >= group->num_slices()) {
    return Failed(name + ": expected a device below " + std::to_string(shape.num_devices) +
                  " and a slice below " + std::to_string(group->num_slices()) + ", got " +
                  std::to_string(rank) + " and " + std::to_string(slice));
  }
  try {
    StartDeviceThread(device);
  } catch (const std::system_error& error) {
    return Failed(name + ": cannot start a thread: " + error.what());
  }
  ffi::Promise promise;
  ffi::Future future(promise);
  Arrival arrival;
  arrival.rank = rank;
  arrival.device = device;
  arrival.buffers = std::move(buffers);
  arrival.done = [promise = std::move(promise)](const std::string& error) mutable {
    if (error.empty()) {
      promise.SetAvailable();
    } else {
      promise.SetError(ffi::Error(ffi::ErrorCode::kDeadlineExceeded, error));
    }
  };
  group->Arrive({slice, op, run.run_id, config.site, state->instance}, shape, std::move(arrival));
  return future;
}

CallShape ShapeOf(const Config& config, int64_t num_tokens, int64_t top_k, int64_t dim,
                  int64_t capacity, ffi::DataType dtype) {
  return {num_tokens,
          top_k,
          dim,
          capacity,
          config.num_devices,
          config.num_experts,
          config.num_experts / config.num_devices,
          dtype};
}

// With `row_scales` the rows are handed over in FP8.
ffi::Future DispatchRows(ffi::RunId run, int32_t device, CallState* state, const Config& config,
                         const Ints& where, const Rows& x, const Ints& expert_ids,
                         const Weights& weights, RowsOut rows, WeightsOut row_weights,
                         IntsOut group_sizes, IntsOut num_rows, IntsOut num_dropped,
                         IntsOut num_invalid, IntsOut row_map, IntsOut row_source,
                         IntsOut choice_device, void* row_scales) {
  const auto ids = expert_ids.dimensions();
  CallShape shape = ShapeOf(config, ids[0], ids[1], x.dimensions()[1], row_weights->dimensions()[0],
                            x.element_type());
  shape.wire = static_cast<WireFormat>(config.wire);
  shape.fp8_rows = row_scales != nullptr;
  return Arrive(Operation::kDispatch, run, device, state, config, where, shape,
                {{x.untyped_data(), expert_ids.untyped_data(), weights.untyped_data()},
                 {rows->untyped_data(), row_weights->untyped_data(), group_sizes->untyped_data(),
                  num_rows->untyped_data(), num_dropped->untyped_data(),
                  num_invalid->untyped_data(), row_map->untyped_data(), row_source->untyped_data(),
                  choice_device->untyped_data(), row_scales}});
}

ffi::Future Dispatch(ffi::RunId run, int32_t device, CallState* state, Config config, Ints where,
                     Rows x, Ints expert_ids, Weights weights, RowsOut rows, WeightsOut row_weights,
                     IntsOut group_sizes, IntsOut num_rows, IntsOut num_dropped,
                     IntsOut num_invalid, IntsOut row_map, IntsOut row_source,
                     IntsOut choice_device) {
  return DispatchRows(run, device, state, config, where, x, expert_ids, weights, rows, row_weights,
                      group_sizes, num_rows, num_dropped, num_invalid, row_map, row_source,
                      choice_device, nullptr);
}

ffi::Future DispatchFp8Rows(ffi::RunId run, int32_t device, CallState* state, Config config,
                            Ints where, Rows x, Ints expert_ids, Weights weights, RowsOut rows,
                            WeightsOut row_weights, IntsOut group_sizes, IntsOut num_rows,
                            IntsOut num_dropped, IntsOut num_invalid, IntsOut row_map,
                            IntsOut row_source, IntsOut choice_device, WeightsOut row_scales) {
  return DispatchRows(run, device, state, config, where, x, expert_ids, weights, rows, row_weights,
                      group_sizes, num_rows, num_dropped, num_invalid, row_map, row_source,
                      choice_device, row_scales->untyped_data());
}

ffi::Future Combine(ffi::RunId run, int32_t device, CallState* state, Config config, Ints where,
                    Rows expert_rows, Weights row_weights, Ints row_map, RowsOut y) {
  const auto map = row_map.dimensions();
  const auto rows = expert_rows.dimensions();
  const CallShape shape =
      ShapeOf(config, map[1], map[2], rows[1], rows[0], expert_rows.element_type());
  return Arrive(Operation::kCombine, run, device, state, config, where, shape,
                {{expert_rows.untyped_data(), row_weights.untyped_data(), row_map.untyped_data()},
                 {y->untyped_data()}});
}

ffi::Future DispatchGrad(ffi::RunId run, int32_t device, CallState* state, Config config,
                         Ints where, Rows d_rows, Weights d_row_weights, Ints row_map,
                         Ints choice_device, RowsOut d_x, WeightsOut d_weights) {
  const auto map = row_map.dimensions();
  const auto rows = d_rows.dimensions();
  const CallShape shape = ShapeOf(config, map[1], map[2], rows[1], rows[0], d_rows.element_type());
  return Arrive(Operation::kDispatchGrad, run, device, state, config, where, shape,
                {{d_rows.untyped_data(), d_row_weights.untyped_data(), row_map.untyped_data(),
                  choice_device.untyped_data()},
                 {d_x->untyped_data(), d_weights->untyped_data()}});
}

ffi::Future CombineGrad(ffi::RunId run, int32_t device, CallState* state, Config config, Ints where,
                        Rows d_y, Rows expert_rows, Weights row_weights, Ints row_source, Ints,
                        Ints, Ints, RowsOut d_rows, WeightsOut d_row_weights) {
  const auto tokens = d_y.dimensions();
  const CallShape shape = ShapeOf(config, tokens[0], config.top_k, tokens[1],
                                  row_source.dimensions()[0], d_y.element_type());
  return Arrive(Operation::kCombineGrad, run, device, state, config, where, shape,
                {{d_y.untyped_data(), expert_rows.untyped_data(), row_weights.untyped_data(),
                  row_source.untyped_data()},
                 {d_rows->untyped_data(), d_row_weights->untyped_data()}});
}

XLA_FFI_DEFINE_HANDLER(kInstantiateHandler, Instantiate,
                       ffi::Ffi::BindInstantiate().Attr<Config>("config"));

// What every call begins with.
auto BindCall() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::RunId>()
      .Ctx<ffi::DeviceOrdinal>()
      .Ctx<State>()
      .Attr<Config>("config")
      .Arg<Ints>();  // where: [rank, slice]
}

auto BindDispatch() {
  return BindCall()
      .Arg<Rows>()     // x [T, D]
      .Arg<Ints>()     // expert_ids [T, K]
      .Arg<Weights>()  // weights [T, K]
      .Ret<Rows>()     // rows [C, D]
      .Ret<Weights>()  // row_weights [C]
      .Ret<Ints>()     // group_sizes [L]
      .Ret<Ints>()     // num_rows []
      .Ret<Ints>()     // num_dropped []
      .Ret<Ints>()     // num_invalid []
      .Ret<Ints>()     // row_map [R, T, K]
      .Ret<Ints>()     // row_source [C]
      .Ret<Ints>();    // choice_device [T, K]
}

XLA_FFI_DEFINE_HANDLER(kDispatchHandler, Dispatch, BindDispatch());

XLA_FFI_DEFINE_HANDLER(kDispatchFp8RowsHandler, DispatchFp8Rows,
                       BindDispatch().Ret<Weights>());  // row_scales [C, ceil(D / 128)]

XLA_FFI_DEFINE_HANDLER(kCombineHandler, Combine,
                       BindCall()
                           .Arg<Rows>()     // expert_rows [C, D]
                           .Arg<Weights>()  // row_weights [C]
                           .Arg<Ints>()     // row_map [R, T, K]
                           .Ret<Rows>());   // y [T, D]

XLA_FFI_DEFINE_HANDLER(kDispatchGradHandler, DispatchGrad,
                       BindCall()
                           .Arg<Rows>()       // d_rows [C, D]
                           .Arg<Weights>()    // d_row_weights [C]
                           .Arg<Ints>()       // row_map [R, T, K]
                           .Arg<Ints>()       // choice_device [T, K]
                           .Ret<Rows>()       // d_x [T, D]
                           .Ret<Weights>());  // d_weights [T, K]

XLA_FFI_DEFINE_HANDLER(kCombineGradHandler, CombineGrad,
                       BindCall()
                           .Arg<Rows>()       // d_y [T, D]
                           .Arg<Rows>()       // expert_rows [C, D]
                           .Arg<Weights>()    // row_weights [C]
                           .Arg<Ints>()       // row_source [C]
                           .Arg<Ints>()       // row_map [R, T, K]: GPUs go by tokens
                           .Arg<Ints>()       // choice_device [T, K]: likewise
                           .Arg<Ints>()       // num_rows []: likewise
                           .Ret<Rows>()       // d_rows [C, D]
                           .Ret<Weights>());  // d_row_weights [C]

}  // namespace

const std::vector<HandlerEntry>& CpuHandlers() {
  static const auto* handlers = new std::vector<HandlerEntry>{
      {Name(Operation::kDispatch), kInstantiateHandler, kDispatchHandler},
      {kDispatchFp8Rows, kInstantiateHandler, kDispatchFp8RowsHandler},
      {Name(Operation::kCombine), kInstantiateHandler, kCombineHandler},
      {Name(Operation::kDispatchGrad), kInstantiateHandler, kDispatchGradHandler},
      {Name(Operation::kCombineGrad), kInstantiateHandler, kCombineGradHandler},
  };
  return *handlers;
}

}  // namespace jaxmoe

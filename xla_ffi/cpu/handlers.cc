#include "xla_ffi/cpu/handlers.h"

#include <cstring>
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

ffi::Future Failed(ffi::Error error) {
  ffi::Promise promise;
  promise.SetError(std::move(error));
  return ffi::Future(promise);
}

// A device's place in a call: who it is, of which group.
struct Place {
  std::shared_ptr<Group> group;
  int64_t rank;
  int32_t slice;
};

// `where` is [rank, slice].
ffi::ErrorOr<Place> PlaceOf(const std::string& name, int32_t device, const Config& config,
                            const Ints& where, const CallShape& shape) {
  const auto failed = [&name](const std::string& why) {
    return ffi::Unexpected(ffi::Error(ffi::ErrorCode::kFailedPrecondition, name + ": " + why));
  };
  Place place = {Group::Find(config.group), where.typed_data()[0], where.typed_data()[1]};
  if (place.group == nullptr) {
    return failed(
        "the program uses a group that was closed. Keep the ExpertParallel alive as long as "
        "programs compiled with it run.");
  }
  if (RowMathFor(shape.dtype) == nullptr) return failed("expected bf16, f16 or f32 rows");
  if (place.rank < 0 || place.rank >= shape.num_devices || place.slice < 0 ||
      place.slice >= place.group->num_slices()) {
    return failed("expected a device below " + std::to_string(shape.num_devices) +
                  " and a slice below " + std::to_string(place.group->num_slices()) + ", got " +
                  std::to_string(place.rank) + " and " + std::to_string(place.slice));
  }
  try {
    StartDeviceThread(device);
  } catch (const std::system_error& error) {
    return failed(std::string("cannot start a thread: ") + error.what());
  }
  return place;
}

Arrival ArrivalOf(const Place& place, int32_t device, Buffers buffers, ffi::Promise promise) {
  Arrival arrival;
  arrival.rank = place.rank;
  arrival.device = device;
  arrival.buffers = std::move(buffers);
  arrival.done = [promise = std::move(promise)](const std::string& error) mutable {
    if (error.empty()) {
      promise.SetAvailable();
    } else {
      promise.SetError(ffi::Error(ffi::ErrorCode::kDeadlineExceeded, error));
    }
  };
  return arrival;
}

// Joins the devices' call, or with `pending` receives what its start and theirs have left.
ffi::Future Arrive(Operation op, ffi::RunId run, int32_t device, const CallState* state,
                   const Config& config, const Ints& where, const CallShape& shape, Buffers buffers,
                   const Ints* pending = nullptr) {
  auto place = PlaceOf(Name(op), device, config, where, shape);
  if (place.has_error()) return Failed(place.error());
  ffi::Promise promise;
  ffi::Future future(promise);
  Arrival arrival = ArrivalOf(*place, device, std::move(buffers), std::move(promise));
  if (pending == nullptr) {
    place->group->Arrive({place->slice, op, run.run_id, config.site, state->instance}, shape,
                         std::move(arrival));
  } else {
    // Tasks may still run when the group was closed.
    arrival.done = [group = place->group,
                    done = std::move(arrival.done)](const std::string& error) { done(error); };
    int64_t number;
    std::memcpy(&number, pending->typed_data(), sizeof(number));
    place->group->split().Done(number, op, shape, std::move(arrival));
  }
  return future;
}

// Leaves what the other devices need; `pending` is what the done goes by.
ffi::Error Start(Operation op, ffi::RunId run, int32_t device, const CallState* state,
                 const Config& config, const Ints& where, const CallShape& shape,
                 const Buffers& buffers, IntsOut pending) {
  auto place = PlaceOf(Name(op), device, config, where, shape);
  if (place.has_error()) return place.error();
  std::string error;
  const int64_t number =
      place->group->split().Start({place->slice, op, run.run_id, config.site, state->instance},
                                  shape, place->rank, buffers, &error);
  if (!error.empty()) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition, std::string(Name(op)) + ": " + error);
  }
  std::memset(pending->typed_data(), 0, pending->size_bytes());
  std::memcpy(pending->typed_data(), &number, sizeof(number));
  return ffi::Error::Success();
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

// With `row_scales` the rows are handed over in FP8, with `pending` it is the second half of a
// call.
ffi::Future DispatchRows(ffi::RunId run, int32_t device, CallState* state, const Config& config,
                         const Ints& where, const Rows& x, const Ints& expert_ids,
                         const Weights& weights, RowsOut rows, WeightsOut row_weights,
                         IntsOut group_sizes, IntsOut num_rows, IntsOut num_dropped,
                         IntsOut num_invalid, IntsOut row_map, IntsOut row_source,
                         IntsOut choice_device, void* row_scales, const Ints* pending = nullptr) {
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
                  choice_device->untyped_data(), row_scales}},
                pending);
}

ffi::Error DispatchStart(ffi::RunId run, int32_t device, CallState* state, Config config,
                         Ints where, Rows x, Ints expert_ids, Weights weights, IntsOut pending) {
  const auto ids = expert_ids.dimensions();
  CallShape shape = ShapeOf(config, ids[0], ids[1], x.dimensions()[1], 0, x.element_type());
  shape.wire = static_cast<WireFormat>(config.wire);
  return Start(Operation::kDispatch, run, device, state, config, where, shape,
               {{x.untyped_data(), expert_ids.untyped_data(), weights.untyped_data()}, {}},
               pending);
}

ffi::Future DispatchDone(ffi::RunId run, int32_t device, CallState* state, Config config,
                         Ints where, Ints pending, Rows x, Ints expert_ids, Weights weights,
                         RowsOut rows, WeightsOut row_weights, IntsOut group_sizes,
                         IntsOut num_rows, IntsOut num_dropped, IntsOut num_invalid,
                         IntsOut row_map, IntsOut row_source, IntsOut choice_device) {
  return DispatchRows(run, device, state, config, where, x, expert_ids, weights, rows, row_weights,
                      group_sizes, num_rows, num_dropped, num_invalid, row_map, row_source,
                      choice_device, nullptr, &pending);
}

ffi::Future DispatchFp8RowsDone(ffi::RunId run, int32_t device, CallState* state, Config config,
                                Ints where, Ints pending, Rows x, Ints expert_ids, Weights weights,
                                RowsOut rows, WeightsOut row_weights, IntsOut group_sizes,
                                IntsOut num_rows, IntsOut num_dropped, IntsOut num_invalid,
                                IntsOut row_map, IntsOut row_source, IntsOut choice_device,
                                WeightsOut row_scales) {
  return DispatchRows(run, device, state, config, where, x, expert_ids, weights, rows, row_weights,
                      group_sizes, num_rows, num_dropped, num_invalid, row_map, row_source,
                      choice_device, row_scales->untyped_data(), &pending);
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

CallShape CombineShape(const Config& config, const Rows& expert_rows, const Ints& row_map) {
  const auto map = row_map.dimensions();
  const auto rows = expert_rows.dimensions();
  return ShapeOf(config, map[1], map[2], rows[1], rows[0], expert_rows.element_type());
}

ffi::Future Combine(ffi::RunId run, int32_t device, CallState* state, Config config, Ints where,
                    Rows expert_rows, Weights row_weights, Ints row_map, RowsOut y) {
  return Arrive(Operation::kCombine, run, device, state, config, where,
                CombineShape(config, expert_rows, row_map),
                {{expert_rows.untyped_data(), row_weights.untyped_data(), row_map.untyped_data()},
                 {y->untyped_data()}});
}

ffi::Error CombineStart(ffi::RunId run, int32_t device, CallState* state, Config config, Ints where,
                        Rows expert_rows, Weights row_weights, Ints row_map, IntsOut pending) {
  return Start(
      Operation::kCombine, run, device, state, config, where,
      CombineShape(config, expert_rows, row_map),
      {{expert_rows.untyped_data(), row_weights.untyped_data(), row_map.untyped_data()}, {}},
      pending);
}

ffi::Future CombineDone(ffi::RunId run, int32_t device, CallState* state, Config config, Ints where,
                        Ints pending, Rows expert_rows, Weights row_weights, Ints row_map,
                        RowsOut y) {
  return Arrive(Operation::kCombine, run, device, state, config, where,
                CombineShape(config, expert_rows, row_map),
                {{expert_rows.untyped_data(), row_weights.untyped_data(), row_map.untyped_data()},
                 {y->untyped_data()}},
                &pending);
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

XLA_FFI_DEFINE_HANDLER(kDispatchHandler, Dispatch, BindDispatch(BindCall()));

XLA_FFI_DEFINE_HANDLER(kDispatchFp8RowsHandler, DispatchFp8Rows,
                       BindDispatch(BindCall()).Ret<Weights>());  // row_scales [C, ceil(D / 128)]

XLA_FFI_DEFINE_HANDLER(kCombineHandler, Combine,
                       BindCall()
                           .Arg<Rows>()     // expert_rows [C, D]
                           .Arg<Weights>()  // row_weights [C]
                           .Arg<Ints>()     // row_map [R, T, K]
                           .Ret<Rows>());   // y [T, D]

// What a start hands to its done: pending [4].
XLA_FFI_DEFINE_HANDLER(kDispatchStartHandler, DispatchStart,
                       BindCall()
                           .Arg<Rows>()     // x [T, D]
                           .Arg<Ints>()     // expert_ids [T, K]
                           .Arg<Weights>()  // weights [T, K]
                           .Ret<Ints>());   // pending

XLA_FFI_DEFINE_HANDLER(kDispatchDoneHandler, DispatchDone,
                       BindDispatch(BindCall().Arg<Ints>()));  // pending first

XLA_FFI_DEFINE_HANDLER(kDispatchFp8RowsDoneHandler, DispatchFp8RowsDone,
                       BindDispatch(BindCall().Arg<Ints>()).Ret<Weights>());

XLA_FFI_DEFINE_HANDLER(kCombineStartHandler, CombineStart,
                       BindCall()
                           .Arg<Rows>()     // expert_rows [C, D]
                           .Arg<Weights>()  // row_weights [C]
                           .Arg<Ints>()     // row_map [R, T, K]
                           .Ret<Ints>());   // pending

XLA_FFI_DEFINE_HANDLER(kCombineDoneHandler, CombineDone,
                       BindCall()
                           .Arg<Ints>()     // pending
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
      {"jaxmoe_dispatch_start", kInstantiateHandler, kDispatchStartHandler},
      {"jaxmoe_dispatch_done", kInstantiateHandler, kDispatchDoneHandler},
      {"jaxmoe_dispatch_fp8_rows_done", kInstantiateHandler, kDispatchFp8RowsDoneHandler},
      {"jaxmoe_combine_start", kInstantiateHandler, kCombineStartHandler},
      {"jaxmoe_combine_done", kInstantiateHandler, kCombineDoneHandler},
      {Name(Operation::kDispatchGrad), kInstantiateHandler, kDispatchGradHandler},
      {Name(Operation::kCombineGrad), kInstantiateHandler, kCombineGradHandler},
  };
  return *handlers;
}

}  // namespace jaxmoe

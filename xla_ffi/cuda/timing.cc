// Times on the device, for benchmarks: a custom call that records a CUDA event on XLA's stream, and
// the C functions that give the time between two of them.
//
// The call is not command-buffer compatible: a replayed graph runs no host code, and an event of a
// graph has no time. The operations between two records may well be in a graph.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace jaxmoe::cuda {
namespace {

// Events of this process by device and slot. A slot that is recorded again holds the later time.
// They are made before a program runs: while it does, a peer may be spinning.
struct Events {
  std::mutex mutex;
  std::map<std::pair<int, int64_t>, cudaEvent_t> of;
};

Events& TheEvents() {
  static auto* events = new Events;
  return *events;
}

// An event belongs to the device that was current when it was made.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess) error_ = cudaSetDevice(device);
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;

  cudaError_t error() const { return error_; }

 private:
  int before_ = 0;
  cudaError_t error_;
};

cudaError_t RecordEvent(cudaStream_t stream, int device, int64_t slot) {
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const std::lock_guard<std::mutex> lock(TheEvents().mutex);
  const auto event = TheEvents().of.find({device, slot});
  return event == TheEvents().of.end() ? cudaErrorInvalidValue
                                       : cudaEventRecord(event->second, stream);
}

ffi::Error Status(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("jaxmoe_cuda_record: ") + cudaGetErrorString(error));
}

// The first operands come out again, as many as there are results; the others are only waited for.
ffi::Error Record(cudaStream_t stream, int32_t device, int64_t slot, ffi::RemainingArgs args,
                  ffi::RemainingRets results) {
  for (size_t i = 0; i < results.size(); ++i) {
    auto in = args.get<ffi::AnyBuffer>(i);
    if (in.has_error()) return in.error();
    auto out = results.get<ffi::AnyBuffer>(i);
    if (out.has_error()) return out.error();
    void* to = (*out)->untyped_data();
    if (to == in->untyped_data()) continue;  // as asked for by input_output_aliases
    const cudaError_t error =
        cudaMemcpyAsync(to, in->untyped_data(), in->size_bytes(), cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return Status(error);
  }
  return Status(RecordEvent(stream, device, slot));
}

cudaError_t MakeEvents(int device, int64_t num_slots) {
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const std::lock_guard<std::mutex> lock(TheEvents().mutex);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    cudaEvent_t& event = TheEvents().of[{device, slot}];
    if (event != nullptr) continue;
    const cudaError_t error = cudaEventCreate(&event);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// Fills the caller's message on an error; returns 1 then, else 0.
int Report(cudaError_t error, const std::string& what, char* message, int message_size) {
  if (error == cudaSuccess) return 0;
  std::strncpy(message, (what + ": " + cudaGetErrorString(error)).c_str(), message_size - 1);
  message[message_size - 1] = '\0';
  return 1;
}

cudaError_t Elapsed(int device, int64_t from, int64_t to, float* ms) {
  const OnDevice current(device);
  if (current.error() != cudaSuccess) return current.error();
  const std::lock_guard<std::mutex> lock(TheEvents().mutex);
  const auto first = TheEvents().of.find({device, from});
  const auto last = TheEvents().of.find({device, to});
  if (first == TheEvents().of.end() || last == TheEvents().of.end()) return cudaErrorInvalidValue;
  const cudaError_t error = cudaEventSynchronize(last->second);
  if (error != cudaSuccess) return error;
  return cudaEventElapsedTime(ms, first->second, last->second);
}

}  // namespace
}  // namespace jaxmoe::cuda

#define JAXMOE_EXPORT extern "C" __attribute__((visibility("default")))

JAXMOE_EXPORT XLA_FFI_Error* jaxmoe_cuda_record(XLA_FFI_CallFrame* frame);
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_cuda_record, jaxmoe::cuda::Record,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attr<int64_t>("slot")
                                  .RemainingArgs()
                                  .RemainingRets());

// Makes events for slots 0 … num_slots - 1 of a device, unless it has them. Returns 0, or 1 with a
// message; so does the next one.
JAXMOE_EXPORT int jaxmoe_cuda_make_events(int device, int64_t num_slots, char* message,
                                          int message_size) {
  return jaxmoe::cuda::Report(jaxmoe::cuda::MakeEvents(device, num_slots),
                              "events of GPU " + std::to_string(device), message, message_size);
}

// Milliseconds on `device` from one slot's event to another's; waits for the latter.
JAXMOE_EXPORT int jaxmoe_cuda_elapsed_ms(int device, int64_t from, int64_t to, float* ms,
                                         char* message, int message_size) {
  const std::string what = "time from event " + std::to_string(from) + " to " + std::to_string(to) +
                           " of GPU " + std::to_string(device);
  return jaxmoe::cuda::Report(jaxmoe::cuda::Elapsed(device, from, to, ms), what, message,
                              message_size);
}

// Destroys all events.
JAXMOE_EXPORT void jaxmoe_cuda_reset_events() {
  const std::lock_guard<std::mutex> lock(jaxmoe::cuda::TheEvents().mutex);
  for (const auto& [key, event] : jaxmoe::cuda::TheEvents().of) {
    const jaxmoe::cuda::OnDevice current(key.first);
    cudaEventDestroy(event);
  }
  jaxmoe::cuda::TheEvents().of.clear();
}

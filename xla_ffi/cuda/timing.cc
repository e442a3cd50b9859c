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
  cudaEvent_t& event = TheEvents().of[{device, slot}];
  if (event == nullptr) {
    const cudaError_t error = cudaEventCreate(&event);
    if (error != cudaSuccess) return error;
  }
  return cudaEventRecord(event, stream);
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

// Forgets all events.
JAXMOE_EXPORT void jaxmoe_cuda_reset_events() {
  const std::lock_guard<std::mutex> lock(jaxmoe::cuda::TheEvents().mutex);
  for (const auto& [key, event] : jaxmoe::cuda::TheEvents().of) {
    const jaxmoe::cuda::OnDevice current(key.first);
    cudaEventDestroy(event);
  }
  jaxmoe::cuda::TheEvents().of.clear();
}

// Milliseconds on `device` from one slot's event to another's; waits for the latter. Returns 0, or
// 1 with a message.
JAXMOE_EXPORT int jaxmoe_cuda_elapsed_ms(int device, int64_t from, int64_t to, float* ms,
                                         char* message, int message_size) {
  const cudaError_t error = jaxmoe::cuda::Elapsed(device, from, to, ms);
  if (error == cudaSuccess) return 0;
  const std::string text = "events " + std::to_string(from) + " and " + std::to_string(to) +
                           " of GPU " + std::to_string(device) + ": " + cudaGetErrorString(error);
  std::strncpy(message, text.c_str(), message_size - 1);
  message[message_size - 1] = '\0';
  return 1;
}

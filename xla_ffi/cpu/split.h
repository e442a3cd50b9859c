// Calls in two halves, for groups whose devices all belong to this process. A start leaves what the
// other devices need of it and returns; a done waits for what they have left, and makes its results
// of that and of its own operands, which it gets again.

#ifndef JAXMOE_XLA_FFI_CPU_SPLIT_H_
#define JAXMOE_XLA_FFI_CPU_SPLIT_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "xla_ffi/cpu/exchange.h"

namespace jaxmoe {

class SplitCalls {
 public:
  explicit SplitCalls(double timeout_seconds) : timeout_seconds_(timeout_seconds) {}

  // Returns the number that the device's done goes by, the same on all devices of the call; 0 with
  // an error. Calls of one device under a key come one after the other.
  int64_t Start(const CallKey& key, const CallShape& shape, int64_t rank, const Buffers& operands,
                std::string* error);
  // `arrival.done` is called when the results are there; until then it keeps this object alive.
  void Done(int64_t number, Operation op, const CallShape& shape, Arrival arrival);

  void CheckDeadlines(Clock::time_point now);
  void Close();

 private:
  struct Device {
    bool started = false;
    std::vector<char> payload;  // for all other devices
    bool left = false;          // the payload is complete
    bool asked = false;         // its done has come
    std::optional<Arrival> waiting;
    CallShape shape;  // of its done, while that waits
    Clock::time_point deadline;
  };
  struct Call {
    CallKey key;
    CallShape shape;  // what a start knows of it
    int64_t number = 0;
    int64_t num_left = 0, num_finished = 0;
    std::vector<Device> devices;
  };
  struct Running;

  std::shared_ptr<Call> FindOrCreate(const CallKey& key, const CallShape& shape, int64_t rank);
  void Run(const std::shared_ptr<Call>& call, const CallShape& shape, Arrival arrival);
  void Finish(const std::shared_ptr<Running>& running);

  const double timeout_seconds_;
  std::mutex mutex_;
  bool closed_ = false;
  int64_t last_number_ = 0;
  std::map<int64_t, std::shared_ptr<Call>> calls_;  // whose results not all devices have
  // Calls that lack a start, oldest first.
  std::map<CallKey, std::deque<std::shared_ptr<Call>>> open_;
};

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_SPLIT_H_

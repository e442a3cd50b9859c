// One operation of all devices of a slice: from the first device's arrival until every device of
// this process has its results, or an error.

#ifndef JAXMOE_XLA_FFI_CPU_EXCHANGE_H_
#define JAXMOE_XLA_FFI_CPU_EXCHANGE_H_

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "xla_ffi/common/config.h"
#include "xla_ffi/cpu/operations.h"

namespace jaxmoe {

using Clock = std::chrono::steady_clock;

// What devices must agree on to be in one exchange. Calls of one device under one key come one
// after the other (a loop); everything else differs in the key.
struct CallKey {
  int32_t slice = 0;
  Operation op = Operation::kDispatch;
  int64_t run = 0;   // XLA's id of one execution of a program, equal on all devices and processes
  int64_t site = 0;  // the call's name
  int32_t instance = 0;  // which of the compiled calls of this name

  bool operator<(const CallKey& o) const {
    return std::tie(slice, op, run, site, instance) <
           std::tie(o.slice, o.op, o.run, o.site, o.instance);
  }
};

// A device of this process that takes part.
struct Arrival {
  int64_t rank = 0;
  int32_t device = 0;  // XLA's ordinal, which picks the thread that `done` runs on
  Buffers buffers;
  std::function<void(const std::string& error)> done;  // empty: success
};

// A device of another process that takes part: its payload, to be released once read.
struct RemoteArrival {
  int64_t rank = 0;
  const char* payload = nullptr;
  std::function<void()> release;
};

class Exchange : public std::enable_shared_from_this<Exchange> {
 public:
  // `process_of[rank]` and `here` tell which devices share this process.
  Exchange(const CallKey& key, const CallShape& shape, std::vector<int64_t> process_of,
           int64_t here, Clock::time_point deadline);

  bool HasArrived(int64_t rank) const;
  // Each returns true if that was the last device; then the caller calls Start. A failed exchange
  // answers an arrival with its error.
  bool Add(Arrival arrival, const CallShape& shape);
  bool AddRemote(RemoteArrival arrival, const CallShape& shape);

  // Operands of a device are still being read for others, by somebody who calls Unhold.
  void Hold();
  void Unhold();

  void Start();
  void Fail(const std::string& error);
  bool failed() const;
  // Everybody has come: nobody will look for this exchange again.
  bool full() const;

  const CallKey& key() const { return key_; }
  Clock::time_point deadline() const { return deadline_; }
  // Who is here, who is missing and where they should be; for errors.
  std::string Describe() const;

  // Index of `rank` among the devices that are not in the process of `source`.
  size_t DestinationIndex(int64_t source, int64_t rank) const;

 private:
  void CheckShape(int64_t rank, const CallShape& shape);
  bool Count(std::unique_lock<std::mutex> lock);
  Tasks Guarded(Tasks tasks);
  void Finish();
  void DeliverIfReady(std::unique_lock<std::mutex> lock);

  const CallKey key_;
  const CallShape shape_;
  const std::vector<int64_t> process_of_;
  const int64_t here_;
  const Clock::time_point deadline_;

  mutable std::mutex mutex_;
  std::vector<std::optional<Arrival>> local_;
  std::vector<std::optional<RemoteArrival>> remote_;
  int64_t num_arrived_ = 0;
  int64_t num_holds_ = 0;
  bool started_ = false;                      // everybody came before an error did
  bool worked_ = false;                       // all results of this process are written
  std::string error_;                         // set once, by Fail or by work that failed
  std::vector<std::vector<Source>> sources_;  // [rank], what the work of a local rank reads
};

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_EXCHANGE_H_

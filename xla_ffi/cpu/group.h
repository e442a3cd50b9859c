// An ExpertParallel group on the host: pairs up the calls of its devices.

#ifndef JAXMOE_XLA_FFI_CPU_GROUP_H_
#define JAXMOE_XLA_FFI_CPU_GROUP_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "xla_ffi/cpu/exchange.h"
#include "xla_ffi/cpu/link.h"
#include "xla_ffi/cpu/split.h"

namespace jaxmoe {

struct GroupOptions {
  int64_t uid = 0;
  double timeout_seconds = 60;
  // [slice][rank] the process of each device, and which process this is.
  std::vector<std::vector<int64_t>> process_of;
  int64_t here = 0;
};

class Group : public std::enable_shared_from_this<Group> {
 public:
  explicit Group(GroupOptions options)
      : options_(std::move(options)), split_(options_.timeout_seconds) {}

  // The registry. Find returns null for a group that is closed or was never opened.
  static void Open(GroupOptions options);
  static std::shared_ptr<Group> Find(int64_t uid);
  static void Close(int64_t uid);

  int32_t num_slices() const { return static_cast<int32_t>(options_.process_of.size()); }

  // A device of this process takes part in a call; `arrival.done` is called when its results are
  // there.
  void Arrive(const CallKey& key, const CallShape& shape, Arrival arrival);

  // Calls in two halves; not for groups that span processes.
  SplitCalls& split() { return split_; }

  // Shared memory, for groups that span processes; `largest` is the largest call there will be.
  void CreateSegment(const std::string& name, const CallShape& largest);
  void MapSegment(int64_t process, const std::string& name);
  void UnlinkSegment();

  // Ends exchanges whose time is up.
  void CheckDeadlines(Clock::time_point now);

 private:
  using Queue = std::deque<std::shared_ptr<Exchange>>;

  void ArriveRemote(const Announcement& announcement, const char* payload,
                    std::function<void()> release);
  std::shared_ptr<Exchange> FindOrCreate(const CallKey& key, const CallShape& shape, int64_t rank);
  void ForgetIfFull(const CallKey& key, const std::shared_ptr<Exchange>& exchange);
  void Send(const std::shared_ptr<Exchange>& exchange, const CallShape& shape, int64_t rank,
            const Buffers& buffers);
  bool SpansProcesses(int32_t slice) const;
  void Shut();

  const GroupOptions options_;
  std::shared_ptr<Link> link_;
  SplitCalls split_;

  std::mutex mutex_;
  bool closed_ = false;
  // Exchanges that lack a device, oldest first. A device takes part in the first one that it is not
  // in yet: its calls under one key come in order.
  std::map<CallKey, Queue> open_;
};

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_GROUP_H_

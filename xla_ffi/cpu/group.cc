#include "xla_ffi/cpu/group.h"

#include <unistd.h>

#include <algorithm>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>

#include "xla_ffi/common/text.h"
#include "xla_ffi/cpu/threads.h"

namespace jaxmoe {
namespace {

// Payloads of one device that peers may be reading at a time; further ones wait for a slot.
// Slots take memory when first used. Too few could let processes that run many independent calls in
// different orders wait for each other.
constexpr int64_t kSlotsPerDevice = 256;
constexpr auto kWatchPeriod = std::chrono::milliseconds(50);

struct Registry {
  const pid_t process = getpid();
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Group>> groups;
};

Registry& TheRegistry() {
  static auto* registry = new Registry;
  return *registry;
}

void WatchDeadlines() {
  for (;;) {
    std::this_thread::sleep_for(kWatchPeriod);
    std::vector<std::shared_ptr<Group>> groups;
    {
      std::lock_guard<std::mutex> lock(TheRegistry().mutex);
      for (auto& [uid, group] : TheRegistry().groups) groups.push_back(group);
    }
    for (auto& group : groups) {
      group->CheckDeadlines(Clock::now());
      group->split().CheckDeadlines(Clock::now());
    }
  }
}

}  // namespace

void Group::Open(GroupOptions options) {
  StartPool();
  static const bool watching = [] {
    std::thread(WatchDeadlines).detach();
    return true;
  }();
  static_cast<void>(watching);
  auto group = std::make_shared<Group>(std::move(options));
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  if (!TheRegistry().groups.emplace(group->options_.uid, group).second) {
    throw std::runtime_error("group " + std::to_string(group->options_.uid) + " is open already");
  }
}

std::shared_ptr<Group> Group::Find(int64_t uid) {
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  auto found = TheRegistry().groups.find(uid);
  return found == TheRegistry().groups.end() ? nullptr : found->second;
}

void Group::Close(int64_t uid) {
  // A fork has copies of the groups. Closing one would release payloads that we have yet to read,
  // and wait for a thread that is not there.
  if (TheRegistry().process != getpid()) return;
  std::shared_ptr<Group> group;
  {
    std::lock_guard<std::mutex> lock(TheRegistry().mutex);
    auto found = TheRegistry().groups.find(uid);
    if (found == TheRegistry().groups.end()) return;
    group = std::move(found->second);
    TheRegistry().groups.erase(found);
  }
  group->Shut();
}

void Group::Shut() {
  if (link_) link_->Stop();
  split_.Close();
  std::map<CallKey, Queue> open;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    open.swap(open_);
  }
  for (auto& [key, queue] : open) {
    for (auto& exchange : queue) exchange->Fail("the group was closed during the call");
  }
}

bool Group::SpansProcesses(int32_t slice) const {
  const auto& processes = options_.process_of[slice];
  return std::any_of(processes.begin(), processes.end(),
                     [this](int64_t p) { return p != options_.here; });
}

// The exchange that the device's next call under `key` belongs to. Called with mutex_ held.
std::shared_ptr<Exchange> Group::FindOrCreate(const CallKey& key, const CallShape& shape,
                                              int64_t rank) {
  Queue& queue = open_[key];
  for (auto& exchange : queue) {
    if (!exchange->HasArrived(rank)) return exchange;
  }
  const auto timeout = std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(options_.timeout_seconds));
  queue.push_back(std::make_shared<Exchange>(key, shape, options_.process_of[key.slice],
                                             options_.here, Clock::now() + timeout));
  return queue.back();
}

// Called with mutex_ held.
void Group::ForgetIfFull(const CallKey& key, const std::shared_ptr<Exchange>& exchange) {
  if (!exchange->full()) return;
  auto found = open_.find(key);
  Queue& queue = found->second;
  queue.erase(std::find(queue.begin(), queue.end(), exchange));
  if (queue.empty()) open_.erase(found);
}

void Group::Arrive(const CallKey& key, const CallShape& shape, Arrival arrival) {
  const int64_t rank = arrival.rank;
  const Buffers buffers = arrival.buffers;
  const bool sends = SpansProcesses(key.slice);
  std::shared_ptr<Exchange> exchange;
  bool last;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (closed_) {
      lock.unlock();
      return arrival.done("the group is closed");
    }
    exchange = FindOrCreate(key, shape, rank);
    if (sends) exchange->Hold();
    last = exchange->Add(std::move(arrival), shape);
    ForgetIfFull(key, exchange);
  }
  if (last) exchange->Start();
  if (sends) Send(exchange, shape, rank, buffers);
}

void Group::Send(const std::shared_ptr<Exchange>& exchange, const CallShape& shape, int64_t rank,
                 const Buffers& buffers) {
  const CallKey& key = exchange->key();
  const auto& process_of = options_.process_of[key.slice];
  std::vector<int64_t> destinations;
  std::set<int64_t> readers;
  for (size_t r = 0; r < process_of.size(); ++r) {
    if (process_of[r] == options_.here) continue;
    destinations.push_back(static_cast<int64_t>(r));
    readers.insert(process_of[r]);
  }
  Outgoing outgoing;
  outgoing.announcement = {key, shape, rank, -1};
  outgoing.num_readers = static_cast<int64_t>(readers.size());
  outgoing.bytes = Payload(key.op, shape).Bytes(destinations.size());
  outgoing.write = [op = key.op, shape, buffers, destinations](char* payload) {
    WritePayload(op, shape, buffers, destinations, payload);
  };
  outgoing.written = [exchange](const std::string& error) {
    if (!error.empty()) exchange->Fail(error);
    exchange->Unhold();
  };
  outgoing.cancelled = [exchange] { return exchange->failed(); };
  outgoing.deadline = exchange->deadline();
  link_->Send(std::move(outgoing));
}

void Group::ArriveRemote(const Announcement& announcement, const char* payload,
                         std::function<void()> release) {
  const CallKey& key = announcement.key;
  const auto& process_of = options_.process_of[key.slice];
  if (std::find(process_of.begin(), process_of.end(), options_.here) == process_of.end()) {
    return;  // a slice that this process has no device in; the payload is not ours to release
  }
  std::shared_ptr<Exchange> exchange;
  bool last;
  {
    std::unique_lock<std::mutex> lock(mutex_);
    if (closed_) {
      lock.unlock();
      return release();
    }
    exchange = FindOrCreate(key, announcement.shape, announcement.rank);
    RemoteArrival arrival{announcement.rank, payload, std::move(release)};
    last = exchange->AddRemote(std::move(arrival), announcement.shape);
    ForgetIfFull(key, exchange);
  }
  if (last) exchange->Start();
}

void Group::CheckDeadlines(Clock::time_point now) {
  std::vector<std::shared_ptr<Exchange>> late;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [key, queue] : open_) {
      for (auto& exchange : queue) {
        if (now >= exchange->deadline() && !exchange->failed()) late.push_back(exchange);
      }
    }
  }
  for (auto& exchange : late) {
    const std::string text =
        Concat("timed out after ", options_.timeout_seconds, " s: ", exchange->Describe(),
               ", group ", Hex(options_.uid),
               ". A device stopped or runs another program; a slow one needs a longer timeout=.");
    exchange->Fail(text);
  }
}

void Group::CreateSegment(const std::string& name, const CallShape& largest) {
  int64_t num_local = 0;
  size_t num_remote = 0;
  for (const auto& slice : options_.process_of) {
    const auto local = std::count(slice.begin(), slice.end(), options_.here);
    num_local += local;
    if (local) num_remote = std::max<size_t>(num_remote, slice.size() - local);
  }
  size_t slot_bytes = 0;
  for (Operation op : {Operation::kDispatch, Operation::kCombine, Operation::kDispatchGrad,
                       Operation::kCombineGrad}) {
    slot_bytes = std::max(slot_bytes, Payload(op, largest).Bytes(num_remote));
  }
  CallShape quantized = largest;  // scales make narrow tokens longer
  quantized.wire = kWireAmax;
  slot_bytes = std::max(slot_bytes, Payload(Operation::kDispatch, quantized).Bytes(num_remote));
  auto self = weak_from_this();
  link_ = std::make_shared<Link>(
      options_.here,
      [self](const Announcement& announcement, const char* payload, std::function<void()> release) {
        if (auto group = self.lock()) group->ArriveRemote(announcement, payload, release);
      });
  link_->Create(name, kSlotsPerDevice * num_local, slot_bytes);
}

void Group::MapSegment(int64_t process, const std::string& name) { link_->Map(process, name); }

void Group::UnlinkSegment() {
  if (link_) link_->Unlink();
}

}  // namespace jaxmoe

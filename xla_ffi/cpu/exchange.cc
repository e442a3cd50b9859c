#include "xla_ffi/cpu/exchange.h"

#include <exception>
#include <utility>

#include "xla_ffi/common/text.h"
#include "xla_ffi/cpu/threads.h"

namespace jaxmoe {
namespace {

std::string List(const std::vector<int64_t>& numbers) {
  std::string text;
  for (int64_t number : numbers) text += Concat(text.empty() ? "" : ", ", number);
  return Concat("[", text, "]");
}

const char* Name(xla::ffi::DataType dtype) {
  switch (dtype) {
    case xla::ffi::DataType::BF16:
      return "bfloat16";
    case xla::ffi::DataType::F16:
      return "float16";
    case xla::ffi::DataType::F32:
      return "float32";
    default:
      return "other";
  }
}

std::string Sizes(const CallShape& s) {
  return Concat("tokens ", s.num_tokens, ", top_k ", s.top_k, ", dim ", s.dim, ", capacity ",
                s.capacity, ", experts ", s.num_experts, ", dtype ", Name(s.dtype));
}

// Below this, handing work to other threads costs more than it saves.
constexpr size_t kInlineBytes = 1 << 16;

}  // namespace

Exchange::Exchange(const CallKey& key, const CallShape& shape, std::vector<int64_t> process_of,
                   int64_t here, Clock::time_point deadline)
    : key_(key),
      shape_(shape),
      process_of_(std::move(process_of)),
      here_(here),
      deadline_(deadline),
      local_(process_of_.size()),
      remote_(process_of_.size()),
      sources_(process_of_.size()) {}

bool Exchange::HasArrived(int64_t rank) const {
  std::lock_guard<std::mutex> lock(mutex_);
  return local_[rank].has_value() || remote_[rank].has_value();
}

bool Exchange::Add(Arrival arrival, const CallShape& shape) {
  CheckShape(arrival.rank, shape);
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t rank = arrival.rank;
  local_[rank] = std::move(arrival);
  return Count(std::move(lock));
}

bool Exchange::AddRemote(RemoteArrival arrival, const CallShape& shape) {
  CheckShape(arrival.rank, shape);
  std::unique_lock<std::mutex> lock(mutex_);
  const int64_t rank = arrival.rank;
  remote_[rank] = std::move(arrival);
  return Count(std::move(lock));
}

// Counts an arrival. True for the last one, unless the exchange has failed: the work now holds the
// operands, and from here on nothing but its end ends the exchange.
bool Exchange::Count(std::unique_lock<std::mutex> lock) {
  ++num_arrived_;
  if (!error_.empty()) {
    DeliverIfReady(std::move(lock));
    return false;
  }
  started_ = num_arrived_ == static_cast<int64_t>(process_of_.size());
  num_holds_ += started_;
  return started_;
}

void Exchange::CheckShape(int64_t rank, const CallShape& shape) {
  if (shape == shape_) return;
  Fail("device " + std::to_string(rank) + " came with other sizes (" + Sizes(shape) +
       ") than the first one (" + Sizes(shape_) +
       "). All devices must make the same call: run the same program everywhere.");
}

void Exchange::Hold() {
  std::lock_guard<std::mutex> lock(mutex_);
  ++num_holds_;
}

void Exchange::Unhold() {
  std::unique_lock<std::mutex> lock(mutex_);
  --num_holds_;
  DeliverIfReady(std::move(lock));
}

size_t Exchange::DestinationIndex(int64_t source, int64_t rank) const {
  size_t index = 0;
  for (int64_t r = 0; r < rank; ++r) index += process_of_[r] != process_of_[source];
  return index;
}

void Exchange::Start() {
  const int64_t num = static_cast<int64_t>(process_of_.size());
  const Payload layout(key_.op, shape_);
  Tasks first, second;
  for (int64_t rank = 0; rank < num; ++rank) {
    if (!local_[rank]) continue;
    sources_[rank].resize(num);
    for (int64_t s = 0; s < num; ++s) {
      if (local_[s]) {
        sources_[rank][s].local = &local_[s]->buffers;
      } else {
        sources_[rank][s].payload = remote_[s]->payload + layout.Offset(DestinationIndex(s, rank));
      }
    }
    Work work = MakeWork(key_.op, shape_, rank, local_[rank]->buffers, sources_[rank]);
    std::move(work.first.begin(), work.first.end(), std::back_inserter(first));
    std::move(work.second.begin(), work.second.end(), std::back_inserter(second));
  }
  first = Guarded(std::move(first));
  second = Guarded(std::move(second));
  const size_t bytes = shape_.capacity * shape_.row_bytes() * num;
  if (bytes <= kInlineBytes) {
    for (auto& task : first) task();
    for (auto& task : second) task();
    return Finish();
  }
  RunAllOnPool(std::move(first), [self = shared_from_this(), second = std::move(second)]() mutable {
    RunAllOnPool(std::move(second), [self] { self->Finish(); });
  });
}

// Tasks whose exceptions (there is no memory) become the call's error. Later steps then do nothing.
Tasks Exchange::Guarded(Tasks tasks) {
  for (auto& task : tasks) {
    task = [self = shared_from_this(), task = std::move(task)] {
      if (self->failed()) return;
      try {
        task();
      } catch (const std::exception& failure) {
        std::lock_guard<std::mutex> lock(self->mutex_);
        self->error_ = failure.what();
      }
    };
  }
  return tasks;
}

void Exchange::Finish() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    worked_ = true;
  }
  Unhold();
}

void Exchange::Fail(const std::string& error) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (started_ || !error_.empty()) return;
  error_ = error.empty() ? "failed" : error;
  DeliverIfReady(std::move(lock));
}

bool Exchange::failed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return !error_.empty();
}

bool Exchange::full() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return num_arrived_ == static_cast<int64_t>(process_of_.size());
}

// Once nobody reads the operands any more: lets go of the payloads and tells every device of this
// process that has not been told yet.
void Exchange::DeliverIfReady(std::unique_lock<std::mutex> lock) {
  if (num_holds_ > 0 || (!worked_ && error_.empty())) return;
  std::vector<std::pair<int32_t, std::function<void()>>> calls;
  for (auto& arrival : local_) {
    if (!arrival || !arrival->done) continue;
    std::string error = error_;
    if (!error.empty()) {
      error = std::string(Name(key_.op)) + " on device " + std::to_string(arrival->rank) + ": " +
              error_;
    }
    calls.emplace_back(arrival->device, [done = std::move(arrival->done), error] { done(error); });
    arrival->done = nullptr;
  }
  std::vector<std::function<void()>> releases;
  for (auto& arrival : remote_) {
    if (!arrival || !arrival->release) continue;
    releases.push_back(std::move(arrival->release));
    arrival->release = nullptr;
  }
  lock.unlock();
  for (auto& release : releases) release();
  for (auto& [device, call] : calls) RunOnDeviceThread(device, std::move(call));
}

std::string Exchange::Describe() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> present, missing, processes;
  for (size_t r = 0; r < process_of_.size(); ++r) {
    const bool here = local_[r].has_value() || remote_[r].has_value();
    (here ? present : missing).push_back(static_cast<int64_t>(r));
    if (!here && process_of_[r] != here_ &&
        (processes.empty() || processes.back() != process_of_[r])) {
      processes.push_back(process_of_[r]);
    }
  }
  return Concat("devices ", List(missing), " of the expert axis did not come",
                processes.empty() ? std::string() : Concat(" (processes ", List(processes), ")"),
                ", devices ", List(present), " did; slice ", key_.slice, ", run ", key_.run,
                ", site ", key_.site, ", instance ", key_.instance, ", ", Sizes(shape_));
}

}  // namespace jaxmoe

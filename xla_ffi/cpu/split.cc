#include "xla_ffi/cpu/split.h"

#include <exception>
#include <utility>

#include "xla_ffi/common/text.h"
#include "xla_ffi/cpu/threads.h"

namespace jaxmoe {
namespace {

// Below this, handing work to other threads costs more than it saves.
constexpr size_t kInlineBytes = 1 << 16;

// What a start knows of the sizes.
CallShape ShapeOfStart(CallShape shape, Operation op) {
  if (op == Operation::kDispatch) shape.capacity = 0;
  shape.fp8_rows = false;
  return shape;
}

void Fail(Arrival arrival, Operation op, const std::string& error) {
  std::string text = Concat(Name(op), " on device ", arrival.rank, ": ", error);
  RunOnDeviceThread(arrival.device,
                    [done = std::move(arrival.done), text = std::move(text)] { done(text); });
}

}  // namespace

// A done at work; what its tasks read.
struct SplitCalls::Running {
  std::shared_ptr<Call> call;
  Arrival arrival;
  std::vector<Source> sources;
  std::mutex mutex;
  std::string error;
};

// Called with mutex_ held.
std::shared_ptr<SplitCalls::Call> SplitCalls::FindOrCreate(const CallKey& key,
                                                           const CallShape& shape, int64_t rank) {
  auto& queue = open_[key];
  for (auto& call : queue) {
    if (!call->devices[rank].started) return call;
  }
  auto call = std::make_shared<Call>();
  call->key = key;
  call->shape = shape;
  call->number = ++last_number_;
  call->devices.resize(shape.num_devices);
  calls_[call->number] = call;
  queue.push_back(call);
  return call;
}

int64_t SplitCalls::Start(const CallKey& key, const CallShape& shape, int64_t rank,
                          const Buffers& operands, std::string* error) {
  std::shared_ptr<Call> call;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (closed_) {
      *error = "the group is closed";
      return 0;
    }
    call = FindOrCreate(key, shape, rank);
    call->devices[rank].started = true;
    if (!(call->shape == shape)) {
      *error = Concat("device ", rank,
                      " came with other sizes than the first one. All devices "
                      "must make the same call: run the same program everywhere.");
      return 0;
    }
  }
  std::vector<int64_t> others;
  for (int64_t r = 0; r < shape.num_devices; ++r) {
    if (r != rank) others.push_back(r);
  }
  std::vector<char> payload(Payload(key.op, shape).Bytes(others.size()));
  WritePayload(key.op, shape, operands, others, payload.data());
  std::vector<std::pair<CallShape, Arrival>> ready;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    call->devices[rank].payload = std::move(payload);
    call->devices[rank].left = true;
    if (++call->num_left < shape.num_devices) return call->number;
    auto queue = open_.find(key);
    if (queue != open_.end()) {
      for (auto i = queue->second.begin(); i != queue->second.end(); ++i) {
        if (*i != call) continue;
        queue->second.erase(i);
        break;
      }
      if (queue->second.empty()) open_.erase(queue);
    }
    for (Device& device : call->devices) {
      if (!device.waiting) continue;
      ready.emplace_back(device.shape, std::move(*device.waiting));
      device.waiting.reset();
    }
  }
  for (auto& [done_shape, arrival] : ready) Run(call, done_shape, std::move(arrival));
  return call->number;
}

void SplitCalls::Done(int64_t number, Operation op, const CallShape& shape, Arrival arrival) {
  std::shared_ptr<Call> call;
  std::string error;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = calls_.find(number);
    const bool known =
        found != calls_.end() && arrival.rank < static_cast<int64_t>(found->second->devices.size());
    if (closed_) {
      error = "the group is closed";
    } else if (!known || !found->second->devices[arrival.rank].started ||
               found->second->devices[arrival.rank].asked) {
      error =
          "done of a pending call that is not one: no start of this group is waiting for it; "
          "each can be done once";
    } else if (found->second->key.op != op || !(found->second->shape == ShapeOfStart(shape, op))) {
      error =
          "done of a pending call that is not one: its start was of another operation or of "
          "other sizes";
    } else {
      call = found->second;
      Device& device = call->devices[arrival.rank];
      device.asked = true;
      if (call->num_left < shape.num_devices) {
        device.deadline = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                             std::chrono::duration<double>(timeout_seconds_));
        device.waiting = std::move(arrival);
        device.shape = shape;
        return;
      }
    }
  }
  if (!error.empty()) return Fail(std::move(arrival), op, error);
  Run(call, shape, std::move(arrival));
}

// The work of one device; all have started.
void SplitCalls::Run(const std::shared_ptr<Call>& call, const CallShape& shape, Arrival arrival) {
  auto running = std::make_shared<Running>();
  running->call = call;
  running->arrival = std::move(arrival);
  const Operation op = call->key.op;
  const int64_t rank = running->arrival.rank;
  const Payload layout(op, shape);
  running->sources.resize(shape.num_devices);
  for (int64_t s = 0; s < shape.num_devices; ++s) {
    if (s == rank) {
      running->sources[s].local = &running->arrival.buffers;
    } else {
      running->sources[s].payload =
          call->devices[s].payload.data() + layout.Offset(rank < s ? rank : rank - 1);
    }
  }
  Work work = MakeWork(op, shape, rank, running->arrival.buffers, running->sources);
  for (Tasks* tasks : {&work.first, &work.second}) {
    for (auto& task : *tasks) {
      task = [running, task = std::move(task)] {
        try {
          task();
        } catch (const std::exception& failure) {  // there is no memory
          std::lock_guard<std::mutex> lock(running->mutex);
          running->error = failure.what();
        }
      };
    }
  }
  if (shape.capacity * shape.row_bytes() <= kInlineBytes) {
    for (auto& task : work.first) task();
    for (auto& task : work.second) task();
    return Finish(running);
  }
  RunAllOnPool(std::move(work.first), [this, running, second = std::move(work.second)]() mutable {
    RunAllOnPool(std::move(second), [this, running] { Finish(running); });
  });
}

void SplitCalls::Finish(const std::shared_ptr<Running>& running) {
  const std::shared_ptr<Call> call = running->call;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (++call->num_finished == call->shape.num_devices) calls_.erase(call->number);
  }
  if (!running->error.empty()) {
    return Fail(std::move(running->arrival), call->key.op, running->error);
  }
  RunOnDeviceThread(running->arrival.device,
                    [done = std::move(running->arrival.done)] { done(""); });
}

void SplitCalls::CheckDeadlines(Clock::time_point now) {
  std::vector<std::pair<Operation, Arrival>> late;
  std::vector<std::string> missing;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [number, call] : calls_) {
      std::string text;
      for (size_t r = 0; r < call->devices.size(); ++r) {
        if (!call->devices[r].left) text += Concat(text.empty() ? "" : ", ", r);
      }
      for (Device& device : call->devices) {
        if (!device.waiting || now < device.deadline) continue;
        late.emplace_back(call->key.op, std::move(*device.waiting));
        missing.push_back(text);
        device.waiting.reset();
      }
    }
  }
  for (size_t i = 0; i < late.size(); ++i) {
    Fail(std::move(late[i].second), late[i].first,
         Concat("timed out after ", timeout_seconds_, " s: devices [", missing[i],
                "] of the expert axis did not start the call that this one waits for. A device "
                "stopped or runs another program; a slow one needs a longer timeout=."));
  }
}

void SplitCalls::Close() {
  std::vector<std::pair<Operation, Arrival>> waiting;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    for (auto& [number, call] : calls_) {
      for (Device& device : call->devices) {
        if (!device.waiting) continue;
        waiting.emplace_back(call->key.op, std::move(*device.waiting));
        device.waiting.reset();
      }
    }
    calls_.clear();
    open_.clear();
  }
  for (auto& [op, arrival] : waiting) {
    Fail(std::move(arrival), op, "the group was closed during the call");
  }
}

}  // namespace jaxmoe

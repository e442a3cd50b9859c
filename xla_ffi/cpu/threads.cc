#include "xla_ffi/cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <unordered_map>
#include <utility>

namespace jaxmoe {
namespace {

using Task = std::function<void()>;

// A queue and the threads that serve it.
class Workers {
 public:
  // Makes do with fewer threads where the system gives no more; throws if it gives none.
  explicit Workers(unsigned num_threads) {
    for (unsigned i = 0; i < num_threads; ++i) {
      try {
        std::thread([this] { Serve(); }).detach();
      } catch (const std::system_error&) {
        if (i == 0) throw;
      }
    }
  }

  void Push(Task task) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      queue_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void Serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [this] { return !queue_.empty(); });
      Task task = std::move(queue_.front());
      queue_.pop_front();
      lock.unlock();
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Task> queue_;
};

Workers& Pool() {
  static auto* pool = new Workers(std::max(1u, std::thread::hardware_concurrency()));
  return *pool;
}

Workers& DeviceThread(int32_t device) {
  static auto* mutex = new std::mutex;
  static auto* threads = new std::unordered_map<int32_t, std::unique_ptr<Workers>>;
  std::lock_guard<std::mutex> lock(*mutex);
  std::unique_ptr<Workers>& worker = (*threads)[device];
  if (worker == nullptr) worker = std::make_unique<Workers>(1);
  return *worker;
}

}  // namespace

void StartPool() { Pool(); }

void StartDeviceThread(int32_t device) { DeviceThread(device); }

void RunOnPool(Task task) { Pool().Push(std::move(task)); }

void RunAllOnPool(std::vector<Task> tasks, Task done) {
  if (tasks.empty()) return done();
  auto left = std::make_shared<std::atomic<size_t>>(tasks.size());
  auto last = std::make_shared<Task>(std::move(done));
  for (Task& task : tasks) {
    RunOnPool([left, last, task = std::move(task)] {
      task();
      if (left->fetch_sub(1) == 1) (*last)();
    });
  }
}

void RunOnDeviceThread(int32_t device, Task task) { DeviceThread(device).Push(std::move(task)); }

}  // namespace jaxmoe

#include "xla_ffi/cpu/threads.h"

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <utility>

namespace jaxmoe {
namespace {

using Task = std::function<void()>;

// A queue and the threads that serve it.
class Workers {
 public:
  explicit Workers(unsigned num_threads) {
    for (unsigned i = 0; i < num_threads; ++i) std::thread([this] { Serve(); }).detach();
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

}  // namespace

void RunOnPool(Task task) {
  static Workers* pool = new Workers(std::max(1u, std::thread::hardware_concurrency()));
  pool->Push(std::move(task));
}

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

void RunOnDeviceThread(int32_t device, Task task) {
  static auto* mutex = new std::mutex;
  static auto* threads = new std::unordered_map<int32_t, Workers*>;
  Workers* worker;
  {
    std::lock_guard<std::mutex> lock(*mutex);
    Workers*& slot = (*threads)[device];
    if (slot == nullptr) slot = new Workers(1);
    worker = slot;
  }
  worker->Push(std::move(task));
}

}  // namespace jaxmoe

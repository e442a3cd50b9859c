// A GPU in one host thread, to run kernels of xla_ffi/gemm where there is none: their threads are
// fibers that take turns in random order, and copies between memories happen at random times.
//
// It follows what the documentation of PTX promises and nothing more: what a kernel does not wait
// for may come as late as it can. It says nothing about speed, and cannot tell whether the
// documentation was understood.

#ifndef JAXMOE_XLA_FFI_TESTS_EMULATED_GPU_H_
#define JAXMOE_XLA_FFI_TESTS_EMULATED_GPU_H_

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

namespace jaxmoe::emulated {

constexpr uint32_t kSharedBytes = 232448;
// Where a block's shared memory begins: no more aligned than CUDA promises.
constexpr uint32_t kSharedBegin = 0x410;
constexpr int kWarpLanes = 32;
constexpr int kNamedBarriers = 16;

// An mbarrier: a phase ends when all have arrived and the expected bytes are there.
struct Barrier {
  int arrivals = 0, pending = 0, phase = 0;
  int64_t bytes = 0;

  void EndIfComplete() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    ++phase;
  }
};

// A place where threads wait for each other, again and again.
struct Meeting {
  int arrived = 0, round = 0;
};

struct Block {
  int cluster, rank;
  std::vector<char> shared;
  // By pieces of 16 bytes: the thread + 1 whose ordinary writing the copy engine and the tensor
  // cores need not see yet.
  std::vector<int> unfenced;
  std::map<uint32_t, Barrier> barriers;
  Meeting named[kNamedBarriers];
};

struct Warp {
  Meeting meeting;
  uint32_t values[kWarpLanes];
  uint32_t matrices[kWarpLanes][4];
};

// A product of the tensor cores: where its results go, and what is left to do for them.
struct TensorProduct {
  const float* results;
  std::function<void()> run;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  unsigned thread, block_id;
  Block* block;
  Warp* warp;
  std::function<bool()> ready;  // empty: can run
  bool done = false;
  // Of the tensor cores: products of the open group, and of those not waited for.
  std::vector<TensorProduct> products;
  std::vector<std::vector<TensorProduct>> groups;
  // Of the copy engine: stores of the open group, and of those not waited for.
  std::vector<std::shared_ptr<std::function<void()>>> stores;
  std::vector<std::vector<std::shared_ptr<std::function<void()>>>> store_groups;
};

class Gpu {
 public:
  Gpu(int num_blocks, int cluster_size, int num_threads, uint32_t seed)
      : num_blocks_(num_blocks), cluster_size_(cluster_size), random_(seed), lazy_(seed % 2) {
    meetings_.resize(num_blocks / cluster_size);
    for (int id = 0; id < num_blocks; ++id) AddBlock(id, num_threads);
  }

  // Runs `kernel` as every thread, to the end of all.
  void Run(std::function<void()> kernel) {
    current_ = this;
    kernel_ = std::move(kernel);
    std::vector<Fiber*> order;
    for (auto& fiber : fibers_) order.push_back(fiber.get());
    for (size_t left = order.size(); left > 0;) {
      constexpr int kSwaps = 40;
      for (int i = 0; i < kSwaps; ++i) {
        std::swap(order[Random(order.size())], order[Random(order.size())]);
      }
      bool progress = false;
      for (Fiber* fiber : order) {
        if (fiber->done || (fiber->ready && !fiber->ready())) continue;
        progress = true;
        fiber_ = fiber;
        swapcontext(&context_, &fiber->context);
        left -= fiber->done;
      }
      if (!copies_.empty() && (!progress || Random(3) == 0)) {
        progress = true;
        for (size_t n = Random(copies_.size()) + 1; n > 0; --n) Copy(Random(copies_.size()));
      }
      if (!progress) Stop("all threads wait");
    }
    while (!copies_.empty()) Copy(0);
    current_ = nullptr;
  }

  static Gpu& Current() { return *current_; }
  Fiber& Self() { return *fiber_; }
  int num_blocks() const { return num_blocks_; }
  int cluster_size() const { return cluster_size_; }
  // Whether the tensor cores read their operands as late as they may, or at once.
  bool lazy() const { return lazy_; }
  Block* BlockOf(int cluster, int rank) { return blocks_[cluster * cluster_size_ + rank].get(); }
  size_t Random(size_t n) { return random_() % n; }

  void WaitUntil(std::function<bool()> ready) {
    if (ready()) return;
    fiber_->ready = std::move(ready);
    Switch();
    fiber_->ready = nullptr;
  }
  void Yield() {
    if (Random(4) == 0) Switch();
  }
  void Meet(Meeting* meeting, int num_threads) {
    const int round = meeting->round;
    if (++meeting->arrived == num_threads) {
      meeting->arrived = 0;
      ++meeting->round;
    }
    WaitUntil([=] { return meeting->round != round; });
  }
  void MeetCluster(int num_threads) { Meet(&meetings_[fiber_->block->cluster], num_threads); }
  void Later(std::function<void()> copy) { copies_.push_back(std::move(copy)); }

  [[noreturn]] void Stop(const char* why) {
    std::fprintf(stderr, "emulated GPU: block %u, thread %u: %s\n", fiber_->block_id,
                 fiber_->thread, why);
    std::abort();
  }

 private:
  void AddBlock(int id, int num_threads) {
    auto block = std::make_unique<Block>();
    block->cluster = id / cluster_size_;
    block->rank = id % cluster_size_;
    block->shared.assign(kSharedBegin + kSharedBytes, '\xff');  // NaN
    block->unfenced.resize(block->shared.size() / 16 + 1);
    for (int thread = 0; thread < num_threads; ++thread) {
      if (thread % kWarpLanes == 0) warps_.push_back(std::make_unique<Warp>());
      auto fiber = std::make_unique<Fiber>();
      fiber->thread = thread;
      fiber->block_id = id;
      fiber->block = block.get();
      fiber->warp = warps_.back().get();
      Prepare(fiber.get());
      fibers_.push_back(std::move(fiber));
    }
    blocks_.push_back(std::move(block));
  }

  void Prepare(Fiber* fiber) {
    constexpr size_t kStackBytes = 96 << 10;
    fiber->stack.resize(kStackBytes);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = &context_;
    makecontext(&fiber->context, &Gpu::RunFiber, 0);
  }

  static void RunFiber() {
    current_->kernel_();
    current_->fiber_->done = true;
  }
  void Switch() { swapcontext(&fiber_->context, &context_); }
  void Copy(size_t i) {
    const std::function<void()> copy = std::move(copies_[i]);
    copies_.erase(copies_.begin() + i);
    copy();
  }

  static inline Gpu* current_ = nullptr;
  const int num_blocks_, cluster_size_;
  std::mt19937 random_;
  const bool lazy_;
  std::vector<std::unique_ptr<Block>> blocks_;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Meeting> meetings_;
  std::vector<std::function<void()>> copies_;
  std::function<void()> kernel_;
  ucontext_t context_;
  Fiber* fiber_ = nullptr;
};

}  // namespace jaxmoe::emulated

#endif  // JAXMOE_XLA_FFI_TESTS_EMULATED_GPU_H_

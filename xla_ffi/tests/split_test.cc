// Calls in two halves: who is paired with whom, that nobody reads what a start or done has given
// back, and what is refused.

#include "xla_ffi/cpu/split.h"

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "xla_ffi/cpu/threads.h"
#include "xla_ffi/tests/call.h"
#include "xla_ffi/tests/check.h"

namespace jaxmoe {
namespace {

using testing::DispatchCall;
using testing::DispatchShape;
using Calls = std::vector<std::unique_ptr<DispatchCall>>;

CallKey KeyOf(int64_t site) {
  CallKey key;
  key.run = 1;
  key.site = site;
  return key;
}

CallShape StartShape(CallShape shape) {
  shape.capacity = 0;
  return shape;
}

int64_t Start(SplitCalls* split, int64_t site, const CallShape& shape, int64_t rank,
              DispatchCall* call) {
  std::string error;
  const Buffers operands = {call->MakeArrival().buffers.in, {}};
  const int64_t number = split->Start(KeyOf(site), StartShape(shape), rank, operands, &error);
  CHECK_EQ(error, "");
  return number;
}

// Every device starts all calls and then ends them, each in orders of its own.
void CheckManyPending(int64_t num_devices, int64_t num_calls, int64_t dim) {
  StartPool();
  SplitCalls split(60);
  const CallShape shape = DispatchShape(num_devices, 7, dim);
  std::vector<Calls> calls(num_devices);
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < num_devices; ++rank) {
    StartDeviceThread(static_cast<int32_t>(rank));
    for (int64_t site = 0; site < num_calls; ++site) {
      calls[rank].push_back(std::make_unique<DispatchCall>(shape, rank, site));
    }
    threads.emplace_back([&, rank] {
      std::mt19937 random(static_cast<unsigned>(rank));
      std::vector<int64_t> order(num_calls), numbers(num_calls);
      for (int64_t i = 0; i < num_calls; ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), random);
      for (const int64_t site : order) {
        numbers[site] = Start(&split, site, shape, rank, calls[rank][site].get());
      }
      std::shuffle(order.begin(), order.end(), random);
      for (const int64_t site : order) {
        split.Done(numbers[site], Operation::kDispatch, shape, calls[rank][site]->MakeArrival());
      }
    });
  }
  for (auto& thread : threads) thread.join();
  for (Calls& of_device : calls) {
    for (auto& call : of_device) {
      CHECK_EQ(call->Wait(), "");
      CHECK(call->Right());
    }
  }
}

TEST(PendingCallsEndInAnyOrder) { CheckManyPending(4, 32, 3); }

TEST(PendingCallsThatUseThePoolEndInAnyOrder) { CheckManyPending(4, 8, 1024); }

TEST(OneDeviceNeedsNobody) { CheckManyPending(1, 4, 5); }

// Several starts under one key, before the first done: a loop that is ahead.
TEST(StartsOfALoopPairInOrder) {
  constexpr int64_t kDevices = 3, kSteps = 20;
  StartPool();
  SplitCalls split(60);
  const CallShape shape = DispatchShape(kDevices, 5, 2);
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < kDevices; ++rank) {
    StartDeviceThread(static_cast<int32_t>(rank));
    threads.emplace_back([&, rank] {
      Calls calls;
      std::vector<int64_t> numbers;
      for (int64_t step = 0; step < kSteps; ++step) {
        calls.push_back(std::make_unique<DispatchCall>(shape, rank, step));
        numbers.push_back(Start(&split, 9, shape, rank, calls.back().get()));
      }
      for (int64_t step = 0; step < kSteps; ++step) {
        split.Done(numbers[step], Operation::kDispatch, shape, calls[step]->MakeArrival());
        CHECK_EQ(calls[step]->Wait(), "");
        CHECK(calls[step]->Right());
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

std::string ErrorOfDone(SplitCalls* split, int64_t number, Operation op, const CallShape& shape) {
  DispatchCall call(shape, 0, 0);
  split->Done(number, op, shape, call.MakeArrival());
  const std::string error = call.Wait();
  CHECK(call.Untouched());
  return error;
}

TEST(WhatIsNotPendingIsRefused) {
  StartPool();
  StartDeviceThread(0);
  SplitCalls split(60);
  const CallShape shape = DispatchShape(2, 4, 3);
  DispatchCall call(shape, 0, 1), late(shape, 1, 1);
  const int64_t number = Start(&split, 1, shape, 0, &call);
  const std::string not_one = "jaxmoe_dispatch on device 0: done of a pending call that is not one";
  CHECK_EQ(ErrorOfDone(&split, number + 1, Operation::kDispatch, shape).find(not_one), size_t{0});
  CHECK_EQ(ErrorOfDone(&split, 0, Operation::kDispatch, shape).find(not_one), size_t{0});
  CHECK(ErrorOfDone(&split, number, Operation::kDispatch, DispatchShape(2, 5, 3)).find("sizes") !=
        std::string::npos);
  CHECK(ErrorOfDone(&split, number, Operation::kCombine, shape).find("operation") !=
        std::string::npos);
  split.Done(number, Operation::kDispatch, shape, call.MakeArrival());
  CHECK_EQ(ErrorOfDone(&split, number, Operation::kDispatch, shape).find(not_one), size_t{0});
  CHECK(!call.ended());  // still waits for device 1
  Start(&split, 1, shape, 1, &late);
  CHECK_EQ(call.Wait(), "");
  CHECK(call.Right());
}

TEST(AMissingStartTimesOut) {
  StartPool();
  StartDeviceThread(0);
  SplitCalls split(0.05);
  const CallShape shape = DispatchShape(3, 4, 3);
  DispatchCall call(shape, 0, 1), other(shape, 2, 1);
  const int64_t number = Start(&split, 1, shape, 0, &call);
  Start(&split, 1, shape, 2, &other);
  split.Done(number, Operation::kDispatch, shape, call.MakeArrival());
  split.CheckDeadlines(Clock::now());
  CHECK(!call.ended());
  split.CheckDeadlines(Clock::now() + std::chrono::seconds(1));
  CHECK(call.Wait().find("devices [1] of the expert axis did not start") != std::string::npos);
}

TEST(ClosingEndsWhatWaits) {
  StartPool();
  StartDeviceThread(0);
  SplitCalls split(60);
  const CallShape shape = DispatchShape(2, 4, 3);
  DispatchCall call(shape, 0, 1);
  split.Done(Start(&split, 1, shape, 0, &call), Operation::kDispatch, shape, call.MakeArrival());
  split.Close();
  CHECK(call.Wait().find("the group was closed during the call") != std::string::npos);
  std::string error;
  CHECK_EQ(split.Start(KeyOf(2), StartShape(shape), 0, {}, &error), int64_t{0});
  CHECK_EQ(error, "the group is closed");
}

}  // namespace
}  // namespace jaxmoe

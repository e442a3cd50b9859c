// Calls of several devices of one process: who is paired with whom, and what happens when somebody
// does not come.

#include "xla_ffi/cpu/exchange.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "xla_ffi/cpu/group.h"
#include "xla_ffi/tests/call.h"
#include "xla_ffi/tests/check.h"

namespace jaxmoe {
namespace {

using testing::DispatchCall;
using testing::DispatchShape;
using Calls = std::vector<std::unique_ptr<DispatchCall>>;

// A group of this process' devices, closed at the end.
class OpenGroup {
 public:
  OpenGroup(int64_t num_devices, double timeout_seconds, int64_t num_slices = 1) {
    static std::atomic<int64_t> next_uid{1};
    GroupOptions options;
    options.uid = uid_ = next_uid.fetch_add(1);
    options.timeout_seconds = timeout_seconds;
    options.process_of.assign(num_slices, std::vector<int64_t>(num_devices, 0));
    Group::Open(options);
    group_ = Group::Find(uid_);
  }
  ~OpenGroup() { Group::Close(uid_); }
  Group* operator->() { return group_.get(); }
  int64_t uid() const { return uid_; }

 private:
  int64_t uid_ = 0;
  std::shared_ptr<Group> group_;
};

CallKey KeyOf(int64_t site, int64_t run = 1, int32_t slice = 0) {
  CallKey key;
  key.slice = slice;
  key.run = run;
  key.site = site;
  return key;
}

// Every device makes all calls, each in an order of its own.
void CheckIndependentCalls(int64_t num_devices, int64_t num_calls, int64_t dim) {
  OpenGroup group(num_devices, 60);
  const CallShape shape = DispatchShape(num_devices, 7, dim);
  std::vector<Calls> calls(num_devices);
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < num_devices; ++rank) {
    for (int64_t site = 0; site < num_calls; ++site) {
      calls[rank].push_back(std::make_unique<DispatchCall>(shape, rank, site));
    }
    threads.emplace_back([&, rank] {
      std::vector<int64_t> order(num_calls);
      for (int64_t i = 0; i < num_calls; ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), std::mt19937(static_cast<unsigned>(rank)));
      for (const int64_t site : order) {
        group->Arrive(KeyOf(site), shape, calls[rank][site]->MakeArrival());
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

TEST(IndependentCallsPairInAnyOrder) { CheckIndependentCalls(4, 32, 3); }

TEST(IndependentCallsThatUseThePoolPairInAnyOrder) { CheckIndependentCalls(4, 8, 1024); }

TEST(OneDeviceNeedsNobody) { CheckIndependentCalls(1, 4, 5); }

TEST(CallsOfALoopPairInOrder) {
  constexpr int64_t kDevices = 3, kSteps = 100;
  OpenGroup group(kDevices, 60);
  const CallShape shape = DispatchShape(kDevices, 5, 2);
  std::vector<std::thread> threads;
  for (int64_t rank = 0; rank < kDevices; ++rank) {
    threads.emplace_back([&, rank] {
      for (int64_t step = 0; step < kSteps; ++step) {
        DispatchCall call(shape, rank, step);
        group->Arrive(KeyOf(9), shape, call.MakeArrival());
        CHECK_EQ(call.Wait(), "");
        CHECK(call.Right());
      }
    });
  }
  for (auto& thread : threads) thread.join();
}

TEST(SlicesRunsAndOperationsDoNotMix) {
  OpenGroup group(2, 60, 2);
  const CallShape shape = DispatchShape(2, 4, 2);
  const std::vector<CallKey> keys = {KeyOf(1, 1, 0), KeyOf(1, 1, 1), KeyOf(1, 2, 0),
                                     KeyOf(2, 1, 0)};
  std::vector<Calls> calls(2);
  for (int64_t rank = 0; rank < 2; ++rank) {
    for (size_t i = 0; i < keys.size(); ++i) {
      const size_t at = rank == 0 ? i : keys.size() - 1 - i;
      calls[rank].push_back(std::make_unique<DispatchCall>(shape, rank, at));
      group->Arrive(keys[at], shape, calls[rank].back()->MakeArrival());
    }
  }
  for (Calls& of_device : calls) {
    for (auto& call : of_device) {
      CHECK_EQ(call->Wait(), "");
      CHECK(call->Right());
    }
  }
}

// After a call every device may run into a native collective, which blocks its thread until all
// devices have come.
TEST(DevicesAreCompletedOnThreadsOfTheirOwn) {
  constexpr int64_t kDevices = 4;
  OpenGroup group(kDevices, 60);
  const CallShape shape = DispatchShape(kDevices, 1, 1);
  std::mutex mutex;
  std::condition_variable wake;
  int64_t num_here = 0, num_passed = 0;
  Calls calls;
  for (int64_t rank = 0; rank < kDevices; ++rank) {
    calls.push_back(std::make_unique<DispatchCall>(shape, rank, 0));
    Arrival arrival = calls.back()->MakeArrival();
    arrival.done = [&, done = arrival.done](const std::string& error) {
      {
        std::unique_lock<std::mutex> lock(mutex);
        ++num_here;
        wake.notify_all();
        num_passed +=
            wake.wait_for(lock, std::chrono::seconds(30), [&] { return num_here == kDevices; });
      }
      done(error);
    };
    group->Arrive(KeyOf(1), shape, std::move(arrival));
  }
  for (auto& call : calls) CHECK_EQ(call->Wait(), "");
  CHECK_EQ(num_passed, kDevices);
}

TEST(ADeviceThatDoesNotComeIsNamedInTime) {
  OpenGroup group(3, 0.2);
  const CallShape shape = DispatchShape(3, 4, 2);
  DispatchCall first(shape, 0, 0), third(shape, 2, 0), late(shape, 1, 0);
  const auto begin = Clock::now();
  group->Arrive(KeyOf(5), shape, first.MakeArrival());
  group->Arrive(KeyOf(5), shape, third.MakeArrival());
  CHECK(!first.ended());
  const std::string error = first.Wait();
  const std::chrono::duration<double> seconds = Clock::now() - begin;
  CHECK(seconds.count() >= 0.2);
  CHECK_CONTAINS(error, "jaxmoe_dispatch on device 0: timed out after 0.2 s");
  CHECK_CONTAINS(error, "devices [1] of the expert axis did not come, devices [0, 2] did");
  CHECK_CONTAINS(error, "site 5");
  CHECK_CONTAINS(third.Wait(), "jaxmoe_dispatch on device 2: timed out after 0.2 s");

  group->Arrive(KeyOf(5), shape, late.MakeArrival());
  CHECK_CONTAINS(late.Wait(), "jaxmoe_dispatch on device 1: timed out after 0.2 s");
  CHECK(first.Untouched() && third.Untouched() && late.Untouched());
}

TEST(TheGroupWorksOnAfterATimeout) {
  OpenGroup group(2, 0.2);
  const CallShape shape = DispatchShape(2, 4, 2);
  DispatchCall alone(shape, 0, 0);
  group->Arrive(KeyOf(1), shape, alone.MakeArrival());
  CHECK_CONTAINS(alone.Wait(), "timed out");
  Calls calls;
  for (int64_t rank = 0; rank < 2; ++rank) {
    calls.push_back(std::make_unique<DispatchCall>(shape, rank, 1));
    group->Arrive(KeyOf(1, 2), shape, calls.back()->MakeArrival());
  }
  for (auto& call : calls) {
    CHECK_EQ(call->Wait(), "");
    CHECK(call->Right());
  }
}

TEST(OtherSizesFailEveryDevice) {
  OpenGroup group(3, 60);
  const CallShape shape = DispatchShape(3, 4, 2), longer = DispatchShape(3, 5, 2);
  DispatchCall first(shape, 0, 0), other(longer, 1, 0), third(shape, 2, 0);
  group->Arrive(KeyOf(1), shape, first.MakeArrival());
  group->Arrive(KeyOf(1), longer, other.MakeArrival());
  group->Arrive(KeyOf(1), shape, third.MakeArrival());
  for (DispatchCall* call : {&first, &other, &third}) {
    const std::string error = call->Wait();
    CHECK_CONTAINS(error, "device 1 came with other sizes (tokens 5, top_k 1, dim 2");
    CHECK_CONTAINS(error, "than the first one (tokens 4, top_k 1, dim 2");
    CHECK(call->Untouched());
  }
}

TEST(ClosingAGroupEndsItsCalls) {
  OpenGroup group(2, 60);
  const CallShape shape = DispatchShape(2, 4, 2);
  DispatchCall open(shape, 0, 0), after(shape, 1, 0);
  group->Arrive(KeyOf(1), shape, open.MakeArrival());
  Group::Close(group.uid());
  CHECK_CONTAINS(open.Wait(), "jaxmoe_dispatch on device 0: the group was closed during the call");
  CHECK(Group::Find(group.uid()) == nullptr);
  group->Arrive(KeyOf(1), shape, after.MakeArrival());
  CHECK_EQ(after.Wait(), "the group is closed");
}

TEST(ClosingWhileDevicesComeEndsEveryCallOnce) {
  for (int repeat = 0; repeat < 50; ++repeat) {
    OpenGroup group(2, 60);
    const CallShape shape = DispatchShape(2, 2, 1);
    DispatchCall first(shape, 0, 0), second(shape, 1, 0);
    std::thread threads[] = {
        std::thread([&] { group->Arrive(KeyOf(1), shape, first.MakeArrival()); }),
        std::thread([&] { group->Arrive(KeyOf(1), shape, second.MakeArrival()); }),
        std::thread([&] { Group::Close(group.uid()); })};
    for (auto& thread : threads) thread.join();
    for (DispatchCall* call : {&first, &second}) {
      const std::string error = call->Wait();
      if (error.empty()) {
        CHECK(call->Right());
      } else {
        CHECK_CONTAINS(error, "closed");
        CHECK(call->Untouched());
      }
    }
  }
}

TEST(AUidIsOpenedOnce) {
  OpenGroup group(2, 60);
  GroupOptions again;
  again.uid = group.uid();
  std::string error;
  try {
    Group::Open(again);
  } catch (const std::runtime_error& failure) {
    error = failure.what();
  }
  CHECK_CONTAINS(error, "is open already");
}

TEST(ADescriptionNamesMissingProcesses) {
  const CallShape shape = DispatchShape(6, 4, 2);
  auto exchange = std::make_shared<Exchange>(
      KeyOf(1), shape, std::vector<int64_t>{7, 7, 8, 8, 9, 9}, 7, Clock::now());
  DispatchCall call(shape, 1, 0);
  exchange->Add(call.MakeArrival(), shape);
  RemoteArrival remote;
  remote.rank = 5;
  exchange->AddRemote(std::move(remote), shape);
  CHECK_CONTAINS(exchange->Describe(),
                 "devices [0, 2, 3, 4] of the expert axis did not come (processes [8, 9]), devices "
                 "[1, 5] did");
}

// Somebody still reads a device's operands when the call fails.
TEST(AFailedCallWaitsForReadersOfItsOperands) {
  const CallShape shape = DispatchShape(2, 4, 2);
  auto exchange =
      std::make_shared<Exchange>(KeyOf(1), shape, std::vector<int64_t>{0, 1}, 0, Clock::now());
  DispatchCall call(shape, 0, 0);
  exchange->Hold();
  exchange->Add(call.MakeArrival(), shape);
  exchange->Fail("broken");
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(!call.ended());
  exchange->Unhold();
  CHECK_EQ(call.Wait(), "jaxmoe_dispatch on device 0: broken");
}

TEST(AFailedCallReleasesPayloads) {
  const CallShape shape = DispatchShape(2, 4, 2);
  auto exchange =
      std::make_shared<Exchange>(KeyOf(1), shape, std::vector<int64_t>{0, 1}, 0, Clock::now());
  int num_released = 0;
  RemoteArrival remote;
  remote.rank = 1;
  remote.release = [&] { ++num_released; };
  exchange->AddRemote(std::move(remote), shape);
  CHECK_EQ(num_released, 0);
  exchange->Fail("broken");
  CHECK_EQ(num_released, 1);
  DispatchCall late(shape, 0, 0);
  CHECK(!exchange->Add(late.MakeArrival(), shape));
  CHECK_EQ(late.Wait(), "jaxmoe_dispatch on device 0: broken");
  CHECK_EQ(num_released, 1);
}

}  // namespace
}  // namespace jaxmoe

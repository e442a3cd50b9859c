// Groups that span forked processes. The processes fork before any of them has threads, so nothing
// else is tested here.

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <new>
#include <random>
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

constexpr int64_t kUid = 1;
constexpr auto kPatience = std::chrono::seconds(60);

// Where processes wait for each other.
struct Meeting {
  std::atomic<int> num_here{0};

  void Wait(int count) {
    num_here.fetch_add(1);
    const auto until = Clock::now() + kPatience;
    while (num_here.load() < count && Clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(num_here.load() >= count);
  }
};

struct Meetings {
  Meeting created, mapped, sent, forked, done;
};

// Runs `body(process)` in that many forks, and returns each one's wait status.
std::vector<int> Fork(int num_processes, const std::function<void(int)>& body) {
  std::vector<pid_t> pids;
  for (int process = 0; process < num_processes; ++process) {
    const pid_t pid = fork();
    if (pid == 0) {
      alarm(120);  // a test that hangs ends
      body(process);
      _exit(std::min(testing::NumFailures(), 100));
    }
    pids.push_back(pid);
  }
  std::vector<int> statuses(pids.size(), -1);
  for (size_t i = 0; i < pids.size(); ++i) waitpid(pids[i], &statuses[i], 0);
  return statuses;
}

std::unique_ptr<Meetings, void (*)(Meetings*)> SharedMeetings() {
  void* memory =
      mmap(nullptr, sizeof(Meetings), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  return {new (memory) Meetings, [](Meetings* m) { munmap(m, sizeof(*m)); }};
}

// Opens a group whose device r is in process r / `per_process`, and joins its processes.
std::shared_ptr<Group> Join(Meetings& meetings, int process, int num_processes, int per_process,
                            const CallShape& largest, double timeout_seconds) {
  GroupOptions options;
  options.uid = kUid;
  options.timeout_seconds = timeout_seconds;
  options.here = process;
  options.process_of.emplace_back();
  for (int r = 0; r < num_processes * per_process; ++r) {
    options.process_of[0].push_back(r / per_process);
  }
  Group::Open(options);
  std::shared_ptr<Group> group = Group::Find(kUid);
  const auto name = [](int p) {
    return "/jaxmoe-test-" + std::to_string(getppid()) + "-process" + std::to_string(p);
  };
  group->CreateSegment(name(process), largest);
  meetings.created.Wait(num_processes);
  for (int p = 0; p < num_processes; ++p) {
    if (p != process) group->MapSegment(p, name(p));
  }
  meetings.mapped.Wait(num_processes);
  group->UnlinkSegment();
  return group;
}

CallKey KeyOf(int64_t site, int64_t run) {
  CallKey key;
  key.run = run;
  key.site = site;
  return key;
}

// All calls of one run, in an order that differs between devices and runs.
void CheckRun(Group& group, const CallShape& shape, const std::vector<int64_t>& ranks, int64_t run,
              int64_t num_calls) {
  std::vector<std::unique_ptr<DispatchCall>> calls;
  for (const int64_t rank : ranks) {
    std::vector<int64_t> sites(num_calls);
    for (int64_t i = 0; i < num_calls; ++i) sites[i] = i;
    std::shuffle(sites.begin(), sites.end(), std::mt19937(static_cast<unsigned>(run * 10 + rank)));
    for (const int64_t site : sites) {
      calls.push_back(std::make_unique<DispatchCall>(shape, rank, site));
      group.Arrive(KeyOf(site, run), shape, calls.back()->MakeArrival());
    }
  }
  for (auto& call : calls) {
    CHECK_EQ(call->Wait(), "");
    CHECK(call->Right());
  }
}

void CheckExchanges(int num_processes, int per_process, int64_t dim, int64_t num_runs,
                    int64_t num_calls) {
  const auto meetings = SharedMeetings();
  const CallShape largest = DispatchShape(num_processes * per_process, 7, dim);
  const auto statuses = Fork(num_processes, [&](int process) {
    auto group = Join(*meetings, process, num_processes, per_process, largest, 60);
    std::vector<int64_t> ranks;
    for (int i = 0; i < per_process; ++i) ranks.push_back(process * per_process + i);
    for (int64_t run = 0; run < num_runs; ++run) {
      const CallShape shape = DispatchShape(num_processes * per_process, 1 + run % 7, dim);
      CheckRun(*group, shape, ranks, run, num_calls);
    }
    meetings->done.Wait(num_processes);
    Group::Close(kUid);
  });
  CHECK_EQ(statuses, std::vector<int>(num_processes, 0));
}

TEST(TwoProcessesExchangeManyPayloads) { CheckExchanges(2, 1, 3, 100, 16); }

TEST(ThreeProcessesWithTwoDevicesExchangeManyPayloads) { CheckExchanges(3, 2, 2, 30, 8); }

TEST(LargePayloadsUseThePool) { CheckExchanges(2, 2, 4096, 5, 4); }

// More calls at once than a device has slots, in different orders. As long as they are not twice as
// many, two devices always have a call in common and go on.
TEST(MoreIndependentCallsThanSlots) { CheckExchanges(2, 1, 1, 1, 400); }

TEST(AKilledProcessIsNamedInTime) {
  const auto meetings = SharedMeetings();
  const CallShape shape = DispatchShape(2, 4, 2);
  const auto statuses = Fork(2, [&](int process) {
    auto group = Join(*meetings, process, 2, 1, shape, 0.5);
    CheckRun(*group, shape, {process}, 0, 3);
    if (process == 1) raise(SIGKILL);
    DispatchCall call(shape, 0, 0);
    group->Arrive(KeyOf(0, 1), shape, call.MakeArrival());
    const std::string error = call.Wait();
    CHECK_CONTAINS(error, "jaxmoe_dispatch on device 0: timed out after 0.5 s");
    CHECK_CONTAINS(error, "devices [1] of the expert axis did not come (processes [1])");
    CHECK(call.Untouched());
    Group::Close(kUid);
  });
  CHECK_EQ(statuses[0], 0);
  CHECK(WIFSIGNALED(statuses[1]) && WTERMSIG(statuses[1]) == SIGKILL);
}

// The peer goes on with another call: calls of both processes time out, later ones work.
TEST(ProcessesRecoverFromATimeout) {
  const auto meetings = SharedMeetings();
  const CallShape shape = DispatchShape(2, 4, 2);
  const auto statuses = Fork(2, [&](int process) {
    auto group = Join(*meetings, process, 2, 1, shape, 0.3);
    DispatchCall call(shape, process, 0);
    group->Arrive(KeyOf(process, 0), shape, call.MakeArrival());
    CHECK_CONTAINS(call.Wait(), "timed out");
    meetings->done.Wait(2);
    CheckRun(*group, shape, {process}, 1, 3);
    Group::Close(kUid);
  });
  CHECK_EQ(statuses, (std::vector<int>{0, 0}));
}

// Python closes groups when it ends, also in a fork. There, that must not release payloads that the
// first process has yet to read.
TEST(ClosingGroupsInAForkChangesNothing) {
  const auto meetings = SharedMeetings();
  const CallShape shape = DispatchShape(2, 4, 2);
  const auto statuses = Fork(2, [&](int process) {
    auto group = Join(*meetings, process, 2, 1, shape, 60);
    DispatchCall first(shape, process, 0), second(shape, process, 1);
    const auto arrive = [&](int64_t site, DispatchCall& call) {
      group->Arrive(KeyOf(site, 0), shape, call.MakeArrival());
      std::this_thread::sleep_for(std::chrono::milliseconds(50));  // until the payload is there
    };
    if (process == 0) arrive(0, first);
    meetings->sent.Wait(2);
    if (process == 1) {
      const pid_t copy = fork();
      if (copy == 0) {
        alarm(20);
        Group::Close(kUid);
        _exit(0);
      }
      int status = -1;
      waitpid(copy, &status, 0);
      CHECK_EQ(status, 0);
    }
    meetings->forked.Wait(2);
    if (process == 0) arrive(1, second);  // would take the slot of the first one
    meetings->done.Wait(2);
    if (process == 1) {
      arrive(0, first);
      arrive(1, second);
    }
    for (DispatchCall* call : {&first, &second}) {
      CHECK_EQ(call->Wait(), "");
      CHECK(call->Right());
    }
    Group::Close(kUid);
  });
  CHECK_EQ(statuses, (std::vector<int>{0, 0}));
}

}  // namespace
}  // namespace jaxmoe

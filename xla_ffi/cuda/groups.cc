#include "xla_ffi/cuda/groups.h"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "xla_ffi/common/text.h"

namespace jaxmoe::cuda {

void Check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

namespace {

constexpr const char* kOperations[] = {"jaxmoe_dispatch", "jaxmoe_combine", "jaxmoe_dispatch_grad",
                                       "jaxmoe_combine_grad"};

// Makes `device` current, and the former one again at the end.
class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    Check(cudaGetDevice(&before_), "cudaGetDevice");
    Check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~CurrentDevice() { cudaSetDevice(before_); }

 private:
  int before_ = 0;
};

// Memory of a device, zero at first. Freed when no kernel can use it any more.
std::shared_ptr<void> NewHeap(int device, size_t bytes) {
  CurrentDevice current(device);
  const std::string what =
      Concat("heap of ", bytes >> 20, " MiB on GPU ", device,
             " (lower max_tokens, or XLA_PYTHON_CLIENT_MEM_FRACTION to leave it more memory)");
  void* heap = nullptr;
  Check(cudaMalloc(&heap, bytes), what);
  std::shared_ptr<void> owner(heap, [device](void* p) {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    cudaDeviceSynchronize();
    cudaFree(p);
    cudaSetDevice(before);
  });
  Check(cudaMemset(heap, 0, bytes), what);
  Check(cudaDeviceSynchronize(), what);
  return owner;
}

struct Registry {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<OpenGroup>> groups;
};

Registry& TheRegistry() {
  static auto* registry = new Registry;
  return *registry;
}

void EnablePeerAccess(int from, int to) {
  if (from == to) return;
  int can = 0;
  Check(cudaDeviceCanAccessPeer(&can, from, to), "cudaDeviceCanAccessPeer");
  if (!can) {
    throw std::runtime_error("GPU " + std::to_string(from) + " cannot access the memory of GPU " +
                             std::to_string(to) + "; use transport='xla'");
  }
  CurrentDevice current(from);
  const cudaError_t error = cudaDeviceEnablePeerAccess(to, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled) {
    cudaGetLastError();  // or the next check of somebody else finds it
    return;
  }
  Check(error, "cudaDeviceEnablePeerAccess");
}

int NumBlocks(int device, int num_sms) {
  int available = 0;
  Check(cudaDeviceGetAttribute(&available, cudaDevAttrMultiProcessorCount, device),
        "number of multiprocessors");
  const int most = std::min(available, kMaxBlocks);
  return num_sms > 0 ? std::min(num_sms, most) : most;
}

}  // namespace

std::shared_ptr<const Member> FindMember(int64_t uid, int device) {
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  auto group = TheRegistry().groups.find(uid);
  if (group == TheRegistry().groups.end()) return nullptr;
  auto member = group->second->members.find(device);
  return member == group->second->members.end() ? nullptr : member->second;
}

Member NewMember(const GroupOptions& options, int device, OpenGroup* group) {
  CurrentDevice current(device);
  void* record = nullptr;
  Check(cudaHostAlloc(&record, sizeof(ErrorRecord), cudaHostAllocMapped | cudaHostAllocPortable),
        "error record");
  group->memory.emplace_back(record, [](void* p) { cudaFreeHost(p); });
  Member member = {};
  member.sizes = options.sizes;
  member.num_blocks = NumBlocks(device, options.num_sms);
  member.peers.timeout_ns = static_cast<uint64_t>(options.timeout_seconds * 1e9);
  member.peers.error = new (record) ErrorRecord();
  return member;
}

void RegisterGroup(int64_t uid, std::shared_ptr<OpenGroup> group) {
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  TheRegistry().groups[uid] = std::move(group);
}

void OpenPeerToPeer(const GroupOptions& options, const std::vector<std::vector<int>>& slices) {
  const size_t bytes = Layout(options.sizes).bytes;
  auto group = std::make_shared<OpenGroup>();
  for (const std::vector<int>& devices : slices) {
    Peers slice = {};
    for (size_t rank = 0; rank < devices.size(); ++rank) {
      for (int peer : devices) EnablePeerAccess(devices[rank], peer);
      group->memory.push_back(NewHeap(devices[rank], bytes));
      slice.heap[rank] = static_cast<char*>(group->memory.back().get());
    }
    for (size_t rank = 0; rank < devices.size(); ++rank) {
      Member member = NewMember(options, devices[rank], group.get());
      std::copy(std::begin(slice.heap), std::end(slice.heap), member.peers.heap);
      member.peers.rank = static_cast<int>(rank);
      group->members[devices[rank]] = std::make_shared<Member>(member);
    }
  }
  RegisterGroup(options.uid, std::move(group));
}

void CloseGroup(int64_t uid) {
  std::shared_ptr<OpenGroup> group;
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  auto found = TheRegistry().groups.find(uid);
  if (found == TheRegistry().groups.end()) return;
  group = std::move(found->second);
  TheRegistry().groups.erase(found);
}

namespace {

// What the lower half of a header says.
std::string DescribeHeader(uint64_t header) {
  return Concat(kOperations[header >> kHeaderOperationShift & 3], " [",
                Hex(header & ((1u << kHeaderOperationShift) - 1)), "]");
}

std::string FirstError(const OpenGroup& group) {
  for (const auto& [device, member] : group.members) {
    std::string error = DescribeError(*member);
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace

std::string DescribeError(const Member& member) {
  const volatile ErrorRecord& e = *member.peers.error;
  if (!e.set) return "";
  static constexpr const char* kPhases[] = {"the peer's call", "the peer's choices",
                                            "the peer's rows", "its own blocks"};
  const std::string call = Concat(kOperations[e.operation & 3], " on device ", e.rank, ": ");
  const std::string end =
      Concat("; call ", e.epoch, " of the group. The group cannot be used any more.");
  if (e.phase == kPhaseHeader && e.wrong) {
    return Concat(call, "device ", e.peer, " is in another call: expected ",
                  DescribeHeader(e.expected), ", seen ", DescribeHeader(e.seen),
                  " (the number stands for the call's site= and its number of tokens). All devices "
                  "must run the same program, with their calls in the same order",
                  end);
  }
  if (e.phase == kPhaseStart) {
    return Concat(call, "start while ", e.seen,
                  " calls of the group are between their start and "
                  "their done, which has max_pending=",
                  e.expected,
                  ". Make the group with more, or let the start depend on an earlier done (XLA "
                  "may begin independent ones in any order)",
                  end);
  }
  if (e.phase == kPhaseDone) {
    const char* why = e.wrong ? "its start was of another operation or number of tokens"
                              : "no start of this group is waiting for it; each can be done once";
    return Concat(call, "done of a pending call that is not one: ", why, end);
  }
  return Concat(call, "timed out after ", member.peers.timeout_ns * 1e-9, " s waiting for ",
                kPhases[e.phase & 3], " (device ", e.peer, "): expected ", e.expected, ", seen ",
                e.seen, end);
}

std::string RaiseGroupError(int64_t uid) {
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  auto found = TheRegistry().groups.find(uid);
  if (found == TheRegistry().groups.end()) return "";
  std::string error = FirstError(*found->second);
  if (!error.empty()) found->second->raised = true;
  return error;
}

Failure WaitFailure(double seconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  do {
    {
      std::lock_guard<std::mutex> lock(TheRegistry().mutex);
      for (auto& [uid, group] : TheRegistry().groups) {
        if (group->announced) continue;
        const std::string error = FirstError(*group);
        if (error.empty()) continue;
        group->announced = true;
        return {uid, error};
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  } while (std::chrono::steady_clock::now() < until);
  return {};
}

bool WasRaised(int64_t uid) {
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  auto found = TheRegistry().groups.find(uid);
  return found == TheRegistry().groups.end() || found->second->raised;
}

}  // namespace jaxmoe::cuda

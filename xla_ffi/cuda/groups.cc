#include "xla_ffi/cuda/groups.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <new>
#include <stdexcept>
#include <utility>

#include "xla_ffi/common/text.h"

namespace jaxmoe::cuda {
namespace {

void Check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(what + ": " + cudaGetErrorString(error));
}

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

// A device's memory for one group.
struct Allocation {
  int device = 0;
  void* heap = nullptr;
  ErrorRecord* error = nullptr;

  Allocation(int device, size_t bytes) : device(device) {
    CurrentDevice current(device);
    const std::string what = "heap of " + std::to_string(bytes >> 20) + " MiB on GPU " +
                             std::to_string(device) +
                             " (lower max_tokens or XLA_PYTHON_CLIENT_MEM_FRACTION)";
    Check(cudaMalloc(&heap, bytes), what);
    Check(cudaMemset(heap, 0, bytes), what);
    void* record = nullptr;
    Check(cudaHostAlloc(&record, sizeof(ErrorRecord), cudaHostAllocMapped | cudaHostAllocPortable),
          "error record");
    error = new (record) ErrorRecord();
    Check(cudaDeviceSynchronize(), what);
  }
  ~Allocation() {
    int before = 0;
    cudaGetDevice(&before);
    cudaSetDevice(device);
    cudaDeviceSynchronize();  // a kernel may still use it
    if (heap != nullptr) cudaFree(heap);
    if (error != nullptr) cudaFreeHost(error);
    cudaSetDevice(before);
  }
  Allocation(const Allocation&) = delete;
};

struct OpenGroup {
  std::vector<std::unique_ptr<Allocation>> allocations;
  std::map<int, std::shared_ptr<const Member>> members;  // by device
};

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

void OpenPeerToPeer(const GroupOptions& options, const std::vector<std::vector<int>>& slices) {
  const size_t bytes = Layout(options.sizes).bytes;
  auto group = std::make_shared<OpenGroup>();
  for (const std::vector<int>& devices : slices) {
    Member member = {};
    member.sizes = options.sizes;
    member.peers.timeout_ns = static_cast<uint64_t>(options.timeout_seconds * 1e9);
    std::vector<Allocation*> own;
    for (int device : devices) {
      for (int peer : devices) EnablePeerAccess(device, peer);
      group->allocations.push_back(std::make_unique<Allocation>(device, bytes));
      own.push_back(group->allocations.back().get());
    }
    for (size_t rank = 0; rank < devices.size(); ++rank) {
      member.peers.heap[rank] = static_cast<char*>(own[rank]->heap);
    }
    for (size_t rank = 0; rank < devices.size(); ++rank) {
      member.peers.rank = static_cast<int>(rank);
      member.peers.error = own[rank]->error;
      member.num_blocks = NumBlocks(devices[rank], options.num_sms);
      group->members[devices[rank]] = std::make_shared<Member>(member);
    }
  }
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  TheRegistry().groups[options.uid] = std::move(group);
}

void CloseGroup(int64_t uid) {
  std::shared_ptr<OpenGroup> group;
  std::lock_guard<std::mutex> lock(TheRegistry().mutex);
  auto found = TheRegistry().groups.find(uid);
  if (found == TheRegistry().groups.end()) return;
  group = std::move(found->second);
  TheRegistry().groups.erase(found);
}

std::string DescribeError(const Member& member) {
  const volatile ErrorRecord& e = *member.peers.error;
  if (!e.set) return "";
  static constexpr const char* kOperations[] = {"jaxmoe_dispatch", "jaxmoe_combine",
                                                "jaxmoe_dispatch_grad", "jaxmoe_combine_grad"};
  static constexpr const char* kPhases[] = {"the peer's call", "the peer's choices",
                                            "the peer's rows", "its own blocks"};
  const std::string call = Concat(kOperations[e.operation & 3], " on device ", e.rank, ": ");
  const std::string end =
      Concat("; call ", e.epoch, " of the group. The group cannot be used any more.");
  if (e.phase == kPhaseHeader && e.seen != 0 && e.expected != e.seen) {
    return Concat(call, "device ", e.peer, " is in another call (expected ", Hex(e.expected),
                  ", seen ", Hex(e.seen),
                  "). All devices must run the same program, with their calls in the same order",
                  end);
  }
  return Concat(call, "timed out waiting for ", kPhases[e.phase & 3], " (device ", e.peer,
                "): expected ", e.expected, ", seen ", e.seen, end);
}

}  // namespace jaxmoe::cuda

// Groups on the GPUs of this process: what the handlers look up, and how a group is opened and
// closed.

#ifndef JAXMOE_XLA_FFI_CUDA_GROUPS_H_
#define JAXMOE_XLA_FFI_CUDA_GROUPS_H_

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "xla_ffi/cuda/launch.h"

namespace jaxmoe::cuda {

// One device's place in a group.
struct Member {
  Peers peers;
  GroupSizes sizes;
  int num_blocks;  // of a kernel: all of them must be resident

  Layout layout() const { return Layout(sizes); }
};

struct GroupOptions {
  int64_t uid;
  GroupSizes sizes;
  double timeout_seconds;
  int num_sms;  // 0: all
};

// A group as this process holds it.
struct OpenGroup {
  ~OpenGroup() {
    for (std::shared_ptr<void>& piece : memory) piece.reset();
  }
  std::vector<std::shared_ptr<void>> memory;             // freed with the group, in this order
  std::map<int, std::shared_ptr<const Member>> members;  // by device
  bool announced = false;                                // its failure, to WaitFailure's caller
  std::atomic<bool> raised{false};                       // its failure, by a handler
};

// Opens a group whose devices all belong to this process: `slices[i][rank]` is a device. This and
// what follows throw std::runtime_error with a sentence for the user.
void OpenPeerToPeer(const GroupOptions& options, const std::vector<std::vector<int>>& slices);

// For those that open groups.
void RegisterGroup(int64_t uid, std::shared_ptr<OpenGroup> group);
// A member with everything but the heaps and its rank; its error record goes to `group`.
Member NewMember(const GroupOptions& options, int device, OpenGroup* group);
void Check(cudaError_t error, const std::string& what);

void CloseGroup(int64_t uid);

// Null if the group was closed or `device` is not in it. Called while XLA enqueues: no CUDA call.
std::shared_ptr<const Member> FindMember(int64_t uid, int device);

// What the member's device recorded, as a sentence; empty if nothing went wrong.
std::string DescribeError(const Member& member);

// The same of any member of the group in this process; the caller raises it.
std::string RaiseGroupError(int64_t uid);

struct Failure {
  int64_t uid = 0;
  std::string message;  // empty: none
};
// The failure of a group that was not returned before; waits for one for some seconds.
Failure WaitFailure(double seconds);
// Whether a handler has raised the group's failure, or the group is closed.
bool WasRaised(int64_t uid);

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_GROUPS_H_

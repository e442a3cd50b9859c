// Groups on the GPUs of this process: what the handlers look up, and how a group is opened and
// closed.

#ifndef JAXMOE_XLA_FFI_CUDA_GROUPS_H_
#define JAXMOE_XLA_FFI_CUDA_GROUPS_H_

#include <cstdint>
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

// Null if the group was closed or `device` is not in it. Called while XLA enqueues: no CUDA call.
std::shared_ptr<const Member> FindMember(int64_t uid, int device);

// Opens a group whose devices all belong to this process: `slices[i][rank]` is a device. Throws
// std::runtime_error with a sentence for the user.
void OpenPeerToPeer(const GroupOptions& options, const std::vector<std::vector<int>>& slices);

void CloseGroup(int64_t uid);

// What the device recorded, as a sentence; empty if nothing went wrong.
std::string DescribeError(const Member& member);

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_GROUPS_H_

// The NVSHMEM world of this process, and groups whose heaps lie in its symmetric memory.
//
// NVSHMEM's allocations and frees are collective. Python calls them on all processes at the same
// point, when a group is made; closing a group, which may happen at any time, only sets its heap
// aside until then.

#include <cuda_runtime_api.h>
#include <nvshmem_host.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "xla_ffi/common/text.h"
#include "xla_ffi/cuda/groups.h"

namespace jaxmoe::cuda {
namespace {

// Heaps of closed groups, until all processes free them.
struct ClosedHeaps {
  std::mutex mutex;
  std::map<int64_t, void*> heaps;  // by the group's uid
};

ClosedHeaps& TheClosedHeaps() {
  static auto* heaps = new ClosedHeaps;
  return *heaps;
}

bool Joined() { return nvshmemx_init_status() >= NVSHMEM_STATUS_IS_INITIALIZED; }

void Join(const void* id, int rank, int num_processes, int device) {
  Check(cudaSetDevice(device), "cudaSetDevice");
  if (!Joined()) {
    nvshmemx_uniqueid_t unique_id;
    std::memcpy(&unique_id, id, sizeof(unique_id));
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    nvshmemx_set_attr_uniqueid_args(rank, num_processes, &unique_id, &attributes);
    const int error = nvshmemx_init_attr(NVSHMEMX_INIT_WITH_UNIQUEID, &attributes);
    if (error != 0) {
      throw std::runtime_error(Concat("NVSHMEM could not start (nvshmemx_init_attr: ", error,
                                      "); NVSHMEM_DEBUG=INFO in the environment says more"));
    }
  }
  if (nvshmem_my_pe() != rank || nvshmem_n_pes() != num_processes) {
    throw std::runtime_error(Concat("NVSHMEM was already started in this process as number ",
                                    nvshmem_my_pe(), " of ", nvshmem_n_pes(),
                                    ", and jax.distributed says ", rank, " of ", num_processes));
  }
}

std::shared_ptr<void> NewSymmetricHeap(int64_t uid, size_t bytes) {
  void* heap = nvshmem_malloc(bytes);
  if (heap == nullptr) {
    throw std::runtime_error(
        Concat("NVSHMEM has no room for a heap of ", bytes >> 20,
               " MiB (lower max_tokens, or XLA_PYTHON_CLIENT_MEM_FRACTION to leave it more "
               "memory)"));
  }
  Check(cudaMemset(heap, 0, bytes), "zeros in the heap");
  Check(cudaDeviceSynchronize(), "zeros in the heap");
  return {heap, [uid](void* p) {
            std::lock_guard<std::mutex> lock(TheClosedHeaps().mutex);
            TheClosedHeaps().heaps[uid] = p;
          }};
}

// `pes[rank]` are the processes of this one's slice. The heap is zero at the end; the caller waits
// until all processes have come so far, before anybody uses the group.
void OpenNvshmem(const GroupOptions& options, const int32_t* pes, int rank, int device,
                 bool force_puts) {
  auto group = std::make_shared<OpenGroup>();
  group->memory.push_back(NewSymmetricHeap(options.uid, Layout(options.sizes).bytes));
  void* heap = group->memory.back().get();
  Member member = NewMember(options, device, group.get());
  member.peers.rank = rank;
  for (int i = 0; i < options.sizes.num_devices; ++i) {
    const bool reached = i == rank || !force_puts;
    member.peers.pe[i] = pes[i];
    member.peers.heap[i] = reached ? static_cast<char*>(nvshmem_ptr(heap, pes[i])) : nullptr;
    if (member.peers.heap[i] == nullptr) member.peers.puts = 1;
  }
  if (member.peers.puts && !options.sizes.puts) {
    throw std::runtime_error(
        "a peer is out of reach of plain stores, and the heap has no room for puts; this is an "
        "error of jaxmoe, please report it");
  }
  group->members[device] = std::make_shared<Member>(member);
  RegisterGroup(options.uid, std::move(group));
}

// Runs `body`; 0, or 1 with a message.
template <typename Body>
int Guarded(char* message, int size, Body body) {
  try {
    body();
    return 0;
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), size - 1);
    message[size - 1] = '\0';
    return 1;
  }
}

}  // namespace
}  // namespace jaxmoe::cuda

#define JAXMOE_EXPORT extern "C" __attribute__((visibility("default")))

JAXMOE_EXPORT int jaxmoe_nvshmem_id_bytes() { return sizeof(nvshmemx_uniqueid_t); }

// An id for Join, made by one process for all.
JAXMOE_EXPORT int jaxmoe_nvshmem_new_id(void* id) {
  nvshmemx_uniqueid_t unique_id = NVSHMEMX_UNIQUEID_INITIALIZER;
  const int error = nvshmemx_get_uniqueid(&unique_id);
  std::memcpy(id, &unique_id, sizeof(unique_id));
  return error;
}

// Collective over all processes, as are the next two.
JAXMOE_EXPORT int jaxmoe_nvshmem_join(const void* id, int rank, int num_processes, int device,
                                      char* message, int size) {
  return jaxmoe::cuda::Guarded(message, size,
                               [&] { jaxmoe::cuda::Join(id, rank, num_processes, device); });
}

JAXMOE_EXPORT int jaxmoe_nvshmem_open(int64_t uid, const jaxmoe::cuda::GroupSizes* sizes,
                                      const int32_t* pes, int rank, int device, int force_puts,
                                      double timeout_seconds, int num_sms, char* message,
                                      int size) {
  return jaxmoe::cuda::Guarded(message, size, [&] {
    jaxmoe::cuda::OpenNvshmem({uid, *sizes, timeout_seconds, num_sms}, pes, rank, device,
                              force_puts != 0);
  });
}

// Frees the heap of a group that all processes have closed.
JAXMOE_EXPORT void jaxmoe_nvshmem_free(int64_t uid) {
  auto& closed = jaxmoe::cuda::TheClosedHeaps();
  std::lock_guard<std::mutex> lock(closed.mutex);
  auto found = closed.heaps.find(uid);
  if (found == closed.heaps.end()) return;
  cudaDeviceSynchronize();  // a kernel may still use it
  nvshmem_free(found->second);
  closed.heaps.erase(found);
}

// Whether plain stores reach the memory of all processes. Collective, after Join.
JAXMOE_EXPORT int jaxmoe_nvshmem_reaches_all() {
  void* probe = nvshmem_malloc(256);
  bool all = probe != nullptr;
  for (int pe = 0; all && pe < nvshmem_n_pes(); ++pe) all = nvshmem_ptr(probe, pe) != nullptr;
  nvshmem_free(probe);
  return all;
}

// From tokens to rows: dispatch, and the gradient of combine.
//
// Blocks have two roles. Senders copy this device's tokens to the devices that need them, once per
// device, and announce them chunk by chunk. Expanders make the plan (dispatch only), then turn
// tokens into rows: own tokens first, then zeros behind the last row, then each peer's tokens as
// they come.
//
// The roles are blocks and not warps because a multiprocessor's stores leave it in order: behind
// stores that wait for the wire, those to its own memory wait too. Measured on two H200 (T=4096,
// D=7168, K=8, E=256): 342 us with both roles in every block, 228 us with 20 of 132 blocks as
// senders.

#include "xla_ffi/cuda/bulk.cuh"
#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/plan.cuh"
#include "xla_ffi/cuda/protocol.cuh"
#include "xla_ffi/cuda/rows.cuh"

namespace jaxmoe::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = kWarps * 32;
constexpr int kCrewBarrier = 1;
constexpr int kSenderPercent = 16;  // of the blocks; enough to fill the wire
// Each warp moves rows in pieces through buffers of its own.
constexpr int kPieceBytes = 3584;
constexpr int kBuffers = 3;
using Ring = BulkRing<kBuffers, kPieceBytes>;
constexpr int kSharedBytes = kWarps * Ring::kSharedBytes;
static_assert(((kWarps + 2) * kMaxLocalExperts + kThreads) * 4 <= kSharedBytes,
              "the plan takes the place of the buffers");

// Copies this device's choices to all peers, one part for each flag.
__device__ void SendChoices(const Call& call, const Sizes& sizes, const DispatchArgs& args) {
  const int parts = kMetaParts * (sizes.num_devices - 1);
  const int me = call.peers.rank;
  for (int work = blockIdx.x; work < parts; work += gridDim.x) {
    const int part = work % kMetaParts;
    const int peer = (me + 1 + work / kMetaParts) % sizes.num_devices;
    const int per_part = (sizes.num_choices() + kMetaParts - 1) / kMetaParts;
    const int begin = min(part * per_part, sizes.num_choices());
    const int end = min(begin + per_part, sizes.num_choices());
    auto* ids = reinterpret_cast<int32_t*>(call.heap(peer) + call.layout.Ids(call.parity, me));
    auto* weights =
        reinterpret_cast<float*>(call.heap(peer) + call.layout.Weights(call.parity, me));
    for (int i = begin + threadIdx.x; i < end; i += kThreads) {
      ids[i] = args.expert_ids[i];
      weights[i] = args.weights[i];
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      FenceSystem();
      StoreRelaxed(reinterpret_cast<uint64_t*>(call.heap(peer) + call.layout.MetaFlag(me, part)),
                   call.epoch);
    }
  }
}

// Copies one row, piece by piece, to each of the places that `place(i)` gives for i in `mask`.
template <typename Place>
__device__ void CopyRow(Ring& ring, const char* from, int row_bytes, unsigned mask, Place place) {
  const bool leader = threadIdx.x % 32 == 0;
  const int pieces = (row_bytes + kPieceBytes - 1) / kPieceBytes;
  auto bytes_of = [&](int piece) { return min(kPieceBytes, row_bytes - piece * kPieceBytes); };
  if (leader) ring.Load(from, bytes_of(0));
  for (int piece = 0; piece < pieces; ++piece) {
    const char* loaded = nullptr;
    if (leader) {
      if (piece + 1 < pieces) ring.Load(from + (piece + 1) * kPieceBytes, bytes_of(piece + 1));
      loaded = ring.Loaded();
    }
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      char* to = place(__ffs(rest) - 1);
      if (leader) StartStore(to + piece * kPieceBytes, loaded, bytes_of(piece));
    }
    if (leader) ring.Next();
  }
}

// The device that choice k of a token asks for, in lane k; -1 without one and in lanes past K.
template <bool kPlan>
__device__ int DeviceOfChoice(const Sizes& sizes, const DispatchArgs& args, int token) {
  const int lane = threadIdx.x % 32;
  if (lane >= sizes.top_k) return -1;
  const int i = token * sizes.top_k + lane;
  if (!kPlan) return args.choice_device[i];
  const int id = args.expert_ids[i];
  return id >= 0 && id < sizes.num_experts ? id / sizes.num_local_experts : -1;
}

// Copies a token to every other device that one of its choices asks for.
template <bool kPlan>
__device__ void SendToken(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                          Ring& ring, int token) {
  const int lane = threadIdx.x % 32;
  const int device = DeviceOfChoice<kPlan>(sizes, args, token);
  const unsigned same = __match_any_sync(~0u, device);
  const bool first = lane == __ffs(same) - 1;
  const unsigned send = __ballot_sync(~0u, first && device >= 0 && device != call.peers.rank);
  if (send == 0) return;
  const size_t at = call.layout.Row(call.parity, call.peers.rank, token);
  CopyRow(ring, args.tokens + size_t(token) * sizes.row_bytes, sizes.row_bytes, send,
          [&](int i) { return call.heap(__shfl_sync(~0u, device, i)) + at; });
}

// One warp per chunk.
template <bool kPlan>
__device__ void SendTokens(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                           Ring& ring, int num_senders) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int chunks = (sizes.num_tokens + kChunkTokens - 1) / kChunkTokens;
  for (int chunk = blockIdx.x + num_senders * warp; chunk < chunks; chunk += num_senders * kWarps) {
    for (int i = 0; i < kChunkTokens; ++i) {
      const int token = chunk * kChunkTokens + i;
      if (token < sizes.num_tokens) SendToken<kPlan>(call, sizes, args, ring, token);
    }
    if (lane == 0) {
      WaitWritten();
      FenceBulk();
    }
    __syncwarp();
    FenceSystem();
    for (int peer = lane; peer < sizes.num_devices; peer += 32) {
      if (peer == call.peers.rank) continue;
      StoreRelaxed(
          reinterpret_cast<uint64_t*>(call.heap(peer) +
                                      call.layout.ChunkFlag(call.parity, call.peers.rank, chunk)),
          call.epoch << kEpochShift);
    }
  }
}

// A token's rows in the gradient of combine: its gradient times each row's weight, and the dot
// product with the expert's row for the weight's gradient.
template <typename T>
__device__ void ScaleToRows(const Sizes& sizes, const DispatchArgs& args, const uint4* from,
                            int row_of_lane, unsigned rows) {
  constexpr int kVectors = 4;  // of two rows in flight
  const int lane = threadIdx.x % 32;
  const int n = sizes.row_bytes / 16;
  for (unsigned rest = rows; rest != 0; rest &= rest - 1) {
    const int row = __shfl_sync(~0u, row_of_lane, __ffs(rest) - 1);
    const float weight = args.row_weights_in[row];
    const uint4* expert_row = AsVectors(args.expert_rows + size_t(row) * sizes.row_bytes);
    uint4* dst = AsVectors(args.rows + size_t(row) * sizes.row_bytes);
    float dot = 0.0f;
    for (int base = lane; base < n; base += 32 * kVectors) {
      uint4 v[kVectors], e[kVectors];
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (base + 32 * j >= n) continue;
        v[j] = __ldcg(from + base + 32 * j);
        e[j] = __ldcs(expert_row + base + 32 * j);
      }
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        if (base + 32 * j >= n) continue;
        StoreStreaming(dst + base + 32 * j, Vector<T>::Scale(v[j], weight));
        dot += Vector<T>::Dot(v[j], e[j]);
      }
    }
    for (int offset = 16; offset > 0; offset /= 2) dot += __shfl_xor_sync(~0u, dot, offset);
    if (lane == 0) args.row_weights[row] = dot;
  }
}

// A piece of a token, and the rows that it goes to: row of choice k in lane k, or -1.
struct Item {
  int piece;
  int bytes;
  const char* from;
  int row;
  unsigned rows;
};

// Finds item `i` of a source, waits until it is here, and starts to load it.
__device__ Item StartItem(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                          Ring& ring, int source, int i, bool* ok) {
  const int lane = threadIdx.x % 32;
  const int pieces = (sizes.row_bytes + kPieceBytes - 1) / kPieceBytes;
  const int token = i / pieces;
  Item item;
  item.piece = i - token * pieces;
  item.bytes = min(kPieceBytes, sizes.row_bytes - item.piece * kPieceBytes);
  item.row = -1;
  if (lane < sizes.top_k) {
    item.row = __ldcg(&args.plan.row_map[(source * sizes.num_tokens + token) * sizes.top_k + lane]);
  }
  item.rows = __ballot_sync(~0u, item.row >= 0);
  const bool own = source == call.peers.rank;
  if (!own && lane == 0) {
    const auto* flag = reinterpret_cast<const uint64_t*>(
        call.own() + call.layout.ChunkFlag(call.parity, source, token / kChunkTokens));
    call.Wait(flag, kEpochShift, call.epoch, source, kPhaseRows, ok);
    FenceBulk();
  }
  *ok = __shfl_sync(~0u, *ok, 0);
  item.from = (own ? args.tokens + size_t(token) * sizes.row_bytes
                   : call.own() + call.layout.Row(call.parity, source, token)) +
              item.piece * kPieceBytes;
  if (*ok && item.rows != 0 && lane == 0) ring.Load(item.from, item.bytes);
  return item;
}

__device__ void StoreItem(const Sizes& sizes, const DispatchArgs& args, Ring& ring,
                          const Item& item) {
  if (item.rows == 0) return;
  const bool leader = threadIdx.x % 32 == 0;
  const char* loaded = leader ? ring.Loaded() : nullptr;
  for (unsigned rest = item.rows; rest != 0; rest &= rest - 1) {
    const int row = __shfl_sync(~0u, item.row, __ffs(rest) - 1);
    char* to = args.rows + size_t(row) * sizes.row_bytes + item.piece * kPieceBytes;
    if (leader) StartStore(to, loaded, item.bytes);
  }
  if (leader) ring.Next();
}

// Rows of all tokens of one source, piece by piece; each load starts one item ahead.
__device__ void CopyTokens(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                           const Crew& crew, Ring& ring, int source, bool* ok) {
  const int pieces = (sizes.row_bytes + kPieceBytes - 1) / kPieceBytes;
  const int num_items = sizes.num_tokens * pieces;
  const int stride = crew.num_blocks * crew.num_warps();
  int i = crew.block + crew.num_blocks * crew.warp();
  if (i >= num_items) return;
  Item item = StartItem(call, sizes, args, ring, source, i, ok);
  for (i += stride; *ok && i < num_items; i += stride) {
    const Item next = StartItem(call, sizes, args, ring, source, i, ok);
    StoreItem(sizes, args, ring, item);
    item = next;
  }
  if (*ok) StoreItem(sizes, args, ring, item);
}

// Gradients of all rows of one source's tokens.
template <typename T>
__device__ void ScaleTokens(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                            const Crew& crew, int source, bool* ok) {
  const int lane = threadIdx.x % 32;
  const bool own = source == call.peers.rank;
  const int stride = crew.num_blocks * crew.num_warps();
  for (int t = crew.block + crew.num_blocks * crew.warp(); t < sizes.num_tokens; t += stride) {
    int row = -1;
    if (lane < sizes.top_k) {
      row = args.plan.row_map[(source * sizes.num_tokens + t) * sizes.top_k + lane];
    }
    if (!own) {
      const auto* flag = reinterpret_cast<const uint64_t*>(
          call.own() + call.layout.ChunkFlag(call.parity, source, t / kChunkTokens));
      if (lane == 0) call.Wait(flag, kEpochShift, call.epoch, source, kPhaseRows, ok);
      *ok = __shfl_sync(~0u, *ok, 0);
      if (!*ok) return;
    }
    const char* from = own ? args.tokens + size_t(t) * sizes.row_bytes
                           : call.own() + call.layout.Row(call.parity, source, t);
    ScaleToRows<T>(sizes, args, AsVectors(from), row, __ballot_sync(~0u, row >= 0));
  }
}

template <bool kPlan, typename T>
__device__ void ExpandTokens(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                             const Crew& crew, Ring& ring, int source, bool* ok) {
  if constexpr (kPlan) {
    CopyTokens(call, sizes, args, crew, ring, source, ok);
  } else {
    ScaleTokens<T>(call, sizes, args, crew, source, ok);
  }
}

__device__ void ZeroTail(const Sizes& sizes, const DispatchArgs& args, const Crew& crew,
                         int num_rows) {
  const size_t begin = size_t(num_rows) * (sizes.row_bytes / 16);
  const size_t end = size_t(sizes.capacity) * (sizes.row_bytes / 16);
  const size_t stride = size_t(crew.num_blocks) * crew.num_threads;
  for (size_t i = begin + size_t(crew.block) * crew.num_threads + crew.thread; i < end;
       i += stride) {
    StoreStreaming(AsVectors(args.rows) + i, make_uint4(0, 0, 0, 0));
  }
}

// The plan with all expanders; returns the number of rows.
__device__ int PlanRows(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                        const Crew& crew, int32_t* scratch, bool* ok) {
  const Choices choices{call, sizes, args.expert_ids, args.weights};
  if (crew.block == crew.num_blocks - 1) DescribeOwnChoices(choices, args.plan, crew, scratch);
  for (int i = crew.thread; i < sizes.num_devices * kMetaParts; i += crew.num_threads) {
    const int source = i / kMetaParts;
    if (source == call.peers.rank) continue;
    call.Wait(reinterpret_cast<const uint64_t*>(call.own() +
                                                call.layout.MetaFlag(source, i % kMetaParts)),
              0, call.epoch, source, kPhaseMeta, ok);
  }
  *ok = crew.All(*ok);
  if (!*ok) return 0;
  const int num_rows = MakePlan(choices, args.plan, args.row_weights, crew, scratch, ok);
  *ok = GridBarrier(call, crew, *ok);  // the whole row map is there
  FenceBulk();                         // the scratch becomes buffers
  return num_rows;
}

template <bool kPlan, typename T>
__device__ void Expand(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                       const Crew& crew, Ring& ring, int32_t* scratch) {
  bool ok = true;
  int num_rows;
  if constexpr (kPlan) {
    num_rows = PlanRows(call, sizes, args, crew, scratch, &ok);
    if (!ok) return;
  } else {
    num_rows = *args.num_rows;
    for (int r = num_rows + crew.block * crew.num_threads + crew.thread; r < sizes.capacity;
         r += crew.num_blocks * crew.num_threads) {
      args.row_weights[r] = 0.0f;
    }
  }
  ExpandTokens<kPlan, T>(call, sizes, args, crew, ring, call.peers.rank, &ok);
  ZeroTail(sizes, args, crew, num_rows);
  for (int i = 1; i < sizes.num_devices; ++i) {
    const int source = (call.peers.rank + i) % sizes.num_devices;
    ExpandTokens<kPlan, T>(call, sizes, args, crew, ring, source, &ok);
  }
}

template <bool kPlan, typename T>
__global__ __launch_bounds__(kThreads,
                             1) void DispatchKernel(const __grid_constant__ Peers peers,
                                                    const __grid_constant__ Layout layout,
                                                    const __grid_constant__ Sizes sizes,
                                                    const __grid_constant__ DispatchArgs args,
                                                    const int num_senders) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[kWarps][kBuffers];
  const Call call(peers, layout, kPlan ? kDispatch : kCombineGrad);
  const int warp = threadIdx.x / 32;
  Ring ring(shared + warp * Ring::kSharedBytes, barriers[warp]);
  if (threadIdx.x % 32 == 0) ring.Init();
  __syncwarp();
  if (!call.failed()) {
    if (kPlan) SendChoices(call, sizes, args);
    if (blockIdx.x < num_senders) {
      ExchangeHeaders(call, sizes.num_devices, HeaderHash(call, sizes.num_tokens, args.site));
      SendTokens<kPlan>(call, sizes, args, ring, num_senders);
    } else {
      const Crew crew{kCrewBarrier, kThreads, int(threadIdx.x), int(blockIdx.x) - num_senders,
                      int(gridDim.x) - num_senders};
      Expand<kPlan, T>(call, sizes, args, crew, ring, reinterpret_cast<int32_t*>(shared));
    }
    if (threadIdx.x % 32 == 0) WaitWritten();
  }
  EndCall(call);
}

template <bool kPlan, typename T>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const DispatchArgs& args) {
  const cudaError_t error = cudaFuncSetAttribute(
      DispatchKernel<kPlan, T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  const int num_senders = NumSenders(num_blocks, sizes.num_devices, kSenderPercent);
  DispatchKernel<kPlan, T>
      <<<num_blocks, kThreads, kSharedBytes, stream>>>(peers, layout, sizes, args, num_senders);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchDispatch(cudaStream_t stream, int num_blocks, const Peers& peers,
                           const Layout& layout, const Sizes& sizes, const DispatchArgs& args) {
  return Launch<true, float>(stream, num_blocks, peers, layout, sizes, args);
}

cudaError_t LaunchCombineGrad(cudaStream_t stream, int num_blocks, const Peers& peers,
                              const Layout& layout, const Sizes& sizes, const DispatchArgs& args,
                              RowType type) {
  switch (type) {
    case RowType::kBf16:
      return Launch<false, __nv_bfloat16>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF16:
      return Launch<false, __half>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF32:
      return Launch<false, float>(stream, num_blocks, peers, layout, sizes, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxmoe::cuda

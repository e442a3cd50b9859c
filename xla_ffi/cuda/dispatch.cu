// From tokens to rows: dispatch, and the gradient of combine.
//
// Blocks have two roles. Senders copy this device's tokens to the devices that need them, once per
// device, and announce them chunk by chunk; then they expand as well. Expanders make the plan
// (dispatch only), write zeros behind the last row, and turn tokens into rows. Tokens are expanded
// in the order in which they are sent, the own and the peers' ones in turn, and rows are stored so
// that they leave the second-level cache first: so it still holds a token when it is read again.
// Measured on two H200 (T=4096, D=7168, K=8, E=256): 199 us, and 258 us if each warp of the senders
// takes a chunk of its own, so that they arrive late and out of order.
//
// The roles are blocks and not warps because a multiprocessor's stores leave it in order: behind
// stores that wait for the wire, those to its own memory wait too (342 us with both in every
// block). A multiprocessor stores at most 32 bytes a cycle, 62 GB/s, whatever instruction it uses,
// and every row is stored once: 24 of them cannot end before 389 us.
//
// With an FP8 wire the senders quantise tokens, the own ones as well, and expanders make rows of
// what they find in the heap. Measured with the sizes above: 199 us, though half of the bytes
// cross, and as long without the arithmetic; 144 us if rows are handed over in FP8. Storing these
// rows and nothing else takes 113 us; what the rest waits for is not known.

#include "xla_ffi/cuda/bulk.cuh"
#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/plan.cuh"
#include "xla_ffi/cuda/protocol.cuh"
#include "xla_ffi/cuda/rows.cuh"
#include "xla_ffi/cuda/scale.cuh"
#include "xla_ffi/cuda/send.cuh"

namespace jaxmoe::cuda {
namespace {

constexpr int kThreads = kCopyThreads;
constexpr int kCrewBarrier = 1;
constexpr int kGradSenderPercent = 20;  // of the blocks
constexpr int kUnitsPerWarp = 4;
constexpr int kCopySharedBytes = kCopyWarps * CopyRing::kSharedBytes;
// The gradient's senders load pieces where they had copied tokens; the lists are behind both.
template <int kVectors>
struct GradShared {
  static constexpr int kRings = kCopyWarps * Piece<kVectors>::Ring::kSharedBytes;
  static constexpr int kLists = kCopySharedBytes > kRings ? kCopySharedBytes : kRings;
  static constexpr int kBytes = kLists + kCopyWarps * 2 * sizeof(RowList);
};
static_assert(((kCopyWarps + 2) * kMaxLocalExperts + kThreads) * 4 <= kCopySharedBytes,
              "the plan takes the place of the buffers");

// Blocks that send in dispatch, enough to fill the wire: small tokens need more of them. An FP8
// wire is never full; its senders must keep ahead of the expanders.
int SenderPercent(const Sizes& sizes, const WireArgs& wire) {
  if (wire.format != kWirePlain) return wire.row_scales == nullptr ? 20 : 26;
  return sizes.row_bytes > 8192 ? 16 : 22;
}

// Some parts of a token, and the rows that they go to: row of choice k in lane k, or -1.
struct CopyUnit {
  int source;
  int token;  // -1: there are no more
  int part, end;
  int row;
};

// Tokens of all devices in turn, to whichever warp comes first: so each is copied soon after it was
// sent or has come, while the second-level cache still holds it.
__device__ CopyUnit NextUnit(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                             int units_per_token, int parts, Tickets& tickets) {
  const int lane = threadIdx.x % 32;
  const int ticket = tickets.Next();
  const int rest = ticket / sizes.num_devices;
  const int token = rest / units_per_token, i = rest - token * units_per_token;
  const int per_unit = (parts + units_per_token - 1) / units_per_token;
  CopyUnit unit = {(call.peers.rank + ticket) % sizes.num_devices, token, i * per_unit,
                   min((i + 1) * per_unit, parts), -1};
  if (token >= sizes.num_tokens) {
    unit.token = -1;
  } else if (lane < sizes.top_k) {
    unit.row =
        __ldcg(&args.plan.row_map[(unit.source * sizes.num_tokens + token) * sizes.top_k + lane]);
  }
  return unit;
}

// A part of a token that is being loaded.
struct Part {
  int index;
  bool own;
  int row;
  unsigned rows;  // 0: none
};

template <typename Wire>
__device__ void StorePart(const DispatchArgs& args, const Wire& wire, CopyRing& ring,
                          const Part& part, uint64_t policy) {
  if (part.rows == 0) return;
  const bool leader = threadIdx.x % 32 == 0;
  char* loaded = Wire::kConverts || leader ? ring.Loaded() : nullptr;
  float scale = 0.0f;
  if constexpr (Wire::kConverts) scale = wire.MakeRow(loaded, part.index, part.own);
  const Span span = wire.Row(part.index);
  for (unsigned rest = part.rows; rest != 0; rest &= rest - 1) {
    const int row = __shfl_sync(~0u, part.row, __ffs(rest) - 1);
    char* to = args.rows + size_t(row) * wire.RowBytes() + span.at;
    if (leader) StartStore(to, loaded, span.bytes, policy);
    if constexpr (Wire::kConverts) wire.StoreScale(row, part.index, scale);
  }
  if (Wire::kConverts || leader) ring.Next();
}

// Waits until a peer's token is here.
__device__ bool AwaitToken(const Call& call, const CopyUnit& unit, bool ok) {
  if (threadIdx.x % 32 == 0) {
    const auto* flag = reinterpret_cast<const uint64_t*>(
        call.own() + call.layout.ChunkFlag(call.parity, unit.source, unit.token / kChunkTokens));
    call.Wait(flag, kEpochShift, call.epoch, unit.source, kPhaseRows, &ok);
    FenceBulk();
  }
  return __shfl_sync(~0u, ok, 0);
}

// Rows of all tokens, by all warps that call this; each load starts one part ahead.
template <typename Wire>
__device__ void CopyTokens(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                           const Wire& wire, CopyRing& ring, bool* ok) {
  const int lane = threadIdx.x % 32;
  const int parts = wire.NumParts();
  const int per_unit = min(max(sizes.num_tokens * sizes.num_devices * parts /
                                   int(gridDim.x * kCopyWarps * kUnitsPerWarp),
                               1),
                           parts);
  const int units_per_token = (parts + per_unit - 1) / per_unit;
  const uint64_t policy = EvictFirst();
  Tickets tickets(call);
  Part pending = {};
  CopyUnit unit = NextUnit(call, sizes, args, units_per_token, parts, tickets);
  for (bool more = true; more;) {
    CopyUnit next = {};
    // Tokens that a sender has converted lie in the heap, the own ones as well.
    const bool own = unit.source == call.peers.rank && (!Wire::kConverts || sizes.num_devices == 1);
    const unsigned rows = __ballot_sync(~0u, unit.row >= 0);
    more = unit.token >= 0;
    if (more) {
      next = NextUnit(call, sizes, args, units_per_token, parts, tickets);
      if (!own) *ok = AwaitToken(call, unit, *ok);
      more = *ok;
    }
    const char* from = own ? args.tokens + size_t(unit.token) * sizes.row_bytes
                           : call.own() + call.layout.Row(call.parity, unit.source, unit.token);
    // A last turn stores what is pending.
    const int end = !more ? unit.part + 1 : rows == 0 ? unit.part : unit.end;
    for (int i = unit.part; i < end; ++i) {
      const Span span = own ? wire.Own(i) : wire.Arrived(i);
      if (more && lane == 0) {
        if (own) {
          ring.Load(from + span.at, span.bytes);
        } else {
          ring.Load(from + span.at, span.bytes, policy);
        }
      }
      StorePart(args, wire, ring, pending, policy);
      pending = {i, own, unit.row, rows};
    }
    unit = next;
  }
}

// Words of row_scales in a row.
__device__ int NumScales(const DispatchArgs& args) {
  return args.wire.row_scales == nullptr ? 0 : quantize::NumBlocks(args.wire.dim);
}

__device__ void ZeroTail(const Sizes& sizes, const DispatchArgs& args, const Crew& crew,
                         int num_rows, int row_bytes) {
  const size_t begin = size_t(num_rows) * (row_bytes / 16);
  const size_t end = size_t(sizes.capacity) * (row_bytes / 16);
  const size_t stride = size_t(crew.num_blocks) * crew.num_threads;
  for (size_t i = begin + size_t(crew.block) * crew.num_threads + crew.thread; i < end;
       i += stride) {
    StoreStreaming(AsVectors(args.rows) + i, make_uint4(0, 0, 0, 0));
  }
  const size_t scales = NumScales(args);
  for (size_t i = num_rows * scales + size_t(crew.block) * crew.num_threads + crew.thread;
       i < sizes.capacity * scales; i += stride) {
    args.wire.row_scales[i] = 0.0f;
  }
}

// The plan with all expanders; returns the number of rows.
__device__ int PlanRows(const Call& call, const Sizes& sizes, const DispatchArgs& args,
                        const Crew& crew, int32_t* scratch, bool* ok) {
  const Choices choices{call, sizes, args.expert_ids, args.weights};
  DescribeOwnChoices(choices, args.plan, crew);
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
  if (*ok && crew.block == 0 && crew.thread == 0) {
    FenceSystem();
    StoreRelaxed(&call.control()->planned, call.epoch);
  }
  return num_rows;
}

// A sender's wait for the plan.
__device__ void AwaitPlan(const Call& call, bool* ok) {
  if (threadIdx.x % 32 == 0) {
    call.Wait(&call.control()->planned, 0, call.epoch, call.peers.rank, kPhaseGrid, ok);
    FenceBulk();
  }
  *ok = __shfl_sync(~0u, *ok, 0);
}

// Nobody shall take half a result for a whole one: rows of NaN, and a plan without rows.
__device__ void PoisonDispatch(const Sizes& sizes, const DispatchArgs& args, int row_bytes) {
  PoisonRows(args.rows, sizes.capacity, row_bytes);
  FillArray(args.wire.row_scales, size_t(sizes.capacity) * NumScales(args), __int_as_float(-1));
  FillArray(args.row_weights, sizes.capacity, __int_as_float(-1));
  FillArray(args.plan.group_sizes, sizes.num_local_experts, 0);
  FillArray(args.plan.num_rows, 1, 0);
  FillArray(args.plan.num_dropped, 1, 0);
  FillArray(args.plan.num_invalid, 1, 0);
  FillArray(args.plan.row_map, size_t(sizes.num_devices) * sizes.num_choices(), -1);
  FillArray(args.plan.row_source, sizes.capacity, -1);
  FillArray(args.plan.choice_device, sizes.num_choices(), -1);
}

// dispatch.
template <typename Wire, bool kPuts>
__global__ __launch_bounds__(kThreads,
                             1) void DispatchKernel(const __grid_constant__ Peers peers,
                                                    const __grid_constant__ Layout layout,
                                                    const __grid_constant__ Sizes sizes,
                                                    const __grid_constant__ DispatchArgs args,
                                                    const int num_senders) {
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[kCopyWarps][kCopyBuffers];
  const Call call(peers, layout, kDispatch);
  const Wire wire(sizes, args);
  const int warp = threadIdx.x / 32;
  CopyRing ring(shared + warp * CopyRing::kSharedBytes, barriers[warp]);
  if (threadIdx.x % 32 == 0) ring.Init();
  __syncwarp();
  if (!call.failed()) {
    bool ok = true;
    const int num_expanders = gridDim.x - num_senders;
    SendChoices<kPuts>(call, sizes, args);
    if (blockIdx.x >= num_expanders) {
      SendTokens<true, kPuts>(call, sizes, args, wire, ring, blockIdx.x - num_expanders,
                              num_senders);
      AwaitPlan(call, &ok);
    } else {
      ExchangeHeaders<kPuts>(call, sizes.num_devices,
                             HeaderHash(call, sizes.num_tokens, args.site));
      const Crew crew{kCrewBarrier, kThreads, int(threadIdx.x), int(blockIdx.x), num_expanders};
      const int num_rows =
          PlanRows(call, sizes, args, crew, reinterpret_cast<int32_t*>(shared), &ok);
      if (ok) ZeroTail(sizes, args, crew, num_rows, wire.RowBytes());
    }
    if (ok) CopyTokens(call, sizes, args, wire, ring, &ok);
    if (threadIdx.x % 32 == 0) WaitWritten();
  }
  EndCall(call, [&] { PoisonDispatch(sizes, args, wire.RowBytes()); });
}

// The gradient of combine.
template <typename T, int kVectors, bool kPuts>
__global__ __launch_bounds__(kThreads,
                             1) void CombineGradKernel(const __grid_constant__ Peers peers,
                                                       const __grid_constant__ Layout layout,
                                                       const __grid_constant__ Sizes sizes,
                                                       const __grid_constant__ DispatchArgs args,
                                                       const int num_senders) {
  using Ring = typename Piece<kVectors>::Ring;
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t copy_barriers[kCopyWarps][kCopyBuffers];
  __shared__ uint64_t barriers[kCopyWarps][Ring::kNumBuffers];
  const Call call(peers, layout, kCombineGrad);
  const int warp = threadIdx.x / 32;
  Ring ring(shared + warp * Ring::kSharedBytes, barriers[warp]);
  ring.Init();
  RowList* lists = reinterpret_cast<RowList*>(shared + GradShared<kVectors>::kLists) + 2 * warp;
  if (!call.failed()) {
    bool ok = true;
    const int num_expanders = gridDim.x - num_senders;
    if (blockIdx.x >= num_expanders) {
      CopyRing copy_ring(shared + warp * CopyRing::kSharedBytes, copy_barriers[warp]);
      if (threadIdx.x % 32 == 0) copy_ring.Init();
      __syncwarp();
      SendTokens<false, kPuts>(call, sizes, args, PlainWire(sizes, args), copy_ring,
                               blockIdx.x - num_expanders, num_senders);
      __syncthreads();  // the buffers change their owners
    } else {
      ExchangeHeaders<kPuts>(call, sizes.num_devices,
                             HeaderHash(call, sizes.num_tokens, args.site));
      const Crew crew{kCrewBarrier, kThreads, int(threadIdx.x), int(blockIdx.x), num_expanders};
      ZeroTail(sizes, args, crew, *args.num_rows, sizes.row_bytes);
      for (int r = *args.num_rows + crew.block * crew.num_threads + crew.thread; r < sizes.capacity;
           r += crew.num_blocks * crew.num_threads) {
        args.row_weights[r] = 0.0f;
      }
    }
    ScaleTokens<T, kVectors>(call, sizes, args, ring, lists, &ok);
  }
  EndCall(call, [&] {
    PoisonRows(args.rows, sizes.capacity, sizes.row_bytes);
    FillArray(args.row_weights, sizes.capacity, __int_as_float(-1));
  });
}

template <typename T, int kVectors, bool kPuts>
cudaError_t LaunchGrad(cudaStream_t stream, int num_blocks, const Peers& peers,
                       const Layout& layout, const Sizes& sizes, const DispatchArgs& args) {
  constexpr int kBytes = GradShared<kVectors>::kBytes;
  const cudaError_t error = cudaFuncSetAttribute(
      CombineGradKernel<T, kVectors, kPuts>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  CombineGradKernel<T, kVectors, kPuts><<<num_blocks, kThreads, kBytes, stream>>>(
      peers, layout, sizes, args, NumSenders(num_blocks, sizes.num_devices, kGradSenderPercent));
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchGrad(cudaStream_t stream, int num_blocks, const Peers& peers,
                       const Layout& layout, const Sizes& sizes, const DispatchArgs& args) {
  if constexpr (kWithPuts) {
    if (peers.puts) {
      return LaunchGrad<T, kShortPiece, true>(stream, num_blocks, peers, layout, sizes, args);
    }
  }
  return LongPiecesFit(sizes.row_bytes)
             ? LaunchGrad<T, kLongPiece, false>(stream, num_blocks, peers, layout, sizes, args)
             : LaunchGrad<T, kShortPiece, false>(stream, num_blocks, peers, layout, sizes, args);
}

template <typename Wire, bool kPuts>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const DispatchArgs& args) {
  const cudaError_t error = cudaFuncSetAttribute(
      DispatchKernel<Wire, kPuts>, cudaFuncAttributeMaxDynamicSharedMemorySize, kCopySharedBytes);
  if (error != cudaSuccess) return error;
  const int percent = SenderPercent(sizes, args.wire);
  DispatchKernel<Wire, kPuts><<<num_blocks, kThreads, kCopySharedBytes, stream>>>(
      peers, layout, sizes, args, NumSenders(num_blocks, sizes.num_devices, percent));
  return cudaGetLastError();
}

template <typename Wire>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const DispatchArgs& args) {
  if constexpr (kWithPuts) {
    if (peers.puts) return Launch<Wire, true>(stream, num_blocks, peers, layout, sizes, args);
  }
  return Launch<Wire, false>(stream, num_blocks, peers, layout, sizes, args);
}

template <typename T>
cudaError_t LaunchQuantized(cudaStream_t stream, int num_blocks, const Peers& peers,
                            const Layout& layout, const Sizes& sizes, const DispatchArgs& args) {
  return LongPartsFit(args.wire.dim)
             ? Launch<QuantizedWire<T, kLongPart>>(stream, num_blocks, peers, layout, sizes, args)
             : Launch<QuantizedWire<T, kShortPart>>(stream, num_blocks, peers, layout, sizes, args);
}

}  // namespace

cudaError_t LaunchDispatch(cudaStream_t stream, int num_blocks, const Peers& peers,
                           const Layout& layout, const Sizes& sizes, const DispatchArgs& args) {
  if (args.wire.format == kWirePlain) {
    return Launch<PlainWire>(stream, num_blocks, peers, layout, sizes, args);
  }
  switch (args.wire.type) {
    case RowType::kBf16:
      return LaunchQuantized<__nv_bfloat16>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF16:
      return LaunchQuantized<__half>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF32:
      return Launch<QuantizedWire<float, kFloatPart>>(stream, num_blocks, peers, layout, sizes,
                                                      args);
  }
  return cudaErrorInvalidValue;
}

cudaError_t LaunchCombineGrad(cudaStream_t stream, int num_blocks, const Peers& peers,
                              const Layout& layout, const Sizes& sizes, const DispatchArgs& args,
                              RowType type) {
  switch (type) {
    case RowType::kBf16:
      return LaunchGrad<__nv_bfloat16>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF16:
      return LaunchGrad<__half>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF32:
      return LaunchGrad<float>(stream, num_blocks, peers, layout, sizes, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxmoe::cuda

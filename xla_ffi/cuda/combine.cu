// From rows to tokens: combine, and the gradient of dispatch.
//
// Blocks have two roles (see dispatch.cu for why not warps). Senders sum each peer's tokens over
// this device's rows and send one partial sum per token; then they finish tokens as well. Finishers
// add up this device's own tokens: their own rows, and the peers' partial sums as they come, in the
// order of the devices.

#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/pieces.cuh"
#include "xla_ffi/cuda/protocol.cuh"
#include "xla_ffi/cuda/rows.cuh"
#include "xla_ffi/cuda/units.cuh"

namespace jaxmoe::cuda {
namespace {

// Of the blocks; both roles read as much, and senders finish tokens afterwards. Between 50 and 66
// there is no difference.
constexpr int kSenderPercent = 50;
// Few blocks do not fill the wire; then finishers rather wait for partial sums. Measured with 24
// blocks (T=4096, D=7168, K=8, E=256): 458 us, and 560 us with 50 percent.
constexpr int kFewBlocks = 64, kFewSenderPercent = 80;

// Waits for the peers' partial sums of the list's token, and adds those that there are. They come
// in the order of the devices, so those of devices before this one come before its own sum; if
// there are several of these, they are not loaded with the rest but listed behind it.
__device__ void ListPartialSums(const Context& c, RowList* list, bool* ok) {
  const int lane = threadIdx.x % 32;
  const int me = c.call.peers.rank, token = list->token;
  unsigned present[(kMaxDevices + 31) / 32];
  int num_early = 0;
#pragma unroll
  for (int base = 0; base < kMaxDevices; base += 32) {
    const int device = base + lane;
    uint64_t sent = 0;
    if (device < c.sizes.num_devices && device != me) {
      const auto* flag = reinterpret_cast<const uint64_t*>(
          c.call.own() + c.call.layout.ChunkFlag(c.call.parity, device, token / kSumChunkTokens));
      sent = c.call.Wait(flag, kEpochShift, c.call.epoch, device, kPhaseRows, ok);
    }
    present[base / 32] = __ballot_sync(~0u, sent >> (token % kSumChunkTokens) & 1);
    num_early += __popc(__ballot_sync(~0u, device < me) & present[base / 32]);
  }
  if (num_early < 2) num_early = 0;
  int count = list->count, seen = 0, num_late = 0;
#pragma unroll
  for (int i = 0; i < sizeof(present) / sizeof(present[0]); ++i) num_late += __popc(present[i]);
  num_late -= num_early;
#pragma unroll
  for (int base = 0; base < kMaxDevices; base += 32) {
    const int device = base + lane, at = seen + __popc(present[base / 32] & ((1u << lane) - 1));
    if (present[base / 32] >> lane & 1) {
      list->rows[count + (at < num_early ? num_late + at : at - num_early)] =
          c.call.own() + c.call.layout.Row(c.call.parity, device, token);
    }
    seen += __popc(present[base / 32]);
  }
  FenceBulk();
  __syncwarp();
  if (lane == 0) {
    list->count = count + num_late;
    list->rest = num_early;
    list->complete = 1;
  }
  __syncwarp();
  *ok = __all_sync(~0u, *ok);
}

template <typename T, int kVectors>
using Sum = float[kVectors][Vector<T>::kSize];

// sum = the sum of several early partial sums, in order, plus `sum`.
template <typename T, int kVectors>
__device__ __forceinline__ void AddEarly(const RowList& list, int row_bytes, int piece,
                                         Sum<T, kVectors>& sum) {
  const int lane = threadIdx.x % 32, n = row_bytes / 16;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int at = (piece * kVectors + j) * 32 + lane;
    if (at >= n) break;
    float total[Vector<T>::kSize] = {};
#pragma unroll 1
    for (int i = 0; i < list.rest; ++i) {
      Vector<T>::Add(__ldcg(AsVectors(list.rows[list.count + i]) + at), total);
    }
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) sum[j][e] = __fadd_rn(total[e], sum[j][e]);
  }
}

// Rounds piece `piece` of a row and stores it.
template <typename T, int kVectors, bool kStreaming>
__device__ void StorePiece(char* row, int row_bytes, int piece, const Sum<T, kVectors>& sum) {
  const int n = row_bytes / 16;
  uint4* to = AsVectors(row);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = (piece * kVectors + j) * 32 + threadIdx.x % 32;
    if (i >= n) continue;
    if (kStreaming) {
      StoreStreaming(to + i, Vector<T>::Round(sum[j]));
    } else {
      to[i] = Vector<T>::Round(sum[j]);
    }
  }
}

// Where a sender writes a token's partial sum, and the values of its choices: at the peer, or where
// they are put from.
template <bool kPuts>
__device__ char* SumPlace(const Context& c, const Unit& unit) {
  const Layout& layout = c.call.layout;
  if (c.call.Reaches<kPuts>(unit.peer)) {
    return c.call.heap(unit.peer) + layout.Row(c.call.parity, c.call.peers.rank, unit.token);
  }
  return c.call.own() +
         layout.StagedRow(blockIdx.x, unit.chunk % kChunkSlots, unit.token % kSumChunkTokens);
}
template <bool kPuts>
__device__ float* ValuesPlace(const Context& c, const Unit& unit) {
  const Layout& layout = c.call.layout;
  if (c.call.Reaches<kPuts>(unit.peer)) {
    return reinterpret_cast<float*>(c.call.heap(unit.peer) +
                                    layout.Weights(c.call.parity, c.call.peers.rank)) +
           unit.token * c.sizes.top_k;
  }
  return reinterpret_cast<float*>(c.call.own() + layout.StagedValues(blockIdx.x,
                                                                     unit.chunk % kChunkSlots,
                                                                     unit.token % kSumChunkTokens));
}

// The values of a token's choices, for the device that made them.
template <bool kPuts>
__device__ void SendValues(const Context& c, const Unit& unit) {
  const int lane = threadIdx.x % 32;
  if (lane >= c.sizes.top_k || unit.token >= c.sizes.num_tokens) return;
  ValuesPlace<kPuts>(c, unit)[lane] = unit.row >= 0 ? c.args.row_values[unit.row] : 0.0f;
}

// A choice's value, from the device that was asked.
__device__ void CollectValues(const Context& c, int token) {
  const int lane = threadIdx.x % 32;
  if (lane >= c.sizes.top_k) return;
  const int choice = token * c.sizes.top_k + lane;
  const int device = c.args.choice_device[choice];
  float value = 0.0f;
  if (device == c.call.peers.rank) {
    const int row = c.args.row_map[device * c.sizes.num_choices() + choice];
    if (row >= 0) value = c.args.row_values[row];
  } else if (device >= 0) {
    value = __ldcg(reinterpret_cast<const float*>(c.call.own() +
                                                  c.call.layout.Weights(c.call.parity, device)) +
                   choice);
  }
  c.args.choice_values[choice] = value;
}

// Works through a schedule: the loads run ahead into the next unit, whose rows are known, and the
// row map of the one after that is on its way.
template <typename T, int kVectors, bool kSend, bool kPuts, typename Schedule>
__device__ void RunUnits(const Context& c, Schedule& schedule, typename Piece<kVectors>::Ring& ring,
                         RowList* lists, ChunkSlots* slots) {
  const Sizes& sizes = c.sizes;
  const int lane = threadIdx.x % 32;
  PieceStream<kVectors> stream(ring, sizes.row_bytes);
  bool ok = true;
  const auto complete = [&](RowList* list) { ListPartialSums(c, list, &ok); };
  Unit unit = schedule.Next();
  Unit next = schedule.Next();
  ListRows(c, &unit, &lists[0], kSend || unit.token < 0);
  stream.Queue(&lists[0], unit.begin, unit.end);
  stream.Fill(complete);
  for (int turn = 0; unit.token >= 0 && ok; turn ^= 1) {
    const Unit after = schedule.Next();
    ListRows(c, &next, &lists[turn ^ 1], kSend || next.token < 0);
    stream.Queue(&lists[turn ^ 1], next.begin, next.end);
    stream.Fill(complete);
    const RowList& list = lists[turn];
    for (int piece = unit.begin; piece < unit.end; ++piece) {
      Sum<T, kVectors> sum = {};
      for (unsigned rest = unit.rows; rest != 0; rest &= rest - 1) {
        const float weight = __shfl_sync(~0u, unit.weight, __ffs(rest) - 1);
        const uint4* v = ring.Wait() + lane;
#pragma unroll
        for (int j = 0; j < kVectors; ++j) Vector<T>::AddScaled(v[32 * j], weight, sum[j]);
        ring.Release();
        stream.Fill(complete);
      }
      if (kSend && unit.rows == 0) break;
      if (!kSend) {
        if (!ok) break;
        if (list.rest != 0) AddEarly<T, kVectors>(list, sizes.row_bytes, piece, sum);
        for (int i = __popc(unit.rows); i < list.count; ++i) {
          const uint4* v = ring.Wait() + lane;
#pragma unroll
          for (int j = 0; j < kVectors; ++j) Vector<T>::Add(v[32 * j], sum[j]);
          ring.Release();
          stream.Fill(complete);
        }
      }
      char* to =
          kSend ? SumPlace<kPuts>(c, unit) : c.args.tokens + size_t(unit.token) * sizes.row_bytes;
      StorePiece<T, kVectors, !kSend>(to, sizes.row_bytes, piece, sum);
    }
    if (!ok) break;
    if (c.args.row_values != nullptr && unit.begin == 0) {
      if constexpr (kSend) {
        SendValues<kPuts>(c, unit);
      } else {
        CollectValues(c, unit.token);
      }
    }
    if constexpr (kSend) FinishSending(unit, slots);
    unit = next;
    next = after;
  }
  ring.Drain();
}

template <int kVectors>
constexpr int kSharedBytes =
    kSumWarps * (Piece<kVectors>::Ring::kSharedBytes + 2 * int{sizeof(RowList)});

template <typename T, int kVectors, bool kPuts>
__global__ __launch_bounds__(kSumThreads,
                             1) void CombineKernel(const __grid_constant__ Peers peers,
                                                   const __grid_constant__ Layout layout,
                                                   const __grid_constant__ Sizes sizes,
                                                   const __grid_constant__ CombineArgs args,
                                                   const int num_senders) {
  using Ring = typename Piece<kVectors>::Ring;
  extern __shared__ __align__(128) char shared[];
  __shared__ uint64_t barriers[kSumWarps][Ring::kNumBuffers];
  __shared__ ChunkSlots slots;
  const Call call(peers, layout, args.row_values != nullptr ? kDispatchGrad : kCombine);
  const int warp = threadIdx.x / 32;
  Ring ring(shared + warp * Ring::kSharedBytes, barriers[warp]);
  ring.Init();
  RowList* lists = reinterpret_cast<RowList*>(shared + kSumWarps * Ring::kSharedBytes) + 2 * warp;
  if (!call.failed()) {
    const int num_finishers = gridDim.x - num_senders;
    const int pieces = Piece<kVectors>::NumOf(sizes.row_bytes);
    ExchangeHeaders<kPuts>(call, sizes.num_devices, HeaderHash(call, sizes.num_tokens, args.site));
    if (blockIdx.x >= num_finishers) {
      const Context context(call, sizes, args, pieces, 1);
      SendSchedule schedule(context, blockIdx.x - num_finishers, num_senders);
      slots.Init(schedule.units_per_chunk());
      __syncthreads();
      if (warp < kSendingWarps) {
        RunUnits<T, kVectors, true, kPuts>(context, schedule, ring, lists, &slots);
      } else {
        Announce<kPuts>(context, schedule, &slots);
      }
    }
    const Context context(call, sizes, args, pieces,
                          PiecesPerUnit(sizes.num_tokens, pieces, gridDim.x * kSumWarps));
    FinishSchedule schedule(context);
    RunUnits<T, kVectors, false, kPuts>(context, schedule, ring, lists, &slots);
  }
  EndCall(call, [&] {
    PoisonRows(args.tokens, sizes.num_tokens, sizes.row_bytes);
    FillArray(args.choice_values, sizes.num_choices(), __int_as_float(-1));
  });
}

template <typename T, int kVectors, bool kPuts>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const CombineArgs& args) {
  constexpr int kBytes = kSharedBytes<kVectors>;
  const cudaError_t error = cudaFuncSetAttribute(
      CombineKernel<T, kVectors, kPuts>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int num_senders = NumSenders(num_blocks, sizes.num_devices,
                                     num_blocks < kFewBlocks ? kFewSenderPercent : kSenderPercent);
  CombineKernel<T, kVectors, kPuts>
      <<<num_blocks, kSumThreads, kBytes, stream>>>(peers, layout, sizes, args, num_senders);
  return cudaGetLastError();
}

template <typename T>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const CombineArgs& args) {
  if constexpr (kWithPuts) {
    if (peers.puts) {
      return Launch<T, kShortPiece, true>(stream, num_blocks, peers, layout, sizes, args);
    }
  }
  return LongPiecesFit(sizes.row_bytes)
             ? Launch<T, kLongPiece, false>(stream, num_blocks, peers, layout, sizes, args)
             : Launch<T, kShortPiece, false>(stream, num_blocks, peers, layout, sizes, args);
}

}  // namespace

cudaError_t LaunchCombine(cudaStream_t stream, int num_blocks, const Peers& peers,
                          const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                          RowType type) {
  switch (type) {
    case RowType::kBf16:
      return Launch<__nv_bfloat16>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF16:
      return Launch<__half>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF32:
      return Launch<float>(stream, num_blocks, peers, layout, sizes, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxmoe::cuda

// combine of few tokens: as latency.cuh says, with one way over the wire and no barrier of the
// grid.
//
// Blocks have two roles, as in combine.cu. Senders sum pieces of the peers' tokens over this
// device's rows and send them; for a token without rows here they say so. Finishers add up the
// pieces of this device's own tokens, in the order of the devices. Of a split call the start has
// senders only, the done finishers.

#include "xla_ffi/cuda/latency.cuh"
#include "xla_ffi/cuda/latency_entry.cuh"
#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/rows.cuh"

namespace jaxmoe::cuda {
namespace {

constexpr int kRowsAtOnce = 4;  // whose loads are in flight together
constexpr int kSenderPercent = 50;
// Vectors of a lane in a warp's piece. Short pieces spread over more warps, long ones cost less
// apiece: 3.5 instead of 4.0 us at T=1, 12.1 instead of 11.3 at T=128 (D=7168, K=8).
constexpr int kShort = 1, kLong = 2;

template <typename T, int kVectors>
using Sum = float[kVectors][Vector<T>::kSize];

// A piece of a device's token.
struct Job {
  int device, token, part;
};

using Params = LatencyParams<CombineArgs>;

// What all functions of a warp need.
template <int kVectors>
struct Work {
  const Params& params;
  const Sizes& sizes;
  const CombineArgs& args;
  int rank;

  __device__ explicit Work(const Params& p)
      : params(p), sizes(p.sizes), args(p.args), rank(p.peers.rank) {}
  // Number i of the peers' pieces, or of the own ones.
  __device__ Job PeersJob(int i) const {
    Job job;
    int turn;
    job.token = params.per_peer.Divide(params.per_piece.Divide(i, &job.part), &turn);
    const int peer = rank + 1 + turn;
    job.device = peer < sizes.num_devices ? peer : peer - sizes.num_devices;
    return job;
  }
  __device__ Job OwnJob(int i) const {
    Job job;
    job.device = rank;
    job.token = params.per_piece.Divide(i, &job.part);
    return job;
  }
  // The row of choice k in lane k, or -1.
  __device__ int RowOf(const Job& job) const {
    const int k = threadIdx.x % 32;
    if (k >= sizes.top_k) return -1;
    return LoadEarly(args.row_map + (job.device * sizes.num_tokens + job.token) * sizes.top_k + k);
  }
  __device__ Span SpanOf(const Job& job) const {
    return Span(sizes.row_bytes, job.part * kVectors);
  }
};

// The weighted sum of a piece's rows, in the order of the choices. Returns whether there are any.
template <typename T, int kVectors>
__device__ bool SumRows(const Work<kVectors>& work, const Span& span, int row,
                        Sum<T, kVectors>& sum) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) sum[j][e] = 0.0f;
  }
  const unsigned rows = __ballot_sync(~0u, row >= 0);
  const float weight = row >= 0 ? work.args.row_weights[row] : 0.0f;
  for (unsigned rest = rows; rest != 0;) {
    uint4 v[kRowsAtOnce][kVectors];
    unsigned then = rest;
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i, then &= then - 1) {
      if (then == 0) break;
      const int from = __shfl_sync(~0u, row, __ffs(then) - 1);
      const uint4* vectors = AsVectors(work.args.rows + size_t(from) * work.sizes.row_bytes);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        v[i][j] = span.Has(j) ? LoadEarly(vectors + span.Vector(j)) : make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsAtOnce; ++i, rest &= rest - 1) {
      if (rest == 0) break;
      const float factor = __shfl_sync(~0u, weight, __ffs(rest) - 1);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) Vector<T>::AddScaled(v[i][j], factor, sum[j]);
    }
  }
  return rows != 0;
}

// The send phase of a sender's warp, whose first row was loaded before.
template <typename T, int kVectors>
__device__ void SendSums(const LatencyCall& call, const Work<kVectors>& work, int first,
                         int num_workers, int row) {
  const int num = (work.sizes.num_devices - 1) * work.sizes.num_tokens * work.params.pieces;
  for (int i = first; i < num; i += num_workers) {
    const Job job = work.PeersJob(i);
    const int next_row = i + num_workers < num ? work.RowOf(work.PeersJob(i + num_workers)) : -1;
    const Span span = work.SpanOf(job);
    char* wire = call.heap(job.device) + call.layout.WireRow(call.parity, work.rank, job.token);
    Sum<T, kVectors> sum;
    if (SumRows<T, kVectors>(work, span, row, sum)) {
      WirePiece<kVectors> piece;
#pragma unroll
      for (int j = 0; j < kVectors; ++j) piece.v[j] = Vector<T>::Round(sum[j]);
      piece.Close();
      piece.Send(wire, work.sizes.row_bytes, span);
    } else {
      WirePiece<kVectors>::SendAbsent(wire, work.sizes.row_bytes, span);
    }
    row = next_row;
  }
}

// total += sum, element by element.
template <typename T, int kVectors>
__device__ void AddSum(const Sum<T, kVectors>& sum, Sum<T, kVectors>& total) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
#pragma unroll
    for (int e = 0; e < Vector<T>::kSize; ++e) total[j][e] = __fadd_rn(total[j][e], sum[j][e]);
  }
}

// `own`, the sum of this device's rows, and what the peers send, added in the order of the devices.
// The next peer's piece is on its way while one is added.
template <typename T, int kVectors>
__device__ bool AddPeers(const LatencyCall& call, const Work<kVectors>& work, const Job& job,
                         const Span& span, const Sum<T, kVectors>& own, Sum<T, kVectors>& total) {
  const int num_devices = work.sizes.num_devices, row_bytes = work.sizes.row_bytes;
  const auto wire = [&](int device) {
    return call.own() + call.layout.WireRow(call.parity, device, job.token);
  };
  int device = work.rank == 0 ? 1 : 0;
  WirePiece<kVectors> piece;
  uint64_t header = 0;
  if (device < num_devices) {
    header = call.Header(device);
    piece.Poll(wire(device), row_bytes, span);
  }
  if (work.rank == 0) AddSum<T, kVectors>(own, total);
  while (device < num_devices) {
    const int next = device + 1 == work.rank ? device + 2 : device + 1;
    WirePiece<kVectors> next_piece;
    uint64_t next_header = 0;
    if (next < num_devices) {
      next_header = call.Header(next);
      next_piece.Poll(wire(next), row_bytes, span);
    }
    if (!AwaitHeader(call, header, device)) return false;
    if (!piece.Receive(call, device, wire(device), row_bytes, span)) return false;
    if (!piece.Absent()) {
#pragma unroll
      for (int j = 0; j < kVectors; ++j) Vector<T>::Add(piece.v[j], total[j]);
    }
    if (device + 1 == work.rank) AddSum<T, kVectors>(own, total);
    header = next_header;
    piece = next_piece;
    device = next;
  }
  return true;
}

// The receive phase of a finisher's warp, whose first row was loaded before. NaN if not `ok`, or as
// soon as something is missing.
template <typename T, int kVectors>
__device__ void ReceiveSums(const LatencyCall& call, const Work<kVectors>& work, int first,
                            int num_workers, int row, bool ok) {
  const int num = work.sizes.num_tokens * work.params.pieces;
  for (int i = first; i < num; i += num_workers) {
    const Job job = work.OwnJob(i);
    const int next_row = i + num_workers < num ? work.RowOf(work.OwnJob(i + num_workers)) : -1;
    const Span span = work.SpanOf(job);
    Sum<T, kVectors> sum, total = {};
    WirePiece<kVectors> piece;
    if (ok) {
      SumRows<T, kVectors>(work, span, row, sum);
      ok = AddPeers<T, kVectors>(call, work, job, span, sum, total);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) piece.v[j] = Vector<T>::Round(total[j]);
    if (!ok) piece.Poison();
    piece.Store(work.args.tokens + size_t(job.token) * work.sizes.row_bytes, span);
    row = next_row;
  }
}

template <typename T, int kVectors, CallPart kPart>
__global__ __launch_bounds__(kLatencyThreads,
                             1) void LatencyCombineKernel(const __grid_constant__ Params params) {
  __shared__ Entry entry;
  const Work<kVectors> work(params);
  const int num_finishers = gridDim.x - params.num_senders;
  const bool sends = blockIdx.x >= num_finishers;
  // Neighbouring pieces are in different blocks.
  const int num_blocks = sends ? params.num_senders : num_finishers;
  const int num_workers = num_blocks * kLatencyWarps;
  const int worker = threadIdx.x / 32 * num_blocks + blockIdx.x - (sends ? num_finishers : 0);
  const int num = work.sizes.num_tokens * params.pieces * (sends ? work.sizes.num_devices - 1 : 1);
  int row = -1;
  if (worker < num) row = work.RowOf(sends ? work.PeersJob(worker) : work.OwnJob(worker));
  const uint32_t order = EnterCall<kPart>(params, kCombine, &entry, [] {});
  const LatencyCall call = CallOf<kPart>(params, kCombine, entry);
  const bool tells = kPart == CallPart::kWhole ? !sends : kPart == CallPart::kStart;
  if (tells && worker == num_workers - 1 && !entry.failed) {
    call.TellHeader(work.sizes.num_devices);
  }
  if (!sends) {
    if (kPart != CallPart::kStart) {
      ReceiveSums<T, kVectors>(call, work, worker, num_workers, row, !entry.failed);
    }
  } else if (kPart != CallPart::kDone && !entry.failed) {
    SendSums<T, kVectors>(call, work, worker, num_workers, row);
  }
  LeaveCall<kPart>(params, call, entry, order);
}

// Blocks that send, of `num_blocks`.
int NumSumSenders(CallPart part, int num_blocks, int num_devices, int64_t own) {
  if (part == CallPart::kDone) return 0;
  const bool whole = part == CallPart::kWhole;
  if (whole && num_devices == 1) return 0;
  const int64_t wanted = own * (num_devices - 1);
  const int64_t most = whole ? num_blocks * kSenderPercent / 100 : num_blocks;
  const int64_t senders = wanted < most ? wanted : most;
  return senders < 1 ? 1 : static_cast<int>(senders);
}

template <typename T, int kVectors, CallPart kPart>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const CombineArgs& args) {
  const int pieces = WirePiece<kVectors>::NumOf(sizes.row_bytes);
  const int64_t own = int64_t{sizes.num_tokens} * pieces;
  const int num_senders = NumSumSenders(kPart, num_blocks, sizes.num_devices, own);
  const int64_t rest = kPart == CallPart::kStart ? 0 : num_blocks - num_senders;
  const int64_t num_finishers = own < rest ? own : rest;
  const Params params(peers, layout, sizes, args, num_senders, pieces);
  LatencyCombineKernel<T, kVectors, kPart>
      <<<static_cast<unsigned>(num_finishers + num_senders), kLatencyThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

template <typename T, CallPart kPart>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const CombineArgs& args) {
  const int64_t short_pieces =
      int64_t{sizes.num_devices} * sizes.num_tokens * WirePiece<kShort>::NumOf(sizes.row_bytes);
  return short_pieces <= num_blocks * kLatencyWarps
             ? Launch<T, kShort, kPart>(stream, num_blocks, peers, layout, sizes, args)
             : Launch<T, kLong, kPart>(stream, num_blocks, peers, layout, sizes, args);
}

template <CallPart kPart>
cudaError_t LaunchPart(cudaStream_t stream, int num_blocks, const Peers& peers,
                       const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                       RowType type) {
  switch (type) {
    case RowType::kBf16:
      return Launch<__nv_bfloat16, kPart>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF16:
      return Launch<__half, kPart>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF32:
      return Launch<float, kPart>(stream, num_blocks, peers, layout, sizes, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t LaunchLatencyCombine(cudaStream_t stream, int num_blocks, const Peers& peers,
                                 const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                                 RowType type) {
  return LaunchPart<CallPart::kWhole>(stream, num_blocks, peers, layout, sizes, args, type);
}
cudaError_t LaunchCombineStart(cudaStream_t stream, int num_blocks, const Peers& peers,
                               const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                               RowType type) {
  return LaunchPart<CallPart::kStart>(stream, num_blocks, peers, layout, sizes, args, type);
}
cudaError_t LaunchCombineDone(cudaStream_t stream, int num_blocks, const Peers& peers,
                              const Layout& layout, const Sizes& sizes, const CombineArgs& args,
                              RowType type) {
  return LaunchPart<CallPart::kDone>(stream, num_blocks, peers, layout, sizes, args, type);
}

}  // namespace jaxmoe::cuda

// dispatch of few tokens: as latency.cuh says, with one way over the wire and no barrier of the
// grid.
//
// Blocks have two roles, as in dispatch.cu. Senders copy tokens to the devices that need them.
// Expanders tell the peers this device's choices, learn theirs, make the plan, each block for
// itself, and turn tokens into rows. A warp does a piece of a token: what it needs first is on its
// way while the block waits for the choices. Of a split call the start is the senders' work and the
// choices', the done that of expanders.

#include <algorithm>

#include "xla_ffi/cuda/latency.cuh"
#include "xla_ffi/cuda/latency_entry.cuh"
#include "xla_ffi/cuda/latency_ids.cuh"
#include "xla_ffi/cuda/latency_plan.cuh"
#include "xla_ffi/cuda/latency_results.cuh"
#include "xla_ffi/cuda/latency_wire.cuh"
#include "xla_ffi/cuda/launch.h"

namespace jaxmoe::cuda {
namespace {

using Params = DispatchParams;
constexpr int kSenderPercent = 18;  // of the blocks, at most
// In FP8, which is less to send and more to work, as few as these where that saves the expanders
// one of few rounds.
constexpr int kFewPercent = 15, kFewRounds = 5;
constexpr int kPiecesPerSender = 4;

// The device of an expert, or -1.
__device__ __forceinline__ int DeviceOf(const Params& params, int id) {
  int rest;
  if (id < 0 || id >= params.sizes.num_experts) return -1;
  return params.per_local_expert.Divide(id, &rest);
}

// Lanes whose choice is the token's first one for its device, which is another one.
__device__ __forceinline__ unsigned FirstChoices(int rank, int device) {
  const unsigned same = __match_any_sync(~0u, device);
  const bool first = threadIdx.x % 32 == __ffs(same) - 1;
  return __ballot_sync(~0u, first && device >= 0 && device != rank);
}

// A sender's warp. What its first piece needs is loaded by the constructor. TokenPiece: a class of
// latency_wire.cuh.
template <typename TokenPiece>
class TokenSender {
 public:
  __device__ TokenSender(const Params& params, const Worker& worker)
      : params_(params),
        sizes_(params.sizes),
        args_(params.args),
        stride_(worker.num_workers),
        job_(worker.number) {
    Load();
  }

  // Of the first piece, ahead of Send.
  __device__ void Encode() {
    if (job_ < num_jobs()) piece_.Encode(params_);
    encoded_ = true;
  }

  // The send phase.
  __device__ void Send(const LatencyCall& call) {
    while (job_ < num_jobs()) {
      const int token = token_, part = part_, device = device_;
      const uint32_t weight = weight_;
      TokenPiece piece = piece_;
      if (!encoded_) piece.Encode(params_);
      encoded_ = false;
      job_ += stride_;
      Load();
      piece.Close();
      for (unsigned rest = FirstChoices(call.peers.rank, device); rest != 0; rest &= rest - 1) {
        const int peer = __shfl_sync(~0u, device, __ffs(rest) - 1);
        char* wire = call.heap(peer) + call.layout.WireRow(call.parity, call.peers.rank, token);
        piece.Send(params_, wire, part);
        const int k = threadIdx.x % 32;
        if (part == 0 && k < sizes_.top_k) {
          StoreWord(wire + TokenPiece::WeightOf(params_, k), WirePiece<1>::kPresent | weight);
        }
      }
    }
  }

 private:
  __device__ int num_jobs() const { return sizes_.num_tokens * params_.pieces; }
  __device__ void Load() {
    if (job_ >= num_jobs()) return;
    token_ = params_.per_piece.Divide(job_, &part_);
    const int k = threadIdx.x % 32, choice = token_ * sizes_.top_k + k;
    int id = -1;
    if (k < sizes_.top_k) {
      id = LoadEarly(args_.expert_ids + choice);
      if (part_ == 0) weight_ = LoadEarly(reinterpret_cast<const int32_t*>(args_.weights) + choice);
    }
    piece_.Load(params_, token_, part_);
    device_ = DeviceOf(params_, id);
  }

  const Params& params_;
  const Sizes& sizes_;
  const DispatchArgs& args_;
  const int stride_;
  int job_, token_, part_;
  TokenPiece piece_;
  bool encoded_ = false;
  int device_;
  uint32_t weight_ = 0;
};

// A piece of a token of some device.
struct Job {
  int source, token, part;  // source -1: there are no more
};

// An expander's warp. What its first piece needs is loaded by the constructor, if it is there.
template <typename TokenPiece>
class TokenExpander {
 public:
  __device__ TokenExpander(const Params& params, const Worker& worker)
      : params_(params),
        sizes_(params.sizes),
        args_(params.args),
        rank_(params.peers.rank),
        stride_(worker.num_workers),
        number_(worker.number),
        job_(JobAt(worker.number)) {
    LoadOwn();
  }

  // Starts to load what a peer has sent of the piece, if it is a peer's.
  __device__ void Poll(const LatencyCall& call) {
    if (job_.source < 0 || job_.source == rank_) return;
    piece_.Poll(params_, Wire(call), job_.part);
    if (HasChoice()) weight_ = LoadWord(WireWeight(call));
  }

  // NaN for what is missing. `plan_rows` makes the plan, by all threads of the block; false if
  // there is none. A first piece is encoded before that, while the choices are on their way. Within
  // the loop, so that there is one copy of the code; but where nothing is to encode, the loop must
  // not begin before what is loaded for it has time to come (T=64: 8.3 instead of 9.4 us).
  template <typename PlanRows>
  __device__ bool Run(const LatencyCall& call, LocalPlan& plan, PlanRows plan_rows) {
    bool ok = true;
    if (!TokenPiece::kEncodes && !plan_rows()) return false;
    for (bool planned = !TokenPiece::kEncodes;; planned = true) {
      if (TokenPiece::kEncodes && job_.source == rank_) piece_.Encode(params_);
      if (TokenPiece::kEncodes && !planned && !plan_rows()) return false;
      if (job_.source < 0) return true;
      Expand(call, plan, &ok);
      number_ += stride_;
      job_ = JobAt(number_);
      LoadOwn();
      Poll(call);
    }
  }

 private:
  // Own tokens first: they are there.
  __device__ Job JobAt(int number) const {
    const int per_device = sizes_.num_tokens * params_.pieces;
    Job job = {-1, 0, 0};
    if (number < per_device) {
      job.source = rank_;
      job.token = params_.per_piece.Divide(number, &job.part);
    } else if (number < per_device * sizes_.num_devices) {
      int turn;
      const int rest = params_.per_piece.Divide(number - per_device, &job.part);
      job.token = params_.per_peer.Divide(rest, &turn);
      const int source = rank_ + 1 + turn;
      job.source = source < sizes_.num_devices ? source : source - sizes_.num_devices;
    }
    return job;
  }
  // Whether this lane has a choice of the token to describe: the warp of its first piece does.
  __device__ bool HasChoice() const { return job_.part == 0 && threadIdx.x % 32 < sizes_.top_k; }
  __device__ char* Wire(const LatencyCall& call) const {
    return call.own() + call.layout.WireRow(call.parity, job_.source, job_.token);
  }
  __device__ char* WireWeight(const LatencyCall& call) const {
    return Wire(call) + TokenPiece::WeightOf(params_, threadIdx.x % 32);
  }

  __device__ void LoadOwn() {
    if (job_.source != rank_) return;
    piece_.Load(params_, job_.token, job_.part);
    if (!HasChoice()) return;
    const int i = job_.token * sizes_.top_k + threadIdx.x % 32;
    id_ = LoadEarly(args_.expert_ids + i);
    weight_ = LoadEarly(reinterpret_cast<const int32_t*>(args_.weights) + i);
  }

  __device__ void Expand(const LatencyCall& call, LocalPlan& plan, bool* ok) {
    const int k = threadIdx.x % 32;
    const bool own = job_.source == rank_;
    const int first = (job_.source * sizes_.num_tokens + job_.token) * sizes_.top_k;
    const int choice = first + k, row = plan.Row(first);
    const bool sent = !own && __any_sync(~0u, k < sizes_.top_k && plan.IsMine(choice));
    // Also what is not kept: the wire row must be cleared.
    if (sent && *ok) {
      *ok = piece_.Receive(call, params_, job_.source, Wire(call), job_.part);
      if (*ok && HasChoice()) *ok = ReceiveWeight(call);
      *ok = __all_sync(~0u, *ok);
    }
    const unsigned rows = __ballot_sync(~0u, row >= 0);
    if (!*ok) {
      piece_.Poison();
      weight_ = ~uint64_t{0};
    } else if (rows != 0) {
      piece_.MakeRow(params_);
    }
    for (unsigned rest = rows; rest != 0; rest &= rest - 1) {
      piece_.Store(params_, __shfl_sync(~0u, row, __ffs(rest) - 1), job_.part);
    }
    if (HasChoice()) Describe(choice, row);
  }

  __device__ bool ReceiveWeight(const LatencyCall& call) {
    Waiting waiting;
    while (weight_ == 0) {
      if (!call.KeepWaiting(&waiting, job_.source, kPhaseRows)) return false;
      weight_ = LoadWord(WireWeight(call));
    }
    StoreWord(WireWeight(call), 0);
    return true;
  }

  // The plan's entries of a choice, and its row's weight.
  __device__ void Describe(int choice, int row) {
    if (job_.source == rank_) {
      args_.plan.choice_device[job_.token * sizes_.top_k + threadIdx.x % 32] =
          DeviceOf(params_, id_);
    }
    args_.plan.row_map[choice] = row;
    if (row < 0) return;
    args_.plan.row_source[row] = choice;
    args_.row_weights[row] = __uint_as_float(uint32_t(weight_));
  }

  const Params& params_;
  const Sizes& sizes_;
  const DispatchArgs& args_;
  const int rank_, stride_;
  int number_;
  Job job_;
  TokenPiece piece_;
  int id_ = 0;           // of the choice that this lane describes
  uint64_t weight_ = 0;  // its weight, with a mark if it has come over the wire
};

// The receive phase, by the expanders. False if there is no plan.
template <typename TokenPiece>
__device__ bool ReceiveTokens(const LatencyCall& call, const Params& params,
                              TokenExpander<TokenPiece>& expander, LocalPlan& plan, int num_invalid,
                              const Worker& worker) {
  return expander.Run(call, plan, [&] {
    bool ok = true;
    ReceiveIds(call, params, plan.words(), &ok);
    expander.Poll(call);  // what is sent with the ids comes with them
    if (!__syncthreads_and(ok)) return false;
    plan.Make();
    WriteRest(params, plan, num_invalid, worker);
    return true;
  });
}

template <typename TokenPiece, CallPart kPart>
__global__ __launch_bounds__(kLatencyThreads,
                             1) void LatencyDispatchKernel(const __grid_constant__ Params params) {
  extern __shared__ int32_t shared[];
  __shared__ Entry entry;
  const int num_expanders = kPart == CallPart::kStart ? 0 : gridDim.x - params.num_senders;
  const int sender = int(blockIdx.x) - num_expanders;
  if (kPart != CallPart::kDone && sender >= 0) {
    const Worker worker(sender, params.num_senders);
    TokenSender<TokenPiece> tokens(params, worker);
    const uint32_t order =
        EnterCall<kPart>(params, kDispatch, &entry, [&tokens] { tokens.Encode(); });
    const LatencyCall call = CallOf<kPart>(params, kDispatch, entry);
    if (!entry.failed) {
      if (kPart == CallPart::kStart) {
        if (worker.IsLast()) call.TellHeader(params.sizes.num_devices);
        IdSender(params, params.num_senders).Send(call);
      }
      tokens.Send(call);
    }
    LeaveCall<kPart>(params, call, entry, order);
    return;
  }
  const Worker worker(blockIdx.x, num_expanders);
  LocalPlan plan(params.sizes, shared);
  IdSender ids(params, num_expanders);
  TokenExpander<TokenPiece> expander(params, worker);
  const int num_invalid =
      ReadOwnChoices(params.sizes, params.args, params.peers.rank, plan.words());
  const uint32_t order = EnterCall<kPart>(params, kDispatch, &entry, [] {});
  const LatencyCall call = CallOf<kPart>(params, kDispatch, entry);
  bool ok = !entry.failed;
  if (ok) {
    if (kPart == CallPart::kWhole) {
      if (worker.IsLast()) call.TellHeader(params.sizes.num_devices);
      ids.Send(call);
    }
    ok = ReceiveTokens(call, params, expander, plan, num_invalid, worker);
  }
  if (!ok) Poison(params.sizes, params.args, num_expanders);
  LeaveCall<kPart>(params, call, entry, order);
}

// Blocks that send, of `num_blocks`, where each device has `jobs` pieces.
int NumTokenSenders(CallPart part, bool encodes, int num_blocks, int num_devices, int64_t jobs) {
  if (part == CallPart::kDone || (part == CallPart::kWhole && num_devices == 1)) return 0;
  const int64_t wanted = std::max<int64_t>(1, (jobs + kPiecesPerSender - 1) / kPiecesPerSender);
  if (part == CallPart::kStart) return static_cast<int>(std::min<int64_t>(wanted, num_blocks));
  const int64_t most = std::max(1, num_blocks * kSenderPercent / 100);
  if (wanted < most) return static_cast<int>(wanted);
  // The expanders' warps take a piece each in a round.
  const int64_t all = jobs * num_devices, warps = (num_blocks - most) * kLatencyWarps;
  const int64_t rounds = (all + warps - 1) / warps - 1;  // one less than there are now
  if (!encodes || rounds < 1 || rounds >= kFewRounds) return static_cast<int>(most);
  const int64_t per_round = rounds * kLatencyWarps;
  const int64_t fewer = num_blocks - (all + per_round - 1) / per_round;
  const bool enough = fewer >= 1 && fewer * 100 >= int64_t{num_blocks} * kFewPercent;
  return static_cast<int>(enough ? fewer : most);
}

template <typename TokenPiece, CallPart kPart>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const DispatchArgs& args) {
  const auto kernel = LatencyDispatchKernel<TokenPiece, kPart>;
  const int shared_bytes = kPart == CallPart::kStart ? 0 : LocalPlan::SharedBytes(sizes);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const int pieces = TokenPiece::NumOf(sizes, args.wire);
  const int64_t jobs = int64_t{sizes.num_tokens} * pieces;
  const int num_senders =
      NumTokenSenders(kPart, TokenPiece::kEncodes, num_blocks, sizes.num_devices, jobs);
  // No more blocks than have a piece to do.
  const int64_t all = kPart == CallPart::kStart ? 0 : jobs * sizes.num_devices;
  const int rest = num_blocks - num_senders;
  const int num_expanders = all < rest ? static_cast<int>(all) : rest;
  const Params params(peers, layout, sizes, args, num_senders, pieces);
  kernel<<<num_expanders + num_senders, kLatencyThreads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

template <CallPart kPart>
cudaError_t LaunchPart(cudaStream_t stream, int num_blocks, const Peers& peers,
                       const Layout& layout, const Sizes& sizes, const DispatchArgs& args) {
  const auto launch = [&]() -> decltype(&Launch<PlainToken, kPart>) {
    if (args.wire.format == kWirePlain) return Launch<PlainToken, kPart>;
    switch (args.wire.type) {
      case RowType::kBf16:
        return Launch<QuantizedToken<__nv_bfloat16>, kPart>;
      case RowType::kF16:
        return Launch<QuantizedToken<__half>, kPart>;
      case RowType::kF32:
        return Launch<QuantizedToken<float>, kPart>;
    }
    return nullptr;
  }();
  if (launch == nullptr) return cudaErrorInvalidValue;
  return launch(stream, num_blocks, peers, layout, sizes, args);
}

}  // namespace

cudaError_t LaunchLatencyDispatch(cudaStream_t stream, int num_blocks, const Peers& peers,
                                  const Layout& layout, const Sizes& sizes,
                                  const DispatchArgs& args) {
  return LaunchPart<CallPart::kWhole>(stream, num_blocks, peers, layout, sizes, args);
}
cudaError_t LaunchDispatchStart(cudaStream_t stream, int num_blocks, const Peers& peers,
                                const Layout& layout, const Sizes& sizes,
                                const DispatchArgs& args) {
  return LaunchPart<CallPart::kStart>(stream, num_blocks, peers, layout, sizes, args);
}
cudaError_t LaunchDispatchDone(cudaStream_t stream, int num_blocks, const Peers& peers,
                               const Layout& layout, const Sizes& sizes, const DispatchArgs& args) {
  return LaunchPart<CallPart::kDone>(stream, num_blocks, peers, layout, sizes, args);
}

}  // namespace jaxmoe::cuda

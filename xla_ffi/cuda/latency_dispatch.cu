// dispatch of few tokens: as latency.cuh says, with one way over the wire and no barrier of the
// grid.
//
// Blocks have two roles, as in dispatch.cu. Senders copy tokens to the devices that need them.
// Expanders tell the peers this device's choices, learn theirs, make the plan, each block for
// itself, and turn tokens into rows. A warp does a piece of a token: what it needs first is on its
// way while the block waits for the choices.

#include "xla_ffi/cuda/latency.cuh"
#include "xla_ffi/cuda/latency_ids.cuh"
#include "xla_ffi/cuda/latency_plan.cuh"
#include "xla_ffi/cuda/latency_wire.cuh"
#include "xla_ffi/cuda/launch.h"

namespace jaxmoe::cuda {
namespace {

using Params = DispatchParams;
constexpr int kSenderPercent = 18;  // of the blocks, at most
constexpr int kPiecesPerSender = 4;

// Of the grid's warps that share a role, block by block: neighbours are in different blocks.
struct Worker {
  int number, num_workers;
  bool in_last_block;

  __device__ Worker(int block, int num_blocks)
      : number(threadIdx.x / 32 * num_blocks + block),
        num_workers(num_blocks * kLatencyWarps),
        in_last_block(block == num_blocks - 1) {}
  __device__ bool IsLast() const { return number == num_workers - 1; }
};

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

  // The send phase.
  __device__ void Send(const LatencyCall& call) {
    while (job_ < sizes_.num_tokens * params_.pieces) {
      const int token = token_, part = part_, device = device_;
      const uint32_t weight = weight_;
      TokenPiece piece = piece_;
      job_ += stride_;
      Load();
      piece.Close(params_);
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
  __device__ void Load() {
    if (job_ >= sizes_.num_tokens * params_.pieces) return;
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

  // NaN for what is missing.
  __device__ void Run(const LatencyCall& call, LocalPlan& plan) {
    bool ok = true;
    while (job_.source >= 0) {
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
      piece_.MakeRow(params_, own);
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

// Bytes and scales of a row as it is handed over.
__device__ int RowBytes(const Sizes& sizes, const DispatchArgs& args) {
  return args.wire.row_scales == nullptr ? sizes.row_bytes : args.wire.dim;
}
__device__ int NumScales(const DispatchArgs& args) {
  return args.wire.row_scales == nullptr ? 0 : int(quantize::NumBlocks(args.wire.dim));
}

// Zeros behind the last row, and the plan's entries there; a share for each thread.
__device__ void EmptyTail(const Sizes& sizes, const DispatchArgs& args, int num_rows, int thread,
                          int num_threads) {
  const int vectors = RowBytes(sizes, args) / 16, scales = NumScales(args);
  uint4* rows = AsVectors(args.rows) + size_t(num_rows) * vectors;
  const int64_t end = int64_t{sizes.capacity - num_rows} * vectors;
  for (int64_t i = thread; i < end; i += num_threads) {
    StoreStreaming(rows + i, make_uint4(0, 0, 0, 0));
  }
  for (int r = num_rows + thread; r < sizes.capacity; r += num_threads) {
    args.plan.row_source[r] = -1;
    args.row_weights[r] = 0.0f;
    for (int i = 0; i < scales; ++i) args.wire.row_scales[size_t(r) * scales + i] = 0.0f;
  }
}

// The rest of the results, by warps that have nothing else to do if there are enough. `num_invalid`
// is what this thread has counted.
__device__ void WriteRest(const Params& params, const LocalPlan& plan, int num_invalid,
                          const Worker& worker) {
  const Sizes& sizes = params.sizes;
  const PlanArrays& arrays = params.args.plan;
  const int lane = threadIdx.x % 32;
  int jobs = sizes.num_tokens * params.pieces * sizes.num_devices;
  if (jobs > worker.num_workers / 2) jobs = 0;
  if (worker.number >= jobs) {
    EmptyTail(sizes, params.args, plan.num_rows(), (worker.number - jobs) * 32 + lane,
              (worker.num_workers - jobs) * 32);
  }
  if (!worker.in_last_block) return;
  __shared__ int invalid[kLatencyWarps];
  num_invalid = __reduce_add_sync(~0u, num_invalid);
  if (lane == 0) invalid[threadIdx.x / 32] = num_invalid;
  __syncthreads();
  const int thread = kLatencyThreads - 1 - threadIdx.x;
  for (int e = thread; e < sizes.num_local_experts; e += kLatencyThreads) {
    arrays.group_sizes[e] = plan.GroupSize(e);
  }
  if (thread == 0) {
    *arrays.num_rows = plan.num_rows();
    *arrays.num_dropped = plan.num_addressed() - plan.num_rows();
    for (int w = 1; w < kLatencyWarps; ++w) invalid[0] += invalid[w];
    *arrays.num_invalid = invalid[0];
  }
}

// Where there is no plan: NaN, and a plan without rows; a share for each block.
static __device__ __noinline__ void Poison(const Sizes& sizes, const DispatchArgs& args,
                                           int num_blocks) {
  const auto fill = [num_blocks](auto* array, size_t n, auto value) {
    const size_t stride = size_t(num_blocks) * kLatencyThreads;
    for (size_t i = blockIdx.x * kLatencyThreads + threadIdx.x; i < n; i += stride) {
      array[i] = value;
    }
  };
  fill(AsVectors(args.rows), size_t(sizes.capacity) * (RowBytes(sizes, args) / 16),
       make_uint4(~0u, ~0u, ~0u, ~0u));
  fill(args.wire.row_scales, size_t(sizes.capacity) * NumScales(args), __int_as_float(-1));
  fill(args.row_weights, sizes.capacity, __int_as_float(-1));
  fill(args.plan.group_sizes, sizes.num_local_experts, 0);
  fill(args.plan.num_rows, 1, 0);
  fill(args.plan.num_dropped, 1, 0);
  fill(args.plan.num_invalid, 1, 0);
  fill(args.plan.row_map, size_t(sizes.num_devices) * sizes.num_choices(), -1);
  fill(args.plan.row_source, sizes.capacity, -1);
  fill(args.plan.choice_device, sizes.num_choices(), -1);
}

// The receive phase, by the expanders. False if there is no plan.
template <typename TokenPiece>
__device__ bool ReceiveTokens(const LatencyCall& call, const Params& params,
                              TokenExpander<TokenPiece>& expander, LocalPlan& plan, int num_invalid,
                              const Worker& worker) {
  bool ok = true;
  ReceiveIds(call, params, plan.words(), &ok);
  expander.Poll(call);  // what is sent with the ids comes with them
  if (!__syncthreads_and(ok)) return false;
  plan.Make();
  WriteRest(params, plan, num_invalid, worker);
  expander.Run(call, plan);
  return true;
}

template <typename TokenPiece>
__global__ __launch_bounds__(kLatencyThreads,
                             1) void LatencyDispatchKernel(const __grid_constant__ Params params) {
  extern __shared__ int32_t shared[];
  __shared__ Entry entry;
  auto* control = reinterpret_cast<Control*>(params.own + params.layout.control);
  const int num_expanders = gridDim.x - params.num_senders;
  const int sender = int(blockIdx.x) - num_expanders;
  uint32_t order;
  if (sender >= 0) {
    TokenSender<TokenPiece> tokens(params, Worker(sender, params.num_senders));
    order = EnterCall(control, &entry);
    if (!entry.failed) tokens.Send(LatencyCall(params, kDispatch, entry.epoch));
  } else {
    const Worker worker(blockIdx.x, num_expanders);
    LocalPlan plan(params.sizes, shared);
    IdSender ids(params, num_expanders);
    TokenExpander<TokenPiece> expander(params, worker);
    const int num_invalid =
        ReadOwnChoices(params.sizes, params.args, params.peers.rank, plan.words());
    order = EnterCall(control, &entry);
    const LatencyCall call(params, kDispatch, entry.epoch);
    bool ok = !entry.failed;
    if (ok) {
      if (worker.IsLast()) call.TellHeader(params.sizes.num_devices);
      ids.Send(call);
      ok = ReceiveTokens(call, params, expander, plan, num_invalid, worker);
    }
    if (!ok) Poison(params.sizes, params.args, num_expanders);
  }
  LeaveCall(control, entry, order);
}

template <typename TokenPiece>
cudaError_t Launch(cudaStream_t stream, int num_blocks, const Peers& peers, const Layout& layout,
                   const Sizes& sizes, const DispatchArgs& args) {
  const int shared_bytes = LocalPlan::SharedBytes(sizes);
  const cudaError_t error = cudaFuncSetAttribute(
      LatencyDispatchKernel<TokenPiece>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  const int pieces = TokenPiece::NumOf(sizes, args.wire);
  const int64_t jobs = int64_t{sizes.num_tokens} * pieces;
  int num_senders = 0;
  if (sizes.num_devices > 1) {
    const int64_t wanted = (jobs + kPiecesPerSender - 1) / kPiecesPerSender;
    const int64_t most = num_blocks * kSenderPercent / 100;
    num_senders = static_cast<int>(wanted < most ? wanted : most);
    if (num_senders < 1) num_senders = 1;
  }
  // No more blocks than have a piece to do.
  const int64_t all = jobs * sizes.num_devices;
  const int rest = num_blocks - num_senders;
  const int num_expanders = all < rest ? static_cast<int>(all) : rest;
  const Params params(peers, layout, sizes, args, num_senders, pieces);
  LatencyDispatchKernel<TokenPiece>
      <<<num_expanders + num_senders, kLatencyThreads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

cudaError_t LaunchLatencyDispatch(cudaStream_t stream, int num_blocks, const Peers& peers,
                                  const Layout& layout, const Sizes& sizes,
                                  const DispatchArgs& args) {
  if (args.wire.format == kWirePlain) {
    return Launch<PlainToken>(stream, num_blocks, peers, layout, sizes, args);
  }
  switch (args.wire.type) {
    case RowType::kBf16:
      return Launch<QuantizedToken<__nv_bfloat16>>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF16:
      return Launch<QuantizedToken<__half>>(stream, num_blocks, peers, layout, sizes, args);
    case RowType::kF32:
      return Launch<QuantizedToken<float>>(stream, num_blocks, peers, layout, sizes, args);
  }
  return cudaErrorInvalidValue;
}

}  // namespace jaxmoe::cuda

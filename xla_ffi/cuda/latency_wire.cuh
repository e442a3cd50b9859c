// How the low-latency kernels take tokens over the wire: as they are, or in FP8. Pieces of a token
// in the registers of a warp; latency.cuh says what a wire row is.
//
// In FP8 a piece is a batch: a vector of 16 bytes holds the codes of a lane's numbers of both steps
// (quantize.cuh), and beside the batch's mark lie 8 bytes for the scale of each block, told from
// none like a mark. Rows are made of what crosses the wire, those of the own tokens as well.

#ifndef JAXMOE_XLA_FFI_CUDA_LATENCY_WIRE_CUH_
#define JAXMOE_XLA_FFI_CUDA_LATENCY_WIRE_CUH_

#include "xla_ffi/cuda/latency.cuh"
#include "xla_ffi/cuda/quantize.cuh"

namespace jaxmoe::cuda {

using DispatchParams = LatencyParams<DispatchArgs>;

// In the dtype of the tokens, whatever that is.
class PlainToken {
 public:
  static constexpr bool kEncodes = false;

  static int NumOf(const Sizes& sizes, const WireArgs&) { return Wire::NumOf(sizes.row_bytes); }

  __device__ void Load(const DispatchParams& params, int token, int part) {
    piece_.Load(params.args.tokens + size_t(token) * params.sizes.row_bytes, SpanOf(params, part));
  }
  // What was loaded, as it crosses the wire.
  __device__ void Encode(const DispatchParams&) {}
  // The same, closed for sending.
  __device__ void Close() { piece_.Close(); }
  __device__ void Send(const DispatchParams& params, char* wire, int part) const {
    piece_.Send(wire, params.sizes.row_bytes, SpanOf(params, part));
  }
  __device__ void Poll(const DispatchParams& params, const char* wire, int part) {
    piece_.Poll(wire, params.sizes.row_bytes, SpanOf(params, part));
  }
  __device__ bool Receive(const LatencyCall& call, const DispatchParams& params, int peer,
                          char* wire, int part) {
    return piece_.Receive(call, peer, wire, params.sizes.row_bytes, SpanOf(params, part));
  }
  // What was encoded or received becomes a piece of a row.
  __device__ void MakeRow(const DispatchParams&) {}
  // Instead of what did not come.
  __device__ void Poison() { piece_.Poison(); }
  __device__ void Store(const DispatchParams& params, int row, int part) const {
    piece_.Store(params.args.rows + size_t(row) * params.sizes.row_bytes, SpanOf(params, part));
  }
  // Where the weight of choice k is in a wire row.
  __device__ static int WeightOf(const DispatchParams& params, int k) {
    return Layout::WireWeight(params.sizes.row_bytes, k);
  }

 private:
  // Of a warp's piece. Longer ones cost less apiece, and shorter ones spread over more warps: with
  // 7 instead of 2 dispatch takes 6.3 instead of 6.2 us at T=8, 8.6 instead of 8.4 at T=64 (D=7168,
  // K=8).
  static constexpr int kVectors = 2;
  using Wire = WirePiece<kVectors>;

  __device__ static Span SpanOf(const DispatchParams& params, int part) {
    return Span(params.sizes.row_bytes, part * kVectors);
  }

  Wire piece_;
};

// In FP8, of tokens of dtype T. Functions as above.
template <typename T>
class QuantizedToken {
 public:
  static constexpr bool kEncodes = true;

  static int NumOf(const Sizes&, const WireArgs& wire) { return Layout::CodeBatches(wire.dim); }

  __device__ void Load(const DispatchParams& params, int token, int part) {
    const char* from = params.args.tokens + size_t(token) * params.sizes.row_bytes;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = NumberOf(part, s);
#pragma unroll
      for (int j = 0; j < Numbers::kVectors; ++j) {
        numbers_[s].v[j] = i < params.args.wire.dim ? LoadEarly(AsVectors(from + i * sizeof(T)) + j)
                                                    : make_uint4(0, 0, 0, 0);
      }
    }
  }
  __device__ void Encode(const DispatchParams& params) {
    const bool power_of_two = params.args.wire.format == kWirePowerOfTwo;
    bool odd = false;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      scales_[s] = quantize::Float(numbers_[s].Scale(power_of_two, &odd));
      codes_[s] = numbers_[s].Codes(__frcp_rn(scales_[s]));
    }
    if (!__any_sync(~0u, odd)) return;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const auto result = Numbers::ToOddCodes(numbers_[s], power_of_two);
      codes_[s] = result.codes;
      scales_[s] = result.scale;
    }
  }
  __device__ void Close() {
    uint64_t words = 0;
    const int block = threadIdx.x % 32 - 1;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const float scale = __shfl_sync(~0u, scales_[s], (block & 1) * kBlockLanes);
      if (block >= 0 && block / 2 == s) words = Wire::kPresent | __float_as_uint(scale);
    }
    wire_.v[0] = make_uint4(codes_[0].x, codes_[0].y, codes_[1].x, codes_[1].y);
    wire_.Close(words);
  }
  __device__ void Send(const DispatchParams& params, char* wire, int part) const {
    const int bytes = Layout::CodeBytes(params.args.wire.dim);
    wire_.Send(wire, bytes, Span(bytes, part));
  }
  __device__ void Poll(const DispatchParams& params, const char* wire, int part) {
    const int bytes = Layout::CodeBytes(params.args.wire.dim);
    wire_.Poll(wire, bytes, Span(bytes, part));
  }
  __device__ bool Receive(const LatencyCall& call, const DispatchParams& params, int peer,
                          char* wire, int part) {
    const int bytes = Layout::CodeBytes(params.args.wire.dim);
    if (!wire_.Receive(call, peer, wire, bytes, Span(bytes, part))) return false;
    codes_[0] = make_uint2(wire_.v[0].x, wire_.v[0].y);
    codes_[1] = make_uint2(wire_.v[0].z, wire_.v[0].w);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int lane = 1 + 2 * s + threadIdx.x % 32 / kBlockLanes;
      scales_[s] = __uint_as_float(__shfl_sync(~0u, uint32_t(wire_.mark), lane));
    }
    return true;
  }
  __device__ void MakeRow(const DispatchParams& params) {
    const bool odd = __any_sync(~0u, scales_[0] < 0.0f || scales_[1] < 0.0f);
    if (params.args.wire.row_scales != nullptr) {
      if (odd) HandOverOdd();
      return;
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      numbers_[s] =
          odd ? Numbers::OfOdd(codes_[s], scales_[s]) : Numbers::Of(codes_[s], scales_[s]);
    }
  }
  __device__ void Poison() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      codes_[s] = make_uint2(~0u, ~0u);
      scales_[s] = __int_as_float(-1);
      for (uint4& v : numbers_[s].v) v = make_uint4(~0u, ~0u, ~0u, ~0u);
    }
  }
  __device__ void Store(const DispatchParams& params, int row, int part) const {
    const WireArgs& wire = params.args.wire;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = NumberOf(part, s);
      if (i >= wire.dim) continue;
      if (wire.row_scales == nullptr) {
        char* to = params.args.rows + size_t(row) * params.sizes.row_bytes + i * sizeof(T);
#pragma unroll
        for (int j = 0; j < Numbers::kVectors; ++j) AsVectors(to)[j] = numbers_[s].v[j];
      } else {
        *reinterpret_cast<uint2*>(params.args.rows + size_t(row) * wire.dim + i) = codes_[s];
        if (threadIdx.x % kBlockLanes != 0) continue;
        const size_t first = size_t(row) * quantize::NumBlocks(wire.dim);
        wire.row_scales[first + i / quantize::kBlock] = scales_[s];
      }
    }
  }
  __device__ static int WeightOf(const DispatchParams& params, int k) {
    return Layout::CodeWeight(params.args.wire.dim, k);
  }

 private:
  static constexpr int kSteps = 2;
  static_assert(kSteps * kStepNumbers == kBatchNumbers, "a batch is a warp's piece");
  static_assert(kBatchScales * quantize::kBlock == kBatchNumbers, "a scale for each block");
  static_assert(kSteps * kLaneNumbers == 16, "a vector of codes");
  using Numbers = LaneNumbers<T>;
  using Wire = WirePiece<1, kBatchScales>;

  // This lane's first number of a step.
  __device__ static int NumberOf(int part, int step) {
    return part * kBatchNumbers + step * kStepNumbers + threadIdx.x % 32 * kLaneNumbers;
  }
  // To codes and scales of a row in FP8.
  __device__ void HandOverOdd() {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (scales_[s] < 0.0f) {
        // kMinus becomes kNan: in those bytes all bits change.
        codes_[s].x ^= __vcmpeq4(codes_[s].x, quantize::kMinus * 0x01010101u);
        codes_[s].y ^= __vcmpeq4(codes_[s].y, quantize::kMinus * 0x01010101u);
      }
      scales_[s] = fabsf(scales_[s]);
    }
  }

  Numbers numbers_[kSteps];
  uint2 codes_[kSteps];
  float scales_[kSteps];  // of the lane's blocks; minus in a block with a NaN or an infinity
  Wire wire_;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_LATENCY_WIRE_CUH_

// How tokens cross the wire and become rows: as they are, or in FP8. What senders and expanders do
// with a token's parts; a part is what fits a buffer of a warp's ring, as it lies in memory.

#ifndef JAXMOE_XLA_FFI_CUDA_WIRE_CUH_
#define JAXMOE_XLA_FFI_CUDA_WIRE_CUH_

#include "xla_ffi/cuda/bulk.cuh"
#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/quantize.cuh"

namespace jaxmoe::cuda {

constexpr int kCopyWarps = 16;
constexpr int kCopyThreads = kCopyWarps * 32;
// Each warp moves tokens in parts of this size through buffers of its own.
constexpr int kCopyBytes = 3584;
constexpr int kCopyBuffers = 3;
using CopyRing = BulkRing<kCopyBuffers, kCopyBytes>;

// Bytes of a part, from the start of its token.
struct Span {
  int at, bytes;
};

// Sends one token, part by part, to each of the places that `place(i)` gives for i in `mask`.
// `convert(part, i)`, by all lanes, makes of a loaded part what is stored.
template <bool kConverts, typename Wire, typename Convert, typename Place>
__device__ void SendParts(const Wire& wire, CopyRing& ring, const char* from, unsigned mask,
                          Convert convert, Place place) {
  const bool leader = threadIdx.x % 32 == 0;
  const int parts = wire.NumParts();
  auto load = [&](int i) {
    const Span part = wire.Own(i);
    if (leader) ring.Load(from + part.at, part.bytes);
  };
  load(0);
  for (int i = 0; i < parts; ++i) {
    if (i + 1 < parts) load(i + 1);
    char* part = kConverts || leader ? ring.Loaded() : nullptr;
    convert(part, i);
    const Span stored = wire.Arrived(i);
    for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
      char* to = place(__ffs(rest) - 1);
      if (leader) StartStore(to + stored.at, part, stored.bytes);
    }
    if (kConverts || leader) ring.Next();
  }
}

// Tokens cross as they are, and rows are copies of them.
class PlainWire {
 public:
  static constexpr bool kConverts = false;

  __device__ PlainWire(const Sizes& sizes, const DispatchArgs&) : row_bytes_(sizes.row_bytes) {}

  __device__ int NumParts() const { return (row_bytes_ + kCopyBytes - 1) / kCopyBytes; }
  // Where part i lies in a token of this device, in one that has arrived, and in a row.
  __device__ Span Own(int i) const {
    const int at = i * kCopyBytes;
    return {at, min(kCopyBytes, row_bytes_ - at)};
  }
  __device__ Span Arrived(int i) const { return Own(i); }
  __device__ Span Row(int i) const { return Own(i); }
  __device__ int TokenBytes() const { return row_bytes_; }
  __device__ int RowBytes() const { return row_bytes_; }

  template <typename Place>
  __device__ void Send(CopyRing& ring, const char* from, unsigned mask, Place place) const {
    SendParts<false>(*this, ring, from, mask, [](char*, int) {}, place);
  }

 private:
  const int row_bytes_;
};

// Numbers of a part with an FP8 wire: whole steps of the conversion, whose last one may be in vain.
constexpr int kLongPart = 1792, kShortPart = 1024, kFloatPart = 896;

inline bool LongPartsFit(int dim) {
  const auto steps = [dim](int n) { return (dim + n - 1) / n * (n / kStepNumbers); };
  return steps(kLongPart) <= steps(kShortPart);
}

// Tokens of dtype T cross in FP8. Rows are made of what crossed, those of the own tokens as well.
template <typename T, int kNumbers>
class QuantizedWire {
 public:
  static constexpr bool kConverts = true;

  __device__ QuantizedWire(const Sizes&, const DispatchArgs& args)
      : wire_(args.wire), power_of_two_(args.wire.format == kWirePowerOfTwo) {}

  __device__ int NumParts() const { return (wire_.dim + kNumbers - 1) / kNumbers; }
  __device__ Span Own(int i) const {
    constexpr int kSize = sizeof(T);
    return {i * kNumbers * kSize, NumbersOf(i) * kSize};
  }
  __device__ Span Arrived(int i) const {
    return {i * WirePartBytes(kNumbers), WirePartBytes(NumbersOf(i))};
  }
  __device__ Span Row(int i) const {
    return wire_.row_scales == nullptr ? Own(i) : Span{i * kNumbers, NumbersOf(i)};
  }
  __device__ int TokenBytes() const {
    const Span last = Arrived(NumParts() - 1);
    return last.at + last.bytes;
  }
  __device__ int RowBytes() const {
    return wire_.row_scales == nullptr ? wire_.dim * static_cast<int>(sizeof(T)) : wire_.dim;
  }

  template <typename Place>
  __device__ void Send(CopyRing& ring, const char* from, unsigned mask, Place place) const {
    SendParts<true>(
        *this, ring, from, mask,
        [this](char* part, int i) {
          Quantizer::Quantize(part, NumbersOf(i), power_of_two_);
          FenceBulkShared();
          __syncwarp();
        },
        place);
  }

  // Makes part i of a row of a loaded part, by all lanes. Returns the scale that StoreScale wants.
  __device__ float MakeRow(char* part, int i, bool own) const {
    const int n = NumbersOf(i);
    float scale = 0.0f;
    if (own) Quantizer::Quantize(part, n, power_of_two_);
    if (wire_.row_scales == nullptr) {
      Quantizer::Dequantize(part, n);
    } else {
      scale = Quantizer::HandOver(part, n);
    }
    FenceBulkShared();
    __syncwarp();
    return scale;
  }
  __device__ void StoreScale(int row, int i, float scale) const {
    const int lane = threadIdx.x % 32;
    if (wire_.row_scales == nullptr || lane >= quantize::NumBlocks(NumbersOf(i))) return;
    const size_t first = row * size_t(quantize::NumBlocks(wire_.dim));
    wire_.row_scales[first + i * (kNumbers / quantize::kBlock) + lane] = scale;
  }

 private:
  static_assert(kNumbers * sizeof(T) <= kCopyBytes && WirePartBytes(kNumbers) <= kCopyBytes,
                "a part has one buffer, before and after");
  using Quantizer = PartQuantizer<T, kNumbers>;

  __device__ int NumbersOf(int i) const { return min(kNumbers, wire_.dim - i * kNumbers); }

  const WireArgs& wire_;
  const bool power_of_two_;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_WIRE_CUH_

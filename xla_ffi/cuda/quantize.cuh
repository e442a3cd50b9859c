// Numbers to FP8 and back, by a warp. The arithmetic is that of xla_ffi/common/quantize.h, bit for
// bit: Hopper's conversions round like it, and blocks that need more care than they take (a NaN, an
// infinity, numbers at the end of the range) go through it.
//
// Each step of a warp takes 256 numbers, two blocks, 8 numbers in each lane: in registers, or as
// parts of tokens, in place in shared memory. A part of n numbers on the wire: n codes, then the
// scales of its blocks, filled up to 16 bytes.

#ifndef JAXMOE_XLA_FFI_CUDA_QUANTIZE_CUH_
#define JAXMOE_XLA_FFI_CUDA_QUANTIZE_CUH_

#include <cuda_fp8.h>

#include "xla_ffi/common/quantize.h"
#include "xla_ffi/cuda/rows.cuh"

namespace jaxmoe::cuda {

constexpr int kLaneNumbers = 8;
constexpr int kStepNumbers = 32 * kLaneNumbers;
constexpr int kBlockLanes = quantize::kBlock / kLaneNumbers;

// Bytes of a part on the wire.
__host__ __device__ constexpr int WirePartBytes(int n) {
  return n + (int(quantize::NumBlocks(n)) * 4 + 15) / 16 * 16;
}

// The bits of a dtype's numbers.
template <typename T>
struct Bits16 {
  // The largest magnitude of a lane's numbers, NaN and infinities among them.
  __device__ static uint32_t MaxMagnitude(const uint4 (&v)[1]) {
    constexpr uint32_t kBoth = 0x7fff7fff;
    const uint32_t both = __vmaxu2(__vmaxu2(v[0].x & kBoth, v[0].y & kBoth),
                                   __vmaxu2(v[0].z & kBoth, v[0].w & kBoth));
    return max(both & 0xffff, both >> 16);
  }
};
template <typename T>
struct NumberBits;
template <>
struct NumberBits<__nv_bfloat16> : Bits16<__nv_bfloat16> {
  static constexpr uint32_t kInfinity = 0x7f80, kNan = 0x7fc0;
  static constexpr int kMaxExponent = 128;
  __device__ static uint32_t ToFloat(uint32_t magnitude) { return magnitude << 16; }
  __device__ static __nv_bfloat16 From(uint32_t bits) { return __ushort_as_bfloat16(bits); }
};
template <>
struct NumberBits<__half> : Bits16<__half> {
  static constexpr uint32_t kInfinity = 0x7c00, kNan = 0x7e00;
  static constexpr int kMaxExponent = 16;
  __device__ static uint32_t ToFloat(uint32_t magnitude) {
    return __float_as_uint(__half2float(__ushort_as_half(magnitude)));
  }
  __device__ static __half From(uint32_t bits) { return __ushort_as_half(bits); }
};
template <>
struct NumberBits<float> {
  static constexpr uint32_t kInfinity = quantize::kInfinity, kNan = 0x7fc00000;
  static constexpr int kMaxExponent = 128;
  __device__ static uint32_t MaxMagnitude(const uint4 (&v)[2]) {
    uint32_t most = 0;
#pragma unroll
    for (const uint4& w : v) {
      most = max(most, max(max(w.x & quantize::kMagnitude, w.y & quantize::kMagnitude),
                           max(w.z & quantize::kMagnitude, w.w & quantize::kMagnitude)));
    }
    return most;
  }
  __device__ static uint32_t ToFloat(uint32_t magnitude) { return magnitude; }
  __device__ static float From(uint32_t bits) { return __uint_as_float(bits); }
};

// Of the lanes that share a block.
__device__ __forceinline__ uint32_t BlockMax(uint32_t value) {
#pragma unroll
  for (int offset = kBlockLanes / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(~0u, value, offset));
  }
  return value;
}

// A lane's numbers of a step. Those past the end of a token are zeros. "Odd" is what needs more
// care; those functions are not inline and take and give values, which leaves the callers short and
// their numbers in registers.
template <typename T>
struct LaneNumbers {
  using Number = NumberBits<T>;
  static constexpr int kVectors = kLaneNumbers * sizeof(T) / 16;

  uint4 v[kVectors];

  // The bits of the scale of the lane's block, and whether it or a number is odd.
  __device__ __forceinline__ uint32_t Scale(bool power_of_two, bool* odd) const {
    const uint32_t most = BlockMax(Number::MaxMagnitude(v));
    const uint32_t scale = quantize::ScaleOf(Number::ToFloat(most), power_of_two);
    *odd |= most >= Number::kInfinity ||
            quantize::LargestCode(scale, Number::kMaxExponent) != quantize::kLargest;
    return scale;
  }
  __device__ __forceinline__ uint2 Codes(float inverse) const {
    const T* in = reinterpret_cast<const T*>(v);
    uint32_t pairs[kLaneNumbers / 2];
#pragma unroll
    for (int j = 0; j < kLaneNumbers / 2; ++j) {
      const float2 y = {__fmul_rn(Vector<T>::ToFloat(in[2 * j]), inverse),
                        __fmul_rn(Vector<T>::ToFloat(in[2 * j + 1]), inverse)};
      pairs[j] = __nv_cvt_float2_to_fp8x2(y, __NV_SATFINITE, __NV_E4M3);
    }
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
  }
  __device__ __forceinline__ static LaneNumbers Of(uint2 codes, float scale) {
    float numbers[kLaneNumbers];
#pragma unroll
    for (int j = 0; j < kLaneNumbers / 2; ++j) {
      const uint32_t word = j < 2 ? codes.x : codes.y;
      const __half2 pair = __nv_cvt_fp8x2_to_halfraw2(
          static_cast<__nv_fp8x2_storage_t>(j % 2 == 0 ? word : word >> 16), __NV_E4M3);
      const float2 values = __half22float2(pair);
      numbers[2 * j] = __fmul_rn(values.x, scale);
      numbers[2 * j + 1] = __fmul_rn(values.y, scale);
    }
    LaneNumbers n;
#pragma unroll
    for (int j = 0; j < kVectors; ++j) n.v[j] = Vector<T>::Round(numbers + j * Vector<T>::kSize);
    return n;
  }

  // Codes, and the scale with a minus sign in a block with a NaN or an infinity.
  struct OddCodes {
    uint2 codes;
    float scale;
  };
  __device__ __noinline__ static OddCodes ToOddCodes(LaneNumbers n, bool power_of_two) {
    const T* in = reinterpret_cast<const T*>(n.v);
    uint32_t amax = 0;
    bool special = false;
    for (int j = 0; j < kLaneNumbers; ++j) {
      const uint32_t bits = __float_as_uint(Vector<T>::ToFloat(in[j])) & quantize::kMagnitude;
      if (bits >= quantize::kInfinity) {
        special = true;
      } else {
        amax = max(amax, bits);
      }
    }
    special = BlockMax(special) != 0;
    const uint32_t scale = quantize::ScaleOf(BlockMax(amax), power_of_two);
    const uint32_t largest = quantize::LargestCode(scale, Number::kMaxExponent);
    const float inverse = __frcp_rn(quantize::Float(scale));
    uint32_t words[2] = {0, 0};
    for (int j = 0; j < kLaneNumbers; ++j) {
      const uint32_t bits = __float_as_uint(Vector<T>::ToFloat(in[j]));
      const uint32_t code = special ? quantize::SpecialCodeOf(bits, inverse, largest)
                                    : quantize::CodeOf(bits, inverse, largest);
      words[j / 4] |= (code & 0xff) << (j % 4 * 8);
    }
    return {make_uint2(words[0], words[1]), quantize::Float(scale | uint32_t(special) << 31)};
  }
  __device__ __noinline__ static LaneNumbers OfOdd(uint2 codes, float scale) {
    LaneNumbers n;
    T* out = reinterpret_cast<T*>(n.v);
    for (int j = 0; j < kLaneNumbers; ++j) {
      const uint32_t code = (j < 4 ? codes.x : codes.y) >> (j % 4 * 8) & 0xff;
      if (scale >= 0.0f) {
        Vector<T>::FromFloat(__fmul_rn(quantize::ValueOf(code), scale), out + j);
      } else if (code == quantize::kMinus) {
        out[j] = Number::From(Number::kNan);  // conversions make another NaN
      } else {
        Vector<T>::FromFloat(quantize::SpecialNumberOf(code, -scale), out + j);
      }
    }
    return n;
  }
};

// A warp's work on parts of tokens of dtype T, of at most kNumbers numbers, a multiple of 16.
template <typename T, int kNumbers>
class PartQuantizer {
 public:
  // T[n] becomes a part on the wire.
  __device__ __forceinline__ static void Quantize(char* part, int n, bool power_of_two) {
    const int lane = threadIdx.x % 32;
    Numbers numbers[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) numbers[s] = LoadNumbers(part, n, s);
    uint2 codes[kSteps];
    float own_scale = 0.0f;  // lane i: the scale of block i
    bool odd = false;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const float scale = quantize::Float(numbers[s].Scale(power_of_two, &odd));
      codes[s] = numbers[s].Codes(__frcp_rn(scale));
      KeepScale(s, scale, &own_scale);
    }
    if (__any_sync(~0u, odd)) return QuantizeOdd(part, n, power_of_two);
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int i = s * kStepNumbers + lane * kLaneNumbers;
      if (i < n) *reinterpret_cast<uint2*>(part + i) = codes[s];
    }
    StoreScale(part, n, own_scale);
  }

  // The reverse: a part on the wire becomes T[n].
  __device__ __forceinline__ static void Dequantize(char* part, int n) {
    const float own_scale = OwnScale(part, n);
    uint2 codes[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) codes[s] = LoadCodes(part, n, s);
    if (__any_sync(~0u, own_scale < 0.0f)) return DequantizeOdd(part, n, own_scale);
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      StoreNumbers(part, n, s, Numbers::Of(codes[s], BlockScale(s, own_scale)));
    }
    __syncwarp();
  }

  // A part on the wire becomes one of a row in FP8; returns the scale of block i in lane i.
  __device__ static float HandOver(char* part, int n) {
    const int lane = threadIdx.x % 32;
    const float own_scale = OwnScale(part, n);
    if (__any_sync(~0u, own_scale < 0.0f)) {
      for (int i = lane; i < n; i += 32) {
        if (Scales(part, n)[i / quantize::kBlock] >= 0.0f) continue;
        part[i] = char(quantize::HandedOver(uint8_t(part[i])));
      }
    }
    __syncwarp();
    return fabsf(own_scale);
  }

 private:
  using Numbers = LaneNumbers<T>;
  static constexpr int kSteps = (kNumbers + kStepNumbers - 1) / kStepNumbers;
  static_assert(kNumbers % quantize::kBlock == 0 && kNumbers / quantize::kBlock <= 32,
                "whole blocks, a scale for each lane");

  __device__ static int NumberOf(int step) {
    return step * kStepNumbers + threadIdx.x % 32 * kLaneNumbers;
  }
  __device__ static Numbers LoadNumbers(const char* part, int n, int step) {
    const int i = NumberOf(step);
    Numbers numbers;
#pragma unroll
    for (int j = 0; j < Numbers::kVectors; ++j) {
      numbers.v[j] = i < n ? AsVectors(part + i * sizeof(T))[j] : make_uint4(0, 0, 0, 0);
    }
    return numbers;
  }
  __device__ static void StoreNumbers(char* part, int n, int step, const Numbers& numbers) {
    const int i = NumberOf(step);
    if (i >= n) return;
#pragma unroll
    for (int j = 0; j < Numbers::kVectors; ++j) AsVectors(part + i * sizeof(T))[j] = numbers.v[j];
  }
  __device__ static uint2 LoadCodes(const char* part, int n, int step) {
    const int i = NumberOf(step);
    return i < n ? *reinterpret_cast<const uint2*>(part + i) : make_uint2(0, 0);
  }

  // Block numbers 2s and 2s + 1 are those of a step's two halves.
  __device__ static void KeepScale(int step, float scale, float* own_scale) {
    const int lane = threadIdx.x % 32;
    const float other = __shfl_sync(~0u, scale, lane % 2 * kBlockLanes);
    if (lane / 2 == step) *own_scale = other;
  }
  __device__ static float BlockScale(int step, float own_scale) {
    return __shfl_sync(~0u, own_scale, 2 * step + threadIdx.x % 32 / kBlockLanes);
  }
  __device__ static float* Scales(char* part, int n) { return reinterpret_cast<float*>(part + n); }
  __device__ static void StoreScale(char* part, int n, float own_scale) {
    const int lane = threadIdx.x % 32;
    if (lane < quantize::NumBlocks(n)) Scales(part, n)[lane] = own_scale;
    __syncwarp();
  }
  __device__ static float OwnScale(char* part, int n) {
    const int lane = threadIdx.x % 32;
    return lane < quantize::NumBlocks(n) ? Scales(part, n)[lane] : 0.0f;
  }

  // Step by step. Codes are written behind where numbers are still read.
  __device__ __noinline__ static void QuantizeOdd(char* part, int n, bool power_of_two) {
    float own_scale = 0.0f;
#pragma unroll 1
    for (int s = 0; s < kSteps; ++s) {
      const auto odd = Numbers::ToOddCodes(LoadNumbers(part, n, s), power_of_two);
      KeepScale(s, odd.scale, &own_scale);
      __syncwarp();
      if (NumberOf(s) < n) *reinterpret_cast<uint2*>(part + NumberOf(s)) = odd.codes;
      __syncwarp();
    }
    StoreScale(part, n, own_scale);
  }

  // From the end, so that numbers are written behind where codes are still read.
  __device__ __noinline__ static void DequantizeOdd(char* part, int n, float own_scale) {
    __syncwarp();
#pragma unroll 1
    for (int s = kSteps - 1; s >= 0; --s) {
      const uint2 codes = LoadCodes(part, n, s);
      const Numbers numbers = Numbers::OfOdd(codes, BlockScale(s, own_scale));
      __syncwarp();
      StoreNumbers(part, n, s, numbers);
      __syncwarp();
    }
  }
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_QUANTIZE_CUH_

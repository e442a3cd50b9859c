// How tiles lie in shared memory and results in registers, as TMA and the tensor cores want them.
// https://docs.nvidia.com/cuda/parallel-thread-execution, sections on wgmma and tensor maps.

#ifndef JAXMOE_XLA_FFI_GEMM_LAYOUT_CUH_
#define JAXMOE_XLA_FFI_GEMM_LAYOUT_CUH_

#include <cuda_runtime.h>

#include <cstdint>

namespace jaxmoe::gemm {

// Widest product, and the registers that hold its part of a thread. Register 8 j + i of a thread
// lies in columns 16 j to 16 j + 15: row (lane / 4) + 8 ((i / 2) % 2) of the warp's 16 rows, column
// 8 (i / 4) + 2 (lane % 4) + i % 2.
constexpr int kMaxColumns = 256;
constexpr int kAccumulators = kMaxColumns / 2;

// A tile is made of blocks with 64 bf16 = 128 bytes in a row, swizzled by TMA: the 16-byte piece c
// of row r lies at piece c ^ (r % 8). Eight rows are one pattern of the swizzle.
constexpr int kBlockColumns = 64;
constexpr int kRowBytes = 128;
constexpr int kPatternBytes = 8 * kRowBytes;

// Says where a tile lies: the lower half of the instruction's descriptor, to which DescriptorStep
// of a distance may be added. Rows that run along the contraction (transposed) hold no more than
// 64 features each; wider tiles have blocks kBlockBytes apart.
constexpr int kDepth = 64;
constexpr int kBlockBytes = kDepth * kRowBytes;
__host__ __device__ constexpr uint32_t DescriptorStep(uint32_t bytes) { return bytes >> 4; }
// Within the block: in a cluster the upper bits of an address say which block it is of.
constexpr uint32_t kInBlockMask = (1 << 18) - 1;
__device__ __forceinline__ uint32_t Descriptor(uint32_t address) {
  return DescriptorStep(kBlockBytes) << 16 | DescriptorStep(address & kInBlockMask);
}
__device__ __forceinline__ uint64_t WholeDescriptor(uint32_t low) {
  constexpr uint32_t kSwizzle128 = 1;
  constexpr uint32_t kHigh = kSwizzle128 << 30 | DescriptorStep(kPatternBytes);
  return static_cast<uint64_t>(kHigh) << 32 | low;
}

// One instruction contracts over 16. If rows run along the contraction (transposed), that is two
// patterns; else it is 32 bytes of each row.
constexpr int kInstructionDepth = 16;
template <bool kTransposed>
constexpr uint32_t kDepthStep = DescriptorStep(kTransposed ? 2 * kPatternBytes : 32);

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_LAYOUT_CUH_

// The functions of xla_ffi/gemm/ptx.cuh and wgmma.cuh for the emulated GPU, in their order. Whoever
// includes this before the kernels gets these instead.

#ifndef JAXMOE_XLA_FFI_TESTS_EMULATED_INSTRUCTIONS_H_
#define JAXMOE_XLA_FFI_TESTS_EMULATED_INSTRUCTIONS_H_

#define JAXMOE_XLA_FFI_GEMM_PTX_CUH_
#define JAXMOE_XLA_FFI_GEMM_WGMMA_CUH_
#define JAXMOE_XLA_FFI_GEMM_WGMMA_FP8_CUH_

#include "xla_ffi/gemm/layout.cuh"
#include "xla_ffi/tests/emulated/cuda.h"

namespace jaxmoe::gemm {

using emulated::Barrier;
using emulated::Block;
using emulated::Gpu;

// As on the GPU, a block's own addresses have its rank in a cluster above these bits. Those that
// InBlock has mapped have a mark, too.
constexpr int kRankShift = 24;
constexpr uint32_t kMapped = 1u << 31;

inline Gpu& ThisGpu() { return Gpu::Current(); }
inline Block* ThisBlock() { return ThisGpu().Self().block; }

inline uint32_t Unmapped(uint32_t address) { return address & ((1u << kRankShift) - 1); }

inline char* Bytes(Block* block, uint32_t address, uint32_t bytes) {
  address = Unmapped(address);
  if (address % bytes != 0) ThisGpu().Stop("shared memory: unaligned");
  if (address < emulated::kSharedBegin || address + bytes > block->shared.size()) {
    ThisGpu().Stop("shared memory: out of bounds");
  }
  return &block->shared[address];
}
inline Barrier* BarrierAt(Block* block, uint32_t address) {
  const auto found = block->barriers.find(Unmapped(address));
  if (found == block->barriers.end()) ThisGpu().Stop("barrier that is none");
  return &found->second;
}
inline Block* BlockOf(uint32_t mapped) {
  if ((mapped & kMapped) == 0) ThisGpu().Stop("address that InBlock has not mapped");
  return ThisGpu().BlockOf(ThisBlock()->cluster, (mapped & ~kMapped) >> kRankShift);
}

// How TMA swizzles 128-byte rows: bits 4 to 6 of an address with bits 7 to 9.
inline uint32_t Swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// An element for the copy engine or the tensor cores.
inline char* AsyncBytes(Block* block, uint32_t address, uint32_t bytes) {
  const uint32_t at = Swizzled(Unmapped(address));
  if (block->unfenced[at / 16] != 0) ThisGpu().Stop("shared memory: written without FenceAsync");
  return Bytes(block, at, bytes);
}
inline uint16_t* AsyncElement(Block* block, uint32_t address) {
  return reinterpret_cast<uint16_t*>(AsyncBytes(block, address, 2));
}

inline uint32_t RankInCluster() { return ThisBlock()->rank; }
inline uint32_t SharedAddress(const void*) {
  return emulated::kSharedBegin | RankInCluster() << kRankShift;
}
inline char* SharedMemory() { return nullptr; }
inline uint32_t InBlock(uint32_t address, uint32_t rank) {
  return Unmapped(address) | rank << kRankShift | kMapped;
}

inline void SyncCluster() {
  constexpr int kBlockThreads = 384;
  ThisGpu().MeetCluster(kBlockThreads * ThisGpu().cluster_size());
}
inline void SyncThreads(int id, int threads) {
  if (id >= emulated::kNamedBarriers) ThisGpu().Stop("named barrier that is none");
  ThisGpu().Meet(&ThisBlock()->named[id], threads);
}

inline void InitBarrier(uint32_t barrier, uint32_t arrivals) {
  Bytes(ThisBlock(), barrier, 8);
  const int count = static_cast<int>(arrivals);
  ThisBlock()->barriers[Unmapped(barrier)] = {count, count, 0, 0};
}
inline void FenceInit() {}
inline void ArriveAt(Block* block, uint32_t barrier, uint32_t bytes) {
  Barrier* b = BarrierAt(block, barrier);
  b->bytes += bytes;
  if (--b->pending < 0) ThisGpu().Stop("more arrivals than a barrier expects");
  b->EndIfComplete();
}
inline void ArriveExpecting(uint32_t barrier, uint32_t bytes) {
  ArriveAt(ThisBlock(), barrier, bytes);
}
inline void Arrive(uint32_t barrier) { ArriveAt(BlockOf(barrier), barrier, 0); }
inline void ArriveHere(uint32_t barrier) { ArriveAt(ThisBlock(), barrier, 0); }
inline void Wait(uint32_t barrier, uint32_t parity) {
  const Barrier* b = BarrierAt(ThisBlock(), barrier);
  ThisGpu().WaitUntil([=] { return b->phase % 2 != static_cast<int>(parity); });
  ThisGpu().Yield();
}

inline void FenceAsync() {
  const int self = static_cast<int>(ThisGpu().Self().thread) + 1;
  for (int& writer : ThisBlock()->unfenced) writer = writer == self ? 0 : writer;
}

// The element of a tensor that lies in a box, null outside of the tensor.
inline char* ElementOf(const CUtensorMap& map, int64_t x, int64_t y, int64_t z) {
  const auto inside = [](int64_t i, uint64_t size) { return i >= 0 && i < int64_t(size); };
  if (!inside(x, map.dims[0]) || !inside(y, map.dims[1]) || !inside(z, map.dims[2])) return nullptr;
  return map.data + map.bytes * x + y * int64_t(map.strides[0]) + z * int64_t(map.strides[1]);
}
inline void CheckBox(const CUtensorMap& map, cuuint32_t rank, int x, uint32_t address) {
  if (map.rank != rank) ThisGpu().Stop("copy with coordinates of another rank");
  // Not documented: an H200 calls such a load an illegal instruction.
  if (x * map.bytes % 16 != 0) ThisGpu().Stop("copy from an address that is not aligned");
  const uint32_t aligned = map.swizzled ? kPatternBytes : 128;
  if (address % aligned != 0) ThisGpu().Stop("copy that is not aligned");
}
inline void LoadTo(Block* block, uint32_t to, const CUtensorMap& map, int x, int y, int z,
                   uint32_t barrier) {
  Barrier* b = BarrierAt(block, barrier);
  ThisGpu().Later([=] {
    for (uint32_t row = 0; row < map.box[1]; ++row) {
      for (uint32_t column = 0; column < map.box[0]; ++column) {
        const char* from = ElementOf(map, int64_t{x} + column, int64_t{y} + row, z);
        const uint32_t at = to + (row * map.box[0] + column) * map.bytes;
        char* element =
            map.swizzled ? AsyncBytes(block, at, map.bytes) : Bytes(block, at, map.bytes);
        std::memset(element, 0, map.bytes);
        if (from != nullptr) std::memcpy(element, from, map.bytes);
      }
    }
    b->bytes -= int64_t{map.box[0]} * map.box[1] * map.bytes;
    b->EndIfComplete();
  });
}
inline void Load(uint32_t to, const CUtensorMap& map, int x, int y, uint32_t barrier) {
  CheckBox(map, 2, x, to);
  LoadTo(ThisBlock(), to, map, x, y, 0, barrier);
}
inline void Load(uint32_t to, const CUtensorMap& map, int x, int y, int z, uint32_t barrier) {
  CheckBox(map, 3, x, to);
  LoadTo(ThisBlock(), to, map, x, y, z, barrier);
}
inline void LoadInBlocks(uint32_t to, const CUtensorMap& map, int x, int y, uint32_t barrier,
                         uint16_t mask) {
  CheckBox(map, 2, x, to);
  for (int rank = 0; rank < ThisGpu().cluster_size(); ++rank) {
    if ((mask >> rank & 1) == 0) continue;
    LoadTo(ThisGpu().BlockOf(ThisBlock()->cluster, rank), to, map, x, y, 0, barrier);
  }
}

inline void Store(const CUtensorMap& map, int x, int y, int z, uint32_t from) {
  CheckBox(map, 3, x, from);
  Block* block = ThisBlock();
  auto store = std::make_shared<std::function<void()>>([=] {
    for (uint32_t row = 0; row < map.box[1]; ++row) {
      for (uint32_t column = 0; column < map.box[0]; ++column) {
        char* to = ElementOf(map, int64_t{x} + column, int64_t{y} + row, z);
        const uint16_t* element = AsyncElement(block, from + row * kRowBytes + 2 * column);
        if (to != nullptr) std::memcpy(to, element, 2);
      }
    }
  });
  ThisGpu().Self().stores.push_back(store);
  ThisGpu().Later([store] {
    if (*store) (*store)();
    *store = nullptr;
  });
}
inline void EndStores() {
  emulated::Fiber& self = ThisGpu().Self();
  self.store_groups.push_back(std::move(self.stores));
  self.stores.clear();
}
template <int kPending>
void WaitStoresRead() {
  auto& groups = ThisGpu().Self().store_groups;
  for (; groups.size() > kPending; groups.erase(groups.begin())) {
    for (auto& store : groups.front()) {
      if (*store) (*store)();
      *store = nullptr;
    }
  }
}
inline void WaitStores() { WaitStoresRead<0>(); }

template <int kRegisters>
void GiveRegisters() {}
template <int kRegisters>
void TakeRegisters() {}

inline uint4 ReadShared(uint32_t address) {
  uint4 value;
  std::memcpy(&value, Bytes(ThisBlock(), address, 16), 16);
  return value;
}
inline void WriteShared(uint32_t address, uint4 value) {
  std::memcpy(Bytes(ThisBlock(), address, 16), &value, 16);
  ThisBlock()->unfenced[Unmapped(address) / 16] = static_cast<int>(ThisGpu().Self().thread) + 1;
}
inline int32_t ReadSharedInt(uint32_t address) {
  int32_t value;
  std::memcpy(&value, Bytes(ThisBlock(), address, 4), 4);
  return value;
}
inline void StoreIn(uint32_t address, int32_t value, uint32_t barrier) {
  Block* block = BlockOf(address);
  if (BlockOf(barrier) != block) ThisGpu().Stop("store and its barrier in different blocks");
  Barrier* b = BarrierAt(block, barrier);
  char* to = Bytes(block, address, 4);
  ThisGpu().Later([=] {
    std::memcpy(to, &value, 4);
    b->bytes -= 4;
    b->EndIfComplete();
  });
}
inline float2 ReadSharedPair(uint32_t address) {
  float2 value;
  std::memcpy(&value, Bytes(ThisBlock(), address, 8), 8);
  return value;
}

// Lane l holds columns 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each matrix.
template <bool kTransposed>
void StoreMatrices(uint32_t to, const uint32_t* m) {
  emulated::Warp* warp = ThisGpu().Self().warp;
  const int lane = threadIdx.x % emulated::kWarpLanes;
  std::copy(m, m + 4, warp->matrices[lane]);
  __syncwarp();
  uint16_t row[8];
  for (int i = 0; i < 8; ++i) {
    const int r = kTransposed ? i : lane % 8, c = kTransposed ? lane % 8 : i;
    row[i] = static_cast<uint16_t>(warp->matrices[r * 4 + c / 2][lane / 8] >> (c % 2 * 16));
  }
  uint4 piece;
  std::memcpy(&piece, row, sizeof(piece));
  WriteShared(to, piece);
  __syncwarp();
}

// wgmma.cuh

inline void BeginProducts() {}
inline void EndProducts() {
  emulated::Fiber& self = ThisGpu().Self();
  self.groups.push_back(std::move(self.products));
  self.products.clear();
  ThisGpu().Yield();
}
template <int kPending>
void WaitProducts() {
  auto& groups = ThisGpu().Self().groups;
  for (; groups.size() > kPending; groups.erase(groups.begin())) {
    for (const auto& product : groups.front()) product.run();
  }
  __syncwarp();  // a warp goes on together
}
template <int kCount, int kSize>
void TakeFirst(float (&d)[kSize]) {
  const emulated::Fiber& self = ThisGpu().Self();
  bool pending = !self.products.empty();
  for (const auto& group : self.groups) {
    for (const auto& product : group) pending |= product.results == d;
  }
  if (pending) ThisGpu().Stop("results not waited for");
}
template <int kSize>
void TakeResults(float (&d)[kSize]) {
  TakeFirst<kSize>(d);
}
// Issues a product: to be run when it is waited for, or at once.
template <typename Run>
void Issue(const float* results, Run run) {
  if (ThisGpu().lazy()) {
    ThisGpu().Self().products.push_back({results, run});
  } else {
    run();
    ThisGpu().Self().products.push_back({results, [] {}});
  }
}

// Element (i, k) of a factor with kInstructionDepth elements of the contraction.
inline float Factor(Block* block, uint64_t descriptor, bool transposed, int i, int k) {
  const auto field = [=](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3fff) * 16;
  };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  uint32_t address;
  if (transposed) {
    address = i / 64 * leading + i % 64 * 2 + k / 8 * stride + k % 8 * kRowBytes;
  } else {
    address = i / 8 * stride + i % 8 * kRowBytes + k * 2;
  }
  return __bfloat162float({*AsyncElement(block, start + address)});
}

template <int kN, bool kTransposedA, bool kTransposedB>
struct Product {
  static void Do(float (&d)[kAccumulators], uint32_t a, uint32_t b, int add) {
    Block* block = ThisBlock();
    const int thread = threadIdx.x % 128, lane = thread % emulated::kWarpLanes;
    float* results = d;
    const auto run = [=] {
      for (int i = 0; i < kN / 2; ++i) {
        const int row = thread / emulated::kWarpLanes * 16 + lane / 4 + i / 2 % 2 * 8;
        const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        float sum = add ? results[i] : 0;
        for (int k = 0; k < kInstructionDepth; ++k) {
          sum += Factor(block, WholeDescriptor(a), kTransposedA, row, k) *
                 Factor(block, WholeDescriptor(b), kTransposedB, column, k);
        }
        results[i] = sum;
      }
    };
    Issue(results, run);
  }
};

// wgmma_fp8.cuh

constexpr int kFp8Columns = 128;
constexpr int kFp8Accumulators = kFp8Columns / 2;

// e4m3: 1 sign, 4 exponent (bias 7) and 3 mantissa bits.
inline float FromFp8(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 0x7f) == 0x7f) return NAN;
  const float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                    : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return (code & 0x80) != 0 ? -value : value;
}
inline float Fp8Factor(Block* block, uint64_t descriptor, int i, int k) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) * 16;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) * 16;
  const uint32_t address = start + i / 8 * stride + i % 8 * kRowBytes + k;
  return FromFp8(static_cast<uint8_t>(*AsyncBytes(block, address, 1)));
}

inline void Fp8Product(float (&d)[kFp8Accumulators], uint32_t a, uint32_t b, int add) {
  Block* block = ThisBlock();
  const int thread = threadIdx.x % 128, lane = thread % emulated::kWarpLanes;
  float* results = d;
  const auto run = [=] {
    for (int i = 0; i < kFp8Accumulators; ++i) {
      const int row = thread / emulated::kWarpLanes * 16 + lane / 4 + i / 2 % 2 * 8;
      const int column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = add ? results[i] : 0;
      for (int k = 0; k < 32; ++k) {
        sum += Fp8Factor(block, WholeDescriptor(a), row, k) *
               Fp8Factor(block, WholeDescriptor(b), column, k);
      }
      results[i] = sum;
    }
  };
  Issue(results, run);
}

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_TESTS_EMULATED_INSTRUCTIONS_H_

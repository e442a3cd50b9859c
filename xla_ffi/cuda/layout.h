// The symmetric heap of a group: one region list that the allocator and the kernels share.
//
// Every device of a group has a heap of the same layout. "[s]" below is indexed by the device that
// writes, so that no two devices ever write the same word. Data regions exist twice; a call uses
// the half that its epoch's parity picks (see protocol.cuh for why that suffices). A device's own
// slot [rank] receives nothing but its tokens in FP8, where they cross the wire so; from there it
// puts what plain stores cannot bring to a peer. The low-latency kernels have data regions of their
// own, for what lies there says whether it has come (see latency.cuh), with further parts for calls
// that are split into start and done (see latency_entry.cuh).

#ifndef JAXMOE_XLA_FFI_CUDA_LAYOUT_H_
#define JAXMOE_XLA_FFI_CUDA_LAYOUT_H_

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define JAXMOE_HOST_DEVICE __host__ __device__
#else
#define JAXMOE_HOST_DEVICE
#endif

namespace jaxmoe::cuda {

// Tokens whose arrival one flag announces, from tokens to rows and from rows to tokens. Small
// chunks spread evenly over the blocks, and each costs a fence.
constexpr int kChunkTokens = 8;
constexpr int kSumChunkTokens = 4;
// A flag holds the epoch above this many bits; below, from rows to tokens, which tokens were sent.
constexpr int kEpochShift = 8;
static_assert(kSumChunkTokens <= kEpochShift && kSumChunkTokens <= kChunkTokens, "flags");
// Parts in which a device's choices are sent, each with a flag, so that several blocks can send.
constexpr int kMetaParts = 16;
// Most devices of an expert axis.
constexpr int kMaxDevices = 72;
// Most blocks of a kernel; sizes the scratch for their counts.
constexpr int kMaxBlocks = 160;
// Chunks of partial sums that a block can be sending at once; also sizes the staging area.
constexpr int kChunkSlots = 8;
// Most experts of a device: their counts must fit the shared memory of the plan.
constexpr int kMaxLocalExperts = 2048;

// A wire row of the low-latency kernels: vectors of 16 bytes, and for each 32 of them, which a warp
// moves at once, a mark of 8 bytes; behind them 8 bytes for each weight.
constexpr int kBatchVectors = 32;
// In FP8 a batch is so many numbers, and beside its mark there are 8 bytes for the scale of each of
// its blocks. Every lane has 8 numbers of each half.
constexpr int kBatchNumbers = 512;
constexpr int kBatchScales = 4;
// Local experts of a device's choices that one vector of 16 bytes carries to it.
constexpr int kIdsPerVector = 5;
// Most choices of all devices in a call of the low-latency kernels: each block has all of them in
// its shared memory.
constexpr int kMaxLatencyChoices = 16384;
// Most calls of a group between their start and their done.
constexpr int kMaxPending = 8;

struct GroupSizes {
  int num_devices;        // R
  int num_local_experts;  // L
  int max_tokens;         // most T of a call
  int top_k;              // K
  int row_bytes;          // of a token; a multiple of 16
  int puts;               // 1 if some peer is out of reach of plain stores: partial sums are staged
  int latency_tokens;     // calls of up to so many tokens take the low-latency kernels; 0: none
  int max_pending;        // so many of those may be between start and done; 0: none is split
};

struct Layout {
  // Offsets in bytes.
  size_t control;       // Control
  size_t headers;       // [parts][R] u64: what call device s is in
  size_t meta_flags;    // [R][kMetaParts] u64
  size_t chunk_flags;   // [2][R][chunks] u64
  size_t block_counts;  // [kMaxBlocks][L] int32, local scratch
  size_t ids;           // [2][R][max_tokens * K] int32
  size_t weights;       // [2][R][max_tokens * K] float32
  size_t rows;          // [2][R][max_tokens] rows
  size_t staging;       // [kMaxBlocks][kChunkSlots] chunks that are put; local
  size_t latency_ids;   // [parts][R][IdVectors(latency_tokens * K)] vectors of 16 bytes
  size_t latency_rows;  // [parts][R][latency_tokens] wire rows
  size_t bytes;         // of the whole heap

  int num_devices, chunks, choices, row_bytes, max_tokens, top_k;
  int latency_tokens, id_vectors, wire_row_bytes;  // of the low-latency kernels, for each device
  int max_pending;

  JAXMOE_HOST_DEVICE static size_t Align(size_t n) { return (n + 255) / 256 * 256; }

  JAXMOE_HOST_DEVICE explicit Layout(const GroupSizes& g)
      : num_devices(g.num_devices),
        chunks((g.max_tokens + kSumChunkTokens - 1) / kSumChunkTokens),
        choices(g.max_tokens * g.top_k),
        row_bytes(g.row_bytes),
        max_tokens(g.max_tokens),
        top_k(g.top_k),
        latency_tokens(g.latency_tokens),
        id_vectors(IdVectors(g.latency_tokens * g.top_k)),
        wire_row_bytes((WireRowBytes(g.row_bytes, g.top_k) + 127) / 128 * 128),
        max_pending(g.max_pending) {
    const size_t r = g.num_devices, parts = 2 + NumSplitParts(g.max_pending);
    size_t end = 0;
    auto region = [&end](size_t n) {
      const size_t at = end;
      end = Align(end + n);
      return at;
    };
    control = region(4096);
    headers = region(parts * r * 8);
    meta_flags = region(r * kMetaParts * 8);
    chunk_flags = region(2 * r * chunks * 8);
    block_counts = region(size_t{kMaxBlocks} * g.num_local_experts * 4);
    ids = region(2 * r * choices * 4);
    weights = region(2 * r * choices * 4);
    rows = region(2 * r * size_t(max_tokens) * row_bytes);
    staging = region(g.puts ? size_t{kMaxBlocks} * kChunkSlots * StagingBytes() : 0);
    latency_ids = region(parts * r * size_t(id_vectors) * 16);
    latency_rows = region(parts * r * size_t(latency_tokens) * wire_row_bytes);
    bytes = end;
  }

  // Parts of the headers and of the low-latency regions for split calls, behind the two halves.
  JAXMOE_HOST_DEVICE static int NumSplitParts(int max_pending) {
    return max_pending == 0 ? 0 : 2 + 2 * max_pending;
  }
  JAXMOE_HOST_DEVICE int SplitPart(uint64_t number) const {
    return 2 + int(number % NumSplitParts(max_pending));
  }

  // A chunk of partial sums, and behind them the values of its choices.
  JAXMOE_HOST_DEVICE size_t StagingBytes() const {
    return Align(size_t(kSumChunkTokens) * (row_bytes + top_k * 4));
  }
  JAXMOE_HOST_DEVICE size_t StagedRow(int block, int slot, int i) const {
    return staging + (size_t(block) * kChunkSlots + slot) * StagingBytes() + size_t(i) * row_bytes;
  }
  JAXMOE_HOST_DEVICE size_t StagedValues(int block, int slot, int i) const {
    return StagedRow(block, slot, kSumChunkTokens) + size_t(i) * top_k * 4;
  }

  // Byte offsets of what device s writes in the half `parity`; of headers and of the low-latency
  // regions, `parity` is any part.
  JAXMOE_HOST_DEVICE size_t Header(int parity, int s) const {
    return headers + (size_t(parity) * num_devices + s) * 8;
  }
  JAXMOE_HOST_DEVICE size_t ChunkFlag(int parity, int s, int chunk) const {
    return chunk_flags + ((size_t(parity) * num_devices + s) * chunks + chunk) * 8;
  }
  JAXMOE_HOST_DEVICE size_t MetaFlag(int s, int part) const {
    return meta_flags + (size_t(s) * kMetaParts + part) * 8;
  }
  JAXMOE_HOST_DEVICE size_t Ids(int parity, int s) const {
    return ids + (size_t(parity) * num_devices + s) * choices * 4;
  }
  JAXMOE_HOST_DEVICE size_t Weights(int parity, int s) const {
    return weights + (size_t(parity) * num_devices + s) * choices * 4;
  }
  JAXMOE_HOST_DEVICE size_t Row(int parity, int s, int token) const {
    return rows + ((size_t(parity) * num_devices + s) * max_tokens + token) * row_bytes;
  }

  // The low-latency kernels' wire rows, and offsets in one.
  JAXMOE_HOST_DEVICE static int IdVectors(int choices) {
    return (choices + kIdsPerVector - 1) / kIdsPerVector;
  }
  JAXMOE_HOST_DEVICE static int Batches(int row_bytes) {
    return (row_bytes / 16 + kBatchVectors - 1) / kBatchVectors;
  }
  JAXMOE_HOST_DEVICE static int Mark(int row_bytes, int batch) { return row_bytes + batch * 8; }
  JAXMOE_HOST_DEVICE static int WireWeight(int row_bytes, int k) {
    return Mark(row_bytes, Batches(row_bytes)) + k * 8;
  }
  // Of D numbers in FP8.
  JAXMOE_HOST_DEVICE static int CodeBatches(int dim) {
    return (dim + kBatchNumbers - 1) / kBatchNumbers;
  }
  JAXMOE_HOST_DEVICE static int CodeBytes(int dim) {
    const int lanes = dim % kBatchNumbers / 8;
    return 16 *
           (dim / kBatchNumbers * kBatchVectors + (lanes < kBatchVectors ? lanes : kBatchVectors));
  }
  JAXMOE_HOST_DEVICE static int CodeWeight(int dim, int k) {
    return Mark(CodeBytes(dim), CodeBatches(dim) * (1 + kBatchScales)) + k * 8;
  }
  // Room for either kind, whatever the dtype: numbers have two bytes or more.
  JAXMOE_HOST_DEVICE static int WireRowBytes(int row_bytes, int top_k) {
    const int plain = WireWeight(row_bytes, top_k), codes = CodeWeight(row_bytes / 2, top_k);
    return plain > codes ? plain : codes;
  }
  JAXMOE_HOST_DEVICE size_t WireRow(int parity, int s, int token) const {
    const uint32_t row = (parity * num_devices + s) * latency_tokens + token;
    return latency_rows + uint64_t{row} * uint32_t(wire_row_bytes);
  }
  JAXMOE_HOST_DEVICE size_t IdVector(int parity, int s, int i) const {
    const uint32_t vector = (parity * num_devices + s) * id_vectors + i;
    return latency_ids + uint64_t{vector} * 16;
  }
};

// What went wrong, written once. Host memory that the device can write.
struct ErrorRecord {
  int32_t set;  // 1 once the other words are there
  int32_t operation;
  int32_t rank;
  int32_t peer;
  int32_t phase;  // a Phase
  int32_t wrong;  // 1: what was seen is another call, not an early state of this one
  uint64_t epoch;
  uint64_t expected;
  uint64_t seen;
};

enum Operation : int32_t { kDispatch, kCombine, kDispatchGrad, kCombineGrad };
// A header holds the operation above this many bits of its lower half.
constexpr int kHeaderOperationShift = 30;
enum Phase : int32_t {
  kPhaseHeader = 0,
  kPhaseMeta = 1,
  kPhaseRows = 2,
  kPhaseGrid = 3,
  kPhaseStart = 4,  // no wait: a start while too many calls are pending
  kPhaseDone = 5,   // no wait: a done without its start
};

// First region of the heap; only its own device touches it.
struct Control {
  uint64_t epoch;            // calls finished
  uint32_t failed;           // a wait ran out: all further waits end at once
  uint32_t blocks_finished;  // of the call in progress; the last block resets it
  uint32_t barrier_arrived;  // of the grid barrier; the last one resets it
  uint32_t barrier_phase;    // number of grid barriers passed, ever
  uint32_t num_invalid;      // choices of the plan in progress; the plan resets it
  uint32_t tickets;          // drawn in the call in progress; the last block resets it
  uint64_t planned;          // the latest epoch whose plan is complete
  uint32_t entered;          // blocks of a low-latency call in progress; the last one resets it
  uint64_t started;          // split calls, ever
  uint64_t pending;          // bit i: that in part i of the split ones is not done
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_LAYOUT_H_

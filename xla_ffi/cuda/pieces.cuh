// Going through rows piece by piece: what combine and its gradient share.
//
// A warp works on units: a range of pieces of one token, where each piece is that of several rows.
// The pieces come through a ring of buffers in shared memory, and the loads run ahead of the
// arithmetic into the next unit: a multiprocessor always has loads in flight, and they take no
// registers.

#ifndef JAXMOE_XLA_FFI_CUDA_PIECES_CUH_
#define JAXMOE_XLA_FFI_CUDA_PIECES_CUH_

#include "xla_ffi/cuda/bulk.cuh"
#include "xla_ffi/cuda/launch.h"
#include "xla_ffi/cuda/protocol.cuh"

namespace jaxmoe::cuda {

constexpr int kMaxChoices = 32;  // K: a choice of a token for each lane

// A piece has kVectors 16-byte vectors in each lane. Longer pieces cost less apiece, but a row that
// is no multiple of them wastes some of its last one. Measured with 7 instead of 4 (T=4096, D=7168,
// K=8, E=256) on 24 multiprocessors: combine 533 instead of 658 us, its gradient 639 instead of
// 740.
template <int kVectors>
struct Piece {
  static constexpr int kBytes = 32 * 16 * kVectors;
  // More are no gain: in a loop that only loads, a multiprocessor (of 24) gets 92 GB/s with 32
  // pieces of 2 KB in flight, 38 GB/s with 64 and 30 GB/s with 96.
  static constexpr int kBuffers = 3;
  using Ring = LoadRing<kBuffers, kBytes>;

  __device__ static int NumOf(int row_bytes) { return (row_bytes + kBytes - 1) / kBytes; }
};
constexpr int kShortPiece = 4, kLongPiece = 7;

// Whether to use long pieces.
inline bool LongPiecesFit(int row_bytes) { return row_bytes % Piece<kLongPiece>::kBytes == 0; }

// Pieces of a unit: several units for each warp where there is enough work, and no piece less.
__device__ inline int PiecesPerUnit(int num_tokens, int pieces, int num_warps) {
  constexpr int kUnitsPerWarp = 4;
  const int64_t all = int64_t{num_tokens} * pieces;
  return static_cast<int>(min(max(all / (num_warps * kUnitsPerWarp), int64_t{1}), int64_t{pieces}));
}

// The rows that a unit reads, in this order; in shared memory. Once `complete`, all `count` are
// there; before, only the first ones, and who completes the list knows what is missing.
struct RowList {
  const char* rows[kMaxChoices + kMaxDevices];
  int source, token;
  int count;
  int rest;  // rows of the unit that are listed but do not count, or not yet
  int complete;
};

// One warp's loads.
template <int kVectors>
class PieceStream {
 public:
  using Ring = typename Piece<kVectors>::Ring;

  __device__ PieceStream(Ring& ring, int row_bytes) : ring_(ring), row_bytes_(row_bytes) {}

  // The list to load after the present one, over pieces [begin, end).
  __device__ void Queue(RowList* list, int begin, int end) {
    next_ = list;
    next_piece_ = begin;
    next_end_ = end;
  }
  // Loads until the ring is full or all of the lists are loaded. `complete(list)` finishes a list
  // once its first rows are loaded.
  template <typename Complete>
  __device__ void Fill(Complete complete) {
    while (!ring_.Full()) {
      if (piece_ >= end_) {
        if (next_ == nullptr) return;
        list_ = next_;
        piece_ = next_piece_;
        end_ = next_end_;
        index_ = 0;
        next_ = nullptr;
        count_ = list_->count;
        continue;
      }
      if (index_ == count_) {
        if (!list_->complete) {
          complete(list_);
          count_ = list_->count;
          if (index_ < count_) continue;
        }
        index_ = 0;
        piece_ = count_ == 0 ? end_ : piece_ + 1;
        continue;
      }
      const int at = piece_ * Piece<kVectors>::kBytes;
      ring_.Load(list_->rows[index_++] + at, min(Piece<kVectors>::kBytes, row_bytes_ - at));
    }
  }

 private:
  Ring& ring_;
  const int row_bytes_;
  RowList* list_ = nullptr;
  int count_ = 0, index_ = 0, piece_ = 0, end_ = 0;
  RowList* next_ = nullptr;
  int next_piece_ = 0, next_end_ = 0;
};

// Numbers from 0 that all warps of the grid draw from, one ahead of use; reset by the end of the
// call.
class Tickets {
 public:
  __device__ explicit Tickets(const Call& call) : word_(&call.control()->tickets) { Draw(); }

  __device__ int Next() {
    const int ticket = __shfl_sync(~0u, drawn_, 0);
    Draw();
    return ticket;
  }

 private:
  __device__ void Draw() {
    if (threadIdx.x % 32 == 0) drawn_ = static_cast<int>(atomicAdd(word_, 1u));
  }
  uint32_t* word_;
  int drawn_ = 0;
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_XLA_FFI_CUDA_PIECES_CUH_

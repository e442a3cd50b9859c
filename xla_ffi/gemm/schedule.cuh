// Which tiles a cluster computes, and how its warps learn of them.

#ifndef JAXMOE_XLA_FFI_GEMM_SCHEDULE_CUH_
#define JAXMOE_XLA_FFI_GEMM_SCHEDULE_CUH_

#include "xla_ffi/gemm/block.cuh"

namespace jaxmoe::gemm {

// The numbers of a cluster's tiles: every so-manieth, so that neighbours run at the same time. But
// for the first two, clusters claim them from a counter in device memory: one whose multiprocessors
// other kernels use, so that it is slow or comes late, takes fewer then, and the others go on. NCCL
// may hold a multiprocessor for as long as it waits for another device.
//
// The first block of a cluster claims, two tiles ahead, and sends the number to the others.
class Numbers {
 public:
  __device__ Numbers(int32_t* claims, const Shared& shared)
      : claims_(claims), shared_(shared), rank_(static_cast<int>(RankInCluster())) {}

  // Of the next tile. By a whole warp, as is Prepare.
  __device__ int Next() {
    const int call = num_calls_++, step = gridDim.x / kCluster;
    if (claims_ == nullptr || call < kGiven) return blockIdx.x / kCluster + call * step;
    return rank_ == 0 ? next_ : Receive();
  }

  // After every number that there is a tile for.
  __device__ void Prepare() {
    if (claims_ == nullptr || rank_ != 0) return;
    if (num_calls_ >= kGiven) {
      next_ = __shfl_sync(kAllLanes, claimed_, 0);
      Send(next_);
    }
    // Comes while the tile is loaded.
    if (LaneId() == 0) {
      claimed_ = atomicAdd(claims_, 1) + kGiven * static_cast<int>(gridDim.x / kCluster);
    }
  }

 private:
  static constexpr int kGiven = 2;

  __device__ void Send(int number) {
    if (kCluster == 1) return;
    if (LaneId() == 0) {
      Wait(shared_.NumberEmpty(ring_.at), ring_.parity ^ 1);
      for (int rank = 1; rank < kCluster; ++rank) {
        StoreIn(InBlock(shared_.Number(ring_.at), rank), number,
                InBlock(shared_.NumberFull(ring_.at), rank));
      }
    }
    ring_.Next();
  }

  __device__ int Receive() {
    int number = 0;
    if (LaneId() == 0) {
      ArriveExpecting(shared_.NumberFull(ring_.at), sizeof(int32_t));
      Wait(shared_.NumberFull(ring_.at), ring_.parity);
      number = ReadSharedInt(shared_.Number(ring_.at));
      Arrive(InBlock(shared_.NumberEmpty(ring_.at), 0));
    }
    ring_.Next();
    return __shfl_sync(kAllLanes, number, 0);
  }

  int32_t* const claims_;
  const Shared shared_;
  const int rank_;
  int num_calls_ = 0;
  int next_ = 0;     // first block: the next tile's
  int claimed_ = 0;  // and lane 0: that of the one after it
  Ring ring_{kNumberSlots};
};

// The sequence of a cluster's tiles. The feeding warp finds them and tells the multiplying ones,
// which need their registers for results.
template <Op kOp>
class Schedule {
 public:
  __device__ Schedule(const Params& p, const Shared& shared)
      : tiles_(p.groups, p.tallest, p.num_major, p.num_minor),
        shared_(shared),
        numbers_(p.claims, shared) {}

  // The next tile of this cluster; false after the last. By a whole warp.
  __device__ bool Next(Tile* tile) {
    __syncwarp();
    const bool found = tiles_.Find(numbers_.Next(), tile);
    if (found) numbers_.Prepare();
    Wait(shared_.SlotEmpty(ring_.at), ring_.parity ^ 1);
    if (LaneId() == 0) {
      const uint32_t slot = shared_.Slot(ring_.at);
      const int row = found ? tile->row : tiles_.RowsEnd();
      WriteShared(slot, uint4{found, Bits(row), Bits(tile->rows), Bits(tile->group)});
      WriteShared(slot + 16, uint4{Bits(tile->major), Bits(tile->minor), 0, 0});
      ArriveHere(shared_.SlotFull(ring_.at));
    }
    ring_.Next();
    return found;
  }

 private:
  static __device__ uint32_t Bits(int value) { return static_cast<uint32_t>(value); }

  Tiles<kOp != Op::kWeightGrad, kRowMultiple> tiles_;
  const Shared shared_;
  Numbers numbers_;
  Ring ring_{kSlots};
};

// The same sequence, as it is told to a multiplying warp.
class ToldTiles {
 public:
  explicit __device__ ToldTiles(const Shared& shared) : shared_(shared) {}

  // The next tile; false after the last, and then tile->row is where the rows of groups end.
  __device__ bool Next(Tile* tile) {
    Wait(shared_.SlotFull(ring_.at), ring_.parity);
    const uint4 first = ReadShared(shared_.Slot(ring_.at));
    const uint4 second = ReadShared(shared_.Slot(ring_.at) + 16);
    __syncwarp();
    if (LaneId() == 0) ArriveHere(shared_.SlotEmpty(ring_.at));
    ring_.Next();
    *tile = {static_cast<int>(first.w), static_cast<int>(first.y), static_cast<int>(first.z),
             static_cast<int>(second.x), static_cast<int>(second.y)};
    return first.x != 0;
  }

 private:
  const Shared shared_;
  Ring ring_{kSlots};
};

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_SCHEDULE_CUH_

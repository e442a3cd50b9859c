// The walk over tiles: which tile of which group has number t. Sizes of groups are known to the
// device only, so every warp that needs a tile finds it itself.

#ifndef JAXMOE_XLA_FFI_GEMM_TILES_CUH_
#define JAXMOE_XLA_FFI_GEMM_TILES_CUH_

#include "xla_ffi/gemm/layout.cuh"
#include "xla_ffi/gemm/ptx.cuh"

namespace jaxmoe::gemm {

constexpr uint32_t kAllLanes = 0xffffffff;

__device__ __forceinline__ int LaneId() { return threadIdx.x % 32; }
__host__ __device__ constexpr int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// A tile of the product of one group.
struct Tile {
  int group = 0;
  int row = 0;    // first of its rows
  int rows = 0;   // how many
  int major = 0;  // which of `num_major` slices of the weight (or of its gradient's rows)
  int minor = 0;  // which of `num_minor`
};

struct GroupSizes {
  const int32_t* sizes;  // [num_groups]
  int num_groups;
  int capacity;  // rows in memory: what sizes claim beyond them is cut off
};

// Numbers tiles by group, then major slice, then row tile or minor slice. A group's rows are cut
// into as few tiles as `tallest` allows, as even as multiples of kMultiple are: neighbouring tiles
// share the weights, and none is padded by kMultiple rows. Without kRowTiles a tile has all rows of
// its group and a minor slice, and empty groups have tiles too.
template <bool kRowTiles, int kMultiple>
class Tiles {
 public:
  __device__ Tiles(const GroupSizes& groups, int tallest, int num_major, int num_minor)
      : groups_(groups), tallest_(tallest), num_major_(num_major), num_minor_(num_minor) {
    LoadGroups();
  }

  // Moves on to tile number t, all lanes alike; false if there are fewer. t may only grow.
  __device__ bool Find(int t, Tile* tile) {
    while (t >= tiles_end_) {
      if (first_ + 32 >= groups_.num_groups) return false;
      first_ += 32;
      LoadGroups();
    }
    // An empty group begins where the next one does: the last of them is meant.
    const int lane = 31 - __clz(__ballot_sync(kAllLanes, tile_ <= t));
    const int in_group = t - __shfl_sync(kAllLanes, tile_, lane);
    const int row = __shfl_sync(kAllLanes, row_, lane);
    const int size = __shfl_sync(kAllLanes, size_, lane);
    tile->group = first_ + lane;
    const int inner = kRowTiles ? CeilDiv(size, tallest_) : num_minor_;
    tile->major = in_group / inner;
    const int rest = in_group % inner;
    if (kRowTiles) {
      const int height = CeilDiv(CeilDiv(size, inner), kMultiple) * kMultiple;
      tile->row = row + rest * height;
      tile->rows = min(height, size - rest * height);
      tile->minor = 0;
    } else {
      tile->row = row;
      tile->rows = size;
      tile->minor = rest;
    }
    return true;
  }

  // Once Find has returned false: where the rows of the last group end.
  __device__ int RowsEnd() const { return rows_end_; }

 private:
  // Each lane takes one of the next 32 groups.
  __device__ void LoadGroups() {
    const int group = first_ + LaneId();
    const int claimed = group < groups_.num_groups ? max(__ldg(&groups_.sizes[group]), 0) : 0;
    const int row_end = min(rows_end_ + Scan(claimed), groups_.capacity);
    const int before = __shfl_up_sync(kAllLanes, row_end, 1);
    row_ = LaneId() == 0 ? rows_end_ : before;
    size_ = row_end - row_;
    rows_end_ = __shfl_sync(kAllLanes, row_end, 31);
    int tiles = num_major_ * (kRowTiles ? CeilDiv(size_, tallest_) : num_minor_);
    if (group >= groups_.num_groups) tiles = 0;
    const int tile_end = tiles_end_ + Scan(tiles);
    tile_ = tile_end - tiles;
    tiles_end_ = __shfl_sync(kAllLanes, tile_end, 31);
  }

  // Sum over the lanes up to this one.
  static __device__ int Scan(int value) {
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, value, step);
      if (LaneId() >= step) value += other;
    }
    return value;
  }

  const GroupSizes groups_;
  const int tallest_, num_major_, num_minor_;
  int first_ = 0;                     // group of lane 0
  int rows_end_ = 0, tiles_end_ = 0;  // after the group of lane 31
  int row_, size_, tile_;             // this lane's group: where it begins, and its rows
};

}  // namespace jaxmoe::gemm

#endif  // JAXMOE_XLA_FFI_GEMM_TILES_CUH_

// The symmetric heap of the CUDA transports: its regions are aligned, apart from each other, and as
// large as their last word needs.

#include "xla_ffi/cuda/layout.h"

#include <cstddef>
#include <vector>

#include "xla_ffi/tests/check.h"

namespace jaxmoe::cuda {
namespace {

const std::vector<GroupSizes> kSizes = {
    {1, 4, 1, 1, 16, 0, 1, 0},        {2, 128, 4096, 8, 14336, 0, 512, 2},
    {8, 32, 4096, 8, 14336, 0, 0, 0}, {72, 4, 129, 32, 16, 0, 7, 1},
    {4, 2048, 5, 3, 48, 1, 0, 0},     {8, 32, 128, 8, 14336, 1, 0, 0},
    {2, 1, 65536, 2, 4096, 1, 0, 0},  {3, 6, 50, 5, 528, 0, 33, kMaxPending},
};

struct Region {
  size_t begin, end;
};

// What the functions of the layout reach in each region, in the order of the layout.
std::vector<Region> Reached(const Layout& l, const GroupSizes& g) {
  const int last = g.num_devices - 1, part = 1 + Layout::NumSplitParts(g.max_pending);
  const size_t choices = size_t(g.max_tokens) * g.top_k;
  std::vector<Region> regions = {
      {l.control, l.control + sizeof(Control)},
      {l.Header(0, 0), l.Header(part, last) + 8},
      {l.MetaFlag(0, 0), l.MetaFlag(last, kMetaParts - 1) + 8},
      {l.ChunkFlag(0, 0, 0),
       l.ChunkFlag(1, last, (g.max_tokens + kSumChunkTokens - 1) / kSumChunkTokens - 1) + 8},
      {l.block_counts, l.block_counts + size_t{kMaxBlocks} * g.num_local_experts * 4},
      {l.Ids(0, 0), l.Ids(1, last) + choices * 4},
      {l.Weights(0, 0), l.Weights(1, last) + choices * 4},
      {l.Row(0, 0, 0), l.Row(1, last, g.max_tokens - 1) + g.row_bytes},
  };
  if (g.puts) {
    regions.push_back(
        {l.StagedRow(0, 0, 0),
         l.StagedValues(kMaxBlocks - 1, kChunkSlots - 1, kSumChunkTokens - 1) + g.top_k * 4});
  }
  if (g.latency_tokens > 0) {
    const int slot = g.latency_tokens - 1, choices_sent = g.latency_tokens * g.top_k;
    regions.push_back(
        {l.IdVector(0, 0, 0), l.IdVector(part, last, (choices_sent - 1) / kIdsPerVector) + 16});
    regions.push_back({l.WireRow(0, 0, 0), l.WireRow(part, last, slot) +
                                               Layout::WireWeight(g.row_bytes, g.top_k - 1) + 8});
  }
  return regions;
}

TEST(RegionsAreAlignedAndApart) {
  for (const GroupSizes& sizes : kSizes) {
    const Layout layout(sizes);
    size_t end = 0;
    for (const Region& region : Reached(layout, sizes)) {
      CHECK_EQ(region.begin % 256, size_t{0});
      CHECK(region.begin >= end);
      end = region.end;
    }
    CHECK(layout.bytes >= end);
    CHECK(layout.bytes < end + 256);
  }
}

// Bulk copies and vectors of a kernel need 16 bytes.
TEST(RowsAreAligned) {
  for (const GroupSizes& sizes : kSizes) {
    const Layout layout(sizes);
    for (int token : {0, 1, sizes.max_tokens - 1}) {
      CHECK_EQ(layout.Row(1, sizes.num_devices - 1, token) % 16, size_t{0});
    }
    if (sizes.puts) CHECK_EQ(layout.StagedRow(3, 1, 2) % 16, size_t{0});
  }
}

// A wire row's parts do not overlap, and the next one begins behind it: a vector needs 16 bytes, a
// mark and a weight 8.
TEST(WireRowsAreAligned) {
  for (const GroupSizes& sizes : kSizes) {
    if (sizes.latency_tokens == 0) continue;
    const Layout layout(sizes);
    const int batches = Layout::Batches(sizes.row_bytes);
    CHECK(batches * kBatchVectors * 16 >= sizes.row_bytes);
    CHECK((batches - 1) * kBatchVectors * 16 < sizes.row_bytes);
    CHECK_EQ(Layout::Mark(sizes.row_bytes, 0), sizes.row_bytes);
    CHECK_EQ(Layout::WireWeight(sizes.row_bytes, 0),
             Layout::Mark(sizes.row_bytes, batches - 1) + 8);
    CHECK(layout.wire_row_bytes >= Layout::WireWeight(sizes.row_bytes, sizes.top_k - 1) + 8);
    for (int dim : {sizes.row_bytes / 2, sizes.row_bytes / 4}) {
      if (dim % 16 != 0) continue;  // those in FP8
      CHECK(Layout::CodeBatches(dim) * kBatchNumbers >= dim);
      CHECK(Layout::CodeBytes(dim) >= dim);
      CHECK_EQ(Layout::CodeBytes(dim) % 16, 0);
      const int words = Layout::CodeBatches(dim) * (1 + kBatchScales);
      CHECK_EQ(Layout::CodeWeight(dim, 0), Layout::Mark(Layout::CodeBytes(dim), words));
      CHECK(layout.wire_row_bytes >= Layout::CodeWeight(dim, sizes.top_k - 1) + 8);
    }
    CHECK_EQ(layout.wire_row_bytes % 128, 0);
    const int last = sizes.latency_tokens - 1;
    if (sizes.num_devices == 1) continue;
    CHECK_EQ(layout.WireRow(1, 0, last) + layout.wire_row_bytes, layout.WireRow(1, 1, 0));
  }
}

// So many split calls in a row have parts of their own, apart from the two halves.
TEST(SplitCallsHaveParts) {
  for (const GroupSizes& sizes : kSizes) {
    const Layout layout(sizes);
    const int num = Layout::NumSplitParts(sizes.max_pending);
    if (sizes.max_pending == 0) {
      CHECK_EQ(num, 0);
      continue;
    }
    CHECK_EQ(num, 2 + 2 * sizes.max_pending);
    std::vector<int> seen(2 + num);
    for (int i = 0; i < num; ++i) ++seen[layout.SplitPart((uint64_t{1} << 40) + i)];
    for (int part = 0; part < 2 + num; ++part) CHECK_EQ(seen[part], part < 2 ? 0 : 1);
  }
  CHECK(Layout::NumSplitParts(kMaxPending) <= 64);  // bits of Control::pending
}

// Two halves of R rows of each token, and little else.
TEST(HeapOfEightDevices) {
  const Layout layout({8, 32, 4096, 8, 14336, 0, 0, 0});
  const double rows = 2.0 * 8 * 4096 * 14336;
  CHECK(layout.bytes >= rows);
  CHECK(layout.bytes < 1.02 * rows);
  CHECK(layout.bytes < 1.1 * (1 << 30));
}

}  // namespace
}  // namespace jaxmoe::cuda

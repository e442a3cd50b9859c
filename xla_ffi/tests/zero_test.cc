// FillZero on memory of several kinds: fresh, used, of every alignment, and shared (which the
// system does not clear when pages are dropped).

#include "xla_ffi/cpu/zero.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "xla_ffi/tests/check.h"

namespace jaxmoe {
namespace {

constexpr size_t kMiB = 1 << 20;

bool AllEqual(const char* begin, size_t bytes, char value) {
  return std::all_of(begin, begin + bytes, [=](char c) { return c == value; });
}

// Fills `memory` with a poison, zeroes [begin, begin + bytes) and looks at everything.
void CheckOn(char* memory, size_t size, size_t begin, size_t bytes) {
  std::memset(memory, 0x5A, size);
  FillZero(memory + begin, bytes);
  CHECK(AllEqual(memory, begin, 0x5A));
  CHECK(AllEqual(memory + begin, bytes, 0));
  CHECK(AllEqual(memory + begin + bytes, size - begin - bytes, 0x5A));
}

TEST(ZeroesExactlyTheRange) {
  std::vector<char> memory(2 * kMiB);
  for (const size_t begin : {0, 1, 2, 63, 4095, 4096, 4097}) {
    for (const size_t bytes : {size_t{0}, size_t{1}, size_t{4096}, kMiB / 4 - 1, kMiB / 4,
                               kMiB / 4 + 1, kMiB, kMiB + 4095}) {
      CheckOn(memory.data(), memory.size(), begin, bytes);
    }
  }
}

TEST(ZeroesMemoryThatKeepsItsPages) {
  for (const int kind : {MAP_SHARED | MAP_ANONYMOUS, MAP_PRIVATE | MAP_ANONYMOUS | MAP_LOCKED}) {
    void* memory = mmap(nullptr, kMiB, PROT_READ | PROT_WRITE, kind, -1, 0);
    if (memory == MAP_FAILED) continue;  // no right to lock so much
    CheckOn(static_cast<char*>(memory), kMiB, 3, kMiB - 7);
    munmap(memory, kMiB);
  }
}

TEST(ZeroedMemoryCanBeWrittenAgain) {
  std::vector<char> memory(kMiB, 0x5A);
  FillZero(memory.data(), memory.size());
  std::memset(memory.data(), 0x33, memory.size());
  CHECK(AllEqual(memory.data(), memory.size(), 0x33));
}

}  // namespace
}  // namespace jaxmoe

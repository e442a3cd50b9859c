#include "xla_ffi/cpu/zero.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace jaxmoe {
namespace {

// Below this a system call costs about as much as writing.
constexpr size_t kDropBytes = 1 << 18;

// Drops whole pages. True if they read as zero now. The system refuses some memory (locked, huge
// pages) and would not clear shared memory or files; marks at both ends tell, and one allocation
// is of one kind.
bool DropPages(char* begin, char* end) {
  volatile char* first = begin;
  volatile char* last = end - 1;
  *first = *last = 1;
  return madvise(begin, static_cast<size_t>(end - begin), MADV_DONTNEED) == 0 && *first == 0 &&
         *last == 0;
}

}  // namespace

void FillZero(char* begin, size_t bytes) {
  if (bytes < kDropBytes) {
    if (bytes > 0) std::memset(begin, 0, bytes);
    return;
  }
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  char* const end = begin + bytes;
  char* const pages_begin =
      reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page);
  char* const pages_end = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(end) / page * page);
  if (!DropPages(pages_begin, pages_end)) {
    std::memset(begin, 0, bytes);
    return;
  }
  std::memset(begin, 0, static_cast<size_t>(pages_begin - begin));
  std::memset(pages_end, 0, static_cast<size_t>(end - pages_end));
}

}  // namespace jaxmoe

#include "xla_ffi/cpu/segment.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <new>
#include <stdexcept>

namespace jaxmoe {
namespace {

constexpr uint64_t kMagic = 0x6a61786d6f653031;  // layout version
constexpr size_t kPage = 4096;
constexpr int64_t kMaxSlots = 1 << 14;

size_t RoundToPages(size_t n) { return (n + kPage - 1) / kPage * kPage; }

// Gives bytes [begin, begin + size) of a shared-memory file memory, so that touching them later
// cannot end the process by SIGBUS. Returns an error number, or 0.
int Reserve(int fd, size_t begin, size_t size) {
  int error;
  do {
    error = posix_fallocate(fd, static_cast<off_t>(begin), static_cast<off_t>(size));
  } while (error == EINTR);
  return error;
}

[[noreturn]] void Throw(const std::string& what, const std::string& advice) {
  throw std::runtime_error("shared memory: " + what + ": " + std::strerror(errno) + ". " + advice);
}

}  // namespace

struct Segment::Header {
  uint64_t magic;
  int64_t num_slots;
  size_t slot_bytes;
  alignas(64) std::atomic<uint32_t> doorbell;
  alignas(64) std::atomic<uint64_t> announced;
  alignas(64) std::atomic<uint64_t> taken[kMaxProcesses];
  std::atomic<int32_t> unreleased[kMaxSlots];
  Announcement ring[kRing];
};

static_assert(std::atomic<uint64_t>::is_always_lock_free, "the words are shared by processes");

size_t Segment::SlotOffset(int64_t i) const {
  return RoundToPages(sizeof(Header)) + static_cast<size_t>(i) * header().slot_bytes;
}

std::shared_ptr<Segment> Segment::Create(const std::string& name, int64_t num_slots,
                                         size_t slot_bytes) {
  slot_bytes = RoundToPages(std::max<size_t>(slot_bytes, 1));
  num_slots = std::min(num_slots, kMaxSlots);
  std::shared_ptr<Segment> segment(new Segment);
  segment->fd_ = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
  if (segment->fd_ < 0) Throw("cannot create " + name, "Is /dev/shm mounted and writable?");
  try {
    segment->MakeLayout(name, num_slots, slot_bytes);
  } catch (...) {
    Unlink(name);
    throw;
  }
  return segment;
}

void Segment::MakeLayout(const std::string& name, int64_t num_slots, size_t slot_bytes) {
  const size_t header_bytes = RoundToPages(sizeof(Header));
  bytes_ = header_bytes + static_cast<size_t>(num_slots) * slot_bytes;
  // Slots take memory when they are first used; the header needs it now.
  if (ftruncate(fd_, static_cast<off_t>(bytes_)) != 0 ||
      (errno = Reserve(fd_, 0, header_bytes)) != 0) {
    Throw("cannot size " + name, "Make /dev/shm larger, or lower max_tokens.");
  }
  void* base = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd_, 0);
  if (base == MAP_FAILED) Throw("cannot map " + name, "Raise the limit on address space.");
  base_ = static_cast<char*>(base);
  Header* header = new (base) Header();
  header->num_slots = num_slots;
  header->slot_bytes = slot_bytes;
  header->magic = kMagic;
}

std::shared_ptr<Segment> Segment::Open(const std::string& name) {
  std::shared_ptr<Segment> segment(new Segment);
  const int fd = shm_open(name.c_str(), O_RDWR, 0600);
  if (fd < 0) Throw("cannot open " + name, "Are all processes on one host, under one user?");
  struct stat status;
  const bool sized = fstat(fd, &status) == 0;
  if (sized) segment->bytes_ = static_cast<size_t>(status.st_size);
  void* base = sized ? mmap(nullptr, segment->bytes_, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_NORESERVE, fd, 0)
                     : MAP_FAILED;
  close(fd);
  if (base == MAP_FAILED) Throw("cannot map " + name, "Raise the limit on address space.");
  segment->base_ = static_cast<char*>(base);
  if (segment->bytes_ < sizeof(Header) || segment->header().magic != kMagic) {
    throw std::runtime_error("shared memory: " + name +
                             " has another layout. Use the same jaxmoe in all processes.");
  }
  return segment;
}

void Segment::Unlink(const std::string& name) { shm_unlink(name.c_str()); }

Segment::~Segment() {
  if (base_ != nullptr) munmap(base_, bytes_);
  if (fd_ >= 0) close(fd_);
}

int64_t Segment::TakeSlot(int64_t num_readers, size_t bytes) {
  Header& h = header();
  if (bytes > h.slot_bytes) {
    throw std::runtime_error("shared memory: a payload of " + std::to_string(bytes) +
                             " bytes does not fit a slot of " + std::to_string(h.slot_bytes));
  }
  for (int64_t i = 0; i < h.num_slots; ++i) {
    if (h.unreleased[i].load(std::memory_order_acquire) != 0) continue;
    const int error = Reserve(fd_, SlotOffset(i), std::max<size_t>(bytes, 1));
    if (error != 0) {
      errno = error;
      Throw("cannot reserve " + std::to_string(bytes) + " bytes",
            "Make /dev/shm larger, or lower max_tokens.");
    }
    h.unreleased[i].store(static_cast<int32_t>(num_readers), std::memory_order_relaxed);
    return i;
  }
  return -1;
}

bool Segment::Announce(const Announcement& announcement, const int64_t* peers, size_t num_peers) {
  Header& h = header();
  const uint64_t next = h.announced.load(std::memory_order_relaxed);
  for (size_t i = 0; i < num_peers; ++i) {
    if (next - h.taken[peers[i]].load(std::memory_order_acquire) >= kRing) return false;
  }
  h.ring[next % kRing] = announcement;
  h.announced.store(next + 1, std::memory_order_release);
  return true;
}

bool Segment::Take(int64_t process, Announcement* announcement) {
  Header& h = header();
  const uint64_t next = h.taken[process].load(std::memory_order_relaxed);
  if (next == h.announced.load(std::memory_order_acquire)) return false;
  *announcement = h.ring[next % kRing];
  h.taken[process].store(next + 1, std::memory_order_release);
  return true;
}

void Segment::ReleaseSlot(int64_t slot) {
  header().unreleased[slot].fetch_sub(1, std::memory_order_release);
}

void Segment::ReturnSlot(int64_t slot) {
  header().unreleased[slot].store(0, std::memory_order_release);
}

uint32_t Segment::Doorbell() const { return header().doorbell.load(std::memory_order_acquire); }

void Segment::Ring() {
  std::atomic<uint32_t>& word = header().doorbell;
  word.fetch_add(1, std::memory_order_release);
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, 1, nullptr, nullptr, 0);
}

void Segment::WaitForRing(uint32_t seen, int64_t milliseconds) {
  const timespec limit = {milliseconds / 1000, (milliseconds % 1000) * 1000000};
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&header().doorbell), FUTEX_WAIT, seen, &limit,
          nullptr, 0);
}

}  // namespace jaxmoe

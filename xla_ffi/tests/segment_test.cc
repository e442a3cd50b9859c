// The shared-memory segment by itself: its regions, its ring and its slots.

#include "xla_ffi/cpu/segment.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "xla_ffi/tests/check.h"

namespace jaxmoe {
namespace {

std::string NewName() {
  static int count = 0;
  return "/jaxmoe-test-" + std::to_string(getpid()) + "-" + std::to_string(count++);
}

bool Exists(const std::string& name) {
  const int fd = shm_open(name.c_str(), O_RDWR, 0600);
  if (fd >= 0) close(fd);
  return fd >= 0;
}

std::string ErrorOf(const std::function<void()>& body) {
  try {
    body();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

// An owner's segment and a peer's view of it.
struct Pair {
  explicit Pair(int64_t num_slots = 4, size_t slot_bytes = 5000) {
    const std::string name = NewName();
    owner = Segment::Create(name, num_slots, slot_bytes);
    peer = Segment::Open(name);
    Segment::Unlink(name);
    CHECK(!Exists(name));
  }
  bool Announce(int64_t number, const std::vector<int64_t>& peers) {
    Announcement announcement{};
    announcement.key.site = number;
    announcement.rank = -number;
    return owner->Announce(announcement, peers.data(), peers.size());
  }
  // The number of the next announcement for `process`, or -1.
  int64_t Take(int64_t process) {
    Announcement announcement{};
    if (!peer->Take(process, &announcement)) return -1;
    CHECK_EQ(announcement.rank, -announcement.key.site);
    return announcement.key.site;
  }
  std::shared_ptr<Segment> owner, peer;
};

TEST(SlotsAreAlignedAndOverlapNothing) {
  constexpr int64_t kSlots = 4, kBytes = 5000;
  Pair pair(kSlots, kBytes);
  CHECK(pair.Announce(7, {1}));
  for (int64_t i = 0; i < kSlots; ++i) {
    CHECK_EQ(pair.owner->TakeSlot(1, kBytes), i);
    CHECK_EQ(reinterpret_cast<uintptr_t>(pair.owner->slot(i)) % 64, 0u);
    std::memset(pair.owner->slot(i), static_cast<int>(i + 1), kBytes);
  }
  for (int64_t i = 0; i < kSlots; ++i) {
    const char* slot = pair.peer->slot(i);
    CHECK(std::all_of(slot, slot + kBytes, [=](char c) { return c == i + 1; }));
  }
  // The words and the ring before the slots are as they were.
  CHECK_EQ(pair.owner->TakeSlot(1, kBytes), -1);
  CHECK_EQ(pair.Take(1), 7);
  CHECK_EQ(pair.Take(1), -1);
}

TEST(ASlotIsFreeOnceEveryReaderReleasedIt) {
  Pair pair(2);
  CHECK_EQ(pair.owner->TakeSlot(3, 10), 0);
  CHECK_EQ(pair.owner->TakeSlot(1, 10), 1);
  for (int reader = 0; reader < 3; ++reader) {
    CHECK_EQ(pair.owner->TakeSlot(1, 10), -1);
    pair.peer->ReleaseSlot(0);
  }
  CHECK_EQ(pair.owner->TakeSlot(1, 10), 0);
  pair.owner->ReturnSlot(1);
  CHECK_EQ(pair.owner->TakeSlot(1, 10), 1);
}

TEST(TheRingWrapsAroundAndWaitsForTheSlowestReader) {
  Pair pair;
  const auto ring = static_cast<int64_t>(Segment::kRing);
  const int64_t last = 3 * ring + 5;
  int64_t announced = 0, taken_by_fast = 0, taken_by_slow = 0;
  for (; announced < ring; ++announced) CHECK(pair.Announce(announced, {1, 2}));
  CHECK(!pair.Announce(announced, {1, 2}));
  while (taken_by_fast < ring) CHECK_EQ(pair.Take(1), taken_by_fast++);
  CHECK(!pair.Announce(announced, {1, 2}));  // process 2 has read none
  while (announced < last) {
    CHECK_EQ(pair.Take(2), taken_by_slow++);
    CHECK(pair.Announce(announced++, {1, 2}));
    CHECK(!pair.Announce(announced, {1, 2}));
    CHECK_EQ(pair.Take(1), taken_by_fast++);
  }
  while (taken_by_slow < last) CHECK_EQ(pair.Take(2), taken_by_slow++);
  CHECK_EQ(pair.Take(2), -1);
  CHECK_EQ(pair.Take(1), -1);
}

TEST(APayloadLargerThanASlotIsAnError) {
  Pair pair(1, 4096);
  CHECK_CONTAINS(ErrorOf([&] { pair.owner->TakeSlot(1, 4097); }),
                 "a payload of 4097 bytes does not fit a slot of 4096");
  CHECK_EQ(pair.owner->TakeSlot(1, 4096), 0);
}

TEST(ExhaustedSharedMemoryIsAnErrorNotASignal) {
  struct statvfs status;
  if (statvfs("/dev/shm", &status) != 0 || status.f_blocks == 0) return;  // without a limit
  const size_t more = (static_cast<size_t>(status.f_blocks) + 1) * status.f_frsize;
  Pair pair(2, more);
  const std::string error = ErrorOf([&] { pair.owner->TakeSlot(1, more); });
  CHECK_CONTAINS(error, "cannot reserve " + std::to_string(more) + " bytes");
  CHECK_CONTAINS(error, "Make /dev/shm larger, or lower max_tokens.");
  CHECK_EQ(pair.owner->TakeSlot(1, 4096), 0);
}

TEST(AFailedCreationLeavesNoName) {
  const std::string name = NewName();
  const size_t more_than_addresses = size_t{1} << 58;
  CHECK_CONTAINS(ErrorOf([&] { Segment::Create(name, 1, more_than_addresses); }), "cannot ");
  CHECK(!Exists(name));
}

TEST(ANameIsCreatedOnce) {
  const std::string name = NewName();
  const auto segment = Segment::Create(name, 1, 1);
  CHECK_CONTAINS(ErrorOf([&] { Segment::Create(name, 1, 1); }), "cannot create " + name);
  CHECK(Exists(name));
  Segment::Unlink(name);
}

TEST(OpeningSaysWhatIsWrong) {
  const std::string name = NewName();
  CHECK_CONTAINS(ErrorOf([&] { Segment::Open(name); }), "cannot open " + name);
  const int fd = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
  CHECK_EQ(ftruncate(fd, 4096), 0);
  close(fd);
  CHECK_CONTAINS(ErrorOf([&] { Segment::Open(name); }), "has another layout");
  Segment::Unlink(name);
}

TEST(ARingWakesTheOwner) {
  Pair pair;
  const uint32_t before = pair.owner->Doorbell();
  pair.peer->Ring();
  CHECK_EQ(pair.owner->Doorbell(), before + 1);
  pair.owner->WaitForRing(before, 60000);  // has rung since: comes back at once
}

}  // namespace
}  // namespace jaxmoe

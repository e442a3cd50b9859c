// Two ends of a link in one process: sending, waiting for room, giving up.

#include "xla_ffi/cpu/link.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "xla_ffi/tests/check.h"

namespace jaxmoe {
namespace {

using Strings = std::vector<std::string>;
constexpr auto kForEver = std::chrono::seconds(60);

// One process' end: what it received, and what became of what it sent.
class End {
 public:
  End(int64_t process, int64_t num_slots, size_t slot_bytes)
      : process_(process),
        name_("/jaxmoe-test-" + std::to_string(getpid()) + "-" + std::to_string(process)) {
    link_ =
        std::make_shared<Link>(process, [this](const Announcement& announcement,
                                               const char* payload, std::function<void()> release) {
          std::lock_guard<std::mutex> lock(mutex_);
          received_.push_back(std::to_string(announcement.key.site) + " " + payload);
          releases_.push_back(std::move(release));
          wake_.notify_all();
        });
    link_->Create(name_, num_slots, slot_bytes);
  }
  ~End() {
    link_->Stop();
    link_->Unlink();
  }

  void Map(const End& other) { link_->Map(other.process_, other.name_); }
  Link& link() { return *link_; }

  // Sends `text` as number `number`. It is given up when `*cancelled`.
  void Send(int64_t number, const std::string& text, bool* cancelled = nullptr,
            std::chrono::milliseconds timeout = kForEver) {
    Outgoing outgoing;
    outgoing.announcement.key.site = number;
    outgoing.num_readers = 1;
    outgoing.bytes = text.size() + 1;
    outgoing.write = [text](char* payload) {
      if (text == "throws") throw std::runtime_error("no memory");
      std::memcpy(payload, text.c_str(), text.size() + 1);
    };
    outgoing.written = [this, number](const std::string& error) {
      std::lock_guard<std::mutex> lock(mutex_);
      written_.push_back(std::to_string(number) + " " + error);
      wake_.notify_all();
    };
    outgoing.cancelled = [this, cancelled] {
      if (cancelled == nullptr) return false;
      std::lock_guard<std::mutex> lock(mutex_);
      return *cancelled;
    };
    outgoing.deadline = Clock::now() + timeout;
    link_->Send(std::move(outgoing));
  }

  void Set(bool* flag) {
    std::lock_guard<std::mutex> lock(mutex_);
    *flag = true;
  }

  // Waits until that much was received (or written), and returns it.
  Strings Received(size_t count) { return Wait(received_, count); }
  Strings Written(size_t count) { return Wait(written_, count); }

  // Releases the oldest payload that is not released yet.
  void Release() {
    std::function<void()> release;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      release = std::move(releases_.at(num_released_++));
    }
    release();
  }

 private:
  Strings Wait(const Strings& strings, size_t count) {
    std::unique_lock<std::mutex> lock(mutex_);
    wake_.wait_for(lock, kForEver, [&] { return strings.size() >= count; });
    return strings;
  }

  const int64_t process_;
  const std::string name_;
  std::mutex mutex_;
  std::condition_variable wake_;
  Strings received_, written_;
  std::vector<std::function<void()>> releases_;
  size_t num_released_ = 0;
  std::shared_ptr<Link> link_;
};

// Ends 0 and 1, joined.
struct Joined {
  explicit Joined(int64_t num_slots, size_t slot_bytes = 100)
      : a(0, num_slots, slot_bytes), b(1, num_slots, slot_bytes) {
    a.Map(b);
    b.Map(a);
  }
  End a, b;
};

TEST(PayloadsArriveBothWays) {
  Joined ends(2);
  ends.a.Send(1, "to b");
  ends.b.Send(2, "to a");
  CHECK_EQ(ends.b.Received(1), (Strings{"1 to b"}));
  CHECK_EQ(ends.a.Received(1), (Strings{"2 to a"}));
  CHECK_EQ(ends.a.Written(1), (Strings{"1 "}));
}

TEST(SendsWaitForSlotsInOrder) {
  Joined ends(2);
  for (int64_t i = 0; i < 6; ++i) ends.a.Send(i, "x");
  CHECK_EQ(ends.b.Received(2).size(), 2u);
  CHECK_EQ(ends.a.Written(2).size(), 2u);
  for (size_t i = 3; i <= 6; ++i) {
    ends.b.Release();
    const Strings received = ends.b.Received(i);
    CHECK_EQ(received.size(), i);
    CHECK_EQ(received.back(), std::to_string(i - 1) + " x");
  }
  CHECK_EQ(ends.a.Written(6).size(), 6u);
}

TEST(MorePayloadsThanTheRingHoldsArriveInOrder) {
  constexpr int64_t kCount = 2 * static_cast<int64_t>(Segment::kRing) + 3;
  Joined ends(1);  // one slot: payloads are written, hence announced, in the order of the sends
  for (int64_t i = 0; i < kCount; ++i) {
    ends.a.Send(i, "x");
    const auto count = static_cast<size_t>(i + 1);
    CHECK_EQ(ends.b.Received(count).back(), std::to_string(i) + " x");
    ends.b.Release();
  }
}

TEST(ACancelledSendGivesUpItsPlace) {
  Joined ends(1);
  bool cancelled = false;
  ends.a.Send(0, "x");
  ends.a.Send(1, "waits");
  ends.a.Send(2, "unwanted", &cancelled);
  CHECK_EQ(ends.a.Written(1), (Strings{"0 "}));
  ends.a.Set(&cancelled);  // while 1 still waits for a slot
  CHECK_EQ(ends.a.Written(2), (Strings{"0 ", "2 "}));
  ends.b.Release();
  CHECK_EQ(ends.b.Received(2), (Strings{"0 x", "1 waits"}));
}

TEST(ASendThatFindsNoSlotInTimeFails) {
  Joined ends(1);
  ends.a.Send(0, "x");
  CHECK_EQ(ends.a.Written(1), (Strings{"0 "}));
  ends.a.Send(1, "x", nullptr, std::chrono::milliseconds(50));
  CHECK_CONTAINS(ends.a.Written(2).back(), "1 timed out: peers did not read earlier payloads");
  CHECK_EQ(ends.b.Received(1), (Strings{"0 x"}));
}

TEST(APayloadThatIsTooLargeFails) {
  Joined ends(1);
  ends.a.Send(0, std::string(5000, 'x'));
  CHECK_CONTAINS(ends.a.Written(1).back(), "does not fit a slot");
}

TEST(AFailedWriteReturnsItsSlot) {
  Joined ends(1);
  ends.a.Send(0, "throws");
  CHECK_EQ(ends.a.Written(1), (Strings{"0 no memory"}));
  ends.a.Send(1, "x");
  CHECK_EQ(ends.b.Received(1), (Strings{"1 x"}));
}

TEST(StoppingEndsSendsThatWait) {
  Joined ends(1);
  ends.a.Send(0, "x");
  CHECK_EQ(ends.a.Written(1), (Strings{"0 "}));
  ends.a.Send(1, "x");
  ends.a.link().Stop();
  CHECK_EQ(ends.a.Written(2).back(), "1 the group was closed during the call");
  ends.a.Send(2, "x");
  CHECK_EQ(ends.a.Written(3).back(), "2 the group was closed during the call");
}

}  // namespace
}  // namespace jaxmoe

#include "xla_ffi/cpu/link.h"

#include <exception>
#include <utility>

#include "xla_ffi/cpu/threads.h"

namespace jaxmoe {
namespace {

// Longest sleep without a ring: bounds what a lost one costs.
constexpr int64_t kWaitMilliseconds = 20;

}  // namespace

void Link::Create(const std::string& name, int64_t num_slots, size_t slot_bytes) {
  own_ = Segment::Create(name, num_slots, slot_bytes);
  name_ = name;
  thread_ = std::thread([this] { Progress(); });
}

void Link::Map(int64_t process, const std::string& name) {
  std::shared_ptr<Segment> segment = Segment::Open(name);
  std::lock_guard<std::mutex> lock(mutex_);
  peers_.push_back({process, std::move(segment)});
}

void Link::Unlink() {
  if (!name_.empty()) Segment::Unlink(name_);
}

void Link::Stop() {
  if (!thread_.joinable()) return;
  stop_ = true;
  own_->Ring();
  thread_.join();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
  }
  TrySend();
}

void Link::Send(Outgoing outgoing) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    waiting_.push_back(std::make_shared<Outgoing>(std::move(outgoing)));
  }
  TrySend();
}

// Gives slots to those that wait, in order.
void Link::TrySend() {
  std::vector<std::shared_ptr<Outgoing>> ready;
  std::vector<std::pair<std::shared_ptr<Outgoing>, std::string>> ended;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::deque<std::shared_ptr<Outgoing>> still_waiting;
    for (std::shared_ptr<Outgoing>& next : waiting_) {
      std::string error;
      if (GivenUp(*next, &error)) {
        ended.emplace_back(std::move(next), error);
      } else if (!still_waiting.empty()) {  // there was no slot for an earlier one
        still_waiting.push_back(std::move(next));
      } else {
        try {
          next->announcement.slot = own_->TakeSlot(next->num_readers, next->bytes);
          if (next->announcement.slot < 0) {
            still_waiting.push_back(std::move(next));
          } else {
            ready.push_back(std::move(next));
          }
        } catch (const std::exception& failure) {
          ended.emplace_back(std::move(next), failure.what());
        }
      }
    }
    waiting_.swap(still_waiting);
  }
  for (auto& [outgoing, error] : ended) outgoing->written(error);
  for (auto& outgoing : ready) {
    RunOnPool([self = shared_from_this(), outgoing] { self->Write(outgoing); });
  }
}

// Whether one that waits for a slot should wait no longer, and the error if it is one. Called with
// mutex_ held.
bool Link::GivenUp(const Outgoing& outgoing, std::string* error) const {
  if (outgoing.cancelled()) return true;
  if (closed_) {
    *error = "the group was closed during the call";
  } else if (Clock::now() >= outgoing.deadline) {
    *error = "timed out: peers did not read earlier payloads, no shared memory is free";
  }
  return !error->empty();
}

void Link::Write(std::shared_ptr<Outgoing> outgoing) {
  try {
    outgoing->write(own_->slot(outgoing->announcement.slot));
  } catch (const std::exception& failure) {
    own_->ReturnSlot(outgoing->announcement.slot);
    return outgoing->written(failure.what());
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    written_.push_back(outgoing);
  }
  TryAnnounce();
  outgoing->written("");
}

// Announces what is written, in order, as far as peers have taken earlier announcements.
void Link::TryAnnounce() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<int64_t> peers;
  for (const Peer& peer : peers_) peers.push_back(peer.process);
  while (!written_.empty()) {
    if (!own_->Announce(written_.front()->announcement, peers.data(), peers.size())) return;
    for (const Peer& peer : peers_) peer.segment->Ring();
    written_.pop_front();
  }
}

void Link::Progress() {
  while (!stop_) {
    const uint32_t seen = own_->Doorbell();
    ReceiveAll();
    TryAnnounce();
    TrySend();
    own_->WaitForRing(seen, kWaitMilliseconds);
  }
}

void Link::ReceiveAll() {
  std::vector<Peer> peers;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    peers = peers_;
  }
  Announcement announcement;
  for (const Peer& peer : peers) {
    while (peer.segment->Take(process_, &announcement)) {
      // The closure keeps the peer's memory mapped until the payload has been read.
      receive_(announcement, peer.segment->slot(announcement.slot),
               [segment = peer.segment, slot = announcement.slot] {
                 segment->ReleaseSlot(slot);
                 segment->Ring();
               });
    }
  }
}

}  // namespace jaxmoe

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
    while (!waiting_.empty()) {
      std::shared_ptr<Outgoing> next = waiting_.front();
      if (next->cancelled()) {
        ended.emplace_back(next, "");
      } else {
        int64_t slot = -1;
        try {
          slot = own_->TakeSlot(next->num_readers, next->bytes);
          if (slot < 0) break;
          next->announcement.slot = slot;
          ready.push_back(next);
        } catch (const std::exception& error) {
          ended.emplace_back(next, error.what());
        }
      }
      waiting_.pop_front();
    }
  }
  for (auto& [outgoing, error] : ended) outgoing->written(error);
  for (auto& outgoing : ready) {
    RunOnPool([self = shared_from_this(), outgoing] { self->Write(outgoing); });
  }
}

void Link::Write(std::shared_ptr<Outgoing> outgoing) {
  outgoing->write(own_->slot(outgoing->announcement.slot));
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

// A group's connection with the other processes of the host: sends payloads of this process'
// devices and reports those of others.

#ifndef JAXMOE_XLA_FFI_CPU_LINK_H_
#define JAXMOE_XLA_FFI_CPU_LINK_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla_ffi/cpu/segment.h"

namespace jaxmoe {

// A payload on its way out.
struct Outgoing {
  Announcement announcement;  // `slot` is filled in
  int64_t num_readers = 0;    // processes that will release it
  size_t bytes = 0;
  std::function<void(char*)> write;
  // Called once; the operands are free again. With an error the payload was not sent.
  std::function<void(const std::string& error)> written;
  std::function<bool()> cancelled;  // nobody wants it any more
  Clock::time_point deadline;       // for finding a slot
};

class Link : public std::enable_shared_from_this<Link> {
 public:
  using Receive =
      std::function<void(const Announcement&, const char* payload, std::function<void()> release)>;

  Link(int64_t process, Receive receive) : process_(process), receive_(std::move(receive)) {}
  ~Link() { Stop(); }

  void Create(const std::string& name, int64_t num_slots, size_t slot_bytes);
  void Map(int64_t process, const std::string& name);
  void Unlink();

  // Sends as soon as there is room; never blocks.
  void Send(Outgoing outgoing);
  // Nothing is received after this returns, and sends that have no slot end with an error.
  void Stop();

 private:
  struct Peer {
    int64_t process;
    std::shared_ptr<Segment> segment;
  };

  void Progress();
  void ReceiveAll();
  void TrySend();
  bool GivenUp(const Outgoing& outgoing, std::string* error) const;
  void Write(std::shared_ptr<Outgoing> outgoing);
  void TryAnnounce();

  const int64_t process_;
  const Receive receive_;
  std::string name_;
  std::shared_ptr<Segment> own_;
  std::thread thread_;
  std::atomic<bool> stop_{false};

  std::mutex mutex_;
  bool closed_ = false;
  std::vector<Peer> peers_;
  std::deque<std::shared_ptr<Outgoing>> waiting_;  // for a slot
  std::deque<std::shared_ptr<Outgoing>> written_;  // for room in the ring
};

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_LINK_H_

// Shared memory between the processes of a group on one host.
//
// Each process owns one segment per group, which its peers map. Layout, in this order:
//
//   Header      written once by the owner
//   doorbell    incremented (and its futex woken) by peers that did what the owner waits for
//   announced   how many announcements the owner has made
//   taken       per peer, how many of them it has taken
//   unreleased  per slot, how many peers have not released it yet; 0 is free
//   ring        the latest announcements, read by every peer at its own pace
//   slots       payloads
//
// Words are touched through this class only.
//
//   Announce: the owner writes the entry, then increments `announced` (release).
//   Take:     a peer sees `announced` (acquire), reads the entry, then increments its own word
//             (release). The owner overwrites an entry only when every peer's word (acquire) is
//             past it.
//   Release:  a peer decrements the slot's count (release) once it has read the payload; the owner
//             reuses the slot when it sees 0 (acquire).
//
// Nothing is ever reset.

#ifndef JAXMOE_XLA_FFI_CPU_SEGMENT_H_
#define JAXMOE_XLA_FFI_CPU_SEGMENT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "xla_ffi/cpu/exchange.h"

namespace jaxmoe {

// What a device tells the other processes when its payload is ready.
struct Announcement {
  CallKey key;
  CallShape shape;
  int64_t rank;
  int64_t slot;
};

class Segment {
 public:
  static constexpr int64_t kMaxProcesses = 256;
  static constexpr uint64_t kRing = 1024;

  // Both throw std::runtime_error with a sentence for the user, and leave no name behind then.
  static std::shared_ptr<Segment> Create(const std::string& name, int64_t num_slots,
                                         size_t slot_bytes);
  static std::shared_ptr<Segment> Open(const std::string& name);
  static void Unlink(const std::string& name);
  ~Segment();
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;

  // Owner. A free slot with memory behind it, to be released by `num_readers` peers, or -1 if none
  // is free now; throws if the host has no more shared memory.
  int64_t TakeSlot(int64_t num_readers, size_t bytes);
  // Owner. False if a peer is so far behind that there is no room now; peers are process numbers.
  bool Announce(const Announcement& announcement, const int64_t* peers, size_t num_peers);

  // Peer `process`. Takes the next announcement, if there is one.
  bool Take(int64_t process, Announcement* announcement);
  void ReleaseSlot(int64_t slot);
  // Owner. Frees a slot that was never announced.
  void ReturnSlot(int64_t slot);

  const char* slot(int64_t i) const { return base_ + SlotOffset(i); }
  char* slot(int64_t i) { return base_ + SlotOffset(i); }

  // Wakes the owner. The owner waits for a ring after it read `seen` from Doorbell.
  void Ring();
  uint32_t Doorbell() const;
  void WaitForRing(uint32_t seen, int64_t milliseconds);

 private:
  struct Header;
  Segment() = default;
  void MakeLayout(const std::string& name, int64_t num_slots, size_t slot_bytes);
  Header& header() const { return *reinterpret_cast<Header*>(base_); }
  size_t SlotOffset(int64_t i) const;

  char* base_ = nullptr;
  size_t bytes_ = 0;
  int fd_ = -1;  // the owner's, to reserve memory with
};

}  // namespace jaxmoe

#endif  // JAXMOE_XLA_FFI_CPU_SEGMENT_H_

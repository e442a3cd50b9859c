// A device's `dispatch` call on host memory, for tests of how calls are paired. One choice per
// token: token t of device s goes to device (s + t) % R, so every result has a closed form.

#ifndef JAXMOE_XLA_FFI_TESTS_CALL_H_
#define JAXMOE_XLA_FFI_TESTS_CALL_H_

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "xla_ffi/cpu/exchange.h"

namespace jaxmoe::testing {

// No token and no plan holds this value.
constexpr int32_t kPoison = -77;

inline CallShape DispatchShape(int64_t num_devices, int64_t num_tokens, int64_t dim) {
  CallShape shape{};
  shape.num_tokens = num_tokens;
  shape.top_k = 1;
  shape.dim = dim;
  shape.capacity = num_devices * num_tokens;
  shape.num_devices = num_devices;
  shape.num_experts = num_devices;
  shape.num_local_experts = 1;
  shape.dtype = xla::ffi::DataType::F32;
  return shape;
}

class DispatchCall {
 public:
  // Tokens of the call hold numbers that tell `tag`, the device and the token.
  DispatchCall(const CallShape& shape, int64_t rank, int64_t tag)
      : shape_(shape), rank_(rank), tag_(tag) {
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      x_.insert(x_.end(), shape.dim, Value(rank, t));
      ids_.push_back(static_cast<int32_t>((rank + t) % shape.num_devices));
      weights_.push_back(Value(rank, t) + 0.5f);
    }
    rows_.assign(shape.capacity * shape.dim, kPoison);
    row_weights_.assign(shape.capacity, kPoison);
    ints_.assign(4 + shape.num_devices * shape.num_choices() + shape.capacity + shape.num_choices(),
                 kPoison);
  }

  // `device` picks the thread that the call is completed on.
  Arrival MakeArrival() {
    int32_t* row_map = ints_.data() + 4;
    int32_t* row_source = row_map + shape_.num_devices * shape_.num_choices();
    Arrival arrival;
    arrival.rank = rank_;
    arrival.device = static_cast<int32_t>(rank_);
    arrival.buffers = {{x_.data(), ids_.data(), weights_.data()},
                       {rows_.data(), row_weights_.data(), &ints_[0], &ints_[1], &ints_[2],
                        &ints_[3], row_map, row_source, row_source + shape_.capacity}};
    arrival.done = [this](const std::string& error) { Done(error); };
    return arrival;
  }

  // Waits for the end of the call, and returns its error.
  std::string Wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool ended = wake_.wait_for(lock, std::chrono::seconds(60), [this] { return done_; });
    return ended ? error_ : "the test waited in vain";
  }
  bool ended() {
    std::lock_guard<std::mutex> lock(mutex_);
    return done_;
  }

  // Whether the results are those of this call with all of its devices, to the last word.
  bool Right() const {
    int64_t row = 0;
    for (int64_t s = 0; s < shape_.num_devices; ++s) {
      for (int64_t t = 0; t < shape_.num_tokens; ++t) {
        if ((s + t) % shape_.num_devices != rank_) continue;
        if (!RowIs(row, Value(s, t)) || row_weights_[row] != Value(s, t) + 0.5f) return false;
        ++row;
      }
    }
    if (ints_[1] != row) return false;
    for (; row < shape_.capacity; ++row) {
      if (!RowIs(row, 0.0f) || row_weights_[row] != 0.0f) return false;
    }
    return std::count(ints_.begin(), ints_.end(), kPoison) == 0;
  }

  bool Untouched() const {
    const auto poison = [](auto value) { return value == kPoison; };
    return std::all_of(rows_.begin(), rows_.end(), poison) &&
           std::all_of(row_weights_.begin(), row_weights_.end(), poison) &&
           std::all_of(ints_.begin(), ints_.end(), poison);
  }

 private:
  float Value(int64_t rank, int64_t t) const {
    return static_cast<float>(tag_ * 1024 + rank * 64 + t);
  }
  bool RowIs(int64_t row, float value) const {
    const auto begin = rows_.begin() + row * shape_.dim;
    return std::all_of(begin, begin + shape_.dim, [=](float v) { return v == value; });
  }

  // From here on the caller may do with the operands what it likes: a reader that is late would
  // get garbage, and the thread sanitizer sees it.
  void Done(const std::string& error) {
    std::fill(x_.begin(), x_.end(), -1.0f);
    std::fill(ids_.begin(), ids_.end(), kPoison);
    std::fill(weights_.begin(), weights_.end(), -1.0f);
    std::lock_guard<std::mutex> lock(mutex_);
    error_ = done_ ? "completed twice" : error;
    done_ = true;
    wake_.notify_all();
  }

  const CallShape shape_;
  const int64_t rank_, tag_;
  std::vector<float> x_, weights_, rows_, row_weights_;
  std::vector<int32_t> ids_, ints_;  // ints_: all integer results
  std::mutex mutex_;
  std::condition_variable wake_;
  bool done_ = false;
  std::string error_;
};

}  // namespace jaxmoe::testing

#endif  // JAXMOE_XLA_FFI_TESTS_CALL_H_

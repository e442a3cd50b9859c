#include "xla_ffi/cpu/operations.h"

#include <algorithm>
#include <cstring>
#include <thread>

#include "xla_ffi/common/plan.h"
#include "xla_ffi/cpu/quantize.h"
#include "xla_ffi/cpu/rows.h"
#include "xla_ffi/cpu/zero.h"

namespace jaxmoe {
namespace {

template <typename T>
const T* In(const Buffers& buffers, int i) {
  return static_cast<const T*>(buffers.in[i]);
}
template <typename T>
T* Out(const Buffers& buffers, int i) {
  return static_cast<T*>(buffers.out[i]);
}

// An index of a plan, which comes through the caller's program: one that is out of range counts as
// absent (-1), so that no plan makes us read past a buffer.
int32_t InRange(int32_t index, int64_t size) { return index < size ? index : -1; }

// Splits [0, n) into ranges of about a quarter of a MiB, though not many more than there are cores.
void AddRanges(int64_t n, size_t bytes_each, std::function<void(int64_t, int64_t)> body,
               Tasks* tasks) {
  constexpr int64_t kRangeBytes = 1 << 18;
  const int64_t most = 4 * std::max(1u, std::thread::hardware_concurrency());
  const int64_t wanted = n * static_cast<int64_t>(bytes_each) / kRangeBytes;
  const int64_t count = std::clamp<int64_t>(wanted, 1, std::min(most, std::max<int64_t>(n, 1)));
  for (int64_t i = 0; i < count; ++i) {
    tasks->push_back([=] { body(n * i / count, n * (i + 1) / count); });
  }
}

// ---- From tokens to rows: dispatch and the gradient of combine.

const char* Tokens(const Payload& layout, const Source& source) {
  return source.local != nullptr ? In<char>(*source.local, 0)
                                 : source.payload + layout.TokensOffset();
}

// Where dispatch puts the scales of FP8 rows.
constexpr int kRowScales = 9;

// One row of the expert buffer: which source it comes from, and which token of it.
struct RowOrigin {
  int64_t source;
  int64_t token;
  int64_t choice;  // within the source
};

RowOrigin OriginOf(const CallShape& shape, int32_t row_source) {
  const int64_t source = row_source / shape.num_choices();
  const int64_t choice = row_source % shape.num_choices();
  return {source, choice / shape.top_k, choice};
}

PlanOutputs DispatchPlan(const Buffers& own) {
  return {Out<int32_t>(own, 2), Out<int32_t>(own, 3), Out<int32_t>(own, 4), Out<int32_t>(own, 5),
          Out<int32_t>(own, 6), Out<int32_t>(own, 7), Out<int32_t>(own, 8)};
}

// Tokens of an FP8 wire, as rows.
class QuantizedTokens {
 public:
  explicit QuantizedTokens(const CallShape& shape)
      : shape_(shape),
        math_(*WireMathFor(shape.dtype)),
        layout_(Operation::kDispatch, shape),
        codes_(shape.dim),
        scales_(shape.num_scales()) {}

  // Row `r` of `own` becomes that token. One of this process is quantised here, as it would have
  // been on its way to another.
  void Write(const Source& source, int64_t token, const Buffers& own, int64_t r) {
    const uint8_t* codes = codes_.data();
    const float* scales = scales_.data();
    if (source.local != nullptr) {
      math_.quantize(In<char>(*source.local, 0) + token * shape_.row_bytes(), shape_.dim,
                     shape_.wire == kWirePowerOfTwo, codes_.data(), scales_.data());
    } else {
      codes = reinterpret_cast<const uint8_t*>(source.payload + layout_.TokensOffset()) +
              token * shape_.dim;
      scales = reinterpret_cast<const float*>(source.payload + layout_.ScalesOffset()) +
               token * shape_.num_scales();
    }
    if (shape_.fp8_rows) {
      HandOver(codes, scales, shape_.dim, Out<uint8_t>(own, 0) + r * shape_.dim,
               Out<float>(own, kRowScales) + r * shape_.num_scales());
    } else {
      math_.dequantize(codes, scales, shape_.dim, Out<char>(own, 0) + r * shape_.row_bytes());
    }
  }

 private:
  const CallShape& shape_;
  const WireMath& math_;
  const Payload layout_;
  std::vector<uint8_t> codes_;
  std::vector<float> scales_;
};

void CopyRows(const CallShape& shape, const Buffers& own, const std::vector<Source>& sources,
              int64_t begin, int64_t end) {
  const Payload layout(Operation::kDispatch, shape);
  const bool quantized = shape.wire != kWirePlain;
  const size_t bytes = shape.fp8_rows ? shape.dim : shape.row_bytes();
  QuantizedTokens tokens(shape);
  const int32_t* row_source = DispatchPlan(own).row_source;
  char* rows = Out<char>(own, 0);
  float* row_weights = Out<float>(own, 1);
  const int64_t used = std::clamp<int64_t>(*DispatchPlan(own).num_rows, begin, end);
  for (int64_t r = begin; r < used; ++r) {
    const RowOrigin origin = OriginOf(shape, row_source[r]);
    const Source& source = sources[origin.source];
    if (quantized) {
      tokens.Write(source, origin.token, own, r);
    } else {
      std::memcpy(rows + r * bytes, Tokens(layout, source) + origin.token * bytes, bytes);
    }
    const float* weights =
        source.local != nullptr
            ? In<float>(*source.local, 2)
            : reinterpret_cast<const float*>(source.payload + layout.ChoicesOffset());
    row_weights[r] = weights[origin.choice];
  }
  FillZero(rows + used * bytes, (end - used) * bytes);
  std::fill(row_weights + used, row_weights + end, 0.0f);
  if (!shape.fp8_rows) return;
  float* scales = Out<float>(own, kRowScales);
  std::fill(scales + used * shape.num_scales(), scales + end * shape.num_scales(), 0.0f);
}

void WriteQuantized(const CallShape& shape, const Buffers& own, char* payload) {
  const Payload layout(Operation::kDispatch, shape);
  const WireMath& math = *WireMathFor(shape.dtype);
  auto* codes = reinterpret_cast<uint8_t*>(payload + layout.TokensOffset());
  auto* scales = reinterpret_cast<float*>(payload + layout.ScalesOffset());
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    math.quantize(In<char>(own, 0) + t * shape.row_bytes(), shape.dim,
                  shape.wire == kWirePowerOfTwo, codes + t * shape.dim,
                  scales + t * shape.num_scales());
  }
}

Work DispatchWork(const CallShape& shape, int64_t rank, const Buffers& own,
                  const std::vector<Source>& sources) {
  Work work;
  work.first.push_back([&own, &sources, shape, rank] {
    const Payload layout(Operation::kDispatch, shape);
    std::vector<const int32_t*> ids;
    for (const Source& source : sources) {
      ids.push_back(source.local != nullptr
                        ? In<int32_t>(*source.local, 1)
                        : reinterpret_cast<const int32_t*>(source.payload + layout.IdsOffset()));
    }
    BuildPlan(shape, rank, ids, DispatchPlan(own));
  });
  AddRanges(
      shape.capacity, shape.row_bytes(),
      [&own, &sources, shape](int64_t begin, int64_t end) {
        CopyRows(shape, own, sources, begin, end);
      },
      &work.second);
  return work;
}

void CombineGradRows(const CallShape& shape, const Buffers& own, const std::vector<Source>& sources,
                     int64_t begin, int64_t end) {
  const Payload layout(Operation::kCombineGrad, shape);
  const RowMath& math = *RowMathFor(shape.dtype);
  const size_t bytes = shape.row_bytes();
  const char* expert_rows = In<char>(own, 1);
  const float* row_weights = In<float>(own, 2);
  const int32_t* row_source = In<int32_t>(own, 3);
  char* d_rows = Out<char>(own, 0);
  float* d_row_weights = Out<float>(own, 1);
  const int64_t num_sources = shape.num_devices * shape.num_choices();
  int64_t used = end;
  while (used > begin && InRange(row_source[used - 1], num_sources) < 0) --used;
  FillZero(d_rows + used * bytes, (end - used) * bytes);
  std::fill(d_row_weights + used, d_row_weights + end, 0.0f);
  for (int64_t r = begin; r < used; ++r) {
    if (InRange(row_source[r], num_sources) < 0) {
      std::memset(d_rows + r * bytes, 0, bytes);
      d_row_weights[r] = 0.0f;
      continue;
    }
    const RowOrigin origin = OriginOf(shape, row_source[r]);
    const char* d_token = Tokens(layout, sources[origin.source]) + origin.token * bytes;
    math.scale(d_token, row_weights[r], d_rows + r * bytes, shape.dim);
    d_row_weights[r] = math.dot(d_token, expert_rows + r * bytes, shape.dim);
  }
}

// ---- From rows to tokens: combine and the gradient of dispatch.

struct Rows {
  const char* rows;          // [C, D]
  const float* row_weights;  // [C] factors, or null for all one
  const float* row_values;   // [C] to be sent to the choices, or null
  const int32_t* row_map;    // [R, T, K]
};

Rows RowsOf(Operation op, const Buffers& buffers) {
  const float* scalars = In<float>(buffers, 1);
  const bool combine = op == Operation::kCombine;
  return {In<char>(buffers, 0), combine ? scalars : nullptr, combine ? nullptr : scalars,
          In<int32_t>(buffers, 2)};
}

// The partial sum of one token's rows on one device. False if the token has none there, and then
// `sum` is zero.
bool PartialSum(const CallShape& shape, const RowMath& math, const Rows& from,
                const int32_t* choice_rows, float* sum) {
  bool any = false;
  for (int64_t k = 0; k < shape.top_k; ++k) {
    const int32_t row = InRange(choice_rows[k], shape.capacity);
    if (row < 0) continue;
    if (!any) std::fill_n(sum, shape.dim, 0.0f);
    any = true;
    const float weight = from.row_weights != nullptr ? from.row_weights[row] : 1.0f;
    math.add_scaled(from.rows + row * shape.row_bytes(), weight, sum, shape.dim);
  }
  return any;
}

void WritePartialSums(Operation op, const CallShape& shape, const Buffers& own, int64_t destination,
                      char* part) {
  const Payload layout(op, shape);
  const RowMath& math = *RowMathFor(shape.dtype);
  const Rows from = RowsOf(op, own);
  const int32_t* map = from.row_map + destination * shape.num_choices();
  char* sums = part + layout.TokensOffset();
  float* values = reinterpret_cast<float*>(part + layout.ChoicesOffset());
  std::vector<float> sum(shape.dim);
  for (int64_t t = 0; t < shape.num_tokens; ++t) {
    if (!PartialSum(shape, math, from, map + t * shape.top_k, sum.data())) {
      std::fill(sum.begin(), sum.end(), 0.0f);
    }
    math.store(sum.data(), sums + t * shape.row_bytes(), shape.dim);
  }
  if (from.row_values == nullptr) return;
  for (int64_t c = 0; c < shape.num_choices(); ++c) {
    const int32_t row = InRange(map[c], shape.capacity);
    values[c] = row >= 0 ? from.row_values[row] : 0.0f;
  }
}

void SumTokens(Operation op, const CallShape& shape, int64_t rank, const Buffers& own,
               const std::vector<Source>& sources, int64_t begin, int64_t end) {
  const Payload layout(op, shape);
  const RowMath& math = *RowMathFor(shape.dtype);
  const size_t bytes = shape.row_bytes();
  std::vector<float> total(shape.dim), sum(shape.dim);
  std::vector<char> on_wire(bytes);
  for (int64_t t = begin; t < end; ++t) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t d = 0; d < shape.num_devices; ++d) {
      if (sources[d].local == nullptr) {
        math.add(sources[d].payload + layout.TokensOffset() + t * bytes, total.data(), shape.dim);
        continue;
      }
      const Rows from = RowsOf(op, *sources[d].local);
      const int32_t* choice_rows = from.row_map + (rank * shape.num_tokens + t) * shape.top_k;
      if (!PartialSum(shape, math, from, choice_rows, sum.data())) continue;
      if (d == rank) {
        for (int64_t i = 0; i < shape.dim; ++i) total[i] += sum[i];
      } else {
        math.store(sum.data(), on_wire.data(), shape.dim);
        math.add(on_wire.data(), total.data(), shape.dim);
      }
    }
    math.store(total.data(), Out<char>(own, 0) + t * bytes, shape.dim);
  }
}

// The gradients of a device's own weights: each choice's, from the device that was asked.
void CollectChoices(const CallShape& shape, int64_t rank, const Buffers& own,
                    const std::vector<Source>& sources) {
  const Payload layout(Operation::kDispatchGrad, shape);
  const int32_t* choice_device = In<int32_t>(own, 3);
  float* d_weights = Out<float>(own, 1);
  for (int64_t c = 0; c < shape.num_choices(); ++c) {
    d_weights[c] = 0.0f;
    if (choice_device[c] < 0 || choice_device[c] >= shape.num_devices) continue;
    const Source& source = sources[choice_device[c]];
    if (source.local == nullptr) {
      d_weights[c] = reinterpret_cast<const float*>(source.payload + layout.ChoicesOffset())[c];
    } else {
      const Rows from = RowsOf(Operation::kDispatchGrad, *source.local);
      const int32_t row = InRange(from.row_map[rank * shape.num_choices() + c], shape.capacity);
      if (row >= 0) d_weights[c] = from.row_values[row];
    }
  }
}

}  // namespace

size_t Payload::Bytes(size_t num_destinations) const {
  return PerDestination() ? num_destinations * PartBytes() : PartBytes();
}

void WritePayload(Operation op, const CallShape& shape, const Buffers& own,
                  const std::vector<int64_t>& destinations, char* payload) {
  const Payload layout(op, shape);
  if (op == Operation::kCombine || op == Operation::kDispatchGrad) {
    for (size_t n = 0; n < destinations.size(); ++n) {
      WritePartialSums(op, shape, own, destinations[n], payload + layout.Offset(n));
    }
    return;
  }
  if (op == Operation::kDispatch && shape.wire != kWirePlain) {
    WriteQuantized(shape, own, payload);
  } else {
    std::memcpy(payload + layout.TokensOffset(), own.in[0], shape.num_tokens * shape.row_bytes());
  }
  if (op == Operation::kDispatch) {
    std::memcpy(payload + layout.IdsOffset(), own.in[1], shape.num_choices() * sizeof(int32_t));
    std::memcpy(payload + layout.ChoicesOffset(), own.in[2], shape.num_choices() * sizeof(float));
  }
}

Work MakeWork(Operation op, const CallShape& shape, int64_t rank, const Buffers& own,
              const std::vector<Source>& sources) {
  if (op == Operation::kDispatch) return DispatchWork(shape, rank, own, sources);
  Work work;
  if (op == Operation::kCombineGrad) {
    AddRanges(
        shape.capacity, shape.row_bytes(),
        [&own, &sources, shape](int64_t begin, int64_t end) {
          CombineGradRows(shape, own, sources, begin, end);
        },
        &work.second);
    return work;
  }
  AddRanges(
      shape.num_tokens, shape.top_k * shape.row_bytes(),
      [&own, &sources, op, shape, rank](int64_t begin, int64_t end) {
        SumTokens(op, shape, rank, own, sources, begin, end);
      },
      &work.second);
  if (op == Operation::kDispatchGrad) {
    work.second.push_back(
        [&own, &sources, shape, rank] { CollectChoices(shape, rank, own, sources); });
  }
  return work;
}

}  // namespace jaxmoe

#include "xla_ffi/common/plan.h"

#include <algorithm>

namespace jaxmoe {
namespace {

// Calls visit(local expert, s, t, k) for every choice that is addressed to the device whose first
// expert is `first`, in the order (s, t, k).
template <typename Visit>
void ForEachOwn(const CallShape& shape, int64_t first, const std::vector<const int32_t*>& ids,
                Visit visit) {
  const uint64_t num_local = static_cast<uint64_t>(shape.num_local_experts);
  for (int64_t s = 0; s < shape.num_devices; ++s) {
    const int32_t* id = ids[s];
    for (int64_t t = 0; t < shape.num_tokens; ++t) {
      for (int64_t k = 0; k < shape.top_k; ++k, ++id) {
        const uint64_t local = static_cast<uint64_t>(*id - first);  // negative wraps to huge
        if (local < num_local) visit(static_cast<int64_t>(local), s, t, k);
      }
    }
  }
}

// The place of a choice in the order (k, t, s), by which choices are kept.
int64_t Priority(const CallShape& shape, int64_t s, int64_t t, int64_t k) {
  return (k * shape.num_tokens + t) * shape.num_devices + s;
}

// The priority from which on choices are dropped, given that more than `capacity` are addressed
// here.
int64_t FirstDropped(const CallShape& shape, int64_t first,
                     const std::vector<const int32_t*>& ids) {
  std::vector<int64_t> priorities;
  ForEachOwn(shape, first, ids, [&](int64_t, int64_t s, int64_t t, int64_t k) {
    priorities.push_back(Priority(shape, s, t, k));
  });
  auto cut = priorities.begin() + shape.capacity;
  std::nth_element(priorities.begin(), cut, priorities.end());
  return *cut;
}

void DescribeOwnChoices(const CallShape& shape, const int32_t* ids, const PlanOutputs& out) {
  int32_t num_invalid = 0;
  for (int64_t i = 0; i < shape.num_choices(); ++i) {
    const bool valid = ids[i] >= 0 && ids[i] < shape.num_experts;
    out.choice_device[i] = valid ? static_cast<int32_t>(ids[i] / shape.num_local_experts) : -1;
    num_invalid += !valid && ids[i] != -1;
  }
  *out.num_invalid = num_invalid;
}

}  // namespace

void BuildPlan(const CallShape& shape, int64_t rank, const std::vector<const int32_t*>& ids,
               const PlanOutputs& out) {
  DescribeOwnChoices(shape, ids[rank], out);
  const int64_t first = rank * shape.num_local_experts;
  std::fill_n(out.group_sizes, shape.num_local_experts, 0);
  int64_t num_addressed = 0;
  ForEachOwn(shape, first, ids, [&](int64_t expert, int64_t, int64_t, int64_t) {
    ++out.group_sizes[expert];
    ++num_addressed;
  });

  const bool overflow = num_addressed > shape.capacity;
  const int64_t first_dropped = overflow ? FirstDropped(shape, first, ids) : 0;
  const auto dropped = [&](int64_t s, int64_t t, int64_t k) {
    return overflow && Priority(shape, s, t, k) >= first_dropped;
  };
  if (overflow) {
    ForEachOwn(shape, first, ids, [&](int64_t expert, int64_t s, int64_t t, int64_t k) {
      out.group_sizes[expert] -= dropped(s, t, k);
    });
  }

  std::vector<int32_t> next(shape.num_local_experts);
  int32_t num_rows = 0;
  for (int64_t e = 0; e < shape.num_local_experts; ++e) {
    next[e] = num_rows;
    num_rows += out.group_sizes[e];
  }
  std::fill_n(out.row_map, shape.num_devices * shape.num_choices(), -1);
  ForEachOwn(shape, first, ids, [&](int64_t expert, int64_t s, int64_t t, int64_t k) {
    if (dropped(s, t, k)) return;
    const int64_t choice = (s * shape.num_tokens + t) * shape.top_k + k;
    const int32_t row = next[expert]++;
    out.row_map[choice] = row;
    out.row_source[row] = static_cast<int32_t>(choice);
  });
  std::fill(out.row_source + num_rows, out.row_source + shape.capacity, -1);
  *out.num_rows = num_rows;
  *out.num_dropped = static_cast<int32_t>(num_addressed - num_rows);
}

}  // namespace jaxmoe

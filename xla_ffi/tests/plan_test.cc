// BuildPlan against plans worked out by hand, for 2 devices with 2 experts each and 2 tokens with 2
// choices each (choice (s, t, k) has the index (s * 2 + t) * 2 + k), and against the rules applied
// literally to random inputs.

#include "xla_ffi/common/plan.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "xla_ffi/tests/check.h"

namespace jaxmoe {
namespace {

using Ints = std::vector<int32_t>;

// No plan holds this value: a word that nobody wrote shows.
constexpr int32_t kPoison = -77;

struct Plan {
  Ints group_sizes, row_map, row_source, choice_device;
  int32_t num_rows = kPoison, num_dropped = kPoison, num_invalid = kPoison;
};

Plan Poisoned(const CallShape& shape) {
  Plan plan;
  plan.group_sizes.assign(shape.num_local_experts, kPoison);
  plan.row_map.assign(shape.num_devices * shape.num_choices(), kPoison);
  plan.row_source.assign(shape.capacity, kPoison);
  plan.choice_device.assign(shape.num_choices(), kPoison);
  return plan;
}

Plan Build(const CallShape& shape, int64_t rank, const std::vector<Ints>& ids) {
  Plan plan = Poisoned(shape);
  std::vector<const int32_t*> pointers;
  for (const Ints& of_device : ids) pointers.push_back(of_device.data());
  BuildPlan(shape, rank, pointers,
            {plan.group_sizes.data(), &plan.num_rows, &plan.num_dropped, &plan.num_invalid,
             plan.row_map.data(), plan.row_source.data(), plan.choice_device.data()});
  return plan;
}

Plan Build(int64_t rank, int64_t capacity, const Ints& ids_of_0, const Ints& ids_of_1) {
  CallShape shape{};
  shape.top_k = 2;
  shape.num_tokens = static_cast<int64_t>(ids_of_0.size()) / shape.top_k;
  shape.capacity = capacity;
  shape.num_devices = 2;
  shape.num_experts = 4;
  shape.num_local_experts = 2;
  return Build(shape, rank, {ids_of_0, ids_of_1});
}

const Ints kIds0 = {0, 2, 1, -1};
const Ints kIds1 = {1, 0, 7, 2};  // 7 is no expert

TEST(RowsAreOrderedByExpertSourceTokenChoice) {
  const Plan plan = Build(0, 6, kIds0, kIds1);
  CHECK_EQ(plan.group_sizes, (Ints{2, 2}));
  CHECK_EQ(plan.row_source, (Ints{0, 5, 2, 4, -1, -1}));
  CHECK_EQ(plan.row_map, (Ints{0, -1, 2, -1, 3, 1, -1, -1}));
  CHECK_EQ(plan.num_rows, 4);
  CHECK_EQ(plan.num_dropped, 0);
}

TEST(InvalidIdsAreCountedByTheirOwnDevice) {
  const Plan plan0 = Build(0, 6, kIds0, kIds1);
  CHECK_EQ(plan0.choice_device, (Ints{0, 1, 0, -1}));
  CHECK_EQ(plan0.num_invalid, 0);
  const Plan plan1 = Build(1, 6, kIds0, kIds1);
  CHECK_EQ(plan1.choice_device, (Ints{0, 0, -1, 1}));
  CHECK_EQ(plan1.num_invalid, 1);
  CHECK_EQ(plan1.group_sizes, (Ints{2, 0}));
  CHECK_EQ(plan1.row_source, (Ints{1, 7, -1, -1, -1, -1}));
}

TEST(OverflowDropsTheLastChoicesFirst) {
  const Plan plan =
      Build(0, 3, kIds0, kIds1);  // choice 5 is a second choice, the others first ones
  CHECK_EQ(plan.group_sizes, (Ints{1, 2}));
  CHECK_EQ(plan.row_source, (Ints{0, 2, 4}));
  CHECK_EQ(plan.row_map, (Ints{0, -1, 1, -1, 2, -1, -1, -1}));
  CHECK_EQ(plan.num_rows, 3);
  CHECK_EQ(plan.num_dropped, 1);
}

TEST(OverflowDropsLaterTokensBeforeEarlierOnesOfAnySource) {
  const Plan plan = Build(0, 2, kIds0, kIds1);  // both first tokens stay
  CHECK_EQ(plan.row_source, (Ints{0, 4}));
  CHECK_EQ(plan.num_dropped, 2);
}

TEST(NoCapacityDropsEverything) {
  const Plan plan = Build(0, 0, kIds0, kIds1);
  CHECK_EQ(plan.group_sizes, (Ints{0, 0}));
  CHECK_EQ(plan.row_map, Ints(8, -1));
  CHECK_EQ(plan.num_rows, 0);
  CHECK_EQ(plan.num_dropped, 4);
}

TEST(NoTokensGiveAnEmptyPlan) {
  const Plan plan = Build(1, 2, {}, {});
  CHECK_EQ(plan.group_sizes, (Ints{0, 0}));
  CHECK_EQ(plan.row_source, (Ints{-1, -1}));
  CHECK_EQ(plan.num_rows, 0);
  CHECK_EQ(plan.num_dropped, 0);
  CHECK_EQ(plan.num_invalid, 0);
}

// The same plan by sorting: choices by (k, t, s) to find those that stay, these by (expert, s, t,
// k).
Plan Expected(const CallShape& shape, int64_t rank, const std::vector<Ints>& ids) {
  struct Choice {
    int64_t expert, s, t, k, index;
  };
  Plan plan = Poisoned(shape);
  std::vector<Choice> here;
  plan.num_invalid = 0;
  for (int64_t s = 0; s < shape.num_devices; ++s) {
    for (int64_t c = 0; c < shape.num_choices(); ++c) {
      const int64_t id = ids[s][c];
      const bool valid = 0 <= id && id < shape.num_experts;
      const int64_t device = valid ? id / shape.num_local_experts : -1;
      if (s == rank) {
        plan.choice_device[c] = static_cast<int32_t>(device);
        plan.num_invalid += !valid && id != -1;
      }
      if (device != rank) continue;
      here.push_back({id % shape.num_local_experts, s, c / shape.top_k, c % shape.top_k,
                      s * shape.num_choices() + c});
    }
  }
  std::sort(here.begin(), here.end(), [](const Choice& a, const Choice& b) {
    return std::tie(a.k, a.t, a.s) < std::tie(b.k, b.t, b.s);
  });
  const size_t kept = std::min(here.size(), static_cast<size_t>(shape.capacity));
  plan.num_dropped = static_cast<int32_t>(here.size() - kept);
  here.resize(kept);
  std::sort(here.begin(), here.end(), [](const Choice& a, const Choice& b) {
    return std::tie(a.expert, a.s, a.t, a.k) < std::tie(b.expert, b.s, b.t, b.k);
  });
  plan.num_rows = static_cast<int32_t>(kept);
  std::fill(plan.group_sizes.begin(), plan.group_sizes.end(), 0);
  std::fill(plan.row_map.begin(), plan.row_map.end(), -1);
  std::fill(plan.row_source.begin(), plan.row_source.end(), -1);
  for (size_t row = 0; row < kept; ++row) {
    ++plan.group_sizes[here[row].expert];
    plan.row_map[here[row].index] = static_cast<int32_t>(row);
    plan.row_source[row] = static_cast<int32_t>(here[row].index);
  }
  return plan;
}

TEST(RandomPlansFollowTheRules) {
  std::mt19937 random(1);
  const auto draw = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  for (int repeat = 0; repeat < 500; ++repeat) {
    CallShape shape{};
    shape.num_devices = draw(1, 5);
    shape.num_local_experts = draw(1, 4);
    shape.num_experts = shape.num_devices * shape.num_local_experts;
    shape.num_tokens = draw(0, 9);
    shape.top_k = draw(1, 4);
    shape.capacity = draw(0, shape.num_devices * shape.num_choices());
    std::vector<Ints> ids(shape.num_devices, Ints(shape.num_choices()));
    // Some of the draws crowd a few experts.
    const int64_t highest = repeat % 3 == 0 ? shape.num_experts / 2 : shape.num_experts + 1;
    for (Ints& of_device : ids) {
      for (int32_t& id : of_device) id = static_cast<int32_t>(draw(-2, highest));
    }
    for (int64_t rank = 0; rank < shape.num_devices; ++rank) {
      const Plan got = Build(shape, rank, ids), want = Expected(shape, rank, ids);
      CHECK_EQ(got.group_sizes, want.group_sizes);
      CHECK_EQ(got.row_map, want.row_map);
      CHECK_EQ(got.row_source, want.row_source);
      CHECK_EQ(got.choice_device, want.choice_device);
      CHECK_EQ((Ints{got.num_rows, got.num_dropped, got.num_invalid}),
               (Ints{want.num_rows, want.num_dropped, want.num_invalid}));
    }
  }
}

TEST(ExtremeIdsAreInvalid) {
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
  const Plan plan = Build(1, 8, {kMin, kMax, 4, -2}, {kMin, kMax, 4, -2});
  CHECK_EQ(plan.group_sizes, (Ints{0, 0}));
  CHECK_EQ(plan.choice_device, Ints(4, -1));
  CHECK_EQ(plan.num_invalid, 4);
  CHECK_EQ(plan.num_dropped, 0);
}

}  // namespace
}  // namespace jaxmoe

// BuildPlan against plans worked out by hand, for 2 devices with 2 experts each and 2 tokens with 2
// choices each. Choice (s, t, k) has the index (s * 2 + t) * 2 + k.

#include "xla_ffi/common/plan.h"

#include <cstdint>
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

Plan Build(int64_t rank, int64_t capacity, const Ints& ids_of_0, const Ints& ids_of_1) {
  CallShape shape{};
  shape.top_k = 2;
  shape.num_tokens = static_cast<int64_t>(ids_of_0.size()) / shape.top_k;
  shape.capacity = capacity;
  shape.num_devices = 2;
  shape.num_experts = 4;
  shape.num_local_experts = 2;
  Plan plan;
  plan.group_sizes.assign(shape.num_local_experts, kPoison);
  plan.row_map.assign(shape.num_devices * shape.num_choices(), kPoison);
  plan.row_source.assign(capacity, kPoison);
  plan.choice_device.assign(shape.num_choices(), kPoison);
  BuildPlan(shape, rank, {ids_of_0.data(), ids_of_1.data()},
            {plan.group_sizes.data(), &plan.num_rows, &plan.num_dropped, &plan.num_invalid,
             plan.row_map.data(), plan.row_source.data(), plan.choice_device.data()});
  return plan;
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

}  // namespace
}  // namespace jaxmoe

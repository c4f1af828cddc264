// The GPU's group kernels in the emulator, against the CPU's functions, which test_group.cpp checks.

#include <cstring>
#include <random>
#include <vector>

#include "../group_algorithm.h"
#include "check.h"
#include "emulator.h"

namespace {

using namespace grpo_fast;
using testing::Cluster;

struct Rewards {
  int64_t num, kinds;
  std::vector<double> values, weights;
  std::vector<int64_t> order, offsets;

  // Groups of 1 to 100 in a random order; among the rewards missing ones, groups that agree, a completion with none.
  Rewards(int64_t num_completions, int64_t num_rewards, uint64_t seed) : num(num_completions), kinds(num_rewards) {
    std::mt19937_64 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < num * kinds; ++i) values.push_back(random() % 7 == 0 ? NAN : float(normal(random)));
    for (int64_t k = 0; k < kinds; ++k) weights.push_back(0.5 + double(k)), values[size_t(k)] = NAN;
    for (int64_t n = 0; n < num; ++n) order.push_back(n);
    std::shuffle(order.begin(), order.end(), random);
    offsets.push_back(0);
    while (offsets.back() < num) {
      const int64_t begin = offsets.back(), size = 1 + int64_t(random() % (offsets.size() % 3 == 0 ? 100 : 8));
      offsets.push_back(std::min(num, begin + size));
      for (int64_t i = begin; random() % 3 == 0 && i < offsets.back(); ++i) {
        for (int64_t k = 0; k < kinds; ++k) values[size_t(order[size_t(i)] * kinds + k)] = 0.7f;
      }
    }
  }
};

template <typename Real>
void check_advantages(const Rewards& given, const Groups& groups, AdvantageScale scale, RewardAggregation aggregation) {
  const std::vector<Real> rewards(given.values.begin(), given.values.end());
  std::vector<Real> expected(size_t(given.num)), found(size_t(given.num), Real(NAN));
  group_advantages(rewards.data(), given.num, given.kinds, given.weights.data(), groups, scale, aggregation,
                   expected.data());
  const AdvantageTask<Real> task{rewards.data(), given.num, given.kinds, given.weights.data(), groups, scale,
                                 aggregation, found.data()};
  testing::emulate({1, 1, 64, int(sizeof(double)) * kWarp}, 3,
                   [&](Cluster::Lane& lane) { advantages_block(lane, task, lane.shared<double>(0)); });
  const double unit = sizeof(Real) == 4 ? 1e-6 : 1e-14;  // a sum in another order may round a mean the other way
  for (int64_t n = 0; n < given.num; ++n) {
    const double wanted = expected[size_t(n)], got = found[size_t(n)];
    const bool exact = aggregation == RewardAggregation::kNormalizeThenSum || (got == 0) == (wanted == 0);
    CHECK(exact && std::abs(got - wanted) <= unit * (1 + std::abs(wanted)),
          "scale %d, aggregation %d, completion %d: %.9g, on the CPU %.9g", int(scale), int(aggregation), int(n), got,
          wanted);
  }
}

TEST(gpu_advantages_are_the_cpus) {
  for (const int64_t num : {1, 5, 240}) {
    for (const int64_t kinds : {1, 3}) {
      const Rewards given(num, kinds, uint64_t(num + kinds));
      Groups ragged, even;
      ragged.order = given.order.data(), ragged.offsets = given.offsets.data();
      ragged.num_groups = int64_t(given.offsets.size()) - 1;
      even.group_size = num % 8 == 0 ? 8 : num;
      for (int scale = 0; scale < 4; ++scale) {
        const Groups& groups = scale % 2 == kinds % 3 % 2 ? even : ragged;
        check_advantages<float>(given, groups, AdvantageScale(scale), RewardAggregation::kSumThenNormalize);
      }
      check_advantages<double>(given, ragged, AdvantageScale::kLeaveOneOut, RewardAggregation::kSumThenNormalize);
      check_advantages<float>(given, ragged, AdvantageScale::kGroup, RewardAggregation::kNormalizeThenSum);
      check_advantages<double>(given, even, AdvantageScale::kBatch, RewardAggregation::kNormalizeThenSum);
    }
  }
}

TEST(gpu_advantages_are_finite) {
  const std::vector<float> rewards{HUGE_VALF, 1.0f, 2.0f, -HUGE_VALF};
  std::vector<float> found(4);
  AdvantageTask<float> task{};
  task.rewards = rewards.data(), task.num_completions = 4, task.num_rewards = 1;
  task.scale = AdvantageScale::kNone, task.advantages = found.data();
  task.groups.group_size = 2;
  testing::emulate({1, 1, 64, int(sizeof(double)) * kWarp}, 3,
                   [&](Cluster::Lane& lane) { advantages_block(lane, task, lane.shared<double>(0)); });
  for (const float value : found) CHECK(std::isfinite(value), "%g", double(value));
}

TEST(gpu_token_rows_are_the_cpus) {
  std::mt19937_64 random(5);
  const std::vector<std::vector<int64_t>> shapes{{1}, {0, 3, 0}, {300, 1, 0, 64, 31}, {64, 64}};
  for (const std::vector<int64_t>& lengths : shapes) {
    std::vector<int64_t> cu_seqlens{0};
    for (const int64_t length : lengths) cu_seqlens.push_back(cu_seqlens.back() + length);
    const size_t tokens = size_t(cu_seqlens.back()), sequences = lengths.size();
    std::vector<uint8_t> mask(tokens);
    std::vector<float> advantages(tokens + sequences), importance(tokens);
    for (uint8_t& bit : mask) bit = random() % 3 != 0;
    for (float& value : advantages) value = random() % 3 == 0 ? 0.0f : float(random() % 5) - 2.5f;
    for (float& value : importance) value = random() % 4 == 0 ? 0.0f : 1.5f;
    for (int kind = 0; kind < 9; ++kind) {
      TokenBatch<float> batch;
      batch.num_tokens = int64_t(tokens), batch.num_sequences = int64_t(sequences);
      batch.cu_seqlens = cu_seqlens.data(), batch.advantages = advantages.data();
      batch.mask = kind % 4 == 3 ? nullptr : mask.data();
      batch.advantages_per_token = kind % 2 == 1;
      batch.importance = kind % 5 == 0 ? importance.data() : nullptr;
      const auto aggregation = TokenAggregation(kind % 3);
      const bool every_row = kind % 7 == 0, normalized = kind % 8 == 0;
      struct Results {
        std::vector<float> weights, advantages;
        std::vector<uint8_t> active;
        std::vector<int64_t> rows;
        TokenRows<float> out() { return {weights.data(), advantages.data(), active.data(), rows.data()}; }
      };
      const Results blank{std::vector<float>(tokens, NAN), std::vector<float>(tokens, NAN),
                          std::vector<uint8_t>(tokens, 7), std::vector<int64_t>(tokens, -1)};
      Results wanted = blank, found = blank;
      const int64_t count = token_rows(batch, aggregation, normalized ? std::optional<double>(37.0) : std::nullopt,
                                       every_row, wanted.out());
      int64_t num_active = -1;
      std::vector<int64_t> counts(2 * sequences, -1);
      const TokenTask task{batch,
                           aggregation,
                           {nullptr, normalized ? 37.0f : NAN},
                           every_row,
                           found.out(),
                           &num_active,
                           counts.data()};
      const testing::LaunchSize size{int(sequences), 1, 64, 2 * kWarp * int(sizeof(int64_t))};
      testing::emulate(size, 7, [&](Cluster::Lane& lane) { count_sequence(lane, task, lane.shared<int64_t>(0)); });
      testing::emulate(size, 8, [&](Cluster::Lane& lane) {
        write_sequence(lane, task, lane.shared<int64_t>(0), lane.shared<int>(kWarp * int(sizeof(int64_t))));
      });
      CHECK(num_active == count, "kind %d: %d active rows, on the CPU %d", kind, int(num_active), int(count));
      CHECK(found.active == wanted.active && found.rows == wanted.rows, "kind %d: other rows", kind);
      CHECK(found.weights == wanted.weights && found.advantages == wanted.advantages, "kind %d: other weights", kind);
    }
  }
}

}  // namespace

// group_cpu.h against plain loops that share no code with it.

#include "../group_cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#include <algorithm>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "check.h"

namespace {

using grpo_fast::AdvantageScale;
using grpo_fast::Groups;
using grpo_fast::RewardAggregation;
using grpo_fast::TokenAggregation;

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr AdvantageScale kScales[] = {AdvantageScale::kGroup, AdvantageScale::kBatch, AdvantageScale::kNone,
                                      AdvantageScale::kLeaveOneOut};

std::vector<double> existing(const std::vector<double>& values) {
  std::vector<double> out;
  for (const double value : values) {
    if (!std::isnan(value)) out.push_back(value);
  }
  return out;
}

double mean_of(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : existing(values)) sum += value;
  return existing(values).empty() ? 0.0 : sum / double(existing(values).size());
}

double deviation_of(const std::vector<double>& values) {
  double squares = 0;
  const double mean = mean_of(values);
  for (const double value : existing(values)) squares += std::pow(value - mean, 2);
  return existing(values).size() < 2 ? 0.0 : std::sqrt(squares / double(existing(values).size() - 1));
}

// All of `values` whose completion is in the group of n.
std::vector<double> mates(const std::vector<double>& values, const std::vector<int>& group, size_t n) {
  std::vector<double> out;
  for (size_t i = 0; i < values.size(); ++i) {
    if (group[i] == group[n]) out.push_back(values[i]);
  }
  return out;
}

std::vector<double> plain_advantages(const std::vector<double>& rewards, size_t kinds,
                                     const std::vector<double>& weights, const std::vector<int>& group,
                                     AdvantageScale scale, RewardAggregation aggregation) {
  const size_t num = group.size();
  std::vector<double> total(num, kNaN), out(num);
  for (size_t k = 0; k < kinds; ++k) {
    std::vector<double> column(num);
    for (size_t n = 0; n < num; ++n) column[n] = rewards[n * kinds + k];
    for (size_t n = 0; n < num; ++n) {
      if (std::isnan(column[n])) continue;
      const std::vector<double> peers = mates(column, group, n);
      double part = column[n];
      if (aggregation == RewardAggregation::kNormalizeThenSum)
        part = (part - mean_of(peers)) / (deviation_of(peers) + 1e-4);
      total[n] = (std::isnan(total[n]) ? 0.0 : total[n]) + weights[k] * part;
    }
  }
  for (size_t n = 0; n < num; ++n) {
    const std::vector<double> peers = mates(total, group, n);
    if (std::isnan(total[n]) || (scale == AdvantageScale::kLeaveOneOut && existing(peers).size() < 2)) {
      out[n] = 0;
    } else if (aggregation == RewardAggregation::kNormalizeThenSum) {
      out[n] = (total[n] - mean_of(total)) / (deviation_of(total) + 1e-4);
    } else if (scale == AdvantageScale::kLeaveOneOut) {
      const double count = double(existing(peers).size());
      out[n] = total[n] - (mean_of(peers) * count - total[n]) / (count - 1);
    } else {
      const double deviation = scale == AdvantageScale::kGroup ? deviation_of(peers) : deviation_of(total);
      out[n] = (total[n] - mean_of(peers)) / (scale == AdvantageScale::kNone ? 1.0 : deviation + 1e-4);
    }
  }
  return out;
}

// Groups in any order: completions sorted by group, and where each group begins.
struct Sorted {
  std::vector<int64_t> order, offsets;

  explicit Sorted(const std::vector<int>& group) : order(group.size()), offsets{0} {
    for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return group[size_t(a)] < group[size_t(b)]; });
    for (size_t i = 0; i < order.size(); ++i) {
      if (i + 1 == order.size() || group[size_t(order[i])] != group[size_t(order[i + 1])])
        offsets.push_back(int64_t(i) + 1);
    }
  }

  Groups groups() const {
    Groups out;
    out.order = order.data();
    out.offsets = offsets.data();
    out.num_groups = int64_t(offsets.size()) - 1;
    return out;
  }
};

template <typename Real>
void compare_advantages(const std::vector<double>& rewards, size_t kinds, const std::vector<double>& weights,
                        const std::vector<int>& group, const Groups& groups, double tolerance) {
  const std::vector<Real> narrow(rewards.begin(), rewards.end());
  const std::vector<double> rounded(narrow.begin(), narrow.end());
  std::vector<Real> got(group.size(), Real(-77));
  for (const RewardAggregation aggregation :
       {RewardAggregation::kSumThenNormalize, RewardAggregation::kNormalizeThenSum}) {
    for (const AdvantageScale scale : kScales) {
      const bool divides = scale == AdvantageScale::kGroup || scale == AdvantageScale::kBatch;
      if (aggregation == RewardAggregation::kNormalizeThenSum && !divides) continue;
      grpo_fast::group_advantages(narrow.data(), int64_t(group.size()), int64_t(kinds), weights.data(), groups, scale,
                                  aggregation, got.data());
      const std::vector<double> expected = plain_advantages(rounded, kinds, weights, group, scale, aggregation);
      for (size_t n = 0; n < group.size(); ++n) {
        CHECK(std::abs(double(got[n]) - expected[n]) <= tolerance,
              "scale %d, aggregation %d, K %zu, n %zu: %.10g, not %.10g", int(scale), int(aggregation), kinds, n,
              double(got[n]), expected[n]);
      }
    }
  }
}

TEST(advantages_match_plain_loops) {
  std::mt19937_64 random(3);
  std::normal_distribution<double> normal;
  const std::vector<int> unequal = {7, 7, 2, 7, 2, 2, 9, 2, 7, 7, 4, 4, 4, 2, 7, 4, 4, 4, 4, 7, 2, 2, 4, 7};
  for (const size_t kinds : {size_t(1), size_t(3)}) {
    for (const bool missing : {false, true}) {
      std::vector<double> rewards(unequal.size() * kinds), weights = {1.0, 0.5, -2.0};
      weights.resize(kinds);
      for (double& reward : rewards) {
        reward = normal(random);
        if (missing && random() % 3 == 0) reward = kNaN;
      }
      std::vector<int> equal(unequal.size());
      for (size_t n = 0; n < equal.size(); ++n) equal[n] = int(n / 6);
      Groups blocks;
      blocks.group_size = 6;
      const Sorted sorted(unequal);
      compare_advantages<double>(rewards, kinds, weights, equal, blocks, 1e-10);
      compare_advantages<double>(rewards, kinds, weights, unequal, sorted.groups(), 1e-10);
      compare_advantages<float>(rewards, kinds, weights, equal, blocks, 1e-5);
      compare_advantages<float>(rewards, kinds, weights, unequal, sorted.groups(), 1e-5);
    }
  }
}

template <typename Real>
void check_agreeing_groups() {
  // 0.1, 1/3 and 0.7 are not binary fractions: a mean taken as sum / count would miss them by an ulp.
  std::vector<Real> rewards(21, Real(0.1)), got(21);
  std::fill(rewards.begin() + 7, rewards.begin() + 14, Real(1) / 3);
  std::fill(rewards.begin() + 14, rewards.end(), Real(0.7));
  rewards[15] = 0;
  Groups groups;
  groups.group_size = 7;
  for (const AdvantageScale scale : kScales) {
    grpo_fast::group_advantages(rewards.data(), 21, 1, nullptr, groups, scale, RewardAggregation::kSumThenNormalize,
                                got.data());
    for (size_t n = 0; n < 21; ++n) {
      CHECK((got[n] == 0) == (n < 14), "scale %d, n %zu: %g", int(scale), n, double(got[n]));
    }
  }
}

TEST(agreeing_groups_are_exactly_zero) {
  check_agreeing_groups<float>();
  check_agreeing_groups<double>();
}

TEST(nothing_to_compare_is_zero) {
  const std::vector<double> rewards = {5.0, kNaN, kNaN, kNaN};
  std::vector<double> got(4, -77.0);
  Groups groups;
  for (const int64_t size : {int64_t(1), int64_t(4)}) {
    groups.group_size = size;
    for (const AdvantageScale scale : kScales) {
      grpo_fast::group_advantages(rewards.data(), 4, 1, nullptr, groups, scale, RewardAggregation::kSumThenNormalize,
                                  got.data());
      for (size_t n = 0; n < 4; ++n) CHECK(got[n] == 0, "size %d, n %zu: %g", int(size), n, got[n]);
    }
  }
  groups.group_size = 4;
  const double* none = nullptr;
  grpo_fast::group_advantages<double>(none, 0, 1, nullptr, groups, AdvantageScale::kGroup,
                                      RewardAggregation::kSumThenNormalize, nullptr);
}

TEST(malformed_groups_are_refused) {
  const std::vector<double> rewards(6, 1.0);
  std::vector<double> out(6);
  const auto run = [&](const Groups& groups, AdvantageScale scale = AdvantageScale::kGroup,
                       RewardAggregation aggregation = RewardAggregation::kSumThenNormalize) {
    grpo_fast::group_advantages(rewards.data(), 6, 1, nullptr, groups, scale, aggregation, out.data());
  };
  Groups groups;
  CHECK_THROWS(run(groups), std::invalid_argument, "group_size: expected a positive divisor of the 6 rewards; got 0");
  groups.group_size = 4;
  CHECK_THROWS(run(groups), std::invalid_argument, "group_size: expected a positive divisor of the 6 rewards; got 4");
  groups.group_size = 3;
  CHECK_THROWS(run(groups, AdvantageScale::kNone, RewardAggregation::kNormalizeThenSum), std::invalid_argument,
               "scale: ");
  CHECK_THROWS(grpo_fast::group_advantages<double>(nullptr, 6, 1, nullptr, groups, AdvantageScale::kGroup,
                                                   RewardAggregation::kSumThenNormalize, out.data()),
               std::invalid_argument, "rewards: expected an array");
  std::vector<int64_t> order = {0, 1, 2, 3, 4, 4}, offsets = {0, 2, 6};
  groups.order = order.data();
  groups.offsets = offsets.data();
  groups.num_groups = 2;
  CHECK_THROWS(run(groups), std::invalid_argument, "order: expected each of 0 to 5 once; got 4 at position 5");
  order[5] = 6;
  CHECK_THROWS(run(groups), std::invalid_argument, "order: expected each of 0 to 5 once; got 6 at position 5");
  order[5] = 5;
  offsets = {0, 2, 5};
  CHECK_THROWS(run(groups), std::invalid_argument, "offsets: expected 6 last; got 5");
  offsets = {0, 7, 6};
  CHECK_THROWS(run(groups), std::invalid_argument, "offsets: expected values that do not decrease; got 7 before 6");
}

// -- tokens ---------------------------------------------------------------------------------------------------------

struct Packed {
  std::vector<int64_t> cu_seqlens{0};
  std::vector<uint8_t> mask;
  std::vector<float> advantages, token_advantages, importance;

  Packed(const std::vector<int64_t>& lengths, uint64_t seed, bool fully_masked = false) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (const int64_t length : lengths) {
      cu_seqlens.push_back(cu_seqlens.back() + length);
      advantages.push_back(random() % 3 == 0 ? 0.0f : normal(random));
      const bool silent = fully_masked || random() % 5 == 0;
      for (int64_t t = 0; t < length; ++t) {
        mask.push_back(silent ? 0 : uint8_t(random() % 3));  // any nonzero byte is true
        token_advantages.push_back(random() % 3 == 0 ? 0.0f : normal(random));
        importance.push_back(random() % 4 == 0 ? 0.0f : 1.0f);
      }
    }
  }

  grpo_fast::TokenBatch<float> batch(bool masked, bool per_token, bool weighted) const {
    grpo_fast::TokenBatch<float> out;
    out.num_tokens = cu_seqlens.back();
    out.num_sequences = int64_t(cu_seqlens.size()) - 1;
    out.cu_seqlens = cu_seqlens.data();
    out.mask = masked ? mask.data() : nullptr;
    out.advantages = per_token ? token_advantages.data() : advantages.data();
    out.advantages_per_token = per_token;
    out.importance = weighted ? importance.data() : nullptr;
    return out;
  }
};

struct Written {
  std::vector<float> weights, advantages;
  std::vector<uint8_t> active;
  std::vector<int64_t> rows;
  int64_t num_active;

  Written(const grpo_fast::TokenBatch<float>& batch, TokenAggregation aggregation, std::optional<double> normalizer,
          bool every_row)
      : weights(size_t(batch.num_tokens), -77.0f), advantages(weights), active(weights.size(), 77),
        rows(weights.size(), -77) {
    num_active = grpo_fast::token_rows<float>(batch, aggregation, normalizer, every_row,
                                              {weights.data(), advantages.data(), active.data(), rows.data()});
    rows.resize(size_t(num_active));
  }
};

void compare_tokens(const Packed& packed, bool masked, bool per_token, bool weighted, bool every_row,
                    std::optional<double> normalizer) {
  const grpo_fast::TokenBatch<float> batch = packed.batch(masked, per_token, weighted);
  int64_t unmasked = 0;
  for (int64_t t = 0; t < batch.num_tokens; ++t) unmasked += !masked || packed.mask[size_t(t)] != 0;
  for (const TokenAggregation aggregation :
       {TokenAggregation::kSequenceMean, TokenAggregation::kSequenceSum, TokenAggregation::kTokenMean}) {
    const Written got(batch, aggregation, normalizer, every_row);
    std::vector<int64_t> rows;
    std::vector<uint8_t> active;
    const int64_t counted = aggregation == TokenAggregation::kTokenMean ? unmasked : batch.num_sequences;
    const double denominator = normalizer.value_or(double(std::max<int64_t>(counted, 1)));
    for (int64_t s = 0; s < batch.num_sequences; ++s) {
      double length = 0;
      for (int64_t t = packed.cu_seqlens[size_t(s)]; t < packed.cu_seqlens[size_t(s) + 1]; ++t) {
        length += !masked || packed.mask[size_t(t)] != 0;
      }
      for (int64_t t = packed.cu_seqlens[size_t(s)]; t < packed.cu_seqlens[size_t(s) + 1]; ++t) {
        const bool carries = !masked || packed.mask[size_t(t)] != 0;
        const double share = aggregation == TokenAggregation::kSequenceMean ? 1 / length : 1.0;
        const double weight = carries ? share / denominator : 0.0;
        const float advantage =
            carries ? (per_token ? packed.token_advantages[size_t(t)] : packed.advantages[size_t(s)]) : 0;
        const bool live = advantage != 0 && (!weighted || packed.importance[size_t(t)] != 0);
        active.push_back(carries && (every_row || live));
        if (active.back()) rows.push_back(t);
        CHECK(std::abs(double(got.weights[size_t(t)]) - weight) <= 1e-6 * weight, "t %d: weight %.9g, expected %.9g",
              int(t), double(got.weights[size_t(t)]), weight);
        CHECK(got.advantages[size_t(t)] == advantage, "t %d: advantage %g, expected %g", int(t),
              double(got.advantages[size_t(t)]), double(advantage));
      }
    }
    CHECK(got.active == active, "of %d tokens", int(active.size()));
    CHECK(got.rows == rows, "%d active rows, expected %d", int(got.num_active), int(rows.size()));
  }
}

TEST(tokens_match_plain_loops) {
  const Packed batches[] = {
      Packed({5, 0, 1, 12, 7, 0}, 4),          Packed({3, 3}, 5, true), Packed({}, 6), Packed({0, 0}, 7),
      Packed(std::vector<int64_t>(40, 17), 8),
  };
  for (const Packed& packed : batches) {
    for (int bits = 0; bits < 16; ++bits) {
      for (const std::optional<double> normalizer : {std::optional<double>(), std::optional<double>(12.5)}) {
        compare_tokens(packed, bits & 1, bits & 2, bits & 4, bits & 8, normalizer);
      }
    }
  }
}

TEST(threads_do_not_change_tokens) {
#ifdef _OPENMP
  std::vector<int64_t> lengths;
  for (int64_t s = 0; s < 300; ++s) lengths.push_back(s * 37 % 600);
  const Packed packed(lengths, 9);
  const int before = omp_get_max_threads();
  omp_set_num_threads(1);
  const Written one(packed.batch(true, false, true), TokenAggregation::kSequenceMean, {}, false);
  omp_set_num_threads(3);
  const Written three(packed.batch(true, false, true), TokenAggregation::kSequenceMean, {}, false);
  omp_set_num_threads(before);
  CHECK(packed.mask.size() > 65536, "%zu tokens do not reach the parallel path", packed.mask.size());
  CHECK(one.num_active > 0 && one.active == three.active && one.rows == three.rows, "%d and %d active rows",
        int(one.num_active), int(three.num_active));
  CHECK(one.weights == three.weights && one.advantages == three.advantages, "of %zu tokens", one.weights.size());
  compare_tokens(packed, true, false, true, false, {});
#endif
}

TEST(malformed_tokens_are_refused) {
  const Packed packed({2, 3}, 10);
  const auto run = [&](const grpo_fast::TokenBatch<float>& batch, std::optional<double> normalizer = {}) {
    Written(batch, TokenAggregation::kTokenMean, normalizer, false);
  };
  grpo_fast::TokenBatch<float> batch = packed.batch(true, false, false);
  CHECK_THROWS(run(batch, 0.0), std::invalid_argument, "normalizer: expected a finite number > 0; got 0");
  CHECK_THROWS(run(batch, kNaN), std::invalid_argument, "normalizer: ");
  const std::vector<int64_t> late = {1, 2, 5}, falling = {0, 6, 5}, early_end = {0, 2, 4};
  batch.cu_seqlens = late.data();
  CHECK_THROWS(run(batch), std::invalid_argument, "cu_seqlens: expected 0 first; got 1");
  batch.cu_seqlens = falling.data();
  CHECK_THROWS(run(batch), std::invalid_argument, "cu_seqlens: expected values that do not decrease; got 6 before 5");
  batch.cu_seqlens = early_end.data();
  CHECK_THROWS(run(batch), std::invalid_argument, "cu_seqlens: expected 5 last; got 4");
  batch.cu_seqlens = nullptr;
  CHECK_THROWS(run(batch), std::invalid_argument, "cu_seqlens: expected an array; got a null pointer");
  batch = packed.batch(true, false, false);
  batch.advantages = nullptr;
  CHECK_THROWS(run(batch), std::invalid_argument, "advantages: expected an array");
  batch = packed.batch(true, false, false);
  batch.num_sequences = -1;
  CHECK_THROWS(run(batch), std::invalid_argument, "num_sequences: expected a number >= 0; got -1");
}

}  // namespace

#include "group_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "group_math.h"

namespace grpo_fast {
namespace {

// Fewer tokens than this are done before other threads have woken up.
constexpr int64_t kParallelTokens = 1 << 16;

[[noreturn]] void refuse(const std::string& argument, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(argument + ": expected " + expected + "; got " + got);
}

template <typename T>
void require_pointer(const char* argument, const T* pointer, bool needed) {
  if (needed && pointer == nullptr) refuse(argument, "an array", "a null pointer");
}

void require_count(const char* argument, int64_t count) {
  if (count < 0) refuse(argument, "a number >= 0", std::to_string(count));
}

// offsets [num + 1] must rise from 0 to `end`.
void require_offsets(const char* argument, const int64_t* offsets, int64_t num, int64_t end) {
  require_pointer(argument, offsets, true);
  if (offsets[0] != 0) refuse(argument, "0 first", std::to_string(offsets[0]));
  for (int64_t i = 0; i < num; ++i) {
    if (offsets[i + 1] < offsets[i]) {
      refuse(argument, "values that do not decrease",
             std::to_string(offsets[i]) + " before " + std::to_string(offsets[i + 1]));
    }
  }
  if (offsets[num] != end) refuse(argument, std::to_string(end) + " last", std::to_string(offsets[num]));
}

// -- advantages -----------------------------------------------------------------------------------------------------

// Groups of either kind, checked: members of group g are `member(offset(g))` up to `member(offset(g + 1))`.
class CheckedGroups {
 public:
  CheckedGroups(const Groups& groups, int64_t num) : groups_(groups), num_(num) {
    if (groups.offsets != nullptr) {
      require_count("num_groups", groups.num_groups);
      require_offsets("offsets", groups.offsets, groups.num_groups, num);
      num_groups_ = groups.num_groups;
    } else {
      if (groups.group_size < 1 || num % groups.group_size != 0) {
        refuse("group_size", "a positive divisor of the " + std::to_string(num) + " rewards",
               std::to_string(groups.group_size));
      }
      num_groups_ = num / groups.group_size;
    }
    if (groups.order != nullptr) require_permutation();
  }

  int64_t size() const { return num_groups_; }
  int64_t offset(int64_t g) const { return groups_.offsets != nullptr ? groups_.offsets[g] : g * groups_.group_size; }
  int64_t member(int64_t i) const { return groups_.order != nullptr ? groups_.order[i] : i; }

 private:
  void require_permutation() const {
    std::vector<bool> seen(static_cast<size_t>(num_), false);
    for (int64_t i = 0; i < num_; ++i) {
      const int64_t n = groups_.order[i];
      if (n < 0 || n >= num_ || seen[static_cast<size_t>(n)]) {
        refuse("order", "each of 0 to " + std::to_string(num_ - 1) + " once",
               std::to_string(n) + " at position " + std::to_string(i));
      }
      seen[static_cast<size_t>(n)] = true;
    }
  }

  Groups groups_;
  int64_t num_;
  int64_t num_groups_ = 0;
};

template <typename Real>
Moments<Real> moments(const Real* values, const CheckedGroups& groups, int64_t begin, int64_t end) {
  double sum = 0, count = 0;
  double high = -std::numeric_limits<double>::infinity(), low = -high;
  for (int64_t i = begin; i < end; ++i) {
    const double value = values[groups.member(i)];
    if (std::isnan(value)) continue;
    sum += value;
    count += 1;
    high = std::max(high, value);
    low = std::min(low, value);
  }
  const double mean = mean_of(sum, count, high, low);
  double squares = 0;
  for (int64_t i = begin; i < end; ++i) {
    const double value = values[groups.member(i)];
    if (!std::isnan(value)) squares += (value - mean) * (value - mean);
  }
  return moments_of<Real>(mean, squares, count);
}

template <typename Real>
void z_score_groups(const Real* values, const CheckedGroups& groups, Real* scores) {
  for (int64_t g = 0; g < groups.size(); ++g) {
    const Moments<Real> m = moments(values, groups, groups.offset(g), groups.offset(g + 1));
    for (int64_t i = groups.offset(g); i < groups.offset(g + 1); ++i) {
      const int64_t n = groups.member(i);
      scores[n] = z_score(values[n], m);
    }
  }
}

template <typename Real>
void weighted_sums(const Real* table, const Real* rewards, int64_t num, int64_t kinds, const double* weights,
                   Real* total) {
  for (int64_t n = 0; n < num; ++n) total[n] = weighted_sum(table + n * kinds, rewards + n * kinds, kinds, weights);
}

template <typename Real>
void scale_groups(const Real* total, const CheckedGroups& groups, int64_t num, AdvantageScale scale, Real* advantages) {
  Moments<Real> all{};
  if (scale == AdvantageScale::kBatch) all = moments(total, groups, 0, num);
  for (int64_t g = 0; g < groups.size(); ++g) {
    const Moments<Real> m = moments(total, groups, groups.offset(g), groups.offset(g + 1));
    for (int64_t i = groups.offset(g); i < groups.offset(g + 1); ++i) {
      const int64_t n = groups.member(i);
      advantages[n] = scaled_advantage(total[n], m, all, scale);
    }
  }
}

}  // namespace

template <typename Real>
void group_advantages(const Real* rewards, int64_t num_completions, int64_t num_rewards, const double* weights,
                      const Groups& groups, AdvantageScale scale, RewardAggregation aggregation, Real* advantages) {
  const int64_t num = num_completions, kinds = num_rewards;
  require_count("num_completions", num);
  require_count("num_rewards", kinds);
  require_pointer("rewards", rewards, num > 0 && kinds > 0);
  require_pointer("advantages", advantages, num > 0);
  const CheckedGroups checked(groups, num);
  std::vector<Real> total(static_cast<size_t>(num));
  if (aggregation == RewardAggregation::kNormalizeThenSum) {
    if (scale != AdvantageScale::kGroup && scale != AdvantageScale::kBatch) {
      refuse("scale", "kGroup, as kNormalizeThenSum z-scores by group and batch", "a scale that does not divide");
    }
    std::vector<Real> column(static_cast<size_t>(num)), scores(static_cast<size_t>(num)),
        table(static_cast<size_t>(num * kinds));
    for (int64_t k = 0; k < kinds; ++k) {
      for (int64_t n = 0; n < num; ++n) column[static_cast<size_t>(n)] = rewards[n * kinds + k];
      z_score_groups(column.data(), checked, scores.data());
      for (int64_t n = 0; n < num; ++n) table[static_cast<size_t>(n * kinds + k)] = scores[static_cast<size_t>(n)];
    }
    weighted_sums(table.data(), rewards, num, kinds, weights, total.data());
    const Moments<Real> all = moments(total.data(), checked, 0, num);
    for (int64_t n = 0; n < num; ++n) advantages[n] = z_score(total[static_cast<size_t>(n)], all);
  } else {
    weighted_sums(rewards, rewards, num, kinds, weights, total.data());
    scale_groups(total.data(), checked, num, scale, advantages);
  }
  for (int64_t n = 0; n < num; ++n) advantages[n] = finite(advantages[n]);
}

// -- tokens ---------------------------------------------------------------------------------------------------------

namespace {

template <typename Real>
void check_batch(const TokenBatch<Real>& batch, const TokenRows<Real>& rows, std::optional<double> normalizer) {
  require_count("num_tokens", batch.num_tokens);
  require_count("num_sequences", batch.num_sequences);
  require_offsets("cu_seqlens", batch.cu_seqlens, batch.num_sequences, batch.num_tokens);
  const bool any = batch.num_tokens > 0;
  require_pointer("advantages", batch.advantages, any);
  require_pointer("rows.weights", rows.weights, any);
  require_pointer("rows.advantages", rows.advantages, any);
  require_pointer("rows.active", rows.active, any);
  require_pointer("rows.rows", rows.rows, any);
  if (normalizer && !(*normalizer > 0 && std::isfinite(*normalizer))) {
    refuse("normalizer", "a finite number > 0", std::to_string(*normalizer));
  }
}

}  // namespace

template <typename Real>
int64_t token_rows(const TokenBatch<Real>& batch, TokenAggregation aggregation, std::optional<double> normalizer,
                   bool every_row, const TokenRows<Real>& rows) {
  check_batch(batch, rows, normalizer);
  const int64_t num_sequences = batch.num_sequences;
  [[maybe_unused]] const bool parallel = batch.num_tokens >= kParallelTokens;
  // Counts first (bytes of the mask): the weight of a sequence's first token depends on its last, and where its rows
  // begin in the list depends on the sequences before it. The pass over everything else comes after.
  std::vector<int64_t> lengths(static_cast<size_t>(num_sequences));
  std::vector<int64_t> first_row(static_cast<size_t>(num_sequences) + 1, 0);
#pragma omp parallel for schedule(dynamic, 8) if (parallel)
  for (int64_t s = 0; s < num_sequences; ++s) {
    int64_t unmasked = 0, active = 0;
    for (int64_t t = batch.cu_seqlens[s]; t < batch.cu_seqlens[s + 1]; ++t) {
      const bool carries = carries_loss(batch, t);
      unmasked += carries;
      active += carries && (every_row || has_gradient(batch, s, t));
    }
    lengths[static_cast<size_t>(s)] = unmasked;
    first_row[static_cast<size_t>(s) + 1] = active;
  }
  int64_t num_unmasked = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    num_unmasked += lengths[static_cast<size_t>(s)];
    first_row[static_cast<size_t>(s) + 1] += first_row[static_cast<size_t>(s)];
  }
  const Real replacement = normalizer ? static_cast<Real>(*normalizer) : std::numeric_limits<Real>::quiet_NaN();
#pragma omp parallel for schedule(dynamic, 8) if (parallel)
  for (int64_t s = 0; s < num_sequences; ++s) {
    const Real weight = token_weight(aggregation, replacement, num_unmasked, num_sequences,
                                     lengths[static_cast<size_t>(s)]);
    int64_t row = first_row[static_cast<size_t>(s)];
    for (int64_t t = batch.cu_seqlens[s]; t < batch.cu_seqlens[s + 1]; ++t) {
      const bool carries = carries_loss(batch, t);
      rows.weights[t] = carries ? weight : Real(0);
      rows.advantages[t] = carries ? batch.advantages[batch.advantages_per_token ? t : s] : Real(0);
      const bool active = carries && (every_row || has_gradient(batch, s, t));
      rows.active[t] = active;
      if (active) rows.rows[row++] = t;
    }
  }
  return first_row[static_cast<size_t>(num_sequences)];
}

#define GRPO_FAST_INSTANTIATE(Real)                                                                                 \
  template void group_advantages<Real>(const Real*, int64_t, int64_t, const double*, const Groups&, AdvantageScale, \
                                       RewardAggregation, Real*);                                                   \
  template int64_t token_rows<Real>(const TokenBatch<Real>&, TokenAggregation, std::optional<double>, bool,         \
                                    const TokenRows<Real>&);
GRPO_FAST_INSTANTIATE(float)
GRPO_FAST_INSTANTIATE(double)
#undef GRPO_FAST_INSTANTIATE

}  // namespace grpo_fast

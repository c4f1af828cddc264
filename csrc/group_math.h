// What a completion's advantage and a token's weight are once statistics are known: the CPU's and the GPU's common
// part.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "group_cpu.h"
#include "objective.h"

namespace grpo_fast {

constexpr double kStdEpsilon = 1e-4;
template <typename Real>
constexpr Real kLargest = std::numeric_limits<Real>::max();

// Of the values that exist (are not NaN); std unbiased.
template <typename Real>
struct Moments {
  Real mean, std, count;
};

// From the sum of squared distances to the mean.
template <typename Real>
GRPO_FAST_INLINE Moments<Real> moments_of(double mean, double squares, double count) {
  const double std = std::sqrt(squares / (count > 2 ? count - 1 : 1.0));
  return {static_cast<Real>(mean), static_cast<Real>(std), static_cast<Real>(count)};
}

// Where all values agree the mean is exactly theirs, so that their advantage is exactly 0.
GRPO_FAST_INLINE double mean_of(double sum, double count, double high, double low) {
  return high == low ? high : sum / (count > 1 ? count : 1.0);
}

template <typename Real>
GRPO_FAST_INLINE Real z_score(Real value, const Moments<Real>& m) {
  return (value - m.mean) / (m.std + static_cast<Real>(kStdEpsilon));
}

// From a completion's total reward, its group's moments and, for kBatch, those of all.
template <typename Real>
GRPO_FAST_INLINE Real scaled_advantage(Real total, const Moments<Real>& m, const Moments<Real>& all,
                                       AdvantageScale scale) {
  if (scale == AdvantageScale::kGroup) return z_score(total, m);
  const Real centred = total - m.mean;
  if (scale == AdvantageScale::kBatch) return centred / (all.std + static_cast<Real>(kStdEpsilon));
  // R - (n mean - R) / (n - 1) = (R - mean) n / (n - 1)
  if (scale == AdvantageScale::kLeaveOneOut) return m.count > 1 ? centred * m.count / (m.count - 1) : Real(0);
  return centred;
}

// weight_k part_k over the parts that exist; NaN where all rewards are missing. Strides of 1 within a completion.
template <typename Real>
GRPO_FAST_INLINE Real weighted_sum(const Real* parts, const Real* rewards, int64_t kinds, const double* weights) {
  Real sum = 0;
  bool exists = false;
  for (int64_t k = 0; k < kinds; ++k) {
    const Real part = parts[k] * (weights == nullptr ? Real(1) : static_cast<Real>(weights[k]));
    if (!std::isnan(part)) sum += part;
    exists = exists || !std::isnan(rewards[k]);
  }
  return exists ? sum : Real(NAN);
}

// NaN to 0, infinities to the largest finite numbers.
template <typename Real>
GRPO_FAST_INLINE Real finite(Real value) {
  constexpr Real largest = kLargest<Real>;
  if (std::isnan(value)) return Real(0);
  return value > largest ? largest : (value < -largest ? -largest : value);
}

// 1 / D, for kSequenceMean also over the sequence's unmasked tokens. `normalizer` replaces D; NaN: none given.
template <typename Real>
GRPO_FAST_INLINE Real token_weight(TokenAggregation aggregation, Real normalizer, int64_t num_unmasked,
                                   int64_t num_sequences, int64_t length) {
  const int64_t counted = aggregation == TokenAggregation::kTokenMean ? num_unmasked : num_sequences;
  const Real weight = 1 / (std::isnan(normalizer) ? static_cast<Real>(counted > 1 ? counted : 1) : normalizer);
  return aggregation == TokenAggregation::kSequenceMean ? weight / static_cast<Real>(length > 1 ? length : 1) : weight;
}

template <typename Real>
GRPO_FAST_INLINE bool carries_loss(const TokenBatch<Real>& batch, int64_t t) {
  return batch.mask == nullptr || batch.mask[t] != 0;
}

// Token t of sequence s, which carries loss.
template <typename Real>
GRPO_FAST_INLINE bool has_gradient(const TokenBatch<Real>& batch, int64_t s, int64_t t) {
  return batch.advantages[batch.advantages_per_token ? t : s] != 0 &&
         (batch.importance == nullptr || batch.importance[t] != 0);
}

}  // namespace grpo_fast

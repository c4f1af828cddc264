// The derivatives that csrc/objective.h had by hand, before it had dual numbers; to be compared with these, then to go.
//
// Legend: p `logprob` of the current policy, o `old_logprob` (p held fixed where absent), r = p - o, w = e^r the ratio,
// A `advantage`, mu `sampling_logprob` of the rollout engine, sg stop-gradient. Logs are natural (nats).
//
//     term = importance * policy(p) + beta * kl(p)                  d_logprob = d term / d p
//
//     kClipped    -min(min(w, delta) A, clip(w, 1 - epsilon_low, 1 + epsilon_high) A)   grpo bnpo dr_grpo dapo luspo
//     kCispo      -sg(min(w, epsilon_high)) A p
//     kSapo       -A sigmoid(tau (w - 1)) 4 / tau,  tau by the sign of A
//     kDppo       -A w, 0 where e^p - e^mu has left +-threshold on A's side;  + coef r^2
//     kPpoDual    the clipped term, for A < 0 at most -dual_clip A
//     kReinforce  -A p                                                                  reinforce rloo
//
//     kK1  p - ref        kK2  (p - ref)^2 / 2        kK3  e^(ref - p) - (ref - p) - 1        each times w if asked
//
//     importance: 1; a given weight; or e^(o - mu) held fixed, truncated to [min, max] or zeroed outside.
//
// The twin of grpo_fast/objectives.py for objectives whose tokens do not see each other: weights, masks and sums over
// tokens are the caller's. The conventions are that file's, not some version of torch's (2.14 changed clamp's): a clamp
// has slope 1 inside and on its bounds, 0 outside; at a tie min gives half to each side; every path to p ends in a product
// with w, so that 0 * inf is NaN here as it is there.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GRPO_FAST_INLINE __host__ __device__ __forceinline__
#else
#define GRPO_FAST_INLINE inline
#endif

namespace by_hand {

enum class PolicyTerm : int32_t { kClipped, kCispo, kSapo, kDppo, kPpoDual, kReinforce };
enum class KlEstimator : int32_t { kNone, kK1, kK2, kK3 };
enum class Correction : int32_t {
  kNone,
  kWeight,         // TokenInputs::importance is the weight
  kTokenTruncate,  // from o and mu, clamped to [importance_min, importance_max]
  kTokenMask,      // from o and mu, 0 outside [importance_min, importance_max]
};

// What was clipped, as metrics count it. Clipping follows the ratio after `delta` and the sign of A.
enum TokenFlag : uint32_t {
  kClippedLow = 1u << 0,    // w < 1 - epsilon_low,  A < 0
  kClippedHigh = 1u << 1,   // w > 1 + epsilon_high, A > 0
  kCispoClipped = 1u << 2,  // w > epsilon_high,     A > 0; kCispo only
  kDropped = 1u << 3,       // outside the trust region; kDppo only
};

// Plain numbers, double like the Python floats they come from: 1 - epsilon is taken before it is rounded to float.
struct ObjectiveConfig {
  PolicyTerm policy = PolicyTerm::kClipped;
  KlEstimator kl = KlEstimator::kNone;  // kNone iff beta is 0
  Correction correction = Correction::kNone;
  bool kl_times_ratio = true;
  double epsilon_low = 0.2;
  double epsilon_high = 0.2;
  double delta = HUGE_VAL;  // infinite: no bound
  double beta = 0.0;
  double importance_min = -HUGE_VAL;
  double importance_max = HUGE_VAL;
  double sapo_temperature_pos = 1.0;
  double sapo_temperature_neg = 1.05;
  double dppo_threshold = 0.2;
  double dppo_log_ratio_coef = 1e-3;
  double dual_clip = 3.0;
};

template <typename Real>
struct BasicTokenInputs {
  Real logprob = 0;
  Real old_logprob = 0;       // read if has_old
  Real ref_logprob = 0;       // read unless kl is kNone
  Real sampling_logprob = 0;  // read if has_sampling; NaN: the engine does not know
  Real importance = 1;        // read if correction is kWeight
  Real advantage = 0;
  bool has_old = false;
  bool has_sampling = false;
};

template <typename Real>
struct BasicTokenObjective {
  Real term;
  Real d_logprob;
  Real ratio;       // w, before delta
  Real clip_ratio;  // min(w, delta)
  Real kl;          // times w if asked; before beta; 0 if kNone
  Real importance;  // 1 if not corrected
  uint32_t flags;   // TokenFlag, or-ed
};

using TokenInputs = BasicTokenInputs<float>;
using TokenObjective = BasicTokenObjective<float>;

namespace detail {

// A function of p at one point.
template <typename Real>
struct Term {
  Real value;
  Real slope;
};

// NaN stays NaN.
template <typename Real>
GRPO_FAST_INLINE Real clamp(Real x, Real low, Real high) {
  return x < low ? low : (x > high ? high : x);
}

// NaN if either is.
template <typename Real>
GRPO_FAST_INLINE Real minimum(Real a, Real b) {
  return std::isnan(a) || a < b ? a : b;
}

// d min(a, b) / da.
template <typename Real>
GRPO_FAST_INLINE Real minimum_share(Real a, Real b) {
  return a == b ? Real(0.5) : (a > b ? Real(0) : Real(1));
}

template <typename Real>
GRPO_FAST_INLINE Term<Real> clipped_term(const ObjectiveConfig& config, Real ratio, Real capped, Real advantage) {
  const Real low = static_cast<Real>(1.0 - config.epsilon_low);
  const Real high = static_cast<Real>(1.0 + config.epsilon_high);
  const Real free_side = capped * advantage;
  const Real clip_side = clamp(ratio, low, high) * advantage;
  Real d_ratio = 0;
  if (ratio <= static_cast<Real>(config.delta)) d_ratio += minimum_share(free_side, clip_side) * advantage;
  if (ratio >= low && ratio <= high) d_ratio += minimum_share(clip_side, free_side) * advantage;
  return {-minimum(free_side, clip_side), -d_ratio * ratio};
}

template <typename Real>
GRPO_FAST_INLINE Term<Real> ppo_dual_term(const ObjectiveConfig& config, Real ratio, Real capped, Real advantage) {
  const Term<Real> clipped = clipped_term(config, ratio, capped, advantage);
  if (!(advantage < 0)) return clipped;
  const Real bound = -static_cast<Real>(config.dual_clip) * advantage;
  return {minimum(clipped.value, bound), minimum_share(clipped.value, bound) * clipped.slope};
}

template <typename Real>
GRPO_FAST_INLINE Term<Real> cispo_term(const ObjectiveConfig& config, Real ratio, Real advantage, Real logprob) {
  const Real bound = static_cast<Real>(config.epsilon_high);
  const Real slope = -(ratio > bound ? bound : ratio) * advantage;
  return {slope * logprob, slope};
}

template <typename Real>
GRPO_FAST_INLINE Term<Real> sapo_term(const ObjectiveConfig& config, Real ratio, Real advantage) {
  const Real tau = static_cast<Real>(advantage > 0 ? config.sapo_temperature_pos : config.sapo_temperature_neg);
  const Real gate = 1 / (1 + std::exp(-tau * (ratio - 1)));
  const Real scale = -4 / tau * advantage;
  return {scale * gate, scale * ((1 - gate) * gate) * tau * ratio};
}

template <typename Real>
GRPO_FAST_INLINE Term<Real> dppo_term(const ObjectiveConfig& config, const BasicTokenInputs<Real>& token, Real ratio,
                                      Real log_ratio, uint32_t& flags) {
  Real behaviour = token.logprob;  // nobody knows: no evidence of a difference
  if (token.has_sampling) {
    behaviour = token.sampling_logprob;
  } else if (token.has_old) {
    behaviour = token.old_logprob;
  }
  const Real gap = std::exp(token.logprob) - std::exp(behaviour);  // NaN passes no limit
  const Real limit = static_cast<Real>(config.dppo_threshold);
  const bool drop = token.advantage > 0 ? gap > limit : (token.advantage <= 0 && gap < -limit);
  if (drop) flags |= kDropped;
  const Real gain = drop ? Real(0) : -token.advantage;
  const Real coef = static_cast<Real>(config.dppo_log_ratio_coef);
  return {(drop ? Real(0) : gain * ratio) + coef * (log_ratio * log_ratio), gain * ratio + coef * (2 * log_ratio)};
}

template <typename Real>
GRPO_FAST_INLINE Term<Real> kl_term(const ObjectiveConfig& config, Real logprob, Real ref_logprob, Real ratio) {
  const Real difference = ref_logprob - logprob;
  Real value = 0, slope = 0;
  Real weighted_slope = 0;  // of kl * w, over w: slope + value, free of their common part
  switch (config.kl) {
    case KlEstimator::kNone:
      return {0, 0};
    case KlEstimator::kK1:
      value = -difference;
      slope = 1;
      weighted_slope = 1 - difference;
      break;
    case KlEstimator::kK2:
      value = difference * difference / 2;
      slope = -difference;
      weighted_slope = value - difference;
      break;
    case KlEstimator::kK3:
      // expm1, not exp - 1: near the reference k3 is a small difference of numbers near 1.
      slope = -std::expm1(difference);
      value = -slope - difference;
      weighted_slope = -difference;
      break;
  }
  if (config.kl_times_ratio) return {value * ratio, weighted_slope * ratio};
  return {value, slope};
}

template <typename Real>
GRPO_FAST_INLINE Real importance_weight(const ObjectiveConfig& config, const BasicTokenInputs<Real>& token, Real old) {
  if (config.correction == Correction::kWeight) return token.importance;
  if (config.correction == Correction::kNone || !token.has_sampling) return 1;
  const Real difference = old - token.sampling_logprob;
  const Real weight = std::isnan(difference) ? Real(1) : std::exp(difference);
  const Real low = static_cast<Real>(config.importance_min), high = static_cast<Real>(config.importance_max);
  if (config.correction == Correction::kTokenTruncate) return clamp(weight, low, high);
  return weight < low || weight > high ? Real(0) : weight;
}

}  // namespace detail

// One unmasked token. `Real` is float in the kernels, double where derivatives are compared with differences.
template <typename Real>
GRPO_FAST_INLINE BasicTokenObjective<Real> token_objective(const ObjectiveConfig& config,
                                                           const BasicTokenInputs<Real>& token) {
  const Real old = token.has_old ? token.old_logprob : token.logprob;
  const Real log_ratio = token.logprob - old;
  const Real ratio = std::exp(log_ratio);
  const Real delta = static_cast<Real>(config.delta);
  const Real capped = ratio > delta ? delta : ratio;
  const Real advantage = token.advantage;

  uint32_t flags = 0;
  if (capped < static_cast<Real>(1.0 - config.epsilon_low) && advantage < 0) flags |= kClippedLow;
  if (capped > static_cast<Real>(1.0 + config.epsilon_high) && advantage > 0) flags |= kClippedHigh;

  detail::Term<Real> policy{};
  switch (config.policy) {
    case PolicyTerm::kClipped:
      policy = detail::clipped_term(config, ratio, capped, advantage);
      break;
    case PolicyTerm::kCispo:
      policy = detail::cispo_term(config, ratio, advantage, token.logprob);
      if (ratio > static_cast<Real>(config.epsilon_high) && advantage > 0) flags |= kCispoClipped;
      break;
    case PolicyTerm::kSapo:
      policy = detail::sapo_term(config, ratio, advantage);
      break;
    case PolicyTerm::kDppo:
      policy = detail::dppo_term(config, token, ratio, log_ratio, flags);
      break;
    case PolicyTerm::kPpoDual:
      policy = detail::ppo_dual_term(config, ratio, capped, advantage);
      break;
    case PolicyTerm::kReinforce:
      policy = {-advantage * token.logprob, -advantage};
      break;
  }
  const Real importance = detail::importance_weight(config, token, old);
  if (config.correction != Correction::kNone) policy = {policy.value * importance, policy.slope * importance};
  const detail::Term<Real> kl = detail::kl_term(config, token.logprob, token.ref_logprob, ratio);
  if (config.kl != KlEstimator::kNone) {
    const Real beta = static_cast<Real>(config.beta);
    policy = {policy.value + beta * kl.value, policy.slope + beta * kl.slope};
  }
  return {policy.value, policy.slope, ratio, capped, kl.value, importance, flags};
}

}  // namespace by_hand

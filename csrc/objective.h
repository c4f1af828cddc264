// The token objective, once for host and device: a token's loss term and its slope in the current log-probability.
//
// Legend: p `logprob` of the current policy, o `old_logprob` (p held fixed where absent), r = p - o, w = e^r the ratio,
// A `advantage`, mu `sampling_logprob` of the rollout engine. Logs are natural (nats).
//
//     term = importance * policy(p) + beta * kl(p)
//
// The twin of grpo_fast/losses.py for objectives whose tokens do not see each other: weights, masks and sums over
// tokens are the caller's. A term is its formula over dual numbers, whose operations hold autograd's conventions.
//
// To add a token-local policy term: a function of `TermInputs` below, and its name in GRPO_FAST_POLICIES; likewise in
// kernels/objective.py; numbers that it needs go to kernels/parameters.py.

#pragma once

#include <cmath>
#include <cstdint>

#include "parameters.h"

#if defined(__CUDACC__)
#define GRPO_FAST_INLINE __host__ __device__ __forceinline__
#else
#define GRPO_FAST_INLINE inline
#endif

namespace grpo_fast {

#define GRPO_FAST_POLICIES(X) X(clipped) X(cispo) X(sapo) X(dppo) X(ppo_dual) X(reinforce)
#define GRPO_FAST_KL_ESTIMATORS(X) X(none) X(k1) X(k2) X(k3)
// weight: Token::importance; token_*: from o and mu, clamped to [importance_min, importance_max] or 0 outside.
#define GRPO_FAST_CORRECTIONS(X) X(none) X(weight) X(token_truncate) X(token_mask)

#define GRPO_FAST_ENUMERATOR(name) name,
enum class PolicyTerm : int32_t { GRPO_FAST_POLICIES(GRPO_FAST_ENUMERATOR) };
enum class KlEstimator : int32_t { GRPO_FAST_KL_ESTIMATORS(GRPO_FAST_ENUMERATOR) };
enum class Correction : int32_t { GRPO_FAST_CORRECTIONS(GRPO_FAST_ENUMERATOR) };

#define GRPO_FAST_FIELD(name) double name;
struct Parameters {  // double like the Python floats they come from
  GRPO_FAST_PARAMETERS(GRPO_FAST_FIELD)
};

struct Objective {
  PolicyTerm policy;
  KlEstimator kl;  // none iff beta is 0
  Correction correction;
  bool kl_times_ratio;
  Parameters parameters;
};

template <typename Real>
struct Token {
  Real logprob = 0;
  Real old_logprob = 0;       // read if has_old
  Real ref_logprob = 0;       // read unless the KL estimator is none
  Real sampling_logprob = 0;  // read if has_sampling; NaN: the engine does not know
  Real importance = 1;        // read if the correction is weight
  Real advantage = 0;
  bool has_old = false;
  bool has_sampling = false;
};

// NaN stays NaN.
template <typename Real>
GRPO_FAST_INLINE Real clamp(Real x, double low, double high) {
  const Real least = static_cast<Real>(low), most = static_cast<Real>(high);
  return x < least ? least : (x > most ? most : x);
}

// A number and its slope in a variable; {x, 1} is the variable, {x, 0} or a plain Real is held fixed, as if detached.
template <typename Real>
struct Dual {
  Real value, slope;

  friend GRPO_FAST_INLINE Dual operator-(Dual x) { return {-x.value, -x.slope}; }
  friend GRPO_FAST_INLINE Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.slope + b.slope}; }
  friend GRPO_FAST_INLINE Dual operator*(Real factor, Dual x) { return {factor * x.value, factor * x.slope}; }
  friend GRPO_FAST_INLINE Dual square(Dual x) { return {x.value * x.value, 2 * x.value * x.slope}; }
  friend GRPO_FAST_INLINE Dual sigmoid(Dual x) {
    const Real gate = 1 / (1 + std::exp(-x.value));
    return {gate, (1 - gate) * gate * x.slope};
  }
  // e^x - 1 - x: by expm1, as near 0 it is a small difference of numbers near 1, and so is its slope.
  friend GRPO_FAST_INLINE Dual exp_less_tangent(Dual x) {
    const Real rise = std::expm1(x.value);
    return {rise - x.value, rise * x.slope};
  }
  // NaN if either is; at a tie each side gives half of its slope.
  friend GRPO_FAST_INLINE Dual minimum(Dual a, Dual b) {
    const Real from_a = a.value == b.value ? Real(0.5) : a.value > b.value ? Real(0) : Real(1);
    const Real from_b = a.value == b.value ? Real(0.5) : b.value > a.value ? Real(0) : Real(1);
    return {std::isnan(a.value) || a.value < b.value ? a.value : b.value, from_a * a.slope + from_b * b.slope};
  }
  // factor clamp(x). Inside and on the bounds the slope passes whole (a convention of our own: torch's clamp changed in
  // 2.14), outside it is 0, even if the factor is infinite.
  friend GRPO_FAST_INLINE Dual scaled_clamp(Real factor, Dual x, double low, double high) {
    const bool outside = x.value < static_cast<Real>(low) || x.value > static_cast<Real>(high);
    return {factor * clamp(x.value, low, high), outside ? Real(0) : factor * x.slope};
  }
  // f, whose slope is in x, as a function of what x has the slope `inner` in. The innermost factor comes last, as in
  // autograd: a slope of 0 times an infinite ratio is NaN here as it is there.
  friend GRPO_FAST_INLINE Dual chain(Dual f, Real inner) { return {f.value, f.slope * inner}; }
};

// What a policy term may use, and the terms.
template <typename Real>
struct TermInputs {
  const Parameters& with;
  Real logprob, log_ratio, ratio, advantage;
  Real behaviour;  // logprob of the policy that sampled

  // -min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)
  GRPO_FAST_INLINE Dual<Real> clipped() const {
    const Dual<Real> w{ratio, 1};
    return chain(-minimum(scaled_clamp(advantage, w, -HUGE_VAL, with.delta),
                          scaled_clamp(advantage, w, with.clip_low, with.clip_high)), ratio);
  }

  // -min(w, epsilon_high) A p, but for p held fixed
  GRPO_FAST_INLINE Dual<Real> cispo() const {
    return -clamp(ratio, -HUGE_VAL, with.clip_bound) * advantage * Dual<Real>{logprob, 1};
  }

  // -4 / tau A sigmoid(tau (w - 1)), tau by the sign of A
  GRPO_FAST_INLINE Dual<Real> sapo() const {
    const Real tau = static_cast<Real>(advantage > 0 ? with.sapo_temperature_pos : with.sapo_temperature_neg);
    return chain(chain(-4 / tau * advantage * sigmoid(Dual<Real>{tau * (ratio - 1), 1}), tau), ratio);
  }

  // -A w, 0 where e^p - e^mu has left +-threshold on A's side (NaN has not);  + coef r^2
  GRPO_FAST_INLINE Dual<Real> dppo() const {
    const Real gap = std::exp(logprob) - std::exp(behaviour), limit = static_cast<Real>(with.dppo_threshold);
    const bool drop = advantage > 0 ? gap > limit : (advantage <= 0 && gap < -limit);
    return chain(drop ? Dual<Real>{0, 0} : -advantage * Dual<Real>{ratio, 1}, ratio) +
           static_cast<Real>(with.dppo_log_ratio_coef) * square(Dual<Real>{log_ratio, 1});
  }

  // the clipped term, for A < 0 at most -dual_clip A
  GRPO_FAST_INLINE Dual<Real> ppo_dual() const {
    return advantage < 0 ? minimum(clipped(), {-static_cast<Real>(with.dual_clip) * advantage, 0}) : clipped();
  }

  // -A p
  GRPO_FAST_INLINE Dual<Real> reinforce() const { return -advantage * Dual<Real>{logprob, 1}; }

  GRPO_FAST_INLINE Dual<Real> policy(PolicyTerm term) const {
#define GRPO_FAST_CASE(name) case PolicyTerm::name: return name();
    switch (term) { GRPO_FAST_POLICIES(GRPO_FAST_CASE) }
    return {0, 0};
  }

  // k1  p - ref     k2  (p - ref)^2 / 2     k3  e^(ref - p) - (ref - p) - 1     times w if asked
  GRPO_FAST_INLINE Dual<Real> kl(KlEstimator estimator, bool times_ratio, Real ref_logprob) const {
    const Dual<Real> difference{ref_logprob - logprob, -1};
    const Dual<Real> kl = estimator == KlEstimator::k1   ? -difference
                          : estimator == KlEstimator::k2 ? Real(0.5) * square(difference)
                                                         : exp_less_tangent(difference);
    if (!times_ratio) return kl;
    // d (kl w) / dp = (kl + dkl / dp) w; k3's two are free of their common part.
    const Real sum = estimator == KlEstimator::k3 ? -difference.value : kl.value + kl.slope;
    return {kl.value * ratio, sum * ratio};
  }
};

template <typename Real>
GRPO_FAST_INLINE Real importance_weight(const Objective& objective, const Token<Real>& token, Real old) {
  const Parameters& with = objective.parameters;
  if (objective.correction == Correction::weight) return token.importance;
  if (objective.correction == Correction::none || !token.has_sampling) return 1;
  const Real difference = old - token.sampling_logprob;
  const Real weight = std::isnan(difference) ? Real(1) : std::exp(difference);
  const Real bounded = clamp(weight, with.importance_min, with.importance_max);
  return objective.correction == Correction::token_truncate || bounded == weight ? bounded : Real(0);
}

// The term of an unmasked token. `Real` is float in the kernels, double where slopes are compared with differences.
template <typename Real>
GRPO_FAST_INLINE Dual<Real> token_term(const Objective& objective, const Token<Real>& token) {
  const Real old = token.has_old ? token.old_logprob : token.logprob, log_ratio = token.logprob - old;
  const Real behaviour = token.has_sampling ? token.sampling_logprob : old;
  const TermInputs<Real> inputs{objective.parameters, token.logprob,   log_ratio,
                                std::exp(log_ratio),  token.advantage, behaviour};
  Dual<Real> term = inputs.policy(objective.policy);
  if (objective.correction != Correction::none) term = importance_weight(objective, token, old) * term;
  if (objective.kl == KlEstimator::none) return term;
  const Dual<Real> kl = inputs.kl(objective.kl, objective.kl_times_ratio, token.ref_logprob);
  return term + static_cast<Real>(objective.parameters.beta) * kl;
}

}  // namespace grpo_fast

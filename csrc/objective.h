// The token objective, once for host and device: a token's loss term and its slope in the current log-probability.
//
// Legend: p `logprob` of the current policy, o `old_logprob` (p held fixed where absent), r = p - o, w = e^r the ratio,
// A `advantage`, mu `sampling_logprob` of the rollout engine. Logs are natural (nats).
//
//     term = importance * policy(p) + beta * kl(p)
//
// The twin of grpo_fast/objectives.py for objectives whose tokens do not see each other: weights, masks and sums over
// tokens are the caller's. A term is its formula over dual numbers, whose operations hold autograd's conventions.
//
// To add a token-local policy term: a function `name_term` below, and its name in GRPO_FAST_POLICIES; on the other
// device likewise in kernels/objective.py; numbers that it needs go to kernels/parameters.py.

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

// Double like the Python floats they come from.
#define GRPO_FAST_FIELD(name) double name;
struct Parameters {
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

// A number and its slope in a variable. A plain Real is held fixed: what autograd detaches.
template <typename Real>
struct Dual {
  Real value, slope;
};

namespace detail {

// -- operations on dual numbers ---------------------------------------------------------------------------------------

template <typename Real>
GRPO_FAST_INLINE Dual<Real> variable(Real x) {
  return {x, 1};
}

template <typename Real>
GRPO_FAST_INLINE Dual<Real> held(Real x) {
  return {x, 0};
}

template <typename Real>
GRPO_FAST_INLINE Dual<Real> operator-(Dual<Real> x) {
  return {-x.value, -x.slope};
}

template <typename Real>
GRPO_FAST_INLINE Dual<Real> operator+(Dual<Real> a, Dual<Real> b) {
  return {a.value + b.value, a.slope + b.slope};
}

template <typename Real>
GRPO_FAST_INLINE Dual<Real> operator*(Real factor, Dual<Real> x) {
  return {factor * x.value, factor * x.slope};
}

template <typename Real>
GRPO_FAST_INLINE Dual<Real> square(Dual<Real> x) {
  return {x.value * x.value, 2 * x.value * x.slope};
}

template <typename Real>
GRPO_FAST_INLINE Dual<Real> sigmoid(Dual<Real> x) {
  const Real gate = 1 / (1 + std::exp(-x.value));
  return {gate, (1 - gate) * gate * x.slope};
}

// e^x - 1 - x: by expm1, as near 0 it is a small difference of numbers near 1, and so is its slope.
template <typename Real>
GRPO_FAST_INLINE Dual<Real> exp_less_tangent(Dual<Real> x) {
  const Real rise = std::expm1(x.value);
  return {rise - x.value, rise * x.slope};
}

template <typename Real>
GRPO_FAST_INLINE Dual<Real> where(bool condition, Dual<Real> yes, Dual<Real> no) {
  return condition ? yes : no;
}

// NaN stays NaN.
template <typename Real>
GRPO_FAST_INLINE Real clamp(Real x, double low, double high) {
  const Real least = static_cast<Real>(low), most = static_cast<Real>(high);
  return x < least ? least : (x > most ? most : x);
}

// factor clamp(x). Inside and on the bounds the slope passes whole (torch 2.14 changed its clamp's: this is our own);
// outside it is 0 even if the factor is infinite.
template <typename Real>
GRPO_FAST_INLINE Dual<Real> scaled_clamp(Real factor, Dual<Real> x, double low, double high) {
  const bool outside = x.value < static_cast<Real>(low) || x.value > static_cast<Real>(high);
  return {factor * clamp(x.value, low, high), outside ? Real(0) : factor * x.slope};
}

// d min(a, b) / da: at a tie each side gets half.
template <typename Real>
GRPO_FAST_INLINE Real minimum_share(Real a, Real b) {
  return a == b ? Real(0.5) : (a > b ? Real(0) : Real(1));
}

// NaN if either is.
template <typename Real>
GRPO_FAST_INLINE Dual<Real> minimum(Dual<Real> a, Dual<Real> b) {
  return {std::isnan(a.value) || a.value < b.value ? a.value : b.value,
          minimum_share(a.value, b.value) * a.slope + minimum_share(b.value, a.value) * b.slope};
}

// f, whose slope is in x, as a function of what x has the slope `inner` in. The innermost factor comes last, as in
// autograd: a slope of 0 times an infinite ratio is NaN here as it is there.
template <typename Real>
GRPO_FAST_INLINE Dual<Real> chain(Dual<Real> f, Real inner) {
  return {f.value, f.slope * inner};
}

// -- policy terms -----------------------------------------------------------------------------------------------------

// What a policy term may use.
template <typename Real>
struct Context {
  const Parameters& with;
  Real logprob, log_ratio, ratio, advantage;
  Real behaviour;  // logprob of the policy that sampled
};

// -min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A)
template <typename Real>
GRPO_FAST_INLINE Dual<Real> clipped_term(const Context<Real>& c) {
  const Dual<Real> w = variable(c.ratio);
  return chain(-minimum(scaled_clamp(c.advantage, w, -HUGE_VAL, c.with.delta),
                        scaled_clamp(c.advantage, w, c.with.clip_low, c.with.clip_high)),
               c.ratio);
}

// -min(w, epsilon_high) A p, but for p held fixed
template <typename Real>
GRPO_FAST_INLINE Dual<Real> cispo_term(const Context<Real>& c) {
  return -clamp(c.ratio, -HUGE_VAL, c.with.clip_bound) * c.advantage * variable(c.logprob);
}

// -4 / tau A sigmoid(tau (w - 1)), tau by the sign of A
template <typename Real>
GRPO_FAST_INLINE Dual<Real> sapo_term(const Context<Real>& c) {
  const Real tau = static_cast<Real>(c.advantage > 0 ? c.with.sapo_temperature_pos : c.with.sapo_temperature_neg);
  return chain(chain(-4 / tau * c.advantage * sigmoid(variable(tau * (c.ratio - 1))), tau), c.ratio);
}

// -A w, 0 where e^p - e^mu has left +-threshold on A's side (NaN has not);  + coef r^2
template <typename Real>
GRPO_FAST_INLINE Dual<Real> dppo_term(const Context<Real>& c) {
  const Real gap = std::exp(c.logprob) - std::exp(c.behaviour), limit = static_cast<Real>(c.with.dppo_threshold);
  const bool drop = c.advantage > 0 ? gap > limit : (c.advantage <= 0 && gap < -limit);
  return chain(where(drop, held(Real(0)), -c.advantage * variable(c.ratio)), c.ratio) +
         static_cast<Real>(c.with.dppo_log_ratio_coef) * square(variable(c.log_ratio));
}

// the clipped term, for A < 0 at most -dual_clip A
template <typename Real>
GRPO_FAST_INLINE Dual<Real> ppo_dual_term(const Context<Real>& c) {
  const Dual<Real> clipped = clipped_term(c), bound = held(-static_cast<Real>(c.with.dual_clip) * c.advantage);
  return where(c.advantage < 0, minimum(clipped, bound), clipped);
}

// -A p
template <typename Real>
GRPO_FAST_INLINE Dual<Real> reinforce_term(const Context<Real>& c) {
  return -c.advantage * variable(c.logprob);
}

template <typename Real>
GRPO_FAST_INLINE Dual<Real> policy_term(PolicyTerm policy, const Context<Real>& c) {
#define GRPO_FAST_CASE(name) \
  case PolicyTerm::name:     \
    return name##_term(c);
  switch (policy) { GRPO_FAST_POLICIES(GRPO_FAST_CASE) }
  return {0, 0};
}

// -- the rest of the term ---------------------------------------------------------------------------------------------

// k1  p - ref     k2  (p - ref)^2 / 2     k3  e^(ref - p) - (ref - p) - 1     times w if asked
template <typename Real>
GRPO_FAST_INLINE Dual<Real> kl_term(const Objective& objective, const Context<Real>& c, Real ref_logprob) {
  const Dual<Real> difference{ref_logprob - c.logprob, -1};
  const Dual<Real> kl = objective.kl == KlEstimator::k1   ? -difference
                        : objective.kl == KlEstimator::k2 ? Real(0.5) * square(difference)
                                                          : exp_less_tangent(difference);
  if (!objective.kl_times_ratio) return kl;
  // d (kl w) / dp = (kl + dkl / dp) w; k3's two are free of their common part.
  const Real sum = objective.kl == KlEstimator::k3 ? -difference.value : kl.value + kl.slope;
  return {kl.value * c.ratio, sum * c.ratio};
}

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

}  // namespace detail

// One unmasked token. `Real` is float in the kernels, double where slopes are compared with differences.
template <typename Real>
GRPO_FAST_INLINE Dual<Real> token_term(const Objective& objective, const Token<Real>& token) {
  using namespace detail;
  const Real old = token.has_old ? token.old_logprob : token.logprob;
  const Real log_ratio = token.logprob - old;
  const Real behaviour = token.has_sampling ? token.sampling_logprob : old;
  const Context<Real> c{objective.parameters, token.logprob,   log_ratio,
                        std::exp(log_ratio),  token.advantage, behaviour};
  Dual<Real> term = policy_term(objective.policy, c);
  if (objective.correction != Correction::none) term = importance_weight(objective, token, old) * term;
  if (objective.kl == KlEstimator::none) return term;
  return term + static_cast<Real>(objective.parameters.beta) * kl_term(objective, c, token.ref_logprob);
}

}  // namespace grpo_fast

// objective.h: its slopes against central differences in double, its corners by hand.

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "objectives.h"

namespace {

using grpo_fast::Correction;
using grpo_fast::KlEstimator;
using grpo_fast::Objective;
using grpo_fast::PolicyTerm;
using grpo_fast::token_term;
using testing::make_objective;
using Token = grpo_fast::Token<double>;
using Dual = grpo_fast::Dual<double>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

#define POLICY(name) PolicyTerm::name,
constexpr PolicyTerm kPolicies[] = {GRPO_FAST_POLICIES(POLICY)};
constexpr KlEstimator kEstimators[] = {KlEstimator::none, KlEstimator::k1, KlEstimator::k2, KlEstimator::k3};
constexpr Correction kCorrections[] = {Correction::none, Correction::weight, Correction::token_truncate,
                                       Correction::token_mask};

Token make_token(double logprob, double old_logprob, double advantage) {
  Token token;
  token.logprob = logprob;
  token.old_logprob = old_logprob;
  token.has_old = true;
  token.advantage = advantage;
  return token;
}

double ratio_of(const Token& token) { return token.has_old ? std::exp(token.logprob - token.old_logprob) : 1.0; }

double weight_of(const Objective& objective, const Token& token) {
  return grpo_fast::importance_weight(objective, token, token.has_old ? token.old_logprob : token.logprob);
}

// The same objective with everything that carries no gradient held at its value, as a function of p alone.
struct Surrogate {
  Objective objective;
  Token token;

  Surrogate(const Objective& original, const Token& at) : objective(original), token(at) {
    token.old_logprob = at.has_old ? at.old_logprob : at.logprob;
    token.has_old = true;
    token.importance = weight_of(original, at);
    objective.correction = Correction::weight;
    if (objective.policy == PolicyTerm::cispo) {
      objective.policy = PolicyTerm::reinforce;
      token.importance *= std::min(ratio_of(at), objective.parameters.clip_bound);
    }
  }

  double operator()(double logprob) const {
    Token moved = token;
    moved.logprob = logprob;
    return token_term(objective, moved).value;
  }
};

bool near_kink(const Objective& objective, const Token& token) {
  const grpo_fast::Parameters& with = objective.parameters;
  for (const double kink : {with.clip_low, with.clip_high, with.delta, with.dual_clip}) {
    if (std::abs(ratio_of(token) - kink) < 1e-3) return true;
  }
  double behaviour = token.has_sampling ? token.sampling_logprob : token.old_logprob;
  if (std::isnan(behaviour)) behaviour = token.logprob;
  const double gap = std::exp(token.logprob) - std::exp(behaviour);
  return objective.policy == PolicyTerm::dppo && std::abs(std::abs(gap) - with.dppo_threshold) < 1e-3;
}

Token random_token(std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  const auto chance = [&](double share) { return std::uniform_real_distribution<double>()(random) < share; };
  Token token;
  token.logprob = -std::abs(normal(random)) - 0.05;
  token.old_logprob = token.logprob + 0.5 * normal(random);
  token.ref_logprob = token.logprob + normal(random);
  token.sampling_logprob = chance(0.1) ? kNaN : token.logprob + 0.7 * normal(random);
  token.importance = std::exp(normal(random));
  token.advantage = chance(0.1) ? 0.0 : normal(random);
  token.has_old = chance(0.7);
  token.has_sampling = chance(0.7);
  return token;
}

TEST(slope_is_that_of_the_term) {
  std::mt19937_64 random(1);
  int compared = 0, skipped = 0;
  for (const PolicyTerm policy : kPolicies) {
    for (const KlEstimator kl : kEstimators) {
      for (const Correction correction : kCorrections) {
        for (int draw = 0; draw < 200; ++draw) {
          Objective objective = make_objective(policy, kl);
          objective.correction = correction;
          objective.kl_times_ratio = draw % 2 == 0;
          grpo_fast::Parameters& with = objective.parameters;
          with.delta = draw % 3 == 0 ? 1.4 : kInfinity;
          with.clip_bound = draw % 5 == 0 ? 0.28 : 0.2, with.clip_high = 1 + with.clip_bound;
          with.dual_clip = 1.7;
          with.dppo_log_ratio_coef = 0.1;
          with.importance_max = 2.0;
          with.importance_min = draw % 7 == 0 ? 0.6 : -kInfinity;
          const Token token = random_token(random);
          const Dual got = token_term(objective, token);
          if (near_kink(objective, token)) {
            ++skipped;
            continue;
          }
          ++compared;
          const Surrogate term(objective, token);
          const double step = 1e-5, p = token.logprob;
          const double expected = (term(p + step) - term(p - step)) / (2 * step);
          CHECK(std::abs(got.value - term(p)) <= 1e-14 * (1 + std::abs(got.value)), "term %.17g, surrogate %.17g",
                got.value, term(p));
          CHECK(std::abs(got.slope - expected) <= 1e-7 * (1 + std::abs(expected)),
                "policy %d kl %d correction %d draw %d: slope %.12g, difference quotient %.12g", int(policy), int(kl),
                int(correction), draw, got.slope, expected);
        }
      }
    }
  }
  CHECK(skipped < compared / 20, "%d of %d left out near kinks", skipped, compared + skipped);
}

TEST(ties_share_the_gradient) {
  struct Corner {
    const char* name;
    PolicyTerm policy;
    double epsilon, delta, dual_clip, log_ratio, advantage, term, slope;
  };
  // e^0 = 1 exactly: the only ratio that hits a bound to the last bit on every machine.
  const double over = std::exp(1.0);
  const Corner corners[] = {
      {"both sides of min equal", PolicyTerm::clipped, 0.2, kInfinity, 3, 0, 2, -2, -2},
      {"both sides equal, A < 0", PolicyTerm::clipped, 0.2, kInfinity, 3, 0, -2, 2, 2},
      {"on both clip bounds", PolicyTerm::clipped, 0, kInfinity, 3, 0, 2, -2, -2},
      {"on delta", PolicyTerm::clipped, 0.2, 1, 3, 0, 2, -2, -2},
      {"delta below the ratio", PolicyTerm::clipped, 0.2, 0.5, 3, 0, 2, -1, 0},
      {"delta below the ratio, A < 0", PolicyTerm::clipped, 0.2, 0.5, 3, 0, -2, 2, 2},
      {"delta is the upper bound", PolicyTerm::clipped, 0.5, 1.5, 3, 1, -2, 3, 0},
      {"clipped above", PolicyTerm::clipped, 0.5, kInfinity, 3, 1, 2, -3, 0},
      {"free above", PolicyTerm::clipped, 0.5, kInfinity, 3, 1, -2, 2 * over, 2 * over},
      {"clipped below", PolicyTerm::clipped, 0.5, kInfinity, 3, -1, -2, 1, 0},
      {"free below", PolicyTerm::clipped, 0.5, kInfinity, 3, -1, 2, -2 / over, -2 / over},
      {"no advantage", PolicyTerm::clipped, 0.2, kInfinity, 3, 0, 0, 0, 0},
      {"no advantage, off-policy", PolicyTerm::clipped, 0.2, 1.5, 3, 1, 0, 0, 0},
      {"on the dual bound", PolicyTerm::ppo_dual, 0.2, kInfinity, 1, 0, -2, 2, 1},
      {"past the dual bound", PolicyTerm::ppo_dual, 0.2, kInfinity, 2, 1, -2, 4, 0},
      {"the dual bound is for A < 0", PolicyTerm::ppo_dual, 0.2, kInfinity, 0.5, 0, 2, -2, -2},
      {"dual, no advantage", PolicyTerm::ppo_dual, 0.2, kInfinity, 3, 0, 0, 0, 0},
      {"cispo below its bound", PolicyTerm::cispo, 2, kInfinity, 3, 0, 2, 2, -2},
      {"cispo above its bound", PolicyTerm::cispo, 0.5, kInfinity, 3, 0, 2, 1, -1},
      {"sapo on-policy", PolicyTerm::sapo, 0.2, kInfinity, 3, 0, 2, -4, -2},
      {"sapo, no advantage", PolicyTerm::sapo, 0.2, kInfinity, 3, 0, 0, 0, 0},
      {"reinforce ignores the ratio", PolicyTerm::reinforce, 0.2, kInfinity, 3, 5, 2, 2, -2},
  };
  for (const Corner& corner : corners) {
    for (const bool has_old : {true, false}) {
      if (!has_old && corner.log_ratio != 0) continue;
      Objective objective = make_objective(corner.policy);
      grpo_fast::Parameters& with = objective.parameters;
      with.clip_low = 1 - corner.epsilon, with.clip_high = 1 + corner.epsilon, with.clip_bound = corner.epsilon;
      with.delta = corner.delta;
      with.dual_clip = corner.dual_clip;
      Token token = make_token(-1, -1 - corner.log_ratio, corner.advantage);
      token.has_old = has_old;
      const Dual got = token_term(objective, token);
      CHECK(std::abs(got.value - corner.term) < 1e-14, "%s: term %.17g, expected %.17g", corner.name, got.value,
            corner.term);
      CHECK(std::abs(got.slope - corner.slope) < 1e-14, "%s: slope %.17g, expected %.17g", corner.name, got.slope,
            corner.slope);
    }
  }
}

TEST(on_policy_slope_is_the_advantage_exactly) {
  std::mt19937_64 random(2);
  std::uniform_real_distribution<float> uniform(-30, 0);
  for (int draw = 0; draw < 1000; ++draw) {
    grpo_fast::Token<float> token;
    token.logprob = token.old_logprob = token.ref_logprob = uniform(random);
    token.advantage = uniform(random) + 15;
    token.has_old = draw % 2 == 0;
    const grpo_fast::Dual<float> got = token_term(make_objective(PolicyTerm::clipped, KlEstimator::k3), token);
    CHECK(got.value == -token.advantage && got.slope == -token.advantage, "term %g, slope %g, A %g", got.value,
          got.slope, token.advantage);
  }
}

TEST(trust_region_follows_the_sampler) {
  const Objective objective = make_objective(PolicyTerm::dppo);
  const double p = std::log(0.9), mu = std::log(0.5);
  struct Row {
    const char* name;
    double logprob, sampling, advantage;
    bool dropped;
  };
  const Row rows[] = {
      {"risen and rewarded", p, mu, 1, true},          {"risen and punished", p, mu, -1, false},
      {"fallen and punished", mu, p, -1, true},        {"fallen and rewarded", mu, p, 1, false},
      {"fallen, no advantage", mu, p, 0, true},        {"risen, no advantage", p, mu, 0, false},
      {"sampler unknown: no drop", p, kNaN, 1, false},
  };
  for (const Row& row : rows) {
    Token token = make_token(row.logprob, row.logprob - 0.1, row.advantage);
    token.has_sampling = true;
    token.sampling_logprob = row.sampling;
    const double got = token_term(objective, token).slope;
    const double regulariser = 1e-3 * 2 * 0.1, gain = row.dropped ? 0.0 : -row.advantage * std::exp(0.1);
    CHECK(std::abs(got - (gain + regulariser)) < 1e-12, "%s: slope %g, expected %g", row.name, got, gain + regulariser);
  }
  Token token = make_token(p, mu, 1);
  const double dropped = token_term(objective, token).slope, regulariser = 1e-3 * 2 * (p - mu);
  CHECK(std::abs(dropped - regulariser) < 1e-12, "the old policy stands in: slope %g, expected %g", dropped,
        regulariser);
  token.has_old = false;
  const double kept = token_term(objective, token).slope;
  CHECK(kept == -1, "nobody to compare with: slope %g, expected -1", kept);
}

TEST(corrections_bound_the_weight) {
  struct Row {
    Correction correction;
    double difference, low, high, expected;
  };
  const double two = std::log(2.0);
  const Row rows[] = {
      {Correction::none, two, 0.5, 1.5, 1},
      {Correction::token_truncate, two, -kInfinity, kInfinity, 2},
      {Correction::token_truncate, two, -kInfinity, 1.5, 1.5},
      {Correction::token_truncate, -two, 0.7, 1.5, 0.7},
      {Correction::token_mask, two, -kInfinity, 1.5, 0},
      {Correction::token_mask, -two, 0.7, 1.5, 0},
      {Correction::token_mask, two, -kInfinity, kInfinity, 2},
      {Correction::token_mask, 0, 1, 1, 1},  // on both bounds: kept
      {Correction::token_mask, kNaN, 0.5, 1.5, 1},
      {Correction::token_truncate, kNaN, 0.5, 1.5, 1},
      {Correction::token_truncate, kInfinity, 0.5, 1.5, 1.5},
      {Correction::token_mask, -kInfinity, 0.5, 1.5, 0},
  };
  for (const Row& row : rows) {
    for (const bool has_old : {false, true}) {
      Objective objective = make_objective(PolicyTerm::reinforce, KlEstimator::k1);
      objective.correction = row.correction;
      objective.kl_times_ratio = false;
      objective.parameters.importance_min = row.low;
      objective.parameters.importance_max = row.high;
      Token token = make_token(-1, has_old ? -1.5 : 7, 2);
      token.has_old = has_old;
      token.has_sampling = true;
      token.sampling_logprob = (has_old ? -1.5 : -1.0) - row.difference;
      const double weight = weight_of(objective, token), got = token_term(objective, token).slope;
      CHECK(std::abs(weight - row.expected) < 1e-14, "correction %d, difference %g: weight %.17g, expected %.17g",
            int(row.correction), row.difference, weight, row.expected);
      // The weight multiplies the policy term and leaves the KL alone.
      CHECK(std::abs(got - (-2 * row.expected + 0.3)) < 1e-14, "slope %g at weight %g", got, row.expected);
    }
  }
  Objective objective = make_objective(PolicyTerm::reinforce);
  objective.correction = Correction::token_mask;
  objective.parameters.importance_max = 0.5;
  const double unsampled = token_term(objective, make_token(-1, -2, 1)).slope;
  CHECK(unsampled == -1, "no sampler: slope %g, expected -1", unsampled);
}

TEST(bad_numbers_show) {
  for (const PolicyTerm policy : kPolicies) {
    const Objective objective = make_objective(policy, KlEstimator::k3);
    const Dual lost = token_term(objective, make_token(kNaN, -1, 1));
    CHECK(std::isnan(lost.value) && std::isnan(lost.slope), "policy %d hides NaN: %g, %g", int(policy), lost.value,
          lost.slope);
    const Dual gone = token_term(objective, make_token(-kInfinity, -kInfinity, 1));
    CHECK(std::isnan(gone.slope), "policy %d hides inf - inf: %g", int(policy), gone.slope);
  }
}

}  // namespace

// objective.h: its derivative against central differences in double, its corners by hand.

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../objective.h"
#include "check.h"

namespace {

using grpo_fast::Correction;
using grpo_fast::KlEstimator;
using grpo_fast::ObjectiveConfig;
using grpo_fast::PolicyTerm;
using grpo_fast::token_objective;
using Inputs = grpo_fast::BasicTokenInputs<double>;
using Outcome = grpo_fast::BasicTokenObjective<double>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

constexpr PolicyTerm kPolicies[] = {PolicyTerm::kClipped, PolicyTerm::kCispo,   PolicyTerm::kSapo,
                                    PolicyTerm::kDppo,    PolicyTerm::kPpoDual, PolicyTerm::kReinforce};
constexpr KlEstimator kEstimators[] = {KlEstimator::kNone, KlEstimator::kK1, KlEstimator::kK2, KlEstimator::kK3};
constexpr Correction kCorrections[] = {Correction::kNone, Correction::kWeight, Correction::kTokenTruncate,
                                       Correction::kTokenMask};

ObjectiveConfig make_config(PolicyTerm policy, KlEstimator kl = KlEstimator::kNone) {
  ObjectiveConfig config;
  config.policy = policy;
  config.kl = kl;
  config.beta = kl == KlEstimator::kNone ? 0.0 : 0.3;
  return config;
}

Inputs make_inputs(double logprob, double old_logprob, double advantage) {
  Inputs token;
  token.logprob = logprob;
  token.old_logprob = old_logprob;
  token.has_old = true;
  token.advantage = advantage;
  return token;
}

// The same objective with everything that carries no gradient held at its value, as a function of p alone.
struct Surrogate {
  ObjectiveConfig config;
  Inputs token;

  Surrogate(const ObjectiveConfig& original, const Inputs& at) : config(original), token(at) {
    const Outcome here = token_objective(original, at);
    token.old_logprob = at.has_old ? at.old_logprob : at.logprob;
    token.has_old = true;
    token.importance = here.importance;
    config.correction = Correction::kWeight;
    if (config.policy == PolicyTerm::kCispo) {
      config.policy = PolicyTerm::kReinforce;
      token.importance *= std::min(here.ratio, config.epsilon_high);
    }
  }

  double operator()(double logprob) const {
    Inputs moved = token;
    moved.logprob = logprob;
    return token_objective(config, moved).term;
  }
};

bool near_kink(const ObjectiveConfig& config, const Inputs& token, double ratio) {
  for (const double kink : {1.0 - config.epsilon_low, 1.0 + config.epsilon_high, config.delta, config.dual_clip}) {
    if (std::abs(ratio - kink) < 1e-3) return true;
  }
  double behaviour = token.has_sampling ? token.sampling_logprob : token.old_logprob;
  if (std::isnan(behaviour)) behaviour = token.logprob;
  const double gap = std::exp(token.logprob) - std::exp(behaviour);
  return config.policy == PolicyTerm::kDppo && std::abs(std::abs(gap) - config.dppo_threshold) < 1e-3;
}

Inputs random_inputs(std::mt19937_64& random) {
  std::normal_distribution<double> normal;
  const auto chance = [&](double share) { return std::uniform_real_distribution<double>()(random) < share; };
  Inputs token;
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

TEST(derivative_is_that_of_the_term) {
  std::mt19937_64 random(1);
  int compared = 0, skipped = 0;
  for (const PolicyTerm policy : kPolicies) {
    for (const KlEstimator kl : kEstimators) {
      for (const Correction correction : kCorrections) {
        for (int draw = 0; draw < 200; ++draw) {
          ObjectiveConfig config = make_config(policy, kl);
          config.correction = correction;
          config.kl_times_ratio = draw % 2 == 0;
          config.delta = draw % 3 == 0 ? 1.4 : kInfinity;
          config.epsilon_high = draw % 5 == 0 ? 0.28 : 0.2;
          config.dual_clip = 1.7;
          config.dppo_log_ratio_coef = 0.1;
          config.importance_max = 2.0;
          config.importance_min = draw % 7 == 0 ? 0.6 : -kInfinity;
          const Inputs token = random_inputs(random);
          const Outcome got = token_objective(config, token);
          if (near_kink(config, token, got.ratio)) {
            ++skipped;
            continue;
          }
          ++compared;
          const Surrogate term(config, token);
          const double step = 1e-5, p = token.logprob;
          const double expected = (term(p + step) - term(p - step)) / (2 * step);
          CHECK(std::abs(got.term - term(p)) <= 1e-14 * (1 + std::abs(got.term)), "term %.17g, surrogate %.17g",
                got.term, term(p));
          CHECK(std::abs(got.d_logprob - expected) <= 1e-7 * (1 + std::abs(expected)),
                "policy %d kl %d correction %d draw %d: d_logprob %.12g, difference quotient %.12g", int(policy),
                int(kl), int(correction), draw, got.d_logprob, expected);
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
    double epsilon, delta, dual_clip, log_ratio, advantage, term, d_logprob;
  };
  // e^0 = 1 exactly: the only ratio that hits a bound to the last bit on every machine.
  const double over = std::exp(1.0);
  const Corner corners[] = {
      {"both sides of min equal", PolicyTerm::kClipped, 0.2, kInfinity, 3, 0, 2, -2, -2},
      {"both sides equal, A < 0", PolicyTerm::kClipped, 0.2, kInfinity, 3, 0, -2, 2, 2},
      {"on both clip bounds", PolicyTerm::kClipped, 0, kInfinity, 3, 0, 2, -2, -2},
      {"on delta", PolicyTerm::kClipped, 0.2, 1, 3, 0, 2, -2, -2},
      {"delta below the ratio", PolicyTerm::kClipped, 0.2, 0.5, 3, 0, 2, -1, 0},
      {"delta below the ratio, A < 0", PolicyTerm::kClipped, 0.2, 0.5, 3, 0, -2, 2, 2},
      {"delta is the upper bound", PolicyTerm::kClipped, 0.5, 1.5, 3, 1, -2, 3, 0},
      {"clipped above", PolicyTerm::kClipped, 0.5, kInfinity, 3, 1, 2, -3, 0},
      {"free above", PolicyTerm::kClipped, 0.5, kInfinity, 3, 1, -2, 2 * over, 2 * over},
      {"clipped below", PolicyTerm::kClipped, 0.5, kInfinity, 3, -1, -2, 1, 0},
      {"free below", PolicyTerm::kClipped, 0.5, kInfinity, 3, -1, 2, -2 / over, -2 / over},
      {"no advantage", PolicyTerm::kClipped, 0.2, kInfinity, 3, 0, 0, 0, 0},
      {"no advantage, off-policy", PolicyTerm::kClipped, 0.2, 1.5, 3, 1, 0, 0, 0},
      {"on the dual bound", PolicyTerm::kPpoDual, 0.2, kInfinity, 1, 0, -2, 2, 1},
      {"past the dual bound", PolicyTerm::kPpoDual, 0.2, kInfinity, 2, 1, -2, 4, 0},
      {"the dual bound is for A < 0", PolicyTerm::kPpoDual, 0.2, kInfinity, 0.5, 0, 2, -2, -2},
      {"dual, no advantage", PolicyTerm::kPpoDual, 0.2, kInfinity, 3, 0, 0, 0, 0},
      {"cispo below its bound", PolicyTerm::kCispo, 2, kInfinity, 3, 0, 2, 2, -2},
      {"cispo above its bound", PolicyTerm::kCispo, 0.5, kInfinity, 3, 0, 2, 1, -1},
      {"sapo on-policy", PolicyTerm::kSapo, 0.2, kInfinity, 3, 0, 2, -4, -2},
      {"sapo, no advantage", PolicyTerm::kSapo, 0.2, kInfinity, 3, 0, 0, 0, 0},
      {"reinforce ignores the ratio", PolicyTerm::kReinforce, 0.2, kInfinity, 3, 5, 2, 2, -2},
  };
  for (const Corner& corner : corners) {
    for (const bool has_old : {true, false}) {
      if (!has_old && corner.log_ratio != 0) continue;
      ObjectiveConfig config = make_config(corner.policy);
      config.epsilon_low = config.epsilon_high = corner.epsilon;
      config.delta = corner.delta;
      config.dual_clip = corner.dual_clip;
      Inputs token = make_inputs(-1, -1 - corner.log_ratio, corner.advantage);
      token.has_old = has_old;
      const Outcome got = token_objective(config, token);
      CHECK(std::abs(got.term - corner.term) < 1e-14, "%s: term %.17g, expected %.17g", corner.name, got.term,
            corner.term);
      CHECK(std::abs(got.d_logprob - corner.d_logprob) < 1e-14, "%s: d_logprob %.17g, expected %.17g", corner.name,
            got.d_logprob, corner.d_logprob);
    }
  }
}

TEST(on_policy_ratio_is_exactly_one) {
  std::mt19937_64 random(2);
  std::uniform_real_distribution<float> uniform(-30, 0);
  for (int draw = 0; draw < 1000; ++draw) {
    grpo_fast::TokenInputs token;
    token.logprob = token.old_logprob = token.ref_logprob = uniform(random);
    token.advantage = uniform(random) + 15;
    token.has_old = draw % 2 == 0;
    const grpo_fast::TokenObjective got = token_objective(make_config(PolicyTerm::kClipped, KlEstimator::kK3), token);
    CHECK(got.ratio == 1 && got.kl == 0 && got.flags == 0, "ratio %g, kl %g, flags %u", got.ratio, got.kl, got.flags);
    CHECK(got.d_logprob == -token.advantage, "d_logprob %g, expected %g", got.d_logprob, -token.advantage);
  }
}

TEST(trust_region_follows_the_sampler) {
  const ObjectiveConfig config = make_config(PolicyTerm::kDppo);
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
    Inputs token = make_inputs(row.logprob, row.logprob - 0.1, row.advantage);
    token.has_sampling = true;
    token.sampling_logprob = row.sampling;
    const Outcome got = token_objective(config, token);
    const double regulariser = 1e-3 * 2 * 0.1, gain = row.dropped ? 0.0 : -row.advantage * std::exp(0.1);
    CHECK((got.flags == grpo_fast::kDropped) == row.dropped, "%s: flags %u", row.name, got.flags);
    CHECK(std::abs(got.d_logprob - (gain + regulariser)) < 1e-12, "%s: d_logprob %g, expected %g", row.name,
          got.d_logprob, gain + regulariser);
  }
  Inputs token = make_inputs(p, mu, 1);
  CHECK(token_objective(config, token).flags & grpo_fast::kDropped, "the old policy stands in, p %g", p);
  token.has_old = false;
  CHECK(token_objective(config, token).flags == 0, "nobody to compare with, p %g", p);
}

TEST(corrections_bound_the_weight) {
  struct Row {
    Correction correction;
    double difference, low, high, expected;
  };
  const double two = std::log(2.0);
  const Row rows[] = {
      {Correction::kNone, two, 0.5, 1.5, 1},
      {Correction::kTokenTruncate, two, -kInfinity, kInfinity, 2},
      {Correction::kTokenTruncate, two, -kInfinity, 1.5, 1.5},
      {Correction::kTokenTruncate, -two, 0.7, 1.5, 0.7},
      {Correction::kTokenMask, two, -kInfinity, 1.5, 0},
      {Correction::kTokenMask, -two, 0.7, 1.5, 0},
      {Correction::kTokenMask, two, -kInfinity, kInfinity, 2},
      {Correction::kTokenMask, 0, 1, 1, 1},  // on both bounds: kept
      {Correction::kTokenMask, kNaN, 0.5, 1.5, 1},
      {Correction::kTokenTruncate, kNaN, 0.5, 1.5, 1},
      {Correction::kTokenTruncate, kInfinity, 0.5, 1.5, 1.5},
      {Correction::kTokenMask, -kInfinity, 0.5, 1.5, 0},
  };
  for (const Row& row : rows) {
    for (const bool has_old : {false, true}) {
      ObjectiveConfig config = make_config(PolicyTerm::kReinforce, KlEstimator::kK1);
      config.correction = row.correction;
      config.kl_times_ratio = false;
      config.importance_min = row.low;
      config.importance_max = row.high;
      Inputs token = make_inputs(-1, has_old ? -1.5 : 7, 2);
      token.has_old = has_old;
      token.has_sampling = true;
      token.sampling_logprob = (has_old ? -1.5 : -1.0) - row.difference;
      const Outcome got = token_objective(config, token);
      CHECK(std::abs(got.importance - row.expected) < 1e-14,
            "correction %d, difference %g: weight %.17g, expected %.17g", int(row.correction), row.difference,
            got.importance, row.expected);
      // The weight multiplies the policy term and leaves the KL alone.
      CHECK(std::abs(got.d_logprob - (-2 * row.expected + 0.3)) < 1e-14, "d_logprob %g at weight %g", got.d_logprob,
            row.expected);
    }
  }
  ObjectiveConfig config = make_config(PolicyTerm::kReinforce);
  config.correction = Correction::kTokenMask;
  config.importance_max = 0.5;
  const Outcome unsampled = token_objective(config, make_inputs(-1, -2, 1));
  CHECK(unsampled.importance == 1 && unsampled.d_logprob == -1, "no sampler: weight %g", unsampled.importance);
}

TEST(flags_follow_the_sign_of_the_advantage) {
  for (const double advantage : {-1.0, 0.0, 1.0}) {
    for (const double log_ratio : {-1.0, 0.0, 1.0}) {
      const Inputs token = make_inputs(-1, -1 - log_ratio, advantage);
      const bool low = log_ratio < 0 && advantage < 0, high = log_ratio > 0 && advantage > 0;
      const uint32_t clipped = (low ? grpo_fast::kClippedLow : 0u) | (high ? grpo_fast::kClippedHigh : 0u);
      const uint32_t got = token_objective(make_config(PolicyTerm::kClipped), token).flags;
      CHECK(got == clipped, "A %g, r %g: flags %u, expected %u", advantage, log_ratio, got, clipped);
      ObjectiveConfig config = make_config(PolicyTerm::kCispo);
      config.epsilon_high = 1.0;
      const bool over = log_ratio > 0 && advantage > 0;
      const uint32_t cispo = token_objective(config, token).flags & grpo_fast::kCispoClipped;
      CHECK((cispo != 0) == over, "cispo, A %g, r %g: flags %u", advantage, log_ratio, cispo);
      ObjectiveConfig capped = make_config(PolicyTerm::kClipped);
      capped.delta = 1.1;  // below the upper bound: the ratio after delta never passes it
      CHECK((token_objective(capped, token).flags & grpo_fast::kClippedHigh) == 0, "A %g, r %g", advantage, log_ratio);
    }
  }
}

TEST(bad_numbers_show) {
  for (const PolicyTerm policy : kPolicies) {
    const Outcome lost = token_objective(make_config(policy, KlEstimator::kK3), make_inputs(kNaN, -1, 1));
    CHECK(std::isnan(lost.term) && std::isnan(lost.d_logprob), "policy %d hides NaN: %g, %g", int(policy), lost.term,
          lost.d_logprob);
    const Outcome gone = token_objective(make_config(policy, KlEstimator::kK3), make_inputs(-kInfinity, -kInfinity, 1));
    CHECK(std::isnan(gone.d_logprob), "policy %d hides inf - inf: %g", int(policy), gone.d_logprob);
  }
}

}  // namespace

// Objectives with LossConfig's defaults.
#pragma once

#include <cmath>

#include "../objective.h"

namespace testing {

inline grpo_fast::Objective make_objective(grpo_fast::PolicyTerm policy,
                                           grpo_fast::KlEstimator kl = grpo_fast::KlEstimator::none) {
  grpo_fast::Objective out{policy, kl, grpo_fast::Correction::none, true, {}};
  grpo_fast::Parameters& with = out.parameters;
  with.clip_low = 1 - 0.2, with.clip_high = 1 + 0.2, with.clip_bound = 0.2;
  with.delta = with.importance_max = HUGE_VAL, with.importance_min = -HUGE_VAL;
  with.beta = kl == grpo_fast::KlEstimator::none ? 0.0 : 0.3;
  with.sapo_temperature_pos = 1.0, with.sapo_temperature_neg = 1.05;
  with.dppo_threshold = 0.2, with.dppo_log_ratio_coef = 1e-3;
  with.dual_clip = 3.0;
  return out;
}

}  // namespace testing

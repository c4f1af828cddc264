// The numbers of an objective, X(name) each, in the order in which Python hands them over. Written by
// `python kernels/parameters.py`, which says what they are.
#pragma once

#define GRPO_FAST_PARAMETERS(X) \
  X(clip_low) \
  X(clip_high) \
  X(clip_bound) \
  X(delta) \
  X(beta) \
  X(importance_min) \
  X(importance_max) \
  X(sapo_temperature_pos) \
  X(sapo_temperature_neg) \
  X(dppo_threshold) \
  X(dppo_log_ratio_coef) \
  X(dual_clip)

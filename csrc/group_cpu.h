// What a batch of completions says before the model is asked: advantages of groups, weights of tokens, rows to compute.
//
// Legend: N completions, K reward functions, T packed tokens, S sequences, m mask, L_s unmasked tokens of sequence s.
// Pointers are to contiguous arrays that the caller owns. `Real` is float or double. The twin of grpo_fast/advantages.py
// and rows.py: same formulas, statistics in double, results rounded where they are rounded there.
//
// All functions throw std::invalid_argument naming the argument, what was expected and what came.

#pragma once

#include <cstdint>
#include <optional>

namespace grpo_fast {

enum class AdvantageScale : int32_t { kGroup, kBatch, kNone, kLeaveOneOut };
enum class RewardAggregation : int32_t { kSumThenNormalize, kNormalizeThenSum };

// Which completions stand together: equal groups one after another (`group_size`), or any (`order`, `offsets`).
struct Groups {
  int64_t group_size = 0;            // read if offsets is null
  const int64_t* order = nullptr;    // [N] completions sorted by group; null: as they stand
  const int64_t* offsets = nullptr;  // [num_groups + 1] into order
  int64_t num_groups = 0;            // read if offsets is given
};

// advantages [N] from rewards [N, K] (row-major), NaN where a reward is missing.
//
//     kGroup  (R - mean) / (std + 1e-4)     kBatch  (R - mean) / (std of all + 1e-4)     kNone  R - mean
//     kLeaveOneOut  R - mean of the others                                 mean, std: of the group, std unbiased
//
// kSumThenNormalize applies this to R = sum_k weight_k R_k; kNormalizeThenSum z-scores each reward in its group, sums
// them weighted and z-scores the sum over the batch (kGroup or kBatch only). `weights` is [K]; null: all 1. The advantage
// is exactly 0 where all rewards are missing, and with kSumThenNormalize in groups of one and those whose rewards agree.
template <typename Real>
void group_advantages(const Real* rewards, int64_t num_completions, int64_t num_rewards, const double* weights,
                      const Groups& groups, AdvantageScale scale, RewardAggregation aggregation, Real* advantages);

enum class TokenAggregation : int32_t {
  kSequenceMean,  // m / (max(L_s, 1) D), D = max(S, 1)
  kSequenceSum,   // m / D,               D = max(S, 1)     with the normalizer S * C also constant_length
  kTokenMean,     // m / D,               D = max(sum m, 1)
};

template <typename Real>
struct TokenBatch {
  int64_t num_tokens = 0;
  int64_t num_sequences = 0;
  const int64_t* cu_seqlens = nullptr;  // [S + 1]
  const uint8_t* mask = nullptr;        // [T], nonzero: carries loss; null: all do
  const Real* advantages = nullptr;     // [S], or [T] if advantages_per_token
  bool advantages_per_token = false;
  const Real* importance = nullptr;  // [T] weights of the train/inference correction known beforehand, or null
};

template <typename Real>
struct TokenRows {
  Real* weights = nullptr;     // [T] weight of each token's term, 0 where masked
  Real* advantages = nullptr;  // [T], 0 where masked
  uint8_t* active = nullptr;   // [T] 1 at the rows to compute, else 0
  int64_t* rows = nullptr;     // [T] space for their indices, increasing
};

// Weights, advantages and active rows, written in one pass over the tokens. Returns the number of active rows. The
// twin of kernels/group_rows.py.
//
// `normalizer` replaces D. A row is active if it is unmasked and, unless `every_row`, neither its advantage nor its
// importance is 0. Nothing is read of masked tokens: anything may stand there.
template <typename Real>
int64_t token_rows(const TokenBatch<Real>& batch, TokenAggregation aggregation, std::optional<double> normalizer,
                   bool every_row, const TokenRows<Real>& rows);

}  // namespace grpo_fast

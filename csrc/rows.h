// Rows of logits and what is known of each token: what the CPU's and the GPU's row functions take.
//
// Legend: R rows, V columns. For row t with raw product x_t:
//   z_t = softcap tanh(logit_scale (x_t + bias) / softcap) / temperature_t
//   lse_t = log sum_v exp z_tv      logprob_t = z_t[y_t] - lse_t      entropy_t = lse_t - sum_v p_tv z_tv
//   dx_tv = (g_t (1[v = y_t] - p_tv) - e_t p_tv (log p_tv + entropy_t)) / temperature_t * softcap' * logit_scale
#pragma once

#include <cstdint>

#include "objective.h"

namespace grpo_fast {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kFloat64 };

struct Rows {
  float* logits;  // [R, V] raw products, rows `row_stride` apart
  int64_t num_rows;
  int64_t num_columns;
  int64_t row_stride;
  const int64_t* targets;        // [R]
  const float* bias;             // [V] or null
  float logit_scale;             // not 0
  float softcap;                 // 0: none
  float temperature;             // > 0; used where row_temperature is null
  const float* row_temperature;  // [R] or null
};

// What the objective knows of the rows' tokens besides their logits; null where absent.
struct TokenArrays {
  const float* advantages;         // [R]
  const float* weights;            // [R] weight of the row's term in the loss
  const float* old_logprobs;       // [R] or null
  const float* ref_logprobs;       // [R] or null
  const float* sampling_logprobs;  // [R] or null
  const float* importance;         // [R] or null
};

// The token of a row, but for its own logprob.
GRPO_FAST_INLINE Token<float> token_of(const TokenArrays& tokens, int64_t row) {
  Token<float> token;
  token.advantage = tokens.advantages[row];
  token.has_old = tokens.old_logprobs != nullptr;
  token.has_sampling = tokens.sampling_logprobs != nullptr;
  if (token.has_old) token.old_logprob = tokens.old_logprobs[row];
  if (token.has_sampling) token.sampling_logprob = tokens.sampling_logprobs[row];
  if (tokens.ref_logprobs != nullptr) token.ref_logprob = tokens.ref_logprobs[row];
  if (tokens.importance != nullptr) token.importance = tokens.importance[row];
  return token;
}

}  // namespace grpo_fast

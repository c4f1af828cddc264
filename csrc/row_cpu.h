// Row functions on a chunk of logits (rows.h), for the CPU: statistics, gradient, and both with the objective between.
//
// A row is one thread's. It is walked in blocks that stay in the first-level cache; sums within a block are float32,
// across blocks float64. A row's result does not depend on the other rows or on the number of threads.
// Bytes per logit: statistics read 4; gradient reads 4, writes 2 or 4 in place; the fused pass reads 4 from memory and
// again from the second-level cache (a row of 151936 is 0.6 MB), writes 2 or 4.
#pragma once

#include <cstdint>
#include <string>

#include "rows.h"

namespace grpo_fast {

// Instruction sets that the row functions are compiled for.
enum class Isa : int32_t { kBaseline, kAvx2, kAvx512 };

// The best that this machine runs.
Isa detected_isa();

struct Launch {
  int threads;
  Isa isa;  // at most detected_isa()
};

// logprobs, entropy, lse [R]. The logits stay as they are.
void row_statistics(const Rows& rows, float* logprobs, float* entropy, float* lse, Launch launch);

// dx over the logits: row t's result, in `dtype`, starts where row t of the logits starts.
//   g, e: [R] gradients of the loss in logprob and entropy (e null: zero). Rows with both zero become zeros.
//   vocab_start: vocabulary index of column 0; targets outside the columns add nothing.
void row_gradient(const Rows& rows, const float* lse, const float* entropy, const float* g, const float* e,
                  int64_t vocab_start, DType dtype, Launch launch);

// Statistics, the objective's derivative and dx in one visit of each row, for token-local objectives.
//   entropy_gradient: dloss/dentropy, the same for every row. grad_scale: multiplies dx.
//   live: [R], 1 where dx is not all zero.
void row_objective(const Rows& rows, const Objective& objective, const TokenArrays& tokens, float entropy_gradient,
                   float grad_scale, DType dtype, float* logprobs, float* entropy, uint8_t* live, Launch launch);

}  // namespace grpo_fast

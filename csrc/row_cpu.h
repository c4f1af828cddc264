// Row functions on a chunk of logits (rows.h), for the CPU: statistics, gradient, and both with the objective between.
//
// A row is one thread's. It is walked in blocks that stay in the first-level cache; sums within a block are float32,
// across blocks float64. A row's result does not depend on the other rows or on the number of threads.
// Bytes per logit: statistics read 4; gradient reads 4, writes 2 or 4 in place; the fused pass reads 4 from memory and
// again from the second-level cache (a row of 151936 is 0.6 MB), writes 2 or 4.
#pragma once

#include <cstdint>

#include "isa.h"
#include "rows.h"

namespace grpo_fast {

// All functions below take offsets [R+1] where rows have lengths of their own, null where they have not. Row t of the
// logits and of the bias is then [offsets[t], offsets[t + 1]), and its target a place in it; -1: it is not there.

// logprobs, entropy, lse [R]. The logits stay as they are.
void row_statistics(const Rows& rows, float* logprobs, float* entropy, float* lse, Launch launch,
                    const int64_t* offsets = nullptr);

// dx over the logits: row t's result, in `dtype`, starts where row t of the logits starts.
//   g, e: [R] gradients of the loss in logprob and entropy (e null: zero). Rows with both zero become zeros.
//   vocab_start: vocabulary index of column 0; targets outside the columns add nothing.
void row_gradient(const Rows& rows, const float* lse, const float* entropy, const float* g, const float* e,
                  int64_t vocab_start, DType dtype, Launch launch, const int64_t* offsets = nullptr);

// Statistics, the objective's derivative and dx in one visit of each row, for token-local objectives.
//   entropy_gradient: dloss/dentropy, the same for every row. grad_scale: multiplies dx.
//   live: [R], 1 where dx is not all zero.
void row_objective(const Rows& rows, const Objective& objective, const TokenArrays& tokens, float entropy_gradient,
                   float grad_scale, DType dtype, float* logprobs, float* entropy, uint8_t* live, Launch launch,
                   const int64_t* offsets = nullptr);

// -- one row, for functions that do more with it (sparse_cpu.cpp) -----------------------------------------------------

// What turns a row's raw products into logits.
struct RowTransform {
  const float* bias;  // of the row's first logit, or null
  float logit_scale;
  float softcap;
  float temperature;
};

struct Row {
  float* logits;
  int64_t length;
  RowTransform transform;
};

inline Row row_of(const Rows& rows, const int64_t* offsets, int64_t t) {
  const float temperature = rows.row_temperature ? rows.row_temperature[t] : rows.temperature;
  const int64_t start = offsets ? offsets[t] : t * rows.row_stride;
  return {rows.logits + start, offsets ? offsets[t + 1] - start : rows.num_columns,
          {rows.bias && offsets ? rows.bias + start : rows.bias, rows.logit_scale, rows.softcap, temperature}};
}

struct Statistics {
  float logprob;
  float entropy;
  float lse;
};

// (row, target)
using StatisticsFn = Statistics (*)(const Row&, int64_t);
// (row, target, lse, entropy, g, e)
using GradientFn = void (*)(const Row&, int64_t, float, float, float, float);

StatisticsFn statistics_for(Isa isa);
GradientFn gradient_for(Isa isa, DType dtype);

// The whole of row_objective on one row.
struct ObjectivePass {
  const Objective& objective;
  const TokenArrays& tokens;
  float entropy_gradient, grad_scale;
  float* logprobs;
  float* entropy;
  uint8_t* live;
  StatisticsFn statistics;
  GradientFn gradient;

  // Returns whether dx is not all zero.
  bool operator()(const Row& row, int64_t t, int64_t target) const;
};

}  // namespace grpo_fast

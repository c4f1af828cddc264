// group_cpu.h's functions on a CUDA device: the same arguments with arrays on the device, the same results.
// Asynchronous: they enqueue one or two kernels, allocate nothing and wait for nothing. What the arrays hold is not
// checked (that would wait for the device): `order` must hold each completion once, offsets must rise from 0 to their
// end.
//
// Throws std::invalid_argument for sizes and null pointers, std::runtime_error where CUDA returns an error.
#pragma once

#include <cstdint>

#include "group_cpu.h"
#include "row_cuda.h"

namespace grpo_fast {

// One block; a warp a group. `Real` is float or double.
template <typename Real>
void group_advantages_cuda(const Real* rewards, int64_t num_completions, int64_t num_rewards, const double* weights,
                           const Groups& groups, AdvantageScale scale, RewardAggregation aggregation, Real* advantages,
                           CudaQueue queue);

// A block a sequence, twice: counts, then everything else.
//   normalizer: replaces D; NaN (on the host): none.
//   num_active: [1] the number of indices in rows.rows.     counts: [2 S] scratch.
void token_rows_cuda(const TokenBatch<float>& batch, TokenAggregation aggregation, Scalar normalizer, bool every_row,
                     const TokenRows<float>& rows, int64_t* num_active, int64_t* counts, CudaQueue queue);

}  // namespace grpo_fast

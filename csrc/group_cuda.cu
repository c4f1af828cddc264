// The kernels of group_algorithm.h.

#include "group_cuda.h"

#include <stdexcept>
#include <string>

#include "group_algorithm.h"
#include "lane_cuda.h"
#include "launch_cuda.h"

namespace grpo_fast {
namespace {

template <typename Real>
__global__ void __launch_bounds__(kGroupThreads, 1)
    advantages_kernel(const __grid_constant__ AdvantageTask<Real> task) {
  __shared__ double slots[kWarp];
  CudaLane lane{nullptr};
  advantages_block(lane, task, slots);
}

__global__ void __launch_bounds__(kTokenThreads) count_kernel(const __grid_constant__ TokenTask task) {
  __shared__ int64_t slots[kWarp];
  CudaLane lane{nullptr};
  count_sequence(lane, task, slots);
}

__global__ void __launch_bounds__(kTokenThreads) write_kernel(const __grid_constant__ TokenTask task) {
  __shared__ int64_t slots[kWarp];
  __shared__ int places[2 * kWarp];
  CudaLane lane{nullptr};
  write_sequence(lane, task, slots, places);
}

}  // namespace

template <typename Real>
void group_advantages_cuda(const Real* rewards, int64_t num_completions, int64_t num_rewards, const double* weights,
                           const Groups& groups, AdvantageScale scale, RewardAggregation aggregation, Real* advantages,
                           CudaQueue queue) {
  if (num_completions < 0 || num_rewards < 0) {
    throw std::invalid_argument("rewards: expected sizes >= 0; got [" + std::to_string(num_completions) + ", " +
                                std::to_string(num_rewards) + "]");
  }
  if (groups.offsets == nullptr && (groups.group_size < 1 || num_completions % groups.group_size != 0)) {
    throw std::invalid_argument("group_size: expected a positive divisor of the " + std::to_string(num_completions) +
                                " rewards; got " + std::to_string(groups.group_size));
  }
  if (aggregation == RewardAggregation::kNormalizeThenSum && scale != AdvantageScale::kGroup &&
      scale != AdvantageScale::kBatch) {
    throw std::invalid_argument(
        "scale: expected kGroup, as kNormalizeThenSum z-scores by group and batch; got a scale that does not divide");
  }
  if (num_completions == 0) return;
  const LaunchShape shape{"group_advantages of " + std::to_string(num_completions), 1, kGroupThreads, 1, 0};
  const CurrentDevice current(queue.device, shape);
  const AdvantageTask<Real> task{rewards, num_completions, num_rewards, weights,
                                 groups,  scale,           aggregation, advantages};
  launch(advantages_kernel<Real>, shape, queue.stream, task);
}

template void group_advantages_cuda<float>(const float*, int64_t, int64_t, const double*, const Groups&, AdvantageScale,
                                           RewardAggregation, float*, CudaQueue);
template void group_advantages_cuda<double>(const double*, int64_t, int64_t, const double*, const Groups&,
                                            AdvantageScale, RewardAggregation, double*, CudaQueue);

void token_rows_cuda(const TokenBatch<float>& batch, TokenAggregation aggregation, Scalar normalizer, bool every_row,
                     const TokenRows<float>& rows, int64_t* num_active, int64_t* counts, CudaQueue queue) {
  LaunchShape shape{"token_rows of " + std::to_string(batch.num_tokens) + " tokens, counts", batch.num_sequences,
                    kTokenThreads, 1, 0};
  if (batch.num_tokens < 0 || batch.num_sequences < 0 || (batch.num_tokens > 0 && batch.num_sequences == 0)) {
    throw std::invalid_argument("cu_seqlens: expected sequences that hold all tokens; got " +
                                std::to_string(batch.num_sequences) + " for " + std::to_string(batch.num_tokens));
  }
  const CurrentDevice current(queue.device, shape);
  if (batch.num_sequences == 0) {
    check(cudaMemsetAsync(num_active, 0, sizeof(int64_t), queue.stream), "cudaMemsetAsync", shape);
    return;
  }
  const TokenTask task{batch, aggregation, normalizer, every_row, rows, num_active, counts};
  launch(count_kernel, shape, queue.stream, task);
  shape.kernel = "token_rows of " + std::to_string(batch.num_tokens) + " tokens, weights and active rows";
  launch(write_kernel, shape, queue.stream, task);
}

}  // namespace grpo_fast

// row_cuda.h and group_cuda.h on the emulator: with bindings_cuda.cpp an extension module that takes CPU tensors, so
// that the Python side of the cuda backend can be tested without a GPU. "Devices" 0 and 1 are a small sm_90 and an
// sm_80.

#include <algorithm>

#include "../group_algorithm.h"
#include "emulated_rows.h"

namespace grpo_fast {
namespace {

constexpr int kSlots = 2 * kWarp * int(sizeof(int64_t));

int shared_limit(CudaQueue queue) { return queue.device == 0 ? 2900 : 0; }

uint64_t next_seed() {
  static uint64_t seed = 0;
  return ++seed;
}

}  // namespace

RowLaunch row_launch(int device, int64_t num_columns) {
  const ClusterSplit split = split_row(num_columns, shared_limit({device, nullptr}));
  return {split.ranks, split.threads, split.stages, split.shared_bytes};
}

void row_statistics_cuda(const Rows& rows, float* logprobs, float* entropy, float* lse, CudaQueue queue) {
  const RowTask task = statistics_task(rows, logprobs, entropy, lse);
  testing::launch<Pass::kStatistics>(task, DType::kFloat32, shared_limit(queue), 2, next_seed());
}

void row_gradient_cuda(const Rows& rows, const float* lse, const float* entropy, const float* g, const float* e,
                       int64_t vocab_start, const DxOut& out, CudaQueue queue) {
  const RowTask task = gradient_task(rows, lse, entropy, g, e, vocab_start, out);
  testing::launch<Pass::kGradient>(task, out.dtype, shared_limit(queue), 2, next_seed());
}

void row_objective_cuda(const Rows& rows, const Objective& objective, const TokenArrays& tokens,
                        Scalar entropy_gradient, Scalar grad_scale, const DxOut& out, float* logprobs, float* entropy,
                        uint8_t* live, CudaQueue queue) {
  const RowTask task =
      objective_task(rows, objective, tokens, entropy_gradient, grad_scale, out, logprobs, entropy, live);
  testing::launch<Pass::kObjective>(task, out.dtype, shared_limit(queue), 2, next_seed());
}

template <typename Real>
void group_advantages_cuda(const Real* rewards, int64_t num_completions, int64_t num_rewards, const double* weights,
                           const Groups& groups, AdvantageScale scale, RewardAggregation aggregation, Real* advantages,
                           CudaQueue) {
  const AdvantageTask<Real> task{rewards, num_completions, num_rewards, weights,
                                 groups,  scale,           aggregation, advantages};
  testing::emulate({1, 1, 64, kSlots}, next_seed(),
                   [&](testing::Cluster::Lane& lane) { advantages_block(lane, task, lane.shared<double>(0)); });
}
template void group_advantages_cuda<float>(const float*, int64_t, int64_t, const double*, const Groups&, AdvantageScale,
                                           RewardAggregation, float*, CudaQueue);
template void group_advantages_cuda<double>(const double*, int64_t, int64_t, const double*, const Groups&,
                                            AdvantageScale, RewardAggregation, double*, CudaQueue);

void token_rows_cuda(const TokenBatch<float>& batch, TokenAggregation aggregation, Scalar normalizer, bool every_row,
                     const TokenRows<float>& rows, int64_t* num_active, int64_t* counts, CudaQueue) {
  const TokenTask task{batch, aggregation, normalizer, every_row, rows, num_active, counts};
  const testing::LaunchSize size{int(batch.num_sequences), 1, 64, kSlots};
  testing::emulate(size, next_seed(),
                   [&](testing::Cluster::Lane& lane) { count_sequence(lane, task, lane.shared<int64_t>(0)); });
  testing::emulate(size, next_seed(), [&](testing::Cluster::Lane& lane) {
    write_sequence(lane, task, lane.shared<int64_t>(0), lane.shared<int>(kSlots / 2));
  });
}

}  // namespace grpo_fast

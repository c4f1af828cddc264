// grpo_fast._cuda: the CUDA functions for Python. A module of its own beside _C: it needs nvcc to build and the CUDA
// runtime (linked statically) to load, and an install without either keeps _C. Streams are addresses as well.

#include "bindings_types.h"
#include "group_cuda.h"
#include "row_cuda.h"

namespace grpo_fast {
namespace {

CudaQueue queue_of(int device, Address stream) { return {device, at<CUstream_st>(stream)}; }

void bind_rows(py::module_& m) {
  m.def("narrow_offset", &narrow_offset, "columns"_a,
        "Bytes into a row of logits at which narrow dx over it begins, where it has no memory of its own.");
  m.def(
      "row_launch",
      [](int device, int64_t columns) {
        const RowLaunch found = row_launch(device, columns);
        return py::dict("ranks"_a = found.ranks, "threads"_a = found.threads, "stages"_a = found.stages,
                        "shared_bytes"_a = found.shared_bytes);
      },
      "device"_a, "columns"_a, "How statistics and the objective run there; ranks 0: streaming, one block a row.");
  m.def(
      "row_statistics",
      [](const Rows& rows, Address logprobs, Address entropy, Address lse, int device, Address stream) {
        row_statistics_cuda(rows, at<float>(logprobs), at<float>(entropy), at<float>(lse), queue_of(device, stream));
      },
      Unlocked(), "rows"_a, py::kw_only(), "logprobs"_a, "entropy"_a, "lse"_a, "device"_a, "stream"_a);
  m.def(
      "row_gradient",
      [](const Rows& rows, Address lse, Address entropy, Address g, Address e, int64_t vocab_start, Address dx,
         int64_t dx_stride, DType dtype, int device, Address stream) {
        row_gradient_cuda(rows, at<const float>(lse), at<const float>(entropy), at<const float>(g), at<const float>(e),
                          vocab_start, {at<void>(dx), dx_stride, dtype}, queue_of(device, stream));
      },
      Unlocked(), "rows"_a, py::kw_only(), "lse"_a, "entropy"_a, "g"_a, "e"_a, "vocab_start"_a, "dx"_a, "dx_stride"_a,
      "dtype"_a, "device"_a, "stream"_a);
  m.def(
      "row_objective",
      [](const Rows& rows, const Objective& objective, Address advantages, Address weights, Address old_logprobs,
         Address ref_logprobs, Address sampling_logprobs, Address importance, Address entropy_gradient,
         Address grad_scale, Address dx, int64_t dx_stride, DType dtype, Address logprobs, Address entropy,
         Address live, int device, Address stream) {
        const TokenArrays tokens =
            token_arrays_at(advantages, weights, old_logprobs, ref_logprobs, sampling_logprobs, importance);
        row_objective_cuda(rows, objective, tokens, {at<const float>(entropy_gradient), 0.0f},
                           {at<const float>(grad_scale), 1.0f}, {at<void>(dx), dx_stride, dtype},
                           at<float>(logprobs), at<float>(entropy), at<uint8_t>(live), queue_of(device, stream));
      },
      Unlocked(), "rows"_a, "objective"_a, py::kw_only(), "advantages"_a, "weights"_a, "old_logprobs"_a,
      "ref_logprobs"_a, "sampling_logprobs"_a, "importance"_a, "entropy_gradient"_a, "grad_scale"_a, "dx"_a,
      "dx_stride"_a, "dtype"_a, "logprobs"_a, "entropy"_a, "live"_a, "device"_a, "stream"_a,
      "entropy_gradient (address 0: zero) and grad_scale (address 0: one) are one float each.");
}

template <typename Real>
void advantages_of(Address rewards, int64_t num_completions, int64_t num_rewards, Address weights, const Groups& groups,
                   AdvantageScale scale, RewardAggregation aggregation, Address out, CudaQueue queue) {
  group_advantages_cuda(at<const Real>(rewards), num_completions, num_rewards, at<const double>(weights), groups, scale,
                        aggregation, at<Real>(out), queue);
}

void bind_groups(py::module_& m) {
  m.def(
      "group_advantages",
      [](DType dtype, Address rewards, int64_t num_completions, int64_t num_rewards, Address weights,
         int64_t group_size, Address order, Address offsets, int64_t num_groups, AdvantageScale scale,
         RewardAggregation aggregation, Address out, int device, Address stream) {
        const Groups groups = groups_at(group_size, order, offsets, num_groups);
        (dtype == DType::kFloat64 ? advantages_of<double> : advantages_of<float>)(
            rewards, num_completions, num_rewards, weights, groups, scale, aggregation, out, queue_of(device, stream));
      },
      Unlocked(), "dtype"_a, py::kw_only(), "rewards"_a, "num_completions"_a, "num_rewards"_a, "weights"_a,
      "group_size"_a, "order"_a, "offsets"_a, "num_groups"_a, "scale"_a, "aggregation"_a, "out"_a, "device"_a, "stream"_a);
  m.def(
      "token_rows",
      [](Address cu_seqlens, int64_t num_sequences, int64_t num_tokens, Address mask, Address advantages,
         bool advantages_per_token, Address importance, TokenAggregation aggregation, Address normalizer,
         float normalizer_value, bool every_row, Address weights, Address token_advantages, Address active,
         Address rows, Address num_active, Address counts, int device, Address stream) {
        const auto batch = token_batch_at<float>(cu_seqlens, num_sequences, num_tokens, mask, advantages,
                                                 advantages_per_token, importance);
        const TokenRows<float> out{at<float>(weights), at<float>(token_advantages), at<uint8_t>(active),
                                   at<int64_t>(rows)};
        token_rows_cuda(batch, aggregation, {at<const float>(normalizer), normalizer_value}, every_row, out,
                        at<int64_t>(num_active), at<int64_t>(counts), queue_of(device, stream));
      },
      Unlocked(), py::kw_only(), "cu_seqlens"_a, "num_sequences"_a, "num_tokens"_a, "mask"_a, "advantages"_a,
      "advantages_per_token"_a, "importance"_a, "aggregation"_a, "normalizer"_a, "normalizer_value"_a, "every_row"_a,
      "weights"_a, "token_advantages"_a, "active"_a, "rows"_a, "num_active"_a, "counts"_a, "device"_a, "stream"_a,
      "num_active [1], counts [2 S] (scratch): int64 on the device. normalizer 0 and normalizer_value NaN: none.");
}

}  // namespace
}  // namespace grpo_fast

PYBIND11_MODULE(_cuda, m) {
  using namespace grpo_fast;
  m.doc() = "CUDA functions of grpo-fast; addresses, sizes and streams in, no torch linked. They return at once.";
  m.attr("ARCHITECTURES") = GRPO_FAST_ARCHITECTURES;
  bind_types(m);
  bind_group_types(m);
  bind_rows(m);
  bind_groups(m);
}

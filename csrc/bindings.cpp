// grpo_fast._C: the native CPU functions for Python; their callers in grpo_fast/backends/cpu.py have checked the
// arguments.

#include <sys/mman.h>
#include <unistd.h>

#include <optional>
#include <string>

#include "bindings_types.h"
#include "gemm_cpu.h"
#include "group_cpu.h"
#include "row_cpu.h"
#include "sparse_cpu.h"

namespace grpo_fast {
namespace {

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

// The kernel then backs the whole pages of [address, address + bytes) by large ones: 256 MiB are first touched in 7 ms
// instead of 48 (two EPYC cores, Linux 6.18). A hint: refusal changes nothing.
void advise_huge_pages(Address address, size_t bytes) {
#ifdef MADV_HUGEPAGE
  const Address page = static_cast<Address>(sysconf(_SC_PAGESIZE));
  const Address begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (begin < end) (void)madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)bytes;
#endif
}

Launch launch_on(int threads) { return {threads, detected_isa()}; }

void bind_rows(py::module_& m) {
  m.def(
      "row_statistics",
      [](const Rows& rows, Address offsets, Address logprobs, Address entropy, Address lse, int threads) {
        row_statistics(rows, at<float>(logprobs), at<float>(entropy), at<float>(lse), launch_on(threads),
                       at<const int64_t>(offsets));
      },
      Unlocked(), "rows"_a, py::kw_only(), "offsets"_a, "logprobs"_a, "entropy"_a, "lse"_a, "threads"_a);
  m.def(
      "row_gradient",
      [](const Rows& rows, Address offsets, Address lse, Address entropy, Address g, Address e, int64_t vocab_start,
         DType dtype, int threads) {
        row_gradient(rows, at<const float>(lse), at<const float>(entropy), at<const float>(g), at<const float>(e),
                     vocab_start, dtype, launch_on(threads), at<const int64_t>(offsets));
      },
      Unlocked(), "rows"_a, py::kw_only(), "offsets"_a, "lse"_a, "entropy"_a, "g"_a, "e"_a, "vocab_start"_a, "dtype"_a,
      "threads"_a);
  m.def(
      "row_objective",
      [](const Rows& rows, const Objective& objective, Address offsets, Address advantages, Address weights,
         Address old_logprobs, Address ref_logprobs, Address sampling_logprobs, Address importance,
         float entropy_gradient, float grad_scale, DType dtype, Address logprobs, Address entropy, Address live,
         int threads) {
        const TokenArrays tokens =
            token_arrays_at(advantages, weights, old_logprobs, ref_logprobs, sampling_logprobs, importance);
        row_objective(rows, objective, tokens, entropy_gradient, grad_scale, dtype, at<float>(logprobs),
                      at<float>(entropy), at<uint8_t>(live), launch_on(threads), at<const int64_t>(offsets));
      },
      Unlocked(), "rows"_a, "objective"_a, py::kw_only(), "offsets"_a, "advantages"_a, "weights"_a, "old_logprobs"_a,
      "ref_logprobs"_a, "sampling_logprobs"_a, "importance"_a, "entropy_gradient"_a, "grad_scale"_a, "dtype"_a,
      "logprobs"_a, "entropy"_a, "live"_a, "threads"_a);
}

void bind_supports(py::module_& m) {
  py::class_<Operands>(m, "Operands", py::module_local(), "hidden [R, H] and weight [V, H], either 0 where not read.")
      .def(py::init([](DType dtype, Address hidden, Address weight, int64_t width) {
             return Operands{dtype, at<const void>(hidden), at<const void>(weight), width};
           }),
           py::kw_only(), "dtype"_a, "hidden"_a, "weight"_a, "width"_a);
  py::class_<Supports>(m, "Supports", py::module_local())
      .def(py::init([](Address ids, Address offsets, int64_t num_rows) {
             return Supports{at<const int32_t>(ids), at<const int64_t>(offsets), num_rows};
           }),
           py::kw_only(), "ids"_a, "offsets"_a, "num_rows"_a);
  m.def("sparse_sort_bytes", &sparse_sort_bytes, "num_entries"_a);
  m.def(
      "sparse_logits",
      [](const Operands& operands, const Supports& supports, Address out, int threads) {
        sparse_logits(operands, supports, at<float>(out), launch_on(threads));
      },
      Unlocked(), "operands"_a, "supports"_a, py::kw_only(), "out"_a, "threads"_a);
  m.def(
      "sparse_grad_hidden",
      [](const Operands& operands, const Supports& supports, Address dx, Address out, DType out_dtype, int threads) {
        sparse_grad_hidden(at<const float>(dx), operands, supports, {out_dtype, at<void>(out)}, launch_on(threads));
      },
      Unlocked(), "operands"_a, "supports"_a, py::kw_only(), "dx"_a, "out"_a, "out_dtype"_a, "threads"_a);
  m.def(
      "sparse_grad_weight",
      [](const Operands& operands, Address dx, Address ids, Address rows, int64_t num_entries, int64_t vocab,
         Address out, DType out_dtype, Address scratch, int threads) {
        sparse_grad_weight(at<const float>(dx), operands, at<const int32_t>(ids), at<const int64_t>(rows), num_entries,
                           vocab, {out_dtype, at<void>(out)}, at<void>(scratch), launch_on(threads));
      },
      Unlocked(), "operands"_a, py::kw_only(), "dx"_a, "ids"_a, "rows"_a, "num_entries"_a, "vocab"_a, "out"_a,
      "out_dtype"_a, "scratch"_a, "threads"_a);
  m.def(
      "sparse_objective",
      [](const Operands& operands, const Supports& supports, const Rows& rows, const Objective& objective,
         Address advantages, Address weights, Address old_logprobs, Address ref_logprobs, Address sampling_logprobs,
         Address importance, float entropy_gradient, float grad_scale, Address logprobs, Address entropy, Address live,
         Address grad_hidden, DType grad_hidden_dtype, int threads) {
        const TokenArrays tokens =
            token_arrays_at(advantages, weights, old_logprobs, ref_logprobs, sampling_logprobs, importance);
        sparse_objective(operands, supports, rows, objective, tokens, entropy_gradient, grad_scale,
                         at<float>(logprobs), at<float>(entropy), at<uint8_t>(live),
                         {grad_hidden_dtype, at<void>(grad_hidden)}, launch_on(threads));
      },
      Unlocked(), "operands"_a, "supports"_a, "rows"_a, "objective"_a, py::kw_only(), "advantages"_a, "weights"_a,
      "old_logprobs"_a, "ref_logprobs"_a, "sampling_logprobs"_a, "importance"_a, "entropy_gradient"_a, "grad_scale"_a,
      "logprobs"_a, "entropy"_a, "live"_a, "grad_hidden"_a, "grad_hidden_dtype"_a, "threads"_a);
}

template <typename Real>
void advantages_of(Address rewards, int64_t num_completions, int64_t num_rewards, Address weights, const Groups& groups,
                   AdvantageScale scale, RewardAggregation aggregation, Address out) {
  group_advantages(at<const Real>(rewards), num_completions, num_rewards, at<const double>(weights), groups, scale,
                   aggregation, at<Real>(out));
}

template <typename Real>
int64_t token_rows_of(Address cu_seqlens, int64_t num_sequences, int64_t num_tokens, Address mask, Address advantages,
                      bool advantages_per_token, Address importance, TokenAggregation aggregation,
                      std::optional<double> normalizer, bool every_row, Address weights, Address token_advantages,
                      Address active, Address rows) {
  const auto batch = token_batch_at<Real>(cu_seqlens, num_sequences, num_tokens, mask, advantages,
                                          advantages_per_token, importance);
  const TokenRows<Real> out{at<Real>(weights), at<Real>(token_advantages), at<uint8_t>(active), at<int64_t>(rows)};
  return token_rows(batch, aggregation, normalizer, every_row, out);
}

void bind_groups(py::module_& m) {
  m.def(
      "group_advantages",
      [](DType dtype, Address rewards, int64_t num_completions, int64_t num_rewards, Address weights,
         int64_t group_size, Address order, Address offsets, int64_t num_groups, AdvantageScale scale,
         RewardAggregation aggregation, Address out) {
        const Groups groups = groups_at(group_size, order, offsets, num_groups);
        (dtype == DType::kFloat64 ? advantages_of<double> : advantages_of<float>)(
            rewards, num_completions, num_rewards, weights, groups, scale, aggregation, out);
      },
      Unlocked(), "dtype"_a, py::kw_only(), "rewards"_a, "num_completions"_a, "num_rewards"_a, "weights"_a,
      "group_size"_a, "order"_a, "offsets"_a, "num_groups"_a, "scale"_a, "aggregation"_a, "out"_a);
  m.def(
      "token_rows",
      [](DType dtype, Address cu_seqlens, int64_t num_sequences, int64_t num_tokens, Address mask, Address advantages,
         bool advantages_per_token, Address importance, TokenAggregation aggregation, std::optional<double> normalizer,
         bool every_row, Address weights, Address token_advantages, Address active, Address rows) {
        return (dtype == DType::kFloat64 ? token_rows_of<double> : token_rows_of<float>)(
            cu_seqlens, num_sequences, num_tokens, mask, advantages, advantages_per_token, importance, aggregation,
            normalizer, every_row, weights, token_advantages, active, rows);
      },
      Unlocked(), "Weights, advantages and active rows of packed tokens; returns the number of active rows.", "dtype"_a,
      py::kw_only(), "cu_seqlens"_a, "num_sequences"_a, "num_tokens"_a, "mask"_a, "advantages"_a,
      "advantages_per_token"_a, "importance"_a, "aggregation"_a, "normalizer"_a, "every_row"_a, "weights"_a,
      "token_advantages"_a, "active"_a, "rows"_a);
}

void bind_gemms(py::module_& m) {
  m.attr("GEMM_SCRATCH_PER_THREAD") = kGemmScratchPerThread;
  m.def("gemm_packed_bytes", &gemm_packed_bytes, "rows"_a, "width"_a);
  m.def(
      "gemm_obstacle",
      [](DType dtype) -> py::object {
        const char* obstacle = gemm_obstacle(dtype);
        return obstacle ? py::object(py::str(obstacle)) : py::object(py::none());
      },
      "dtype"_a, "Why products of narrow operands cannot be done here, or None.");
  m.def(
      "gemm_logits",
      [](DType dtype, Address hidden, Address weight, Address out, int64_t rows, int64_t width, int64_t vocab,
         int64_t out_stride, Address scratch, int threads) {
        gemm_logits(dtype, at<const uint16_t>(hidden), at<const uint16_t>(weight), at<float>(out), rows, width, vocab,
                    out_stride, at<void>(scratch), threads);
      },
      Unlocked(), "dtype"_a, py::kw_only(), "hidden"_a, "weight"_a, "out"_a, "rows"_a, "width"_a, "vocab"_a,
      "out_stride"_a, "scratch"_a, "threads"_a);
  m.def(
      "gemm_grad_hidden",
      [](DType dtype, Address dx, Address weight, Address out, int64_t rows, int64_t width, int64_t vocab,
         int64_t dx_stride, Address scratch, int threads) {
        gemm_grad_hidden(dtype, at<const uint16_t>(dx), at<const uint16_t>(weight), at<float>(out), rows, width, vocab,
                         dx_stride, at<void>(scratch), threads);
      },
      Unlocked(), "dtype"_a, py::kw_only(), "dx"_a, "weight"_a, "out"_a, "rows"_a, "width"_a, "vocab"_a, "dx_stride"_a,
      "scratch"_a, "threads"_a);
  m.def(
      "gemm_grad_weight",
      [](DType dtype, Address dx, Address hidden, Address base, Address out, bool narrow_out, int64_t rows,
         int64_t width, int64_t vocab, int64_t dx_stride, Address packed, Address scratch, int threads) {
        gemm_grad_weight(dtype, at<const uint16_t>(dx), at<const uint16_t>(hidden), at<const float>(base),
                         at<void>(out), narrow_out, rows, width, vocab, dx_stride, at<void>(packed), at<void>(scratch),
                         threads);
      },
      Unlocked(), "dtype"_a, py::kw_only(), "dx"_a, "hidden"_a, "base"_a, "out"_a, "narrow_out"_a, "rows"_a, "width"_a,
      "vocab"_a, "dx_stride"_a, "packed"_a, "scratch"_a, "threads"_a);
}

}  // namespace
}  // namespace grpo_fast

PYBIND11_MODULE(_C, m) {
  using namespace grpo_fast;
  m.doc() = "Native CPU functions of grpo-fast; addresses and sizes in, no torch linked.";
  m.def("isa", [] { return isa_name(detected_isa()); }, "The instruction set that the row functions use here.");
  m.def("advise_huge_pages", &advise_huge_pages, "address"_a, "bytes"_a);
  bind_types(m);
  bind_group_types(m);
  bind_rows(m);
  bind_supports(m);
  bind_groups(m);
  bind_gemms(m);
}

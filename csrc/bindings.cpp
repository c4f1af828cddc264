// grpo_fast._C: the native CPU functions for Python. Tensors come as addresses (0: none) with their sizes, so that one
// binary serves every torch version; the callers in grpo_fast/ops/cpu_backend.py have checked them. The interpreter's lock is
// released while they run.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sys/mman.h>
#include <unistd.h>

#include <optional>
#include <string>

#include "gemm_cpu.h"
#include "group_cpu.h"
#include "row_cpu.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace grpo_fast {
namespace {

using Address = uintptr_t;
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

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

void bind_types(py::module_& m) {
  py::enum_<DType>(m, "DType")
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("float64", DType::kFloat64);
  py::enum_<PolicyTerm>(m, "PolicyTerm")
      .value("clipped", PolicyTerm::kClipped)
      .value("cispo", PolicyTerm::kCispo)
      .value("sapo", PolicyTerm::kSapo)
      .value("dppo", PolicyTerm::kDppo)
      .value("ppo_dual", PolicyTerm::kPpoDual)
      .value("reinforce", PolicyTerm::kReinforce);
  py::enum_<KlEstimator>(m, "KlEstimator")
      .value("none", KlEstimator::kNone)
      .value("k1", KlEstimator::kK1)
      .value("k2", KlEstimator::kK2)
      .value("k3", KlEstimator::kK3);
  py::enum_<Correction>(m, "Correction")
      .value("none", Correction::kNone)
      .value("weight", Correction::kWeight)
      .value("token_truncate", Correction::kTokenTruncate)
      .value("token_mask", Correction::kTokenMask);
  py::class_<ObjectiveConfig>(m, "ObjectiveConfig")
      .def(py::init<>())
      .def_readwrite("policy", &ObjectiveConfig::policy)
      .def_readwrite("kl", &ObjectiveConfig::kl)
      .def_readwrite("correction", &ObjectiveConfig::correction)
      .def_readwrite("kl_times_ratio", &ObjectiveConfig::kl_times_ratio)
      .def_readwrite("epsilon_low", &ObjectiveConfig::epsilon_low)
      .def_readwrite("epsilon_high", &ObjectiveConfig::epsilon_high)
      .def_readwrite("delta", &ObjectiveConfig::delta)
      .def_readwrite("beta", &ObjectiveConfig::beta)
      .def_readwrite("importance_min", &ObjectiveConfig::importance_min)
      .def_readwrite("importance_max", &ObjectiveConfig::importance_max)
      .def_readwrite("sapo_temperature_pos", &ObjectiveConfig::sapo_temperature_pos)
      .def_readwrite("sapo_temperature_neg", &ObjectiveConfig::sapo_temperature_neg)
      .def_readwrite("dppo_threshold", &ObjectiveConfig::dppo_threshold)
      .def_readwrite("dppo_log_ratio_coef", &ObjectiveConfig::dppo_log_ratio_coef)
      .def_readwrite("dual_clip", &ObjectiveConfig::dual_clip);
}

void bind_rows(py::module_& m) {
  py::class_<Rows>(m, "Rows", "Raw products [R, V] float32, and what turns them into logits.")
      .def(py::init([](Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address targets,
                       Address bias, float logit_scale, float softcap, float temperature, Address row_temperature) {
             return Rows{at<float>(logits),      num_rows,    num_columns, row_stride,  at<const int64_t>(targets),
                         at<const float>(bias), logit_scale, softcap,     temperature, at<const float>(row_temperature)};
           }),
           py::kw_only(), "logits"_a, "num_rows"_a, "num_columns"_a, "row_stride"_a, "targets"_a, "bias"_a,
           "logit_scale"_a, "softcap"_a, "temperature"_a, "row_temperature"_a);
  m.def(
      "row_statistics",
      [](const Rows& rows, Address logprobs, Address entropy, Address lse, int threads) {
        row_statistics(rows, at<float>(logprobs), at<float>(entropy), at<float>(lse), launch_on(threads));
      },
      Unlocked(), "rows"_a, py::kw_only(), "logprobs"_a, "entropy"_a, "lse"_a, "threads"_a);
  m.def(
      "row_gradient",
      [](const Rows& rows, Address lse, Address entropy, Address g, Address e, int64_t vocab_start, DType dtype,
         int threads) {
        row_gradient(rows, at<const float>(lse), at<const float>(entropy), at<const float>(g), at<const float>(e),
                     vocab_start, dtype, launch_on(threads));
      },
      Unlocked(), "rows"_a, py::kw_only(), "lse"_a, "entropy"_a, "g"_a, "e"_a, "vocab_start"_a, "dtype"_a, "threads"_a);
  m.def(
      "row_objective",
      [](const Rows& rows, const ObjectiveConfig& config, Address advantages, Address weights, Address old_logprobs,
         Address ref_logprobs, Address sampling_logprobs, Address importance, float entropy_gradient, float grad_scale,
         DType dtype, Address logprobs, Address entropy, Address live, int threads) {
        const RowTokens tokens{at<const float>(advantages),        at<const float>(weights),
                               at<const float>(old_logprobs),      at<const float>(ref_logprobs),
                               at<const float>(sampling_logprobs), at<const float>(importance)};
        row_objective(rows, config, tokens, entropy_gradient, grad_scale, dtype, at<float>(logprobs),
                      at<float>(entropy), at<uint8_t>(live), launch_on(threads));
      },
      Unlocked(), "rows"_a, "config"_a, py::kw_only(), "advantages"_a, "weights"_a, "old_logprobs"_a, "ref_logprobs"_a,
      "sampling_logprobs"_a, "importance"_a, "entropy_gradient"_a, "grad_scale"_a, "dtype"_a, "logprobs"_a, "entropy"_a,
      "live"_a, "threads"_a);
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
  TokenBatch<Real> batch;
  batch.num_tokens = num_tokens;
  batch.num_sequences = num_sequences;
  batch.cu_seqlens = at<const int64_t>(cu_seqlens);
  batch.mask = at<const uint8_t>(mask);
  batch.advantages = at<const Real>(advantages);
  batch.advantages_per_token = advantages_per_token;
  batch.importance = at<const Real>(importance);
  const TokenRows<Real> out{at<Real>(weights), at<Real>(token_advantages), at<uint8_t>(active), at<int64_t>(rows)};
  return token_rows(batch, aggregation, normalizer, every_row, out);
}

void bind_groups(py::module_& m) {
  py::enum_<AdvantageScale>(m, "AdvantageScale")
      .value("group", AdvantageScale::kGroup)
      .value("batch", AdvantageScale::kBatch)
      .value("none", AdvantageScale::kNone)
      .value("leave_one_out", AdvantageScale::kLeaveOneOut);
  py::enum_<RewardAggregation>(m, "RewardAggregation")
      .value("sum_then_normalize", RewardAggregation::kSumThenNormalize)
      .value("normalize_then_sum", RewardAggregation::kNormalizeThenSum);
  py::enum_<TokenAggregation>(m, "TokenAggregation")
      .value("sequence_mean", TokenAggregation::kSequenceMean)
      .value("sequence_sum", TokenAggregation::kSequenceSum)
      .value("token_mean", TokenAggregation::kTokenMean);
  m.def(
      "group_advantages",
      [](DType dtype, Address rewards, int64_t num_completions, int64_t num_rewards, Address weights,
         int64_t group_size, Address order, Address offsets, int64_t num_groups, AdvantageScale scale,
         RewardAggregation aggregation, Address out) {
        Groups groups;
        groups.group_size = group_size;
        groups.order = at<const int64_t>(order);
        groups.offsets = at<const int64_t>(offsets);
        groups.num_groups = num_groups;
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
  bind_rows(m);
  bind_groups(m);
  bind_gemms(m);
}

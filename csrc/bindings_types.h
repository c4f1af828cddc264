// What both extension modules, _C and _cuda, say of their arguments. The types are local to each module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <iterator>
#include <string>
#include <vector>

#include "group_cpu.h"
#include "rows.h"

namespace grpo_fast {

namespace py = pybind11;
using namespace pybind11::literals;

// Tensors come as addresses (0: none) with their sizes, so that one binary serves every torch version.
using Address = uintptr_t;
// The interpreter's lock is released while functions run.
using Unlocked = py::call_guard<py::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline TokenArrays token_arrays_at(Address advantages, Address weights, Address old_logprobs, Address ref_logprobs,
                               Address sampling_logprobs, Address importance) {
  return {at<const float>(advantages),   at<const float>(weights),           at<const float>(old_logprobs),
          at<const float>(ref_logprobs), at<const float>(sampling_logprobs), at<const float>(importance)};
}

inline Groups groups_at(int64_t group_size, Address order, Address offsets, int64_t num_groups) {
  Groups groups;
  groups.group_size = group_size;
  groups.order = at<const int64_t>(order);
  groups.offsets = at<const int64_t>(offsets);
  groups.num_groups = num_groups;
  return groups;
}

template <typename Real>
TokenBatch<Real> token_batch_at(Address cu_seqlens, int64_t num_sequences, int64_t num_tokens, Address mask,
                                Address advantages, bool advantages_per_token, Address importance) {
  TokenBatch<Real> batch;
  batch.num_tokens = num_tokens;
  batch.num_sequences = num_sequences;
  batch.cu_seqlens = at<const int64_t>(cu_seqlens);
  batch.mask = at<const uint8_t>(mask);
  batch.advantages = at<const Real>(advantages);
  batch.advantages_per_token = advantages_per_token;
  batch.importance = at<const Real>(importance);
  return batch;
}

#define GRPO_FAST_NAME(name) #name,
constexpr const char* kParameters[] = {GRPO_FAST_PARAMETERS(GRPO_FAST_NAME)};
constexpr const char* kPolicies[] = {GRPO_FAST_POLICIES(GRPO_FAST_NAME)};
constexpr const char* kKlEstimators[] = {GRPO_FAST_KL_ESTIMATORS(GRPO_FAST_NAME)};
constexpr const char* kCorrections[] = {GRPO_FAST_CORRECTIONS(GRPO_FAST_NAME)};
static_assert(sizeof(Parameters) == std::size(kParameters) * sizeof(double), "nothing but the parameters");

// The enumerator of a name.
template <typename Enum, size_t kCount>
Enum named(const char* what, const std::string& name, const char* const (&known)[kCount]) {
  std::string all;
  for (size_t i = 0; i < kCount; ++i) {
    if (name == known[i]) return static_cast<Enum>(i);
    all += (i > 0 ? ", " : "") + std::string(known[i]);
  }
  throw py::value_error(std::string(what) + ": expected one of " + all + "; got '" + name + "'");
}

inline Objective objective_of(const std::string& policy, const std::string& kl, bool kl_times_ratio,
                              const std::string& correction, const std::vector<double>& parameters) {
  Objective out{named<PolicyTerm>("policy", policy, kPolicies), named<KlEstimator>("kl", kl, kKlEstimators),
                named<Correction>("correction", correction, kCorrections), kl_times_ratio, {}};
  if (parameters.size() != std::size(kParameters)) {
    throw py::value_error("parameters: expected " + std::to_string(std::size(kParameters)) + " numbers; got " +
                          std::to_string(parameters.size()));
  }
  std::memcpy(&out.parameters, parameters.data(), sizeof(Parameters));
  return out;
}

inline void bind_types(py::module_& m) {
  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("float64", DType::kFloat64);
  py::class_<Objective>(m, "Objective", py::module_local())
      .def(py::init(&objective_of), py::kw_only(), "policy"_a, "kl"_a, "kl_times_ratio"_a, "correction"_a,
           "parameters"_a, "parameters: numbers in the order of PARAMETERS. Raises ValueError for unknown names.");
  py::list parameters;
  for (const char* name : kParameters) parameters.append(name);
  m.attr("PARAMETERS") = py::tuple(parameters);
  py::class_<Rows>(m, "Rows", py::module_local(), "Raw products [R, V] float32, and what turns them into logits.")
      .def(py::init([](Address logits, int64_t num_rows, int64_t num_columns, int64_t row_stride, Address targets,
                       Address bias, float logit_scale, float softcap, float temperature, Address row_temperature) {
             return Rows{at<float>(logits),
                         num_rows,
                         num_columns,
                         row_stride,
                         at<const int64_t>(targets),
                         at<const float>(bias),
                         logit_scale,
                         softcap,
                         temperature,
                         at<const float>(row_temperature)};
           }),
           py::kw_only(), "logits"_a, "num_rows"_a, "num_columns"_a, "row_stride"_a, "targets"_a, "bias"_a,
           "logit_scale"_a, "softcap"_a, "temperature"_a, "row_temperature"_a);
}

inline void bind_group_types(py::module_& m) {
  py::enum_<AdvantageScale>(m, "AdvantageScale", py::module_local())
      .value("group", AdvantageScale::kGroup)
      .value("batch", AdvantageScale::kBatch)
      .value("none", AdvantageScale::kNone)
      .value("leave_one_out", AdvantageScale::kLeaveOneOut);
  py::enum_<RewardAggregation>(m, "RewardAggregation", py::module_local())
      .value("sum_then_normalize", RewardAggregation::kSumThenNormalize)
      .value("normalize_then_sum", RewardAggregation::kNormalizeThenSum);
  py::enum_<TokenAggregation>(m, "TokenAggregation", py::module_local())
      .value("sequence_mean", TokenAggregation::kSequenceMean)
      .value("sequence_sum", TokenAggregation::kSequenceSum)
      .value("token_mean", TokenAggregation::kTokenMean);
}

}  // namespace grpo_fast

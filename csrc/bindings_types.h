// What both extension modules, _C and _cuda, say of their arguments. The types are local to each module.
#pragma once

#include <pybind11/pybind11.h>

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

inline RowTokens row_tokens_at(Address advantages, Address weights, Address old_logprobs, Address ref_logprobs,
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

inline void bind_types(py::module_& m) {
  py::enum_<DType>(m, "DType", py::module_local())
      .value("float32", DType::kFloat32)
      .value("bfloat16", DType::kBFloat16)
      .value("float16", DType::kFloat16)
      .value("float64", DType::kFloat64);
  py::enum_<PolicyTerm>(m, "PolicyTerm", py::module_local())
      .value("clipped", PolicyTerm::kClipped)
      .value("cispo", PolicyTerm::kCispo)
      .value("sapo", PolicyTerm::kSapo)
      .value("dppo", PolicyTerm::kDppo)
      .value("ppo_dual", PolicyTerm::kPpoDual)
      .value("reinforce", PolicyTerm::kReinforce);
  py::enum_<KlEstimator>(m, "KlEstimator", py::module_local())
      .value("none", KlEstimator::kNone)
      .value("k1", KlEstimator::kK1)
      .value("k2", KlEstimator::kK2)
      .value("k3", KlEstimator::kK3);
  py::enum_<Correction>(m, "Correction", py::module_local())
      .value("none", Correction::kNone)
      .value("weight", Correction::kWeight)
      .value("token_truncate", Correction::kTokenTruncate)
      .value("token_mask", Correction::kTokenMask);
  py::class_<ObjectiveConfig>(m, "ObjectiveConfig", py::module_local())
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

// objective.h behind a C interface, for comparing it with autograd from Python: one call, arrays of tokens.

#include "../objective.h"

namespace {

// Arrays of n; null where absent. `flags` is separate: its type does not follow Real.
template <typename Real>
struct Arrays {
  const Real *logprobs, *old_logprobs, *ref_logprobs, *sampling_logprobs, *importance, *advantages;
  Real *terms, *d_logprobs, *ratios, *clip_ratios, *kls, *importances;
};

template <typename Real>
void run(const grpo_fast::ObjectiveConfig& config, int64_t num, const Arrays<Real>& arrays, uint32_t* flags) {
  for (int64_t t = 0; t < num; ++t) {
    grpo_fast::BasicTokenInputs<Real> token;
    token.logprob = arrays.logprobs[t];
    token.has_old = arrays.old_logprobs != nullptr;
    token.has_sampling = arrays.sampling_logprobs != nullptr;
    if (token.has_old) token.old_logprob = arrays.old_logprobs[t];
    if (token.has_sampling) token.sampling_logprob = arrays.sampling_logprobs[t];
    if (arrays.ref_logprobs != nullptr) token.ref_logprob = arrays.ref_logprobs[t];
    if (arrays.importance != nullptr) token.importance = arrays.importance[t];
    token.advantage = arrays.advantages[t];
    const auto out = grpo_fast::token_objective(config, token);
    arrays.terms[t] = out.term;
    arrays.d_logprobs[t] = out.d_logprob;
    arrays.ratios[t] = out.ratio;
    arrays.clip_ratios[t] = out.clip_ratio;
    arrays.kls[t] = out.kl;
    arrays.importances[t] = out.importance;
    flags[t] = out.flags;
  }
}

}  // namespace

extern "C" {

int64_t objective_config_size() { return sizeof(grpo_fast::ObjectiveConfig); }

void objective_float(const grpo_fast::ObjectiveConfig* config, int64_t num, const Arrays<float>* arrays,
                     uint32_t* flags) {
  run(*config, num, *arrays, flags);
}

void objective_double(const grpo_fast::ObjectiveConfig* config, int64_t num, const Arrays<double>* arrays,
                      uint32_t* flags) {
  run(*config, num, *arrays, flags);
}

}  // extern "C"

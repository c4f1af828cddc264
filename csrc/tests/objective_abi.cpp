// objective.h behind a C interface, for comparing it with autograd from Python: one call, arrays of tokens.

#include "../objective.h"

namespace {

// Arrays of n; null where absent.
template <typename Real>
struct Arrays {
  const Real *logprobs, *old_logprobs, *ref_logprobs, *sampling_logprobs, *importance, *advantages;
  Real *terms, *slopes;
};

template <typename Real>
void run(const grpo_fast::Objective& objective, int64_t num, const Arrays<Real>& arrays) {
  for (int64_t t = 0; t < num; ++t) {
    grpo_fast::Token<Real> token;
    token.logprob = arrays.logprobs[t];
    token.has_old = arrays.old_logprobs != nullptr;
    token.has_sampling = arrays.sampling_logprobs != nullptr;
    if (token.has_old) token.old_logprob = arrays.old_logprobs[t];
    if (token.has_sampling) token.sampling_logprob = arrays.sampling_logprobs[t];
    if (arrays.ref_logprobs != nullptr) token.ref_logprob = arrays.ref_logprobs[t];
    if (arrays.importance != nullptr) token.importance = arrays.importance[t];
    token.advantage = arrays.advantages[t];
    const grpo_fast::Dual<Real> term = grpo_fast::token_term(objective, token);
    arrays.terms[t] = term.value;
    arrays.slopes[t] = term.slope;
  }
}

}  // namespace

extern "C" {

int64_t objective_size() { return sizeof(grpo_fast::Objective); }

void objective_float(const grpo_fast::Objective* objective, int64_t num, const Arrays<float>* arrays) {
  run(*objective, num, *arrays);
}

void objective_double(const grpo_fast::Objective* objective, int64_t num, const Arrays<double>* arrays) {
  run(*objective, num, *arrays);
}

}  // extern "C"

// Random chunks of logits, and what their statistics and gradients are in plain double loops that share no code with
// the row functions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "check.h"
#include "narrow.h"
#include "objectives.h"

namespace testing {

using grpo_fast::Rows;
using grpo_fast::TokenArrays;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kGap = 5;        // columns between rows that belong to nobody
constexpr float kGuard = -123.0f;  // what stands there
constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// -- inputs -----------------------------------------------------------------------------------------------------------

struct Head {
  const char* name;
  bool has_bias;
  float logit_scale, softcap, temperature;
  bool has_row_temperature;
};

constexpr Head kHeads[] = {
    {"plain", false, 1.0f, 0.0f, 1.0f, false},
    {"temperature", false, 1.0f, 0.0f, 0.7f, false},
    {"bias, scale, a temperature a row", true, 0.5f, 0.0f, 1.0f, true},
    {"soft cap, bias, scale", true, 1.5f, 5.0f, 0.8f, false},
    {"soft cap, a temperature a row", false, 1.0f, 30.0f, 1.0f, true},
};

struct Chunk {
  int64_t num, width, gap = kGap;
  Head head;
  std::vector<float> logits, bias, temperature;
  std::vector<int64_t> targets;
  std::vector<float> g, e, advantages, weights, old_logprobs, ref_logprobs, sampling_logprobs;

  Chunk(int64_t num_rows, int64_t num_columns, const Head& with, uint64_t seed, int64_t gap_columns = kGap)
      : num(num_rows),
        width(num_columns),
        gap(gap_columns),
        head(with),
        logits(size_t(num_rows * (num_columns + gap_columns)), kGuard) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t v = 0; v < width; ++v) bias.push_back(normal(random));
    for (int64_t t = 0; t < num; ++t) {
      for (int64_t v = 0; v < width; ++v) at(t, v) = 4.0f * normal(random);
      targets.push_back(int64_t(random() % uint64_t(width)));
      temperature.push_back(0.5f + 0.25f * float(t));
      g.push_back(normal(random));
      e.push_back(0.3f * normal(random));
      advantages.push_back(t % 4 == 3 ? 0.0f : normal(random));
      weights.push_back(0.25f);
    }
  }

  // Old, reference and sampling policies as far from the true log-probabilities as policies get.
  void set_policies(const std::vector<float>& logprobs, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal(0.0f, 0.3f);
    for (const float logprob : logprobs) {
      for (auto* values : {&old_logprobs, &ref_logprobs, &sampling_logprobs})
        values->push_back(logprob + normal(random));
    }
  }

  int64_t stride() const { return width + gap; }
  float& at(int64_t t, int64_t v) { return logits[size_t(t * stride() + v)]; }
  float at(int64_t t, int64_t v) const { return logits[size_t(t * stride() + v)]; }

  Rows rows() {
    return {logits.data(),
            num,
            width,
            stride(),
            targets.data(),
            head.has_bias ? bias.data() : nullptr,
            head.logit_scale,
            head.softcap,
            head.temperature,
            head.has_row_temperature ? temperature.data() : nullptr};
  }

  TokenArrays tokens() const {
    return {advantages.data(),   weights.data(),           old_logprobs.data(),
            ref_logprobs.data(), sampling_logprobs.data(), nullptr};
  }
};

// -- oracle -----------------------------------------------------------------------------------------------------------

struct Expected {
  double logprob, entropy, lse;
  double resolution;             // what the float32 roundings of a logit and of lse may add up to, nats
  std::vector<double> z, dz_dx;  // logits, and their derivatives in the products
  double chain;                  // dz / dx without the soft cap's share
};

inline Expected expected_row(const Chunk& chunk, int64_t t) {
  Expected out;
  const double temperature = chunk.head.has_row_temperature ? chunk.temperature[size_t(t)] : chunk.head.temperature;
  const double scale = chunk.head.logit_scale, cap = chunk.head.softcap;
  for (int64_t v = 0; v < chunk.width; ++v) {
    const double x = scale * (double(chunk.at(t, v)) + (chunk.head.has_bias ? double(chunk.bias[size_t(v)]) : 0.0));
    out.z.push_back((cap == 0 ? x : cap * std::tanh(x / cap)) / temperature);
    out.dz_dx.push_back(scale / temperature * (cap == 0 ? 1.0 : 1 / std::pow(std::cosh(x / cap), 2)));
  }
  out.chain = scale / temperature;
  const double top = *std::max_element(out.z.begin(), out.z.end());
  double sum = 0, moment = 0;
  for (const double z : out.z) sum += std::exp(z - top);
  out.lse = top + std::log(sum);
  for (const double z : out.z) moment += z == -kInfinity ? 0.0 : std::exp(z - out.lse) * (z - out.lse);
  out.entropy = -moment;
  double size = std::max(1.0, std::abs(out.lse));
  for (const double z : out.z) size = std::max(size, std::isfinite(z) ? std::abs(z) : 0.0);
  // Bias, factor, product, lse: a rounding each, 2^-24; the soft cap's tanh is good to 4 ulp.
  out.resolution = size * std::ldexp(cap == 0 ? 5.0 : 10.0, -24);
  out.logprob = out.z[size_t(chunk.targets[size_t(t)])] - out.lse;
  return out;
}

// `size`, if given: the norm of the terms that are added up, which is what float32 can be measured by where they cancel
// (1 - p of a sure token, 1 - tanh^2 of a capped one).
inline std::vector<double> expected_gradient(const Chunk& chunk, int64_t t, double g, double e,
                                             double* size = nullptr) {
  const Expected row = expected_row(chunk, t);
  std::vector<double> out;
  double squares = 0;
  for (size_t v = 0; v < row.z.size(); ++v) {
    const double log_p = row.z[v] - row.lse, p = std::exp(log_p);
    const double surprise = p == 0 ? 0.0 : p * (log_p + row.entropy);
    const bool hit = int64_t(v) == chunk.targets[size_t(t)];
    out.push_back((g * (hit - p) - e * surprise) * row.dz_dx[v]);
    squares += std::pow(
        (std::abs(g) * (hit + p) + std::abs(e) * p * (std::abs(p == 0 ? 0 : log_p) + row.entropy)) * row.chain, 2);
  }
  if (size != nullptr) *size = std::sqrt(squares);
  return out;
}

// -- reading the output back ------------------------------------------------------------------------------------------

inline double stored(const Chunk& chunk, int64_t t, int64_t v, DType dtype) {
  if (dtype == DType::kFloat32) return chunk.at(t, v);
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const char*>(&chunk.logits[size_t(t * chunk.stride())]) + 2 * v, 2);
  return decoded(bits, dtype);
}

inline void check_guards(const Chunk& chunk) {
  for (int64_t t = 0; t < chunk.num; ++t) {
    for (int64_t v = chunk.width; v < chunk.stride(); ++v) {
      CHECK(chunk.at(t, v) == kGuard, "row %d, %d past its end: %g", int(t), int(v - chunk.width),
            double(chunk.at(t, v)));
    }
  }
}

// What exp(z - lse) loses to the rounding of z and lse, and what storing loses.
inline double gradient_bound(const Chunk& before, int64_t t, DType dtype) {
  const double narrowing = dtype == DType::kFloat32 ? 0.0 : dtype == DType::kBFloat16 ? 3e-3 : 5e-4;
  return 5e-7 + 2 * expected_row(before, t).resolution + narrowing;
}

inline grpo_fast::Objective clipped_with_kl() {
  grpo_fast::Objective objective = make_objective(grpo_fast::PolicyTerm::clipped, grpo_fast::KlEstimator::k3);
  objective.parameters.beta = 0.1;
  objective.parameters.delta = 2.0;
  return objective;
}

}  // namespace testing

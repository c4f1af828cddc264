#include "row_cpu.h"

#include <cmath>
#include <limits>

namespace grpo_fast {
namespace {

constexpr int64_t kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// z [n] of raw products, columns `start` on: in `buffer`, or where they stand if there is nothing to do.
GRPO_FAST_LOOP const float* logits_of(const float* row, const RowTransform& t, int64_t start, int64_t n, float* buffer) {
  const float* raw = row + start;
  const bool scaled = t.logit_scale != 1.0f || t.temperature != 1.0f;
  if (!t.bias && t.softcap == 0.0f && !scaled) return raw;
  if (t.bias) {
    const float* bias = t.bias + start;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = raw[i] + bias[i];
    raw = buffer;
  }
  if (t.softcap != 0.0f) {
    const float inward = t.logit_scale / t.softcap, outward = t.softcap / t.temperature;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = outward * tanh_approx(raw[i] * inward);
  } else if (scaled) {
    const float factor = t.logit_scale / t.temperature;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) buffer[i] = raw[i] * factor;
  }
  return buffer;
}

GRPO_FAST_LOOP bool has_nan(const float* z, int64_t n) {
  int found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < n; ++i) found |= z[i] != z[i];
  return found != 0;
}

// Reductions by hand, in as many lanes as keep any instruction set busy: compilers vectorise a maximum only where NaN does
// not count, and a loop that also takes exponentials and sums not at all.
constexpr int64_t kLanes = 64;

template <typename Fold>
GRPO_FAST_LOOP float reduce(const float* values, int64_t n, float identity, Fold fold) {
  alignas(64) float lanes[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = identity;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = fold(lanes[lane], values[i + lane]);
  }
  for (int64_t lane = 0; i < n; ++i, ++lane) lanes[lane] = fold(lanes[lane], values[i]);
  for (int64_t width = kLanes / 2; width > 0; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] = fold(lanes[lane], lanes[lane + width]);
  }
  return lanes[0];
}

// Ignores NaN.
GRPO_FAST_LOOP float largest(const float* values, int64_t n) {
  return reduce(values, n, -kInfinity, [](float a, float b) __attribute__((always_inline)) { return b > a ? b : a; });
}

GRPO_FAST_LOOP float total(const float* values, int64_t n) {
  return reduce(values, n, 0.0f, [](float a, float b) __attribute__((always_inline)) { return a + b; });
}

// With m the running maximum: sum = sum e^(z - m), moment = sum (z - m) e^(z - m); then
// lse = m + log sum and entropy = log sum - moment / sum, free of the size of z.
GRPO_FAST_LOOP Statistics statistics_body(const Row& row, int64_t target) {
  const RowTransform& t = row.transform;
  const int64_t columns = row.length;
  alignas(64) float buffer[kBlock], weights[kBlock], moments[kBlock];
  float top = -kInfinity, target_logit = kNaN;
  double sum = 0.0, moment = 0.0;
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t n = columns - start < kBlock ? columns - start : kBlock;
    const float* z = logits_of(row.logits, t, start, n, buffer);
    if (target >= start && target < start + n) target_logit = z[target - start];
    const float block_top = largest(z, n);
    if (block_top > top) {
      if (sum != 0.0) {
        const double shift = static_cast<double>(top) - static_cast<double>(block_top), shrink = std::exp(shift);
        // A shift that underflows takes its moment along: (-1e5 sum) times 0.
        moment = shrink == 0.0 ? 0.0 : shrink * (moment + shift * sum);
        sum *= shrink;
      }
      top = block_top;
    }
    if (top == -kInfinity) {  // nothing but forbidden tokens so far
      if (has_nan(z, n)) sum = kNaN;
      continue;
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      // An infinite distance has weight 0, and so must their product.
      const float distance = exp_floor(z[i] - top);
      weights[i] = exp_within(distance);
      moments[i] = distance * weights[i];
    }
    sum += static_cast<double>(total(weights, n));
    moment += static_cast<double>(total(moments, n));
  }
  const double log_sum = std::log(sum);
  const float lse = static_cast<float>(static_cast<double>(top) + log_sum);
  return {target_logit - lse, static_cast<float>(log_sum - moment / sum), lse};
}

using Narrow __attribute__((may_alias)) = uint16_t;

// A narrow block lies below every logit that is still to be read.
template <DType dtype>
GRPO_FAST_LOOP void store_block(const float* values, int64_t start, int64_t n, float* row) {
  if constexpr (dtype == DType::kFloat32) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) row[start + i] = values[i];
  } else {
    Narrow* narrow = reinterpret_cast<Narrow*>(row) + start;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      narrow[i] = dtype == DType::kBFloat16 ? to_bfloat16(values[i]) : to_float16(values[i]);
    }
  }
}

template <DType dtype>
GRPO_FAST_LOOP void clear_row(float* row, int64_t columns) {
  std::memset(static_cast<void*>(row), 0, static_cast<size_t>(columns) * (dtype == DType::kFloat32 ? 4 : 2));
}

// dx = p (tilt (log p + entropy) - hit) bend, and hit bend more at the target; bend is the soft cap's, see below.
template <DType dtype>
GRPO_FAST_LOOP void gradient_body(const Row& row, int64_t target, float lse, float entropy, float g, float e) {
  const RowTransform& t = row.transform;
  const int64_t columns = row.length;
  if (g == 0.0f && e == 0.0f) return clear_row<dtype>(row.logits, columns);
  const float chain = t.logit_scale / t.temperature;  // dz / dx but for the soft cap's share, bend = 1 - u^2
  const float hit = g * chain, tilt = -(e * chain);
  const float to_u = t.softcap != 0.0f ? t.temperature / t.softcap : 0.0f;
  alignas(64) float buffer[kBlock], dx[kBlock];
  for (int64_t start = 0; start < columns; start += kBlock) {
    const int64_t n = columns - start < kBlock ? columns - start : kBlock;
    const float* z = logits_of(row.logits, t, start, n, buffer);
    if (t.softcap != 0.0f) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float u = z[i] * to_u, log_p = exp_floor(z[i] - lse);
        dx[i] = exp_within(log_p) * (tilt * (log_p + entropy) - hit) * (1.0f - u * u);
      }
    } else if (e != 0.0f) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float log_p = exp_floor(z[i] - lse);
        dx[i] = exp_within(log_p) * (tilt * (log_p + entropy) - hit);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) dx[i] = exp_within(exp_floor(z[i] - lse)) * -hit;
    }
    const int64_t local = target - start;
    if (local >= 0 && local < n) {
      // hit (1 - p) in one: what two rounded products leave of a sure token is not zero.
      const float u = z[local] * to_u, log_p = exp_floor(z[local] - lse), p = exp_within(log_p);
      const float bonus = e != 0.0f ? p * (tilt * (log_p + entropy)) : 0.0f;
      dx[local] = (bonus + hit * (1.0f - p)) * (1.0f - u * u);
    }
    store_block<dtype>(dx, start, n, row.logits);
  }
}

struct StatisticsBody {
  static GRPO_FAST_LOOP Statistics run(const Row& row, int64_t target) { return statistics_body(row, target); }
};

template <DType dtype>
struct GradientBody {
  static GRPO_FAST_LOOP void run(const Row& row, int64_t target, float lse, float entropy, float g, float e) {
    gradient_body<dtype>(row, target, lse, entropy, g, e);
  }
};

// Rows of one length are shared out evenly, others as threads come free.
template <typename Body>
void for_rows(const Rows& rows, const int64_t* offsets, [[maybe_unused]] int threads, Body body) {
  if (!offsets) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < rows.num_rows; ++t) body(row_of(rows, nullptr, t), t);
  } else {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
    for (int64_t t = 0; t < rows.num_rows; ++t) body(row_of(rows, offsets, t), t);
  }
}

}  // namespace

Isa detected_isa() {
#ifdef GRPO_FAST_X86
  __builtin_cpu_init();
  const bool v4 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  if (v4 && v3) return Isa::kAvx512;
  if (v3) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

StatisticsFn statistics_for(Isa isa) { return instance<StatisticsBody>(isa); }

GradientFn gradient_for(Isa isa, DType dtype) {
  if (dtype == DType::kBFloat16) return instance<GradientBody<DType::kBFloat16>>(isa);
  if (dtype == DType::kFloat16) return instance<GradientBody<DType::kFloat16>>(isa);
  return instance<GradientBody<DType::kFloat32>>(isa);
}

bool ObjectivePass::operator()(const Row& row, int64_t t, int64_t target) const {
  const Statistics found = statistics(row, target);
  Token<float> token = token_of(tokens, t);
  token.logprob = found.logprob;
  const float g = token_term(objective, token).slope * tokens.weights[t];
  logprobs[t] = found.logprob;
  entropy[t] = found.entropy;
  live[t] = g != 0.0f || entropy_gradient != 0.0f;
  gradient(row, target, found.lse, found.entropy, g * grad_scale, entropy_gradient * grad_scale);
  return live[t];
}

void row_statistics(const Rows& rows, float* logprobs, float* entropy, float* lse, Launch launch,
                    const int64_t* offsets) {
  const StatisticsFn statistics = statistics_for(launch.isa);
  for_rows(rows, offsets, launch.threads, [&](const Row& row, int64_t t) {
    const Statistics found = statistics(row, rows.targets[t]);
    logprobs[t] = found.logprob;
    entropy[t] = found.entropy;
    lse[t] = found.lse;
  });
}

void row_gradient(const Rows& rows, const float* lse, const float* entropy, const float* g, const float* e,
                  int64_t vocab_start, DType dtype, Launch launch, const int64_t* offsets) {
  const GradientFn gradient = gradient_for(launch.isa, dtype);
  for_rows(rows, offsets, launch.threads, [&](const Row& row, int64_t t) {
    gradient(row, rows.targets[t] - vocab_start, lse[t], entropy[t], g[t], e ? e[t] : 0.0f);
  });
}

void row_objective(const Rows& rows, const Objective& objective, const TokenArrays& tokens, float entropy_gradient,
                   float grad_scale, DType dtype, float* logprobs, float* entropy, uint8_t* live, Launch launch,
                   const int64_t* offsets) {
  const ObjectivePass pass{objective, tokens, entropy_gradient, grad_scale, logprobs, entropy, live,
                           statistics_for(launch.isa), gradient_for(launch.isa, dtype)};
  for_rows(rows, offsets, launch.threads, [&](const Row& row, int64_t t) { pass(row, t, rows.targets[t]); });
}

}  // namespace grpo_fast

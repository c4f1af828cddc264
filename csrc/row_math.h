// The arithmetic of one row as GPU threads do it: per logit, per thread, and how partial results combine.
//
// Legend: x raw product, u = x + bias or tanh((x + bias) logit_scale / softcap), y = factor u = z log2 e: everything is
// in base 2, where the hardware's exponential is. For a set of logits: top = max y, sum = sum 2^(y - top), moment = sum
// (y - top) 2^(y - top). Then lse = (top + log2 sum) ln 2 and entropy = (log2 sum - moment / sum) ln 2.
//
// Compiled without contraction (-fmad=false, -ffp-contract=off): where a multiplication and an addition are one
// instruction it says so, and every kernel that takes a row's statistics takes them to the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "rows.h"

#ifdef __CUDA_ARCH__
#define GRPO_FAST_UNROLL _Pragma("unroll")
#else
#define GRPO_FAST_UNROLL
#endif

namespace grpo_fast {

constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;
constexpr float kVanishing = -160.0f;  // 2^x is 0 from here down, and 0 times it is 0, not NaN
constexpr float kLowest = -3.0e38f;    // the top of nothing; finite, so that nothing minus nothing is 0

// 2^x, 0 where it would be subnormal (device); within 2 ulp.
GRPO_FAST_INLINE float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
#else
  return std::exp2(x);
#endif
}

// Not below `low`; NaN stays NaN.
GRPO_FAST_INLINE float at_least(float x, float low) {
#ifdef __CUDA_ARCH__
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(x), "f"(low));
  return out;
#else
  return x < low ? low : x;
#endif
}

// -- from raw products to y -------------------------------------------------------------------------------------------

struct RowMap {
  const float* bias;  // null: none
  float inward;       // 0: no soft cap
  float factor;
  float chain;  // dz / dx but for the soft cap's share
};

GRPO_FAST_INLINE RowMap row_map(const Rows& rows, int64_t row) {
  const float temperature = rows.row_temperature != nullptr ? rows.row_temperature[row] : rows.temperature;
  const bool capped = rows.softcap != 0.0f;
  const float chain = rows.logit_scale / temperature;
  return {rows.bias, capped ? rows.logit_scale / rows.softcap : 0.0f,
          (capped ? rows.softcap / temperature : chain) * kLog2E, chain};
}

// kTransform: there may be a bias or a soft cap; otherwise u is x.
template <bool kTransform>
GRPO_FAST_INLINE float u_of(const RowMap& map, float x, float bias) {
  if (!kTransform) return x;
  x = x + bias;
  return map.inward != 0.0f ? std::tanh(x * map.inward) : x;
}

// -- statistics -------------------------------------------------------------------------------------------------------

struct alignas(16) Partial {
  float top, sum, moment;
};

constexpr Partial kNothing{kLowest, 0.0f, 0.0f};

// `p` measured from `top`, which is not below its own.
GRPO_FAST_INLINE Partial measured_from(float top, const Partial& p) {
  const float shift = at_least(p.top - top, kVanishing), shrink = exp2_fast(shift);
  return {top, p.sum * shrink, std::fma(shift, p.sum, p.moment) * shrink};
}

// Takes in N values u. A new top shrinks what there was; the N exponentials then share it.
template <int N>
GRPO_FAST_INLINE void absorb(Partial& p, const float (&u)[N], float factor) {
  float top = p.top;
  GRPO_FAST_UNROLL
  for (int i = 0; i < N; ++i) top = std::fmax(top, u[i] * factor);  // passes over NaN
  p = measured_from(top, p);
  float sums[4] = {p.sum, 0.0f, 0.0f, 0.0f}, moments[4] = {p.moment, 0.0f, 0.0f, 0.0f};
  GRPO_FAST_UNROLL
  for (int i = 0; i < N; ++i) {
    const float distance = at_least(std::fma(u[i], factor, -top), kVanishing);
    const float weight = exp2_fast(distance);
    sums[i % 4] += weight;
    moments[i % 4] = std::fma(distance, weight, moments[i % 4]);
  }
  p.sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  p.moment = (moments[0] + moments[1]) + (moments[2] + moments[3]);
}

struct RowStatistics {
  float logprob, entropy, lse;  // nats
  float lse2;                   // lse log2 e, before it was rounded to nats
};

// Nothing but forbidden tokens (sum 0), a NaN or +inf among the logits: NaN.
GRPO_FAST_INLINE RowStatistics row_statistics_of(const Partial& p, float target_u, float factor) {
  const float log_sum = std::log2(p.sum), lse2 = p.top + log_sum;
  const float distance = std::fma(target_u, factor, -p.top);
  return {(distance - log_sum) * kLn2, (log_sum - p.moment / p.sum) * kLn2, lse2 * kLn2, lse2};
}

// -- gradient ---------------------------------------------------------------------------------------------------------

// dx = p (level + tilt log2 p) bend, and hit bend more at the target; bend is 1 - u^2 under a soft cap, else 1.
struct Coefficients {
  float lse2, level, tilt, hit;
  bool zero;  // the whole row is
};

GRPO_FAST_INLINE Coefficients coefficients_of(float lse2, float entropy, float g, float e, float chain) {
  const float hit = g * chain, bonus = e * chain;
  return {lse2, e == 0.0f ? -hit : std::fma(-bonus, entropy, -hit), -bonus * kLn2, hit, g == 0.0f && e == 0.0f};
}

template <bool kTransform>
GRPO_FAST_INLINE float bend(const RowMap& map, float u) {
  return kTransform && map.inward != 0.0f ? std::fma(-u, u, 1.0f) : 1.0f;
}

template <bool kTransform>
GRPO_FAST_INLINE float derivative(const RowMap& map, const Coefficients& coefficients, float u) {
  const float log2_p = at_least(std::fma(u, map.factor, -coefficients.lse2), kVanishing);
  const float dx = exp2_fast(log2_p) * std::fma(coefficients.tilt, log2_p, coefficients.level);
  return kTransform ? dx * bend<kTransform>(map, u) : dx;
}

template <bool kTransform>
GRPO_FAST_INLINE float target_derivative(const RowMap& map, const Coefficients& coefficients, float u) {
  return derivative<kTransform>(map, coefficients, u) + coefficients.hit * bend<kTransform>(map, u);
}

}  // namespace grpo_fast

// vector_math.h: exp and tanh in units of the last place, narrowing bit for bit.

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../isa.h"
#include "check.h"
#include "narrow.h"

namespace {

using grpo_fast::DType;
using grpo_fast::Isa;
using testing::decoded;
using testing::isas;
using testing::rounded;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using Sweep = void (*)(const float*, float*, int);

#define GRPO_FAST_SWEEP(name, function, attribute)                \
  attribute void name(const float* x, float* y, int n) {          \
    for (int i = 0; i < n; ++i) y[i] = grpo_fast::function(x[i]); \
  }
GRPO_FAST_SWEEP(exp_baseline, exp_approx, )
GRPO_FAST_SWEEP(tanh_baseline, tanh_approx, )
#if defined(__x86_64__) && defined(__GNUC__)
GRPO_FAST_SWEEP(exp_avx2, exp_approx, __attribute__((target("arch=x86-64-v3"))))
GRPO_FAST_SWEEP(exp_avx512, exp_approx, __attribute__((target("arch=x86-64-v4"))))
GRPO_FAST_SWEEP(tanh_avx2, tanh_approx, __attribute__((target("arch=x86-64-v3"))))
GRPO_FAST_SWEEP(tanh_avx512, tanh_approx, __attribute__((target("arch=x86-64-v4"))))
constexpr Sweep kExp[] = {exp_baseline, exp_avx2, exp_avx512};
constexpr Sweep kTanh[] = {tanh_baseline, tanh_avx2, tanh_avx512};
#else
constexpr Sweep kExp[] = {exp_baseline};
constexpr Sweep kTanh[] = {tanh_baseline};
#endif

// Distance in units of the last place of float32 at `exact`.
double ulps(float got, double exact) {
  const double unit = std::ldexp(1.0, std::max(std::ilogb(exact), -126) - 23);
  return std::abs(double(got) - exact) / unit;
}

// Every float32 from `low` to `high` that is `stride` representable numbers after another.
std::vector<float> sweep(float low, float high, int32_t stride) {
  std::vector<float> out;
  if (low < 0) {
    for (int32_t bits = 0; grpo_fast::from_bits(bits) <= -low; bits += stride)
      out.push_back(-grpo_fast::from_bits(bits));
  }
  for (int32_t bits = 0; grpo_fast::from_bits(bits) <= high; bits += stride) out.push_back(grpo_fast::from_bits(bits));
  // Exponents differ, and with them the density of the above; evenly as well.
  for (int i = 0; i <= 200000; ++i) out.push_back(low + (high - low) * float(i) / 200000.0f);
  return out;
}

void check_accuracy(const char* name, const Sweep* functions, double (*exact)(double), const std::vector<float>& x,
                    double bound) {
  for (const Isa isa : isas()) {
    std::vector<float> y(x.size());
    functions[int(isa)](x.data(), y.data(), int(x.size()));
    double worst = 0;
    float where = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      const double error = ulps(y[i], exact(double(x[i])));
      if (!(error <= worst)) worst = error, where = x[i];
    }
    CHECK(worst <= bound, "%s, isa %d: %.3f ulp at %.9g", name, int(isa), worst, double(where));
  }
}

TEST(exp_is_within_two_ulp) {
  check_accuracy("exp", kExp, std::exp, sweep(-104.0f, 88.7f, 4099), 2.0);
  for (const Isa isa : isas()) {
    const float x[] = {-kInfinity, kInfinity, kNaN, 0.0f, -0.0f, -1e30f, 1e30f, -104.5f, 90.0f};
    float y[9];
    kExp[int(isa)](x, y, 9);
    const float expected[] = {0, kInfinity, kNaN, 1, 1, 0, kInfinity, 0, kInfinity};
    for (int i = 0; i < 9; ++i) {
      const bool same = std::isnan(expected[i]) ? std::isnan(y[i]) : y[i] == expected[i];
      CHECK(same, "isa %d: exp(%g) is %g, expected %g", int(isa), double(x[i]), double(y[i]), double(expected[i]));
    }
  }
}

TEST(tanh_is_within_four_ulp) {
  check_accuracy("tanh", kTanh, std::tanh, sweep(-12.0f, 12.0f, 4099), 4.0);
  for (const Isa isa : isas()) {
    const float x[] = {-kInfinity, kInfinity, kNaN, 0.0f, 1e30f};
    float y[5];
    kTanh[int(isa)](x, y, 5);
    CHECK(y[0] == -1 && y[1] == 1 && std::isnan(y[2]) && y[3] == 0 && y[4] == 1, "isa %d: %g %g %g %g %g", int(isa),
          double(y[0]), double(y[1]), double(y[2]), double(y[3]), double(y[4]));
  }
}

TEST(narrowing_rounds_to_even) {
  std::vector<float> values = {0.0f,           -0.0f,         kInfinity,     -kInfinity, 65504.0f,      65519.99f,
                               65520.0f,       65536.0f,      3.4e38f,       1e-45f,     5.9604645e-8f, 2.9802322e-8f,
                               2.98023259e-8f, 6.1035156e-5f, 6.1005354e-5f, -1.0009766f};
  std::mt19937_64 random(19);
  for (int i = 0; i < 200000; ++i) values.push_back(grpo_fast::from_bits(int32_t(uint32_t(random()))));
  for (int i = 0; i < 200000; ++i) values.push_back(std::ldexp(float(int32_t(random())), int(random() % 48) - 60));
  for (const float value : values) {
    if (std::isnan(value)) continue;
    const double bf16 = decoded(grpo_fast::to_bfloat16(value), DType::kBFloat16);
    const double fp16 = decoded(grpo_fast::to_float16(value), DType::kFloat16);
    CHECK(bf16 == rounded(value, DType::kBFloat16), "bf16 of %.9g: %.9g", double(value), bf16);
    CHECK(fp16 == rounded(value, DType::kFloat16), "fp16 of %.9g: %.9g", double(value), fp16);
  }
  for (const float lost : {kNaN, grpo_fast::from_bits(0x7f800001), grpo_fast::from_bits(int32_t(0xffffffffu))}) {
    const double bf16 = decoded(grpo_fast::to_bfloat16(lost), DType::kBFloat16);
    const double fp16 = decoded(grpo_fast::to_float16(lost), DType::kFloat16);
    CHECK(std::isnan(bf16) && std::isnan(fp16), "NaN became %g, %g", bf16, fp16);
  }
}

using Widening = void (*)(const uint16_t*, float*, int);

#define GRPO_FAST_WIDENING(name, function, attribute)             \
  attribute void name(const uint16_t* x, float* y, int n) {       \
    for (int i = 0; i < n; ++i) y[i] = grpo_fast::function(x[i]); \
  }
GRPO_FAST_WIDENING(widen_bf16_baseline, from_bfloat16, )
GRPO_FAST_WIDENING(widen_fp16_baseline, from_float16, )
#ifdef GRPO_FAST_X86
GRPO_FAST_WIDENING(widen_bf16_avx2, from_bfloat16, GRPO_FAST_AVX2)
GRPO_FAST_WIDENING(widen_fp16_avx2, from_float16, GRPO_FAST_AVX2)
GRPO_FAST_WIDENING(widen_bf16_avx512, from_bfloat16, GRPO_FAST_AVX512)
GRPO_FAST_WIDENING(widen_fp16_avx512, from_float16, GRPO_FAST_AVX512)
constexpr Widening kWideBFloat16[] = {widen_bf16_baseline, widen_bf16_avx2, widen_bf16_avx512};
constexpr Widening kWideFloat16[] = {widen_fp16_baseline, widen_fp16_avx2, widen_fp16_avx512};
#else
constexpr Widening kWideBFloat16[] = {widen_bf16_baseline};
constexpr Widening kWideFloat16[] = {widen_fp16_baseline};
#endif

TEST(widening_is_exact) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = uint16_t(i);
  std::vector<float> wide(all.size());
  for (const Isa isa : isas()) {
    for (const DType dtype : {DType::kBFloat16, DType::kFloat16}) {
      (dtype == DType::kBFloat16 ? kWideBFloat16 : kWideFloat16)[int(isa)](all.data(), wide.data(), int(all.size()));
      for (size_t i = 0; i < all.size(); ++i) {
        const double expected = decoded(all[i], dtype);
        const bool same = std::isnan(expected) ? std::isnan(wide[i])
                                               : wide[i] == expected && std::signbit(wide[i]) == std::signbit(expected);
        CHECK(same, "isa %d, dtype %d: %04x is %g, not %g", int(isa), int(dtype), unsigned(i), expected,
              double(wide[i]));
      }
    }
  }
}

}  // namespace

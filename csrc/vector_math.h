// exp, tanh, narrowing and widening for loops that the compiler vectorises.
//
//   exp:  x = n ln2 + r, |r| <= ln2 / 2;  e^x = 2^n p(r), p of degree 6; 2^n in two factors, so that subnormal results
//         come out too. Within 2 ulp on all of float32; e^-inf = 0, e^inf = inf, NaN stays NaN.
//   tanh: an odd polynomial below 0.625, else 1 - 2 / (e^2|u| + 1).
//
// Everything is inline and free of branches; which instructions it becomes is decided by the function it lands in.
#pragma once

#include <cstdint>
#include <cstring>

#define GRPO_FAST_LOOP inline __attribute__((always_inline))

namespace grpo_fast {

GRPO_FAST_LOOP int32_t bits_of(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

GRPO_FAST_LOOP float from_bits(int32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// 2^n of -126 <= n <= 127; of another n (that of a NaN) something, but not undefined.
GRPO_FAST_LOOP float power_of_two(int32_t n) {
  return from_bits(static_cast<int32_t>(static_cast<uint32_t>(n + 127) << 23));
}

constexpr float kExpLowest = -104.0f;  // e^x rounds to 0 from here down
constexpr float kExpHighest = 89.0f;   // e^x is infinite from here up

// Not below kExpLowest; NaN passes in this order.
GRPO_FAST_LOOP float exp_floor(float x) { return x < kExpLowest ? kExpLowest : x; }

// Of kExpLowest <= x <= kExpHighest, or NaN. Loops that also need the clamped x clamp once and call this: a second test of
// the same value is turned into a branch, and the loop is not vectorised.
GRPO_FAST_LOOP float exp_within(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t exponent = bits_of(shifted) - bits_of(kRound);
  const int32_t half = exponent >> 1;
  return p * power_of_two(half) * power_of_two(exponent - half);
}

GRPO_FAST_LOOP float exp_approx(float x) {
  x = exp_floor(x);
  return exp_within(x > kExpHighest ? kExpHighest : x);
}

GRPO_FAST_LOOP float tanh_approx(float u) {
  const float size = u < 0.0f ? -u : u;
  const float square = u * u;
  float p = -5.70498872745e-3f;
  p = p * square + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const float small = p * square * u + u;
  const float large = 1.0f - 2.0f / (exp_approx(2.0f * size) + 1.0f);
  const float signed_large = u < 0.0f ? -large : large;
  return size < 0.625f ? small : signed_large;
}

// To the nearest, ties to even; NaN stays NaN.
GRPO_FAST_LOOP uint16_t to_bfloat16(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

GRPO_FAST_LOOP uint16_t to_float16(float value) {
  const uint32_t bits = static_cast<uint32_t>(bits_of(value));
  const uint32_t size = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t normal = (size - (112u << 23) + 0xfffu + ((size >> 13) & 1u)) >> 13;
  // Adding 1/2 shifts a subnormal's last bit to the last bit of the fraction, rounded by the addition.
  const uint32_t subnormal = static_cast<uint32_t>(bits_of(from_bits(static_cast<int32_t>(size)) + 0.5f)) - (126u << 23);
  uint32_t half = size < (113u << 23) ? subnormal : normal;
  half = size >= 0x47800000u ? 0x7c00u : half;  // 65536 and above
  half = size > 0x7f800000u ? 0x7e00u : half;   // NaN
  return static_cast<uint16_t>(sign | half);
}

GRPO_FAST_LOOP float from_bfloat16(uint16_t value) {
  return from_bits(static_cast<int32_t>(static_cast<uint32_t>(value) << 16));
}

// Exact; of what processors might flush to zero, no float32 is made.
GRPO_FAST_LOOP float from_float16(uint16_t value) {
  const uint32_t size = value & 0x7fffu;
  const uint32_t sign = (value & 0x8000u) << 16;
  const uint32_t rebias = size >= 0x7c00u ? 224u << 23 : 112u << 23;  // infinities and NaN: 31 becomes 255
  const uint32_t normal = (size << 13) + rebias;
  const uint32_t subnormal = static_cast<uint32_t>(bits_of(static_cast<float>(static_cast<int32_t>(size)) * 0x1p-24f));
  return from_bits(static_cast<int32_t>(sign | (size < 0x400u ? subnormal : normal)));
}

}  // namespace grpo_fast

// What bf16 and fp16 numbers are, in double; and the instruction sets that this machine can be tested with.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "../row_cpu.h"
#include "../vector_math.h"

namespace testing {

using grpo_fast::DType;
using grpo_fast::Isa;

inline std::vector<Isa> isas() {
  std::vector<Isa> found;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa <= grpo_fast::detected_isa()) found.push_back(isa);
  }
  return found;
}

// The value nearest to x with `bits` fraction bits and exponents from `lowest`, ties to even; infinite from
// 2^(highest + 1) on.
inline double rounded(double x, int bits, int lowest, int highest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(x), lowest) - bits);
  const double nearest = std::nearbyint(x / unit) * unit;
  return std::abs(nearest) >= std::ldexp(1.0, highest + 1) ? std::copysign(HUGE_VAL, x) : nearest;
}

inline double rounded(double x, DType dtype) {
  if (dtype == DType::kBFloat16) return rounded(x, 7, -126, 127);
  return dtype == DType::kFloat16 ? rounded(x, 10, -14, 15) : x;
}

inline double decoded(uint16_t bits, DType dtype) {
  if (dtype == DType::kBFloat16) return grpo_fast::from_bits(int32_t(uint32_t(bits) << 16));
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
  if (exponent == 31) size = fraction == 0 ? HUGE_VAL : std::nan("");
  return bits & 0x8000 ? -size : size;
}

}  // namespace testing

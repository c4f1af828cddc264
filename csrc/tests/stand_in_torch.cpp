// A libtorch_cpu that exports nothing but brgemm, in plain loops: what gemm_cpu.cpp looks up, on any CPU. Its fp16
// products of paired B are wrong, as torch's are on a CPU with AVX-512 FP16 and without AMX; those of plain B are right.

#include <cstdint>

#include "narrow.h"

namespace c10 {
struct BFloat16;
struct Half;
}  // namespace c10

namespace at::native::cpublas {
namespace {

template <class Narrow>
void multiply(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const Narrow* a,
              const Narrow* b, float* c, bool paired, bool wrong, grpo_fast::DType dtype) {
  const auto value = [dtype](const Narrow* from, int64_t index) {
    return testing::decoded(reinterpret_cast<const uint16_t*>(from)[index], dtype);
  };
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = add ? double(c[i * ld_c + j]) : 0.0;
      for (int64_t p = 0; p < k; ++p) {
        sum += value(a, i * ld_a + p) * value(b, paired ? (p / 2 * ld_b + j) * 2 + p % 2 : p * ld_b + j);
      }
      c[i * ld_c + j] = float(paired && wrong ? sum + 1 : sum);
    }
  }
}

}  // namespace

void brgemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const c10::BFloat16* a,
            const c10::BFloat16* b, float* c, bool paired) {
  multiply(m, n, k, ld_a, ld_b, ld_c, add, a, b, c, paired, false, grpo_fast::DType::kBFloat16);
}

void brgemm(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add, const c10::Half* a,
            const c10::Half* b, float* c, bool paired) {
  multiply(m, n, k, ld_a, ld_b, ld_c, add, a, b, c, paired, true, grpo_fast::DType::kFloat16);
}

void brgemm_release(bool) {}

}  // namespace at::native::cpublas

// One body, several instruction sets: loops are vectorised after the body is inlined into a function compiled for each.
#pragma once

#include <cstdint>

#include "vector_math.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define GRPO_FAST_X86 1
#if defined(__clang__)
#define GRPO_FAST_AVX512 __attribute__((target("arch=x86-64-v4")))
#else
#define GRPO_FAST_AVX512 __attribute__((target("arch=x86-64-v4,prefer-vector-width=512")))
#endif
#define GRPO_FAST_AVX2 __attribute__((target("arch=x86-64-v3")))
#endif

namespace grpo_fast {

// Instruction sets that the functions on rows are compiled for.
enum class Isa : int32_t { kBaseline, kAvx2, kAvx512 };

// The best that this machine runs.
Isa detected_isa();

struct Launch {
  int threads;
  Isa isa;  // at most detected_isa()
};

template <typename Body, typename Result, typename... Args>
Result run_baseline(Args... args) {
  return Body::run(args...);
}

#ifdef GRPO_FAST_X86
template <typename Body, typename Result, typename... Args>
GRPO_FAST_AVX2 Result run_avx2(Args... args) {
  return Body::run(args...);
}

template <typename Body, typename Result, typename... Args>
GRPO_FAST_AVX512 Result run_avx512(Args... args) {
  return Body::run(args...);
}
#endif

template <typename Body, typename Result, typename... Args>
auto instance_like(Isa isa, Result (*)(Args...)) -> Result (*)(Args...) {
#ifdef GRPO_FAST_X86
  if (isa == Isa::kAvx512) return run_avx512<Body, Result, Args...>;
  if (isa == Isa::kAvx2) return run_avx2<Body, Result, Args...>;
#endif
  (void)isa;
  return run_baseline<Body, Result, Args...>;
}

// Body::run, a static GRPO_FAST_LOOP function, compiled for an instruction set.
template <typename Body>
auto instance(Isa isa) {
  return instance_like<Body>(isa, static_cast<decltype(&Body::run)>(nullptr));
}

}  // namespace grpo_fast

// gemm_cpu.h's blocking, packing and tails around a stand-in for the library's kernel (stand_in_torch.cpp), against
// plain double loops. bf16 goes by pairs of rows, fp16 by plain rows, which is what that library multiplies rightly.

#include <cmath>
#include <random>
#include <stdexcept>
#include <vector>

#include "../gemm_cpu.h"
#include "../vector_math.h"
#include "check.h"
#include "narrow.h"

namespace {

using grpo_fast::DType;
using testing::decoded;

constexpr int kThreads = 3;
constexpr DType kNarrow[] = {DType::kBFloat16, DType::kFloat16};

struct Size {
  int64_t rows, width, vocab;
};

// Ragged everywhere; odd everywhere; H that no panel of 16 columns fits beside in the scratch.
constexpr Size kSizes[] = {{5, 38, 19}, {70, 129, 33}, {1, 1, 1}, {67, 300, 1030}, {2, 32769, 35}, {2, 40000, 35}};

std::vector<uint16_t> random_narrow(int64_t count, DType dtype, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> out;
  for (int64_t i = 0; i < count; ++i) {
    const float value = normal(random);
    out.push_back(dtype == DType::kBFloat16 ? grpo_fast::to_bfloat16(value) : grpo_fast::to_float16(value));
  }
  return out;
}

// What the threads may write to, with something behind it that they may not.
struct Scratch {
  static constexpr size_t kBytes = kThreads * grpo_fast::kGemmScratchPerThread;
  std::vector<unsigned char> bytes = std::vector<unsigned char>(kBytes + 65536, 0xA5);
  bool kept() const {
    for (size_t i = kBytes; i < bytes.size(); ++i) {
      if (bytes[i] != 0xA5) return false;
    }
    return true;
  }
};

struct Operands {
  Size size;
  DType dtype;
  int64_t stride;  // of dx and of the logits
  std::vector<uint16_t> hidden, weight, dx;

  Operands(const Size& of, DType type)
      : size(of),
        dtype(type),
        stride(of.vocab + 3),
        hidden(random_narrow(of.rows * of.width, type, 1)),
        weight(random_narrow(of.vocab * of.width, type, 2)),
        dx(random_narrow(of.rows * stride, type, 3)) {}

  double h(int64_t r, int64_t c) const { return decoded(hidden[size_t(r * size.width + c)], dtype); }
  double w(int64_t v, int64_t c) const { return decoded(weight[size_t(v * size.width + c)], dtype); }
  double d(int64_t r, int64_t v) const { return decoded(dx[size_t(r * stride + v)], dtype); }
};

void check_close(const char* what, const Operands& in, double found, double expected, double terms, int64_t at) {
  const double bound = (1e-6 + (std::string(what) == "narrow dW" ? 4e-3 : 0.0)) * (std::sqrt(terms) + std::abs(expected));
  CHECK(std::abs(found - expected) <= bound, "%s, [%d, %d, %d], dtype %d, element %d: %.9g, expected %.9g", what,
        int(in.size.rows), int(in.size.width), int(in.size.vocab), int(in.dtype), int(at), found, expected);
}

TEST(both_ways_to_give_b_are_found) {
  for (const DType dtype : kNarrow) {
    const char* obstacle = grpo_fast::gemm_obstacle(dtype);
    CHECK(obstacle == nullptr, "dtype %d: %s", int(dtype), obstacle == nullptr ? "" : obstacle);
  }
}

TEST(logits) {
  for (const Size& size : kSizes) {
    for (const DType dtype : kNarrow) {
      const Operands in(size, dtype);
      Scratch scratch;
      std::vector<float> out(size_t(size.rows * in.stride), -7.0f);
      grpo_fast::gemm_logits(dtype, in.hidden.data(), in.weight.data(), out.data(), size.rows, size.width, size.vocab,
                             in.stride, scratch.bytes.data(), kThreads);
      CHECK(scratch.kept(), "H %d: written behind the scratch", int(size.width));
      for (int64_t r = 0; r < size.rows; ++r) {
        for (int64_t v = 0; v < in.stride; ++v) {
          double expected = v < size.vocab ? 0.0 : -7.0;
          for (int64_t c = 0; v < size.vocab && c < size.width; ++c) expected += in.h(r, c) * in.w(v, c);
          check_close("logits", in, out[size_t(r * in.stride + v)], expected, double(size.width), r * in.stride + v);
        }
      }
    }
  }
}

TEST(grad_hidden) {
  for (const Size& size : kSizes) {
    for (const DType dtype : kNarrow) {
      const Operands in(size, dtype);
      Scratch scratch;
      std::vector<float> out(size_t(size.rows * size.width), 0.5f);
      grpo_fast::gemm_grad_hidden(dtype, in.dx.data(), in.weight.data(), out.data(), size.rows, size.width, size.vocab,
                                  in.stride, scratch.bytes.data(), kThreads);
      CHECK(scratch.kept(), "H %d: written behind the scratch", int(size.width));
      for (int64_t r = 0; r < size.rows; ++r) {
        for (int64_t c = 0; c < size.width; ++c) {
          double expected = 0.5;
          for (int64_t v = 0; v < size.vocab; ++v) expected += in.d(r, v) * in.w(v, c);
          check_close("dHidden", in, out[size_t(r * size.width + c)], expected, double(size.vocab), r * size.width + c);
        }
      }
    }
  }
}

TEST(grad_weight) {
  for (const Size& size : kSizes) {
    for (const DType dtype : kNarrow) {
      const Operands in(size, dtype);
      for (const bool narrow : {false, true}) {
        Scratch scratch;
        std::vector<float> base(size_t(size.vocab * size.width), 0.25f), wide = base;
        std::vector<uint16_t> rounded(wide.size());
        std::vector<unsigned char> packed(grpo_fast::gemm_packed_bytes(size.rows, size.width));
        grpo_fast::gemm_grad_weight(dtype, in.dx.data(), in.hidden.data(), narrow ? base.data() : wide.data(),
                                    narrow ? static_cast<void*>(rounded.data()) : wide.data(), narrow, size.rows,
                                    size.width, size.vocab, in.stride, packed.data(), scratch.bytes.data(), kThreads);
        CHECK(scratch.kept(), "H %d: written behind the scratch", int(size.width));
        for (int64_t v = 0; v < size.vocab; ++v) {
          for (int64_t c = 0; c < size.width; ++c) {
            double expected = 0.25;
            for (int64_t r = 0; r < size.rows; ++r) expected += in.d(r, v) * in.h(r, c);
            const size_t at = size_t(v * size.width + c);
            check_close(narrow ? "narrow dW" : "dW", in, narrow ? decoded(rounded[at], dtype) : double(wide[at]), expected,
                        double(size.rows), int64_t(at));
          }
        }
      }
    }
  }
}

TEST(a_row_of_the_result_that_fits_no_scratch_is_refused) {
  CHECK_THROWS(grpo_fast::gemm_grad_weight(DType::kBFloat16, nullptr, nullptr, nullptr, nullptr, true, 1, 261617, 1, 1,
                                           nullptr, nullptr, 1),
               std::invalid_argument, "width: expected at most 261616; got 261617");
}

}  // namespace

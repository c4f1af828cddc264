// sparse_cpu.h against plain double loops and against row_cpu.h: every instruction set and dtype, ragged widths,
// supports of one, two, hundreds and all of the vocabulary, tokens that every row could have chosen.

#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../sparse_cpu.h"
#include "row_cases.h"

namespace {

using namespace testing;
using grpo_fast::Launch;
using grpo_fast::Operands;
using grpo_fast::Supports;

constexpr int64_t kVocab = 400;
constexpr int64_t kWidths[] = {1, 7, 16, 33, 64, 1100};  // around a vector, and beyond the columns of one sum

// [rows, width] of a dtype.
struct Matrix {
  DType dtype;
  int64_t rows, width;
  std::vector<char> bytes;

  Matrix(DType of, int64_t num_rows, int64_t num_columns, uint64_t seed)
      : dtype(of), rows(num_rows), width(num_columns), bytes(size_t(rows * width * size())) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < rows * width; ++i) set(i, normal(random));
  }

  int64_t size() const { return dtype == DType::kFloat32 ? 4 : 2; }

  void set(int64_t i, float value) {
    const uint16_t narrow = dtype == DType::kBFloat16 ? grpo_fast::to_bfloat16(value) : grpo_fast::to_float16(value);
    if (dtype == DType::kFloat32) std::memcpy(&bytes[size_t(4 * i)], &value, 4);
    if (dtype != DType::kFloat32) std::memcpy(&bytes[size_t(2 * i)], &narrow, 2);
  }

  double at(int64_t row, int64_t column) const {
    const int64_t i = row * width + column;
    float wide;
    uint16_t narrow;
    if (dtype == DType::kFloat32) return std::memcpy(&wide, &bytes[size_t(4 * i)], 4), double(wide);
    return std::memcpy(&narrow, &bytes[size_t(2 * i)], 2), decoded(narrow, dtype);
  }

  grpo_fast::Sums sums() { return {dtype, bytes.data()}; }
};

// Rows with supports of the given sizes; every row that has two tokens or more has token 7.
struct Case {
  Matrix hidden, weight;
  std::vector<int64_t> offsets{0}, rows;
  std::vector<int32_t> ids;
  Chunk policy;  // targets, temperatures, and what the objective reads

  Case(DType dtype, int64_t width, const std::vector<int64_t>& sizes, uint64_t seed, const Head& head = kHeads[0])
      : hidden(dtype, int64_t(sizes.size()), width, seed),
        weight(dtype, kVocab, width, seed + 1),
        policy(int64_t(sizes.size()), 1, head, seed + 2, 0) {
    std::mt19937_64 random(seed + 3);
    std::vector<int32_t> all(kVocab);
    std::iota(all.begin(), all.end(), 0);
    for (size_t t = 0; t < sizes.size(); ++t) {
      if (sizes[t] < kVocab) std::shuffle(all.begin(), all.end(), random);
      if (sizes[t] == kVocab) std::sort(all.begin(), all.end());
      const auto seven = std::find(all.begin(), all.end(), 7);
      if (sizes[t] > 1 && sizes[t] < kVocab) std::iter_swap(seven, all.begin() + 1);
      ids.insert(ids.end(), all.begin(), all.begin() + sizes[t]);
      rows.insert(rows.end(), size_t(sizes[t]), int64_t(t));
      offsets.push_back(int64_t(ids.size()));
      policy.targets[t] = int64_t(random() % uint64_t(sizes[t]));
    }
    std::normal_distribution<float> normal;
    policy.bias.clear();
    for (size_t j = 0; j < ids.size(); ++j) policy.bias.push_back(normal(random));
    policy.logits.assign(ids.size(), kGuard);
    policy.set_policies(std::vector<float>(sizes.size(), -1.0f), seed + 4);
  }

  int64_t num_rows() const { return int64_t(offsets.size()) - 1; }
  int64_t num_entries() const { return int64_t(ids.size()); }
  Operands operands() const { return {hidden.dtype, hidden.bytes.data(), weight.bytes.data(), hidden.width}; }
  Supports supports() const { return {ids.data(), offsets.data(), num_rows()}; }
  std::vector<float> slopes(uint64_t seed) const {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> out(ids.size());
    for (float& value : out) value = normal(random);
    return out;
  }
};

const std::vector<int64_t> kSizes = {1, 2, 3, 4, 5, 9, 300, kVocab, 1, 17};

void for_each_case(const std::function<void(Case&, Isa)>& body) {
  uint64_t seed = 0;
  for (const DType dtype : kDTypes) {
    for (const int64_t width : kWidths) {
      Case given(dtype, width, kSizes, ++seed);
      for (const Isa isa : isas()) body(given, isa);
    }
  }
}

std::vector<float> logits_of(const Case& given, Launch launch) {
  std::vector<float> out(given.ids.size() + 1, kGuard);
  grpo_fast::sparse_logits(given.operands(), given.supports(), out.data(), launch);
  CHECK(out.back() == kGuard, "%g behind the end", double(out.back()));
  out.pop_back();
  return out;
}

// `got` is `exact`, the sum of terms whose sizes add up to `size`, in float32; then rounded to a dtype.
void check_sum(const char* what, double got, double exact, double size, DType dtype, Isa isa) {
  const double narrowing = dtype == DType::kFloat32 ? 0.0 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  const double bound = size * 1e-6 + std::abs(exact) * narrowing + (dtype == DType::kFloat16 ? 0x1p-25 : 1e-38);
  CHECK(std::abs(got - exact) <= bound, "%s, dtype %d, isa %d: %.9g, expected %.9g", what, int(dtype), int(isa), got,
        exact);
}

TEST(gathered_products_match_double) {
  for_each_case([](Case& given, Isa isa) {
    const std::vector<float> x = logits_of(given, {1, isa});
    for (size_t j = 0; j < x.size(); ++j) {
      double exact = 0, size = 0;
      for (int64_t c = 0; c < given.hidden.width; ++c) {
        const double term = given.hidden.at(given.rows[j], c) * given.weight.at(given.ids[j], c);
        exact += term, size += std::abs(term);
      }
      check_sum("x", x[j], exact, size, DType::kFloat32, isa);
    }
  });
}

TEST(sums_into_hidden_match_double) {
  for_each_case([](Case& given, Isa isa) {
    const std::vector<float> dx = given.slopes(3);
    for (const DType dtype : kDTypes) {
      Matrix out(dtype, given.num_rows(), given.hidden.width, 9);
      grpo_fast::sparse_grad_hidden(dx.data(), given.operands(), given.supports(), out.sums(), {1, isa});
      for (int64_t t = 0; t < given.num_rows(); ++t) {
        for (int64_t c = 0; c < out.width; ++c) {
          double exact = 0, size = 0;
          for (int64_t j = given.offsets[size_t(t)]; j < given.offsets[size_t(t + 1)]; ++j) {
            const double term = dx[size_t(j)] * given.weight.at(given.ids[size_t(j)], c);
            exact += term, size += std::abs(term);
          }
          check_sum("dHidden", out.at(t, c), exact, size, dtype, isa);
        }
      }
    }
  });
}

// dWeight into `out`, over `before`.
void add_grad_weight(const Case& given, const std::vector<float>& dx, Matrix& out, Launch launch,
                     int64_t vocab = kVocab) {
  std::vector<uint64_t> scratch(grpo_fast::sparse_sort_bytes(given.num_entries()) / 8 + 1, 0x5a5a5a5a);
  grpo_fast::sparse_grad_weight(dx.data(), given.operands(), given.ids.data(), given.rows.data(), given.num_entries(),
                                vocab, out.sums(), scratch.data(), launch);
  CHECK(scratch.back() == 0x5a5a5a5a, "scratch of %zu words was too small", scratch.size() - 1);
}

void check_grad_weight(const Case& given, DType dtype, Isa isa) {
  const std::vector<float> dx = given.slopes(4);
  Matrix before(dtype, kVocab, given.hidden.width, 10), out = before;
  std::vector<std::vector<int64_t>> entries(kVocab);
  for (size_t j = 0; j < given.ids.size(); ++j) entries[size_t(given.ids[j])].push_back(int64_t(j));
  const size_t row_bytes = size_t(out.width * out.size());
  for (int64_t v = 0; v < kVocab; ++v) {  // a pattern that is NaN in every dtype
    if (entries[size_t(v)].empty()) std::memset(&out.bytes[size_t(v) * row_bytes], 0xff, row_bytes);
  }
  add_grad_weight(given, dx, out, {1, isa});
  for (int64_t v = 0; v < kVocab; ++v) {
    for (size_t i = 0; i < row_bytes && entries[size_t(v)].empty(); ++i) {
      const uint8_t byte = uint8_t(out.bytes[size_t(v) * row_bytes + i]);
      CHECK(byte == 0xff, "id %d does not occur, but byte %zu changed", int(v), i);
    }
    for (int64_t c = 0; c < out.width && !entries[size_t(v)].empty(); ++c) {
      double exact = before.at(v, c), size = std::abs(exact);
      for (const int64_t j : entries[size_t(v)]) {
        const double term = dx[size_t(j)] * given.hidden.at(given.rows[size_t(j)], c);
        exact += term, size += std::abs(term);
      }
      check_sum("dWeight", out.at(v, c), exact, size, dtype, isa);
    }
  }
}

TEST(sums_into_the_weight_match_double_and_touch_nothing_else) {
  for_each_case([](Case& given, Isa isa) {
    for (const DType dtype : kDTypes) check_grad_weight(given, dtype, isa);
  });
  uint64_t seed = 40;
  for (const Isa isa : isas()) {
    for (const std::vector<int64_t>& sizes : {std::vector<int64_t>{2, 3, 1}, std::vector<int64_t>(1000, 3)}) {
      Case given(DType::kBFloat16, 300, sizes, ++seed);  // few ids; token 7 in all of 1000 rows
      check_grad_weight(given, DType::kFloat32, isa);
    }
  }
}

struct Pass {
  std::vector<float> logits, logprobs, entropy, grad_hidden;
  std::vector<uint8_t> live;

  explicit Pass(const Case& given)
      : logits(given.ids.size(), kGuard),
        logprobs(given.policy.g.size(), kGuard),
        entropy(logprobs),
        grad_hidden(size_t(given.num_rows() * given.hidden.width), kGuard),
        live(logprobs.size(), 7) {}
  Rows rows(Case& given) {
    Rows out = given.policy.rows();
    out.logits = logits.data();
    return out;
  }
  bool operator==(const Pass& other) const {
    return same_bits(logits, other.logits) && same_bits(logprobs, other.logprobs) &&
           same_bits(entropy, other.entropy) && same_bits(grad_hidden, other.grad_hidden) && live == other.live;
  }
};

Pass fused(Case& given, float bonus, Launch launch) {
  Pass out(given);
  grpo_fast::sparse_objective(given.operands(), given.supports(), out.rows(given), clipped_with_kl(),
                              given.policy.tokens(), bonus, 8.0f, out.logprobs.data(), out.entropy.data(),
                              out.live.data(), {DType::kFloat32, out.grad_hidden.data()}, launch);
  return out;
}

TEST(one_visit_gives_what_several_give) {
  uint64_t seed = 60;
  for (const Head& head : kHeads) {
    for (const DType dtype : kDTypes) {
      for (const Isa isa : isas()) {
        for (const float bonus : {0.0f, 0.02f}) {
          Case given(dtype, 33, kSizes, ++seed, head);
          Pass expected(given);
          expected.logits = logits_of(given, {1, isa});
          grpo_fast::row_objective(expected.rows(given), clipped_with_kl(), given.policy.tokens(), bonus, 8.0f,
                                   DType::kFloat32, expected.logprobs.data(), expected.entropy.data(),
                                   expected.live.data(), {1, isa}, given.offsets.data());
          grpo_fast::sparse_grad_hidden(expected.logits.data(), given.operands(), given.supports(),
                                        {DType::kFloat32, expected.grad_hidden.data()}, {1, isa});
          for (size_t t = 0; t < kSizes.size(); ++t) {
            if (kSizes[t] != 1) continue;
            const float dx = expected.logits[size_t(given.offsets[t])];
            CHECK(expected.logprobs[t] == 0 && expected.entropy[t] == 0 && dx == 0, "%s: a row of one: %g, %g, dx %g",
                  head.name, double(expected.logprobs[t]), double(expected.entropy[t]), double(dx));
          }
          CHECK(fused(given, bonus, {1, isa}) == expected, "%s, dtype %d, isa %d, bonus %g", head.name, int(dtype),
                int(isa), double(bonus));
        }
      }
    }
  }
}

TEST(rows_of_their_own_lengths_are_rows) {
  for (const Head& head : kHeads) {
    for (const Isa isa : isas()) {
      Case given(DType::kFloat32, 33, {1, 2, 300, 350, 17}, 80,
                 head);
      Pass whole(given), apart(given);
      whole.logits = apart.logits = logits_of(given, {1, isa});
      std::vector<float> lse(whole.logprobs), lse_apart(lse);
      given.policy.targets[1] = -1;
      const auto run = [&](const Rows& rows, Pass& out, float* to, int64_t t, const int64_t* offsets) {
        grpo_fast::row_statistics(rows, &out.logprobs[size_t(t)], &out.entropy[size_t(t)], to + t, {1, isa}, offsets);
        grpo_fast::row_gradient(rows, to + t, &out.entropy[size_t(t)], &given.policy.g[size_t(t)],
                                &given.policy.e[size_t(t)], 0, DType::kFloat32, {1, isa}, offsets);
      };
      run(whole.rows(given), whole, lse.data(), 0, given.offsets.data());
      for (int64_t t = 0; t < given.num_rows(); ++t) {
        Rows row = apart.rows(given);
        const int64_t start = given.offsets[size_t(t)];
        row.logits += start, row.targets += t, row.num_rows = 1, row.num_columns = given.offsets[size_t(t + 1)] - start;
        if (row.bias) row.bias += start;
        if (row.row_temperature) row.row_temperature += t;
        run(row, apart, lse_apart.data(), t, nullptr);
      }
      CHECK(whole == apart && same_bits(lse, lse_apart), "%s, isa %d", head.name, int(isa));
      CHECK(std::isnan(whole.logprobs[1]) && std::isfinite(whole.logprobs[0]), "a target that is not there: %g",
            double(whole.logprobs[1]));
    }
  }
}

TEST(supports_share_nothing_but_memory) {
  std::vector<int64_t> sizes(600, 3);
  sizes[0] = kVocab;
  for (const Isa isa : isas()) {
    Case given(DType::kBFloat16, 150, sizes, 90, kHeads[2]);
    const Pass one = fused(given, 0.01f, {1, isa});
    Matrix first(DType::kBFloat16, kVocab, 150, 12);
    add_grad_weight(given, one.logits, first, {1, isa});
    for (const int threads : {2, 3}) {
      CHECK(fused(given, 0.01f, {threads, isa}) == one, "%d threads, isa %d", threads, int(isa));
      Matrix out(DType::kBFloat16, kVocab, 150, 12);
      add_grad_weight(given, one.logits, out, {threads, isa});
      CHECK(out.bytes == first.bytes, "dWeight: %d threads, isa %d", threads, int(isa));
    }
    // A row alone is the row among others.
    const int64_t t = 599, start = given.offsets[t];
    std::vector<float> alone(3);
    const int64_t offsets[] = {0, 3};
    Operands operands = given.operands();
    operands.hidden = &given.hidden.bytes[size_t(t * 150 * 2)];
    grpo_fast::sparse_logits(operands, {&given.ids[size_t(start)], offsets, 1}, alone.data(), {1, isa});
    const std::vector<float> all = logits_of(given, {2, isa});
    CHECK(std::memcmp(alone.data(), &all[size_t(start)], 12) == 0, "isa %d", int(isa));
  }
}

TEST(digits_of_ids_do_not_matter) {  // how many the vocabulary's size makes of them; every id once fills the scratch
  Case given(DType::kFloat32, 7, {300}, 95);
  const std::vector<float> dx = given.slopes(5);
  Matrix expected(DType::kFloat32, kVocab, 7, 13);
  const Launch launch{1, grpo_fast::detected_isa()};
  add_grad_weight(given, dx, expected, launch);
  for (const int bits : {9, 20, 30}) {
    Matrix out(DType::kFloat32, kVocab, 7, 13);
    add_grad_weight(given, dx, out, launch, int64_t{1} << bits);
    CHECK(out.bytes == expected.bytes, "%d bits", bits);
  }
}

TEST(no_rows_are_nothing) {
  const int64_t offsets[] = {0};
  const Operands operands{DType::kFloat32, nullptr, nullptr, 8};
  std::vector<uint64_t> scratch(grpo_fast::sparse_sort_bytes(0) / 8);
  const Launch launch{1, grpo_fast::detected_isa()};
  grpo_fast::sparse_logits(operands, {nullptr, offsets, 0}, nullptr, launch);
  const int64_t one_empty_row[] = {0, 0};
  std::vector<float> nothing(8, kGuard);
  grpo_fast::sparse_grad_hidden(nullptr, operands, {nullptr, one_empty_row, 1}, {DType::kFloat32, nothing.data()},
                                launch);
  CHECK(nothing == std::vector<float>(8, 0.0f), "the sum of nothing: %g", double(nothing[0]));
  const grpo_fast::Sums nowhere{DType::kFloat32, nullptr};
  grpo_fast::sparse_grad_weight(nullptr, operands, nullptr, nullptr, 0, 8, nowhere, scratch.data(), launch);
  CHECK_THROWS(grpo_fast::sparse_grad_weight(nullptr, operands, nullptr, nullptr, int64_t{1} << 32, 8, nowhere, nullptr,
                                             launch),
               std::invalid_argument, "supports: expected fewer than 2^32 tokens");
}

}  // namespace

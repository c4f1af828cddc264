#include "sparse_cpu.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace grpo_fast {
namespace {

template <DType dtype>
using Stored = std::conditional_t<dtype == DType::kFloat32, float, uint16_t>;

template <DType dtype>
GRPO_FAST_LOOP float widened(Stored<dtype> value) {
  if constexpr (dtype == DType::kBFloat16) return from_bfloat16(value);
  else if constexpr (dtype == DType::kFloat16) return from_float16(value);
  else return value;
}

template <DType dtype>
GRPO_FAST_LOOP Stored<dtype> rounded(float value) {
  if constexpr (dtype == DType::kBFloat16) return to_bfloat16(value);
  else if constexpr (dtype == DType::kFloat16) return to_float16(value);
  else return value;
}

int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

const char* row_at(const void* matrix, DType dtype, int64_t width, int64_t row) {
  return static_cast<const char*>(matrix) + row * width * element_bytes(dtype);
}

constexpr int64_t kLine = 64;        // bytes of a cache line
constexpr int64_t kAhead = 8;        // gathered rows that are on their way while as many are multiplied
constexpr int64_t kColumns = 1024;   // of a sum that is held at once: 4 KiB
constexpr int64_t kDepth = 256;      // terms of a sum that are added up before they meet the rest

// -- dot products ------------------------------------------------------------------------------------------------------

// x_j = h . weight[ids[j]] of one row. Four gathered rows meet h at once, 16 partial sums each; the next are prefetched,
// which go on into the next row's.
template <DType dtype>
struct Dots {
  static constexpr int64_t kLanes = 16, kStep = 32;

  template <int kCount>
  static GRPO_FAST_LOOP void group(const Stored<dtype>* h, const Stored<dtype>* weight, int64_t width,
                                   const int32_t* ids, const int32_t* last, float* out) {
    const Stored<dtype>*rows[kCount], *next[kCount];
    alignas(64) float lanes[kCount][kLanes];
    for (int i = 0; i < kCount; ++i) {
      rows[i] = weight + static_cast<int64_t>(ids[i]) * width;
      const int32_t* ahead = ids + i + kAhead;
      next[i] = weight + static_cast<int64_t>(*(ahead < last ? ahead : last)) * width;
      for (int64_t lane = 0; lane < kLanes; ++lane) lanes[i][lane] = 0.0f;
    }
    int64_t column = 0;
    for (; column + kStep <= width; column += kStep) {
      for (int i = 0; i < kCount; ++i) {
        for (int64_t byte = 0; byte < kStep * static_cast<int64_t>(sizeof *h); byte += kLine) {
          __builtin_prefetch(reinterpret_cast<const char*>(next[i] + column) + byte);
        }
      }
      for (int64_t from = column; from < column + kStep; from += kLanes) {
        for (int i = 0; i < kCount; ++i) {
#pragma omp simd
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            lanes[i][lane] += widened<dtype>(h[from + lane]) * widened<dtype>(rows[i][from + lane]);
          }
        }
      }
    }
    for (int i = 0; i < kCount; ++i) {
      for (int64_t rest = column; rest < width; ++rest) {
        lanes[i][(rest - column) % kLanes] += widened<dtype>(h[rest]) * widened<dtype>(rows[i][rest]);
      }
      for (int64_t count = kLanes / 2; count > 0; count /= 2) {
        for (int64_t lane = 0; lane < count; ++lane) lanes[i][lane] += lanes[i][lane + count];
      }
      out[i] = lanes[i][0];
    }
  }

  // last: of all rows' ids, the last.
  static GRPO_FAST_LOOP void run(const void* hidden, const void* weight, int64_t width, const int32_t* ids, int64_t n,
                                 const int32_t* last, float* out) {
    const auto* h = static_cast<const Stored<dtype>*>(hidden);
    const auto* w = static_cast<const Stored<dtype>*>(weight);
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) group<4>(h, w, width, ids + j, last, out + j);
    for (; j < n; ++j) group<1>(h, w, width, ids + j, last, out + j);
  }
};

// Of all entries; null where there are none.
const int32_t* last_id(const Supports& supports) {
  const int64_t entries = supports.offsets[supports.num_rows];
  return entries > 0 ? supports.ids + entries - 1 : nullptr;
}

using DotsFn = void (*)(const void*, const void*, int64_t, const int32_t*, int64_t, const int32_t*, float*);

// -- sums of gathered rows ---------------------------------------------------------------------------------------------

// One block of terms: sums [n] (+)= sum_j factors[j] rows[j], count >= 1 of them, each row a pointer.
template <DType dtype>
struct SumRows {
  template <int kCount>
  static GRPO_FAST_LOOP void group(const void* const* rows, const float* factors, int64_t n, bool fresh, float* sums) {
    const Stored<dtype>* row[kCount];
    float factor[kCount];
    for (int i = 0; i < kCount; ++i) {
      row[i] = static_cast<const Stored<dtype>*>(rows[i]);
      factor[i] = factors[i];
    }
    if (fresh) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        float sum = factor[0] * widened<dtype>(row[0][c]);
        for (int i = 1; i < kCount; ++i) sum += factor[i] * widened<dtype>(row[i][c]);
        sums[c] = sum;
      }
    } else {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) {
        float sum = sums[c];
        for (int i = 0; i < kCount; ++i) sum += factor[i] * widened<dtype>(row[i][c]);
        sums[c] = sum;
      }
    }
  }

  static GRPO_FAST_LOOP void run(const void* const* rows, const float* factors, int64_t count, int64_t n, float* sums) {
    const int64_t first = (count - 1) % 4 + 1;
    if (first == 1) group<1>(rows, factors, n, true, sums);
    if (first == 2) group<2>(rows, factors, n, true, sums);
    if (first == 3) group<3>(rows, factors, n, true, sums);
    if (first == 4) group<4>(rows, factors, n, true, sums);
    for (int64_t j = first; j < count; j += 4) group<4>(rows + j, factors + j, n, false, sums);
  }
};

using SumRowsFn = void (*)(const void* const*, const float*, int64_t, int64_t, float*);

// out [n] = sums, or out + sums, rounded once.
template <DType dtype>
struct Store {
  static GRPO_FAST_LOOP void run(const float* sums, int64_t n, bool add, void* out) {
    auto* to = static_cast<Stored<dtype>*>(out);
    if (add) {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) to[c] = rounded<dtype>(widened<dtype>(to[c]) + sums[c]);
    } else {
#pragma omp simd
      for (int64_t c = 0; c < n; ++c) to[c] = rounded<dtype>(sums[c]);
    }
  }
};

using StoreFn = void (*)(const float*, int64_t, bool, void*);

template <template <DType> class Body>
auto instance_for(DType dtype, Isa isa) {
  if (dtype == DType::kBFloat16) return instance<Body<DType::kBFloat16>>(isa);
  if (dtype == DType::kFloat16) return instance<Body<DType::kFloat16>>(isa);
  return instance<Body<DType::kFloat32>>(isa);
}

// Sums of rows of a matrix [., width] into rows of another.
struct Summation {
  DType dtype;
  const void* matrix;
  int64_t width;
  Sums out;
  bool add;
  SumRowsFn sum_rows;
  StoreFn store;

  Summation(const Operands& operands, const void* of, Sums into, bool adds, Isa isa)
      : dtype(operands.dtype),
        matrix(of),
        width(operands.width),
        out(into),
        add(adds),
        sum_rows(instance_for<SumRows>(operands.dtype, isa)),
        store(instance_for<Store>(into.dtype, isa)) {}

  // Columns [begin, end) of out's row `row` from `count` terms; term(j): {row of the matrix, factor}.
  template <typename Term>
  void operator()(int64_t row, int64_t count, int64_t begin, int64_t end, Term term) const {
    alignas(64) float sums[kColumns], part[kColumns];
    const void* rows[kDepth];
    float factors[kDepth];
    for (int64_t left = begin; left < end; left += kColumns) {
      const int64_t n = std::min(kColumns, end - left);
      if (count == 0) std::fill_n(sums, n, 0.0f);
      for (int64_t first = 0; first < count; first += kDepth) {
        const int64_t terms = std::min(kDepth, count - first);
        for (int64_t j = 0; j < terms; ++j) {
          const auto [index, factor] = term(first + j);
          rows[j] = row_at(matrix, dtype, width, index) + left * element_bytes(dtype);
          factors[j] = factor;
        }
        sum_rows(rows, factors, terms, n, first == 0 ? sums : part);
        for (int64_t c = 0; first > 0 && c < n; ++c) sums[c] += part[c];
      }
      store(sums, n, add, static_cast<char*>(out.values) + (row * width + left) * element_bytes(out.dtype));
    }
  }
};

struct Term {
  int64_t row;
  float factor;
};

// dHidden of one row of hidden.
void row_grad_hidden(const Summation& sum, const Supports& supports, const float* dx, int64_t t) {
  const int64_t start = supports.offsets[t], n = supports.offsets[t + 1] - start;
  sum(t, n, 0, sum.width, [&](int64_t j) { return Term{supports.ids[start + j], dx[start + j]}; });
}

// -- entries by id -----------------------------------------------------------------------------------------------------

constexpr int kDigitBits = 11;

// id << 32 | entry in ascending order: from the lowest digit of the ids to the highest, stable. In `keys` or `other`.
uint64_t* sorted_by_id(const int32_t* ids, int64_t n, int64_t vocab, uint64_t* keys, uint64_t* other) {
  int bits = 1;
  while (vocab - 1 >= int64_t{1} << bits) ++bits;
  const int passes = (bits + kDigitBits - 1) / kDigitBits, digit = (bits + passes - 1) / passes;
  const uint64_t mask = (uint64_t{1} << digit) - 1;
  for (int64_t j = 0; j < n; ++j) keys[j] = static_cast<uint64_t>(ids[j]) << 32 | static_cast<uint64_t>(j);
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 + pass * digit;
    int64_t places[1 << kDigitBits] = {};
    for (int64_t j = 0; j < n; ++j) ++places[keys[j] >> shift & mask];
    int64_t place = 0;
    for (int64_t& count : places) place += std::exchange(count, place);
    for (int64_t j = 0; j < n; ++j) other[places[keys[j] >> shift & mask]++] = keys[j];
    std::swap(keys, other);
  }
  return keys;
}

constexpr int64_t kLong = 512;      // entries of an id from which on threads share its columns
constexpr int64_t kLongColumns = 128;

}  // namespace

size_t sparse_sort_bytes(int64_t num_entries) { return static_cast<size_t>(2 * num_entries + 2) * sizeof(uint64_t); }

void sparse_logits(const Operands& operands, const Supports& supports, float* out, Launch launch) {
  const DotsFn dots = instance_for<Dots>(operands.dtype, launch.isa);
  const int32_t* last = last_id(supports);
#pragma omp parallel for num_threads(launch.threads) schedule(dynamic, 8)
  for (int64_t t = 0; t < supports.num_rows; ++t) {
    const int64_t start = supports.offsets[t];
    dots(row_at(operands.hidden, operands.dtype, operands.width, t), operands.weight, operands.width,
         supports.ids + start, supports.offsets[t + 1] - start, last, out + start);
  }
}

void sparse_grad_hidden(const float* dx, const Operands& operands, const Supports& supports, Sums out, Launch launch) {
  const Summation sum(operands, operands.weight, out, false, launch.isa);
#pragma omp parallel for num_threads(launch.threads) schedule(dynamic, 8)
  for (int64_t t = 0; t < supports.num_rows; ++t) row_grad_hidden(sum, supports, dx, t);
}

void sparse_objective(const Operands& operands, const Supports& supports, const Rows& rows, const Objective& objective,
                      const TokenArrays& tokens, float entropy_gradient, float grad_scale, float* logprobs,
                      float* entropy, uint8_t* live, Sums grad_hidden, Launch launch) {
  const DotsFn dots = instance_for<Dots>(operands.dtype, launch.isa);
  const ObjectivePass pass{objective, tokens, entropy_gradient, grad_scale, logprobs, entropy, live,
                           statistics_for(launch.isa), gradient_for(launch.isa, DType::kFloat32)};
  const Summation sum(operands, operands.weight, grad_hidden, false, launch.isa);
  const int64_t row_bytes = operands.width * element_bytes(grad_hidden.dtype);
  const int32_t* last = last_id(supports);
#pragma omp parallel for num_threads(launch.threads) schedule(dynamic, 8)
  for (int64_t t = 0; t < supports.num_rows; ++t) {
    const Row row = row_of(rows, supports.offsets, t);
    dots(row_at(operands.hidden, operands.dtype, operands.width, t), operands.weight, operands.width,
         supports.ids + supports.offsets[t], row.length, last, row.logits);
    const bool moves = pass(row, t, rows.targets[t]);
    if (!grad_hidden.values) continue;
    if (moves) {
      row_grad_hidden(sum, supports, rows.logits, t);
    } else {
      std::memset(static_cast<char*>(grad_hidden.values) + t * row_bytes, 0, static_cast<size_t>(row_bytes));
    }
  }
}

// Runs of one id in the sorted entries are independent of each other: short ones go to threads whole, as they come free;
// of a long one, a token that many rows could have chosen, threads take blocks of columns.
void sparse_grad_weight(const float* dx, const Operands& operands, const int32_t* ids, const int64_t* rows,
                        int64_t num_entries, int64_t vocab, Sums out, void* scratch, Launch launch) {
  if (num_entries >> 32 != 0) {
    throw std::invalid_argument("supports: expected fewer than 2^32 tokens at once; got " + std::to_string(num_entries));
  }
  uint64_t *keys = static_cast<uint64_t*>(scratch), *other = keys + num_entries + 1;
  const uint64_t* sorted = sorted_by_id(ids, num_entries, vocab, keys, other);
  const auto id_of = [=](uint64_t i) { return static_cast<int64_t>(sorted[i] >> 32); };
  const auto term = [=](uint64_t i) {
    const uint64_t entry = sorted[i] & 0xffffffffu;
    return Term{rows[entry], dx[entry]};
  };
  // Where runs begin, and where the last ends: in what sorting left over.
  uint64_t* begins = sorted == keys ? other : keys;
  int64_t num_runs = 0;
  std::vector<int64_t> long_runs;
  for (int64_t i = 0; i < num_entries; ++i) {
    if (i == 0 || id_of(i) != id_of(i - 1)) begins[num_runs++] = static_cast<uint64_t>(i);
  }
  begins[num_runs] = static_cast<uint64_t>(num_entries);
  const auto length = [=](int64_t run) { return static_cast<int64_t>(begins[run + 1] - begins[run]); };
  for (int64_t run = 0; run < num_runs; ++run) {
    if (length(run) >= kLong) long_runs.push_back(run);
  }

  const Summation sum(operands, operands.hidden, out, true, launch.isa);
  const auto add_run = [&](int64_t run, int64_t begin, int64_t end) {
    sum(id_of(begins[run]), length(run), begin, end, [&](int64_t j) { return term(begins[run] + j); });
  };
  const int64_t blocks = (operands.width + kLongColumns - 1) / kLongColumns;
#pragma omp parallel for num_threads(launch.threads) schedule(dynamic)
  for (int64_t task = 0; task < static_cast<int64_t>(long_runs.size()) * blocks; ++task) {
    const int64_t begin = task % blocks * kLongColumns;
    add_run(long_runs[task / blocks], begin, std::min(begin + kLongColumns, operands.width));
  }
  const int64_t out_bytes = operands.width * element_bytes(out.dtype);
#pragma omp parallel for num_threads(launch.threads) schedule(dynamic, 16)
  for (int64_t run = 0; run < num_runs; ++run) {
    if (run + 1 < num_runs) {
      const char* next = static_cast<const char*>(out.values) + id_of(begins[run + 1]) * out_bytes;
      for (int64_t byte = 0; byte < out_bytes; byte += kLine) __builtin_prefetch(next + byte, 1);
    }
    if (length(run) < kLong) add_run(run, 0, operands.width);
  }
}

}  // namespace grpo_fast

#include "gemm_cpu.h"

#include <dlfcn.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "vector_math.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace grpo_fast {
namespace {

// at::native::cpublas::brgemm(M, N, K, ld_a, ld_b, ld_c, add_C, A, B, C, is_vnni)
using Brgemm = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const uint16_t*, const uint16_t*,
                        float*, bool);
// at::native::cpublas::brgemm_release(is_vnni): gives the AMX tiles back.
using Release = void (*)(bool);

constexpr const char* kBrgemmBFloat16 = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb";
constexpr const char* kBrgemmFloat16 = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c104HalfES5_Pfb";
constexpr const char* kRelease = "_ZN2at6native7cpublas14brgemm_releaseEb";

struct Library {
  Brgemm brgemm = nullptr;
  Release brgemm_release = nullptr;
  bool paired = true;  // B as pairs of rows; else as it is
  const char* obstacle = nullptr;

  // C [M, N] (+)= A [M, K] B [K, N], B packed by pack_rows or pack_transposed.
  void multiply(int64_t m, int64_t n, int64_t k, int64_t ld_a, int64_t ld_c, bool add, const uint16_t* a,
                const uint16_t* b, float* c) const {
    brgemm(m, n, k, ld_a, n, ld_c, add, a, b, c, paired);
  }
  void release() const { brgemm_release(paired); }
};

bool has_narrow_instructions(DType dtype) {
#if defined(GRPO_FAST_STAND_IN_LIBRARY)  // tests multiply in plain C++
  (void)dtype;
  return true;
#elif defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  // Without them the library computes in emulation, slower than float32.
  return dtype == DType::kBFloat16 ? __builtin_cpu_supports("avx512bf16") : __builtin_cpu_supports("avx512fp16");
#else
  (void)dtype;
  return false;
#endif
}

// A product of exact small integers: a library that means something else by the same name is found out.
bool multiplies_right(const Library& library, DType dtype) {
  constexpr int64_t m = 5, n = 19, k = 38;  // no whole tiles
  const auto rounded = [dtype](int64_t v) {
    return dtype == DType::kBFloat16 ? to_bfloat16(static_cast<float>(v)) : to_float16(static_cast<float>(v));
  };
  const auto a_value = [](int64_t i, int64_t p) { return (i * 3 + p) % 7 - 3; };
  const auto b_value = [](int64_t p, int64_t j) { return (p * 5 + j) % 9 - 4; };
  std::vector<uint16_t> a(m * k), b(k * n);
  std::vector<float> c(m * n, 1.0f);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t p = 0; p < k; ++p) a[i * k + p] = rounded(a_value(i, p));
  }
  for (int64_t p = 0; p < k; ++p) {
    for (int64_t j = 0; j < n; ++j) b[library.paired ? (p / 2 * n + j) * 2 + p % 2 : p * n + j] = rounded(b_value(p, j));
  }
  library.multiply(m, n, k, k, n, true, a.data(), b.data(), c.data());
  library.release();
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      int64_t expected = 1;
      for (int64_t p = 0; p < k; ++p) expected += a_value(i, p) * b_value(p, j);
      if (c[i * n + j] != static_cast<float>(expected)) return false;
    }
  }
  return true;
}

Library look_up(DType dtype) {
  Library library;
  if (!has_narrow_instructions(dtype)) {
    library.obstacle = dtype == DType::kBFloat16 ? "this CPU has no AVX-512 BF16 instructions"
                                                 : "this CPU has no AVX-512 FP16 instructions";
    return library;
  }
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY);
  if (!torch) {
    library.obstacle = "libtorch_cpu.so is not loaded";
    return library;
  }
  library.brgemm =
      reinterpret_cast<Brgemm>(dlsym(torch, dtype == DType::kBFloat16 ? kBrgemmBFloat16 : kBrgemmFloat16));
  library.brgemm_release = reinterpret_cast<Release>(dlsym(torch, kRelease));
  if (!library.brgemm || !library.brgemm_release) {
    library.obstacle = "this torch's CPU library exports no brgemm";
    return library;
  }
  // With AVX-512 FP16 and no AMX the library reads pairs of fp16 as something else, and B as it is rightly.
  for (const bool paired : {true, false}) {
    library.paired = paired;
    try {
      if (multiplies_right(library, dtype)) {
        library.obstacle = nullptr;
        return library;
      }
      library.obstacle = "the brgemm of this torch's CPU library computes something else";
    } catch (const std::exception&) {
      library.obstacle = "the brgemm of this torch's CPU library does not run on this CPU";
    }
  }
  return library;
}

const Library& library_for(DType dtype) {
  static const Library bfloat16 = look_up(DType::kBFloat16);
  static const Library float16 = look_up(DType::kFloat16);
  return dtype == DType::kBFloat16 ? bfloat16 : float16;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
};

// Part `index` of `parts` of [0, total), in whole units.
Range share(int64_t total, int64_t unit, int64_t parts, int64_t index) {
  const int64_t units = ceil_div(total, unit);
  return {std::min(units * index / parts * unit, total), std::min(units * (index + 1) / parts * unit, total)};
}

// -- packing -----------------------------------------------------------------------------------------------------------

// B [K, N], rows `stride` apart -> [K/2, N, 2]; an odd last row is paired with zeros.
void pack_row_pairs(const uint16_t* b, int64_t stride, int64_t k, int64_t n, uint16_t* packed) {
  for (int64_t p = 0; p + 1 < k; p += 2) {
    const uint16_t *first = b + p * stride, *second = first + stride;
    uint16_t* out = packed + p * n;
    int64_t j = 0;
#if defined(__SSE2__)
    for (; j + 8 <= n; j += 8) {
      const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + j));
      const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(second + j));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * j), _mm_unpacklo_epi16(x, y));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * j + 8), _mm_unpackhi_epi16(x, y));
    }
#endif
    for (; j < n; ++j) {
      out[2 * j] = first[j];
      out[2 * j + 1] = second[j];
    }
  }
  if (k % 2) {
    uint16_t* out = packed + (k - 1) * n;
    for (int64_t j = 0; j < n; ++j) {
      out[2 * j] = b[(k - 1) * stride + j];
      out[2 * j + 1] = 0;
    }
  }
}

// B^T [N, K] (K even), rows `stride` apart -> [K/2, N, 2]: a transposition of 32-bit pairs.
void pack_transposed_pairs(const uint16_t* bt, int64_t stride, int64_t k, int64_t n, uint16_t* packed) {
  const auto pair = [](const uint16_t* from) {
    uint32_t value;
    std::memcpy(&value, from, 4);
    return value;
  };
  int64_t j = 0;
#if defined(__SSE2__)
  for (; j + 4 <= n; j += 4) {
    int64_t p = 0;
    for (; p + 8 <= k; p += 8) {
      __m128i row[4];
      for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bt + (j + i) * stride + p));
      const __m128i low01 = _mm_unpacklo_epi32(row[0], row[1]), low23 = _mm_unpacklo_epi32(row[2], row[3]);
      const __m128i high01 = _mm_unpackhi_epi32(row[0], row[1]), high23 = _mm_unpackhi_epi32(row[2], row[3]);
      uint16_t* out = packed + p * n + 2 * j;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi64(low01, low23));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 2 * n), _mm_unpackhi_epi64(low01, low23));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 4 * n), _mm_unpacklo_epi64(high01, high23));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 6 * n), _mm_unpackhi_epi64(high01, high23));
    }
    for (; p < k; p += 2) {
      for (int64_t i = 0; i < 4; ++i) {
        const uint32_t value = pair(bt + (j + i) * stride + p);
        std::memcpy(packed + p * n + 2 * (j + i), &value, 4);
      }
    }
  }
#endif
  for (; j < n; ++j) {
    for (int64_t p = 0; p < k; p += 2) {
      const uint32_t value = pair(bt + j * stride + p);
      std::memcpy(packed + p * n + 2 * j, &value, 4);
    }
  }
}

// a [R, C], rows `stride` apart -> at [C, ld], transposed.
void transpose(const uint16_t* a, int64_t stride, int64_t rows, int64_t columns, uint16_t* at, int64_t ld) {
  int64_t r = 0;
#if defined(__SSE2__)
  for (; r + 8 <= rows; r += 8) {
    // Rows are pages apart, where no hardware prefetcher follows.
    for (int64_t ahead = r + 8; ahead < std::min(r + 16, rows); ++ahead) {
      for (int64_t line = 0; line < columns; line += 32) __builtin_prefetch(a + ahead * stride + line);
    }
    int64_t c = 0;
    for (; c + 8 <= columns; c += 8) {
      __m128i x[8], y[8];
      for (int i = 0; i < 8; ++i) {
        x[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a + (r + i) * stride + c));
      }
      for (int i = 0; i < 4; ++i) {
        y[2 * i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
      }
      for (int i = 0; i < 2; ++i) {
        x[4 * i] = _mm_unpacklo_epi32(y[4 * i], y[4 * i + 2]);
        x[4 * i + 1] = _mm_unpackhi_epi32(y[4 * i], y[4 * i + 2]);
        x[4 * i + 2] = _mm_unpacklo_epi32(y[4 * i + 1], y[4 * i + 3]);
        x[4 * i + 3] = _mm_unpackhi_epi32(y[4 * i + 1], y[4 * i + 3]);
      }
      for (int i = 0; i < 4; ++i) {
        uint16_t* out = at + (c + 2 * i) * ld + r;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_unpacklo_epi64(x[i], x[4 + i]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + ld), _mm_unpackhi_epi64(x[i], x[4 + i]));
      }
    }
    for (; c < columns; ++c) {
      for (int64_t i = r; i < r + 8; ++i) at[c * ld + i] = a[i * stride + c];
    }
  }
#endif
  for (; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) at[c * ld + r] = a[r * stride + c];
  }
}

// B [K, N], rows `stride` apart, as the library takes it: K rounded up to even, the last row zero then.
void pack_rows(const Library& library, const uint16_t* b, int64_t stride, int64_t k, int64_t n, uint16_t* packed) {
  if (library.paired) return pack_row_pairs(b, stride, k, n, packed);
  const size_t bytes = static_cast<size_t>(n) * sizeof(uint16_t);
  for (int64_t p = 0; p < k; ++p) std::memcpy(packed + p * n, b + p * stride, bytes);
  if (k % 2) std::memset(packed + k * n, 0, bytes);
}

// The same from B^T [N, K], K even.
void pack_transposed(const Library& library, const uint16_t* bt, int64_t stride, int64_t k, int64_t n,
                     uint16_t* packed) {
  if (library.paired) return pack_transposed_pairs(bt, stride, k, n, packed);
  transpose(bt, stride, n, k, packed, n);
}

uint16_t* scratch_of(void* scratch, int thread) {
  return reinterpret_cast<uint16_t*>(static_cast<char*>(scratch) + kGemmScratchPerThread * static_cast<size_t>(thread));
}

float widen(DType dtype, uint16_t value) {
  if (dtype == DType::kBFloat16) return from_bits(static_cast<int32_t>(static_cast<uint32_t>(value) << 16));
  const int exponent = (value >> 10) & 31, fraction = value & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1.0f + static_cast<float>(fraction) / 1024.0f, exponent - 15)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return value & 0x8000 ? -size : size;
}

void narrow(DType dtype, const float* values, int64_t n, uint16_t* out) {
  if (dtype == DType::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_bfloat16(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float16(values[i]);
  }
}

constexpr int64_t kScratchElements = static_cast<int64_t>(kGemmScratchPerThread / sizeof(uint16_t));
constexpr int64_t kRowBlock = 64;

}  // namespace

const char* gemm_obstacle(DType dtype) { return library_for(dtype).obstacle; }

// Of H that are packed at once: 16 columns of them fill the scratch. Fixed, as a sum is rounded where a block ends.
constexpr int64_t kLogitsDepth = kScratchElements / 16;
static_assert(kLogitsDepth % 2 == 0);

// Threads take ranges of the vocabulary. A group of 64-column panels of weight^T is packed (half the second-level
// cache) and meets all rows, a block of rows at a time.
void gemm_logits(DType dtype, const uint16_t* hidden, const uint16_t* weight, float* out, int64_t rows, int64_t width,
                 int64_t vocab, int64_t out_stride, void* scratch, int threads) {
  const Library& library = library_for(dtype);
  const int64_t even_width = width / 2 * 2, depth = std::min(even_width, kLogitsDepth);
  const int64_t fits = kScratchElements / std::max<int64_t>(depth, 1);  // columns that the scratch holds
  const int64_t panel = std::clamp<int64_t>(fits / 16 * 16, 16, 64);
  const int64_t group = std::max(panel, std::min<int64_t>(256, fits / 2) / panel * panel);
#pragma omp parallel num_threads(threads)
  {
    const Range mine = share(vocab, panel, omp_get_num_threads(), omp_get_thread_num());
    uint16_t* packed = scratch_of(scratch, omp_get_thread_num());
    for (int64_t begin = mine.begin; begin < mine.end; begin += group) {
      const int64_t end = std::min(begin + group, mine.end);
      for (int64_t from = 0; from < even_width; from += depth) {
        const int64_t k = std::min(depth, even_width - from);
        for (int64_t column = begin; column < end; column += panel) {
          const int64_t n = std::min(panel, end - column);
          pack_transposed(library, weight + column * width + from, width, k, n, packed + (column - begin) * depth);
        }
        for (int64_t row = 0; row < rows; row += kRowBlock) {
          for (int64_t column = begin; column < end; column += panel) {
            library.multiply(std::min(kRowBlock, rows - row), std::min(panel, end - column), k, width, out_stride,
                             from > 0, hidden + row * width + from, packed + (column - begin) * depth,
                             out + row * out_stride + column);
          }
        }
      }
      if (even_width == width) continue;
      for (int64_t row = 0; row < rows; ++row) {  // the kernel takes pairs
        const float factor = widen(dtype, hidden[row * width + even_width]);
        for (int64_t column = begin; column < end; ++column) {
          const float product = factor * widen(dtype, weight[column * width + even_width]);
          float& logit = out[row * out_stride + column];
          logit = even_width > 0 ? logit + product : product;
        }
      }
    }
    library.release();
  }
}

// Fixed, as a sum is rounded where a block of the vocabulary ends: the bits must not depend on the number of threads.
constexpr int64_t kPackedDepth = 512, kPackedColumns = 1024;
static_assert(kPackedDepth * kPackedColumns <= kScratchElements);

// Threads take a grid of blocks of rows and ranges of H; each walks the vocabulary, packing its part of the weight.
void gemm_grad_hidden(DType dtype, const uint16_t* dx, const uint16_t* weight, float* out, int64_t rows, int64_t width,
                      int64_t vocab, int64_t dx_stride, void* scratch, int threads) {
  const Library& library = library_for(dtype);
  const int64_t across = std::max<int64_t>(1, std::min<int64_t>(threads, width / 128));
  const int64_t down = std::max<int64_t>(1, threads / across);
  const int64_t even_vocab = vocab / 2 * 2;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int64_t task = 0; task < across * down; ++task) {
    const Range columns = share(width, 16, across, task % across), lines = share(rows, 1, down, task / across);
    uint16_t* packed = scratch_of(scratch, omp_get_thread_num());
    for (int64_t left = columns.begin; left < columns.end; left += kPackedColumns) {
      const int64_t n = std::min(kPackedColumns, columns.end - left);
      for (int64_t begin = 0; begin < even_vocab; begin += kPackedDepth) {
        const int64_t k = std::min(kPackedDepth, even_vocab - begin);
        pack_rows(library, weight + begin * width + left, width, k, n, packed);
        for (int64_t row = lines.begin; row < lines.end; row += kRowBlock) {
          library.multiply(std::min(kRowBlock, lines.end - row), n, k, dx_stride, width, true,
                           dx + row * dx_stride + begin, packed, out + row * width + left);
        }
      }
      if (vocab % 2) {  // the kernel takes pairs
        const uint16_t* last = weight + (vocab - 1) * width + left;
        for (int64_t row = lines.begin; row < lines.end; ++row) {
          const float factor = widen(dtype, dx[row * dx_stride + vocab - 1]);
          for (int64_t j = 0; j < n; ++j) out[row * width + left + j] += factor * widen(dtype, last[j]);
        }
      }
    }
    library.release();
  }
}

constexpr int64_t kDepth = 1024;      // rows of dx that are transposed at once
constexpr int64_t kTransposedStride = kDepth + 32;  // an odd number of cache lines: no power of two, whose lines collide
constexpr int64_t kVocabBlock = 256;  // columns of dx that are
constexpr int64_t kWidthBlock = 256;  // columns of the result in one product

size_t gemm_packed_bytes(int64_t rows, int64_t width) {
  return static_cast<size_t>((rows + 1) / 2 * 2 * width) * sizeof(uint16_t);
}

// hidden is packed once, by all threads, in panels of kWidthBlock columns; threads take ranges of the vocabulary and
// transpose blocks of dx. A narrow result is gathered in a float32 tile.
void gemm_grad_weight(DType dtype, const uint16_t* dx, const uint16_t* hidden, const float* base, void* out,
                      bool narrow_out, int64_t rows, int64_t width, int64_t vocab, int64_t dx_stride, void* packed,
                      void* scratch, int threads) {
  const Library& library = library_for(dtype);
  uint16_t* b = static_cast<uint16_t*>(packed);
  const int64_t even_rows = (rows + 1) / 2 * 2;
  const int64_t line_bytes = kTransposedStride * 2 + (narrow_out ? width * 4 : 0);  // scratch for one row of the result
  const int64_t fits = static_cast<int64_t>(kGemmScratchPerThread) / line_bytes;
  if (fits < 1) throw std::invalid_argument("width: expected at most 261616; got " + std::to_string(width));
  const int64_t block = fits < 16 ? std::max<int64_t>(1, fits) : std::min(kVocabBlock, fits / 16 * 16);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)  // all of it before any thread goes on
    for (int64_t row = 0; row < rows; row += 64) {
      for (int64_t left = 0; left < width; left += kWidthBlock) {
        const int64_t k = std::min<int64_t>(64, rows - row), n = std::min(kWidthBlock, width - left);
        pack_rows(library, hidden + row * width + left, width, k, n, b + left * even_rows + row * n);
      }
    }
    const Range mine = share(vocab, block, omp_get_num_threads(), omp_get_thread_num());
    uint16_t* at = scratch_of(scratch, omp_get_thread_num());
    float* tile = reinterpret_cast<float*>(at + block * kTransposedStride);
    for (int64_t begin = mine.begin; begin < mine.end; begin += block) {
      const int64_t m = std::min(block, mine.end - begin);
      float* c = narrow_out ? tile : static_cast<float*>(out) + begin * width;
      if (rows == 0 && !base) std::memset(c, 0, static_cast<size_t>(m * width) * sizeof(float));
      if (base && narrow_out) std::memcpy(tile, base + begin * width, static_cast<size_t>(m * width) * sizeof(float));
      for (int64_t first = 0; first < rows; first += kDepth) {
        const int64_t k = std::min(kDepth, rows - first), even = (k + 1) / 2 * 2;
        transpose(dx + first * dx_stride + begin, dx_stride, k, m, at, kTransposedStride);
        for (int64_t line = 0; line < m && k < even; ++line) at[line * kTransposedStride + k] = 0;
        for (int64_t left = 0; left < width; left += kWidthBlock) {
          const int64_t n = std::min(kWidthBlock, width - left);
          library.multiply(m, n, even, kTransposedStride, width, base || first > 0, at, b + left * even_rows + first * n,
                           c + left);
        }
      }
      if (narrow_out) narrow(dtype, tile, m * width, static_cast<uint16_t*>(out) + begin * width);
    }
    library.release();
  }
}

}  // namespace grpo_fast

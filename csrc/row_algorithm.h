// How threads share a row: the kernels' bodies, written against a `Lane` (one thread: lane_cuda.h on a GPU, a fiber in
// tests/emulator.h), so that splits, order of combination, tails and barriers run without a GPU as well.
//
// A row's V columns are V / 4 vectors of 16 bytes and a tail of V % 4. Vector i of a block's part is thread i %
// threads's; threads take kUnroll vectors at a time, a tile. Partial results combine lane by lane (butterfly), warp by
// warp and, in a cluster, block by block; all of it depends on V and the device alone, not on rows, strides or
// alignment.
//
//   stream_row    one block a row. Logits are read once for statistics or a gradient; for both twice, the second time
//                 backwards, so that what was read last, and is still in the L2 cache, is read first.
//   cluster_rows  (row_cluster.h) a cluster of blocks a row, which lies in their shared memory.
//
// dx over the logits (`overlaps`), narrower than they are, starts 2 (V / 8 * 8) bytes into its row: the tile of columns
// [a, b) goes to byte 2a of it and above, logits below column a end at byte 4a, and a tile begins at a multiple of 8.
// So a descending sweep that has read a tile may write it. A barrier before each write keeps slower warps ahead of it.
#pragma once

#include <stdexcept>
#include <string>

#include "row_cuda.h"
#include "row_math.h"

namespace grpo_fast {

constexpr int kVector = 4;  // columns
constexpr int kUnroll = 4;  // vectors of a thread that are in flight together
constexpr int kWarp = 32;
constexpr int kStreamThreads = 1024;  // of a block of stream_row: few rows in flight, so that L2 still holds them

inline int rounded_up(int64_t value, int64_t unit) { return int((value + unit - 1) / unit * unit); }

// Threads for `vectors` vectors of a block: a tile each at most.
inline int threads_for(int64_t vectors, int most) {
  const int wanted = rounded_up((vectors + kUnroll - 1) / kUnroll, kWarp);
  return wanted < 2 * kWarp ? 2 * kWarp : (wanted > most ? most : wanted);
}

enum class Pass : int32_t { kStatistics, kGradient, kObjective };

// What a launch is about; a pass reads and writes what it needs.
struct RowTask {
  Rows rows;
  float *logprobs, *entropy, *lse;          // [R] results; lse of the statistics pass only
  uint8_t* live;                            // [R] result of the objective pass: 1 where dx is not all zero
  const float *given_lse, *given_entropy;   // [R] gradient pass
  const float *g, *e;                       // [R] gradient pass; e may be null
  int64_t vocab_start;                      // gradient pass: vocabulary index of column 0
  Objective objective;                      // objective pass, as are:
  TokenArrays tokens;
  Scalar entropy_gradient, grad_scale;
  void* dx;           // [R, V]
  int64_t dx_stride;  // elements
  bool wide_reads;    // rows and bias begin on 16 bytes
  bool wide_writes;   // rows of dx begin on 4 elements
  bool overlaps;      // dx is narrow and lies over the logits
};

inline bool on_bytes(const void* pointer, int64_t stride_bytes, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % uintptr_t(bytes) == 0 && stride_bytes % bytes == 0;
}

// A task about `rows`, nothing else set. Throws std::invalid_argument.
inline RowTask row_task(const Rows& rows) {
  if (rows.num_columns < 1 || rows.num_columns > INT32_MAX) {
    throw std::invalid_argument("num_columns: expected 1 to 2147483647; got " + std::to_string(rows.num_columns));
  }
  if (rows.num_rows < 0 || rows.row_stride < rows.num_columns) {
    throw std::invalid_argument("rows: expected a number >= 0, at least num_columns apart; got " +
                                std::to_string(rows.num_rows) + ", " + std::to_string(rows.row_stride) + " apart");
  }
  RowTask task{};
  task.rows = rows;
  task.wide_reads = on_bytes(rows.logits, rows.row_stride * 4, 16) && on_bytes(rows.bias, 0, 16);
  return task;
}

// dx must lie apart from the logits or where the kernels can write it over them. Throws std::invalid_argument.
inline void set_output(RowTask& task, const DxOut& out) {
  const Rows& rows = task.rows;
  const int64_t size = out.dtype == DType::kFloat32 ? 4 : 2, stride = out.row_stride * size;
  if (out.row_stride < rows.num_columns || out.dtype == DType::kFloat64) {
    throw std::invalid_argument("dx: expected rows of 2 or 4 byte numbers, at least num_columns apart; got " +
                                std::to_string(out.row_stride) + " apart");
  }
  const auto *x = reinterpret_cast<const char*>(rows.logits), *dx = static_cast<const char*>(out.dx);
  const int64_t last = rows.num_rows - 1, end = rows.num_columns;
  const char *x_end = x + (last * rows.row_stride + end) * 4, *dx_end = dx + last * stride + end * size;
  const bool meets = rows.num_rows > 0 && dx < x_end && x < dx_end;
  const int64_t offset = size == 4 ? 0 : narrow_offset(rows.num_columns);
  if (meets && (dx != x + offset || stride != rows.row_stride * 4)) {
    throw std::invalid_argument("dx: expected memory apart from the logits, or rows " + std::to_string(offset) +
                                " bytes into theirs; got an overlap of another kind");
  }
  task.dx = out.dx, task.dx_stride = out.row_stride;
  task.wide_writes = on_bytes(out.dx, stride, 4 * size);
  task.overlaps = meets && size == 2;
}

inline RowTask statistics_task(const Rows& rows, float* logprobs, float* entropy, float* lse) {
  RowTask task = row_task(rows);
  task.logprobs = logprobs, task.entropy = entropy, task.lse = lse;
  return task;
}

inline RowTask gradient_task(const Rows& rows, const float* lse, const float* entropy, const float* g, const float* e,
                             int64_t vocab_start, const DxOut& out) {
  RowTask task = row_task(rows);
  set_output(task, out);
  task.given_lse = lse, task.given_entropy = entropy, task.g = g, task.e = e, task.vocab_start = vocab_start;
  return task;
}

inline RowTask objective_task(const Rows& rows, const Objective& objective, const TokenArrays& tokens,
                              Scalar entropy_gradient, Scalar grad_scale, const DxOut& out, float* logprobs,
                              float* entropy, uint8_t* live) {
  RowTask task = row_task(rows);
  set_output(task, out);
  task.logprobs = logprobs, task.entropy = entropy, task.live = live;
  task.objective = objective, task.tokens = tokens;
  task.entropy_gradient = entropy_gradient, task.grad_scale = grad_scale;
  return task;
}

struct alignas(16) Quad {
  float v[kVector];
};

// -- pieces of both kernels -------------------------------------------------------------------------------------------

// Of one row, read before anything is written: its addresses and all that is not a logit.
template <Pass kPass, bool kTransform>
struct RowFacts {
  const float* x;
  RowMap map;
  int64_t target;  // column; outside [0, V): none here
  float target_u;
  Token<float> token;
  float weight;

  template <class Lane>
  GRPO_FAST_INLINE RowFacts(const Lane& lane, const RowTask& task, int64_t row)
      : x(task.rows.logits + row * task.rows.row_stride), map(row_map(task.rows, row)), token{}, weight(0.0f) {
    target = task.rows.targets[row] - (kPass == Pass::kGradient ? task.vocab_start : 0);
    const bool here = target >= 0 && target < task.rows.num_columns;
    // In the gradient pass the target's owner reads it when it is due: others might find dx there.
    target_u = kPass == Pass::kGradient || !here ? NAN : at(lane, target);
    if (kPass == Pass::kObjective) {
      token = token_of(task.tokens, row);
      weight = task.tokens.weights[row];
    }
  }

  template <class Lane>
  GRPO_FAST_INLINE float at(const Lane& lane, int64_t column) const {
    return u_of<kTransform>(map, lane.read(x + column), kTransform && map.bias != nullptr ? map.bias[column] : 0.0f);
  }

  // u of a vector: raw products and the column that they begin at.
  template <class Lane>
  GRPO_FAST_INLINE Quad u_quad(const Lane& lane, const RowTask& task, Quad raw, int64_t column) const {
    if (!kTransform) return raw;
    Quad bias{{0.0f, 0.0f, 0.0f, 0.0f}};
    if (map.bias != nullptr) bias = lane.read_quad(map.bias + column, task.wide_reads);
  GRPO_FAST_UNROLL
    for (int i = 0; i < kVector; ++i) raw.v[i] = u_of<kTransform>(map, raw.v[i], bias.v[i]);
    return raw;
  }
};

// The part of a row that a block has.
struct Part {
  int begin, vectors;  // first vector, and how many
  int tail;            // columns after the row's last vector, if they are this block's
};

// Statistics of tile `tile` of a part; `read(i)` gives u of its vector i.
template <class Lane, class Read>
GRPO_FAST_INLINE void absorb_tile(const Lane& lane, Partial& p, int tile, const Part& part, float factor, Read read) {
  const int first = tile * kUnroll * lane.threads() + lane.thread();
  if ((tile + 1) * kUnroll * lane.threads() <= part.vectors) {
    float u[kUnroll * kVector];
  GRPO_FAST_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      const Quad quad = read(first + k * lane.threads());
  GRPO_FAST_UNROLL
      for (int i = 0; i < kVector; ++i) u[k * kVector + i] = quad.v[i];
    }
    absorb(p, u, factor);
  } else {
    for (int i = first; i < part.vectors; i += lane.threads()) absorb(p, read(i).v, factor);
  }
}

// Of groups of `width` lanes, a power of two. First their top, then sums measured from it: every lane has the same
// bits, as neither a maximum nor an addition depends on the order of its two operands.
template <class Lane>
GRPO_FAST_INLINE Partial warp_combined(Lane& lane, Partial p, int width) {
  float top = p.top;
  for (int mask = 1; mask < width; mask *= 2) top = std::fmax(top, lane.shuffle_xor(top, mask));
  p = measured_from(top, p);
  for (int mask = 1; mask < width; mask *= 2) {
    const Partial other = lane.shuffle_sums(p, mask);
    p.sum += other.sum, p.moment += other.moment;
  }
  return p;
}

// Of the first `count` (up to a warp) slots of shared memory.
template <class Lane>
GRPO_FAST_INLINE Partial slots_combined(Lane& lane, const Partial* slots, int count) {
  int width = 1;
  while (width < count) width *= 2;
  const int index = lane.thread() & (width - 1);
  return warp_combined(lane, index < count ? lane.get(slots + index) : kNothing, width);
}

// The block's, in every thread. `slots` [kWarp] is shared memory that nobody has read since the last barrier.
template <class Lane>
GRPO_FAST_INLINE Partial block_combined(Lane& lane, Partial p, Partial* slots) {
  p = warp_combined(lane, p, kWarp);
  if (lane.thread() % kWarp == 0) slots[lane.thread() / kWarp] = p;
  lane.sync_block();
  return slots_combined(lane, slots, lane.threads() / kWarp);
}

template <Pass kPass, bool kTransform>
GRPO_FAST_INLINE RowStatistics recorded(const RowTask& task, const RowFacts<kPass, kTransform>& facts,
                                        const Partial& p, int64_t row, bool writes) {
  const RowStatistics found = row_statistics_of(p, facts.target_u, facts.map.factor);
  if (writes) {
    task.logprobs[row] = found.logprob;
    task.entropy[row] = found.entropy;
    if (kPass == Pass::kStatistics) task.lse[row] = found.lse;
  }
  return found;
}

template <Pass kPass, bool kTransform>
GRPO_FAST_INLINE Coefficients objective_coefficients(const RowTask& task, RowFacts<kPass, kTransform>& facts,
                                                     const RowStatistics& found, int64_t row, bool writes) {
  facts.token.logprob = found.logprob;
  const float g = token_term(task.objective, facts.token).slope * facts.weight;
  const float e = task.entropy_gradient.value(), scale = task.grad_scale.value();
  if (writes) task.live[row] = g != 0.0f || e != 0.0f;
  return coefficients_of(found.lse2, found.entropy, g * scale, e * scale, facts.map.chain);
}

// Writes dx of a row. A thread's own writes stay in order, so the target's vector goes first and its column after it.
template <DType kOut, Pass kPass, bool kTransform>
struct RowWriter {
  const RowTask& task;
  const RowFacts<kPass, kTransform>& facts;
  const Coefficients& coefficients;
  int64_t start;  // element of dx at column 0

  template <class Lane>
  GRPO_FAST_INLINE void quad(const Lane& lane, Quad u, int64_t column) const {
  GRPO_FAST_UNROLL
    for (int i = 0; i < kVector; ++i) u.v[i] = derivative<kTransform>(facts.map, coefficients, u.v[i]);
    lane.template write_quad<kOut>(task.dx, start + column, u, task.wide_writes);
  }

  template <class Lane>
  GRPO_FAST_INLINE void column(const Lane& lane, float u, int64_t column) const {
    const float dx = column == facts.target ? target_derivative<kTransform>(facts.map, coefficients, u)
                                            : derivative<kTransform>(facts.map, coefficients, u);
    lane.template write<kOut>(task.dx, start + column, dx);
  }

  // Zeros in a part.
  template <class Lane>
  GRPO_FAST_INLINE void clear(const Lane& lane, const Part& part, int64_t tail_column) const {
    for (int i = lane.thread(); i < part.vectors; i += lane.threads()) {
      lane.template write_quad<kOut>(task.dx, start + int64_t(part.begin + i) * kVector, Quad{{0, 0, 0, 0}},
                                     task.wide_writes);
    }
    if (lane.thread() < part.tail) lane.template write<kOut>(task.dx, start + tail_column, 0.0f);
  }
};

// Whether this thread writes the vector that the row's target is in.
template <class Lane>
GRPO_FAST_INLINE bool owns(const Lane& lane, const Part& part, int64_t target) {
  const int64_t vector = target / kVector - part.begin;  // of a target below 0: -0 or less, not owned
  return target >= 0 && vector >= 0 && vector < part.vectors && vector % lane.threads() == lane.thread();
}

// -- one block a row --------------------------------------------------------------------------------------------------

// The gradient of a row, its tiles last to first; the next tile's loads are under way while this one is written.
template <DType kOut, Pass kPass, bool kTransform, class Lane>
GRPO_FAST_INLINE void stream_gradient(Lane& lane, const RowTask& task, const RowFacts<kPass, kTransform>& facts,
                                      const Coefficients& coefficients, const Part& part, float tail_u, int64_t row) {
  const RowWriter<kOut, kPass, kTransform> writer{task, facts, coefficients, row * task.dx_stride};
  const int step = lane.threads(), tile_vectors = kUnroll * step;
  const int64_t tail_column = int64_t(part.vectors) * kVector + lane.thread();
  if (coefficients.zero) return writer.clear(lane, part, tail_column);
  const bool owner = owns(lane, part, facts.target);
  float target_u = facts.target_u;
  if (kPass == Pass::kGradient && owner) target_u = facts.at(lane, facts.target);
  const auto read = [&](int i) { return lane.read_quad(facts.x + int64_t(i) * kVector, task.wide_reads); };
  const int tiles = (part.vectors + tile_vectors - 1) / tile_vectors;
  Quad now[kUnroll], next[kUnroll];
  GRPO_FAST_UNROLL
  for (int k = 0; k < kUnroll; ++k) {
    const int i = (tiles - 1) * tile_vectors + k * step + lane.thread();
    now[k] = i < part.vectors && tiles > 0 ? read(i) : Quad{{0, 0, 0, 0}};
  }
  for (int tile = tiles - 1; tile >= 0; --tile) {
    const int first = tile * tile_vectors + lane.thread();
  GRPO_FAST_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      next[k] = tile > 0 ? read(first - tile_vectors + k * step) : Quad{{0, 0, 0, 0}};
    }
    if (task.overlaps) lane.sync_block();
  GRPO_FAST_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      const int i = first + k * step;
      const int64_t column = int64_t(i) * kVector;
      if (i < part.vectors) writer.quad(lane, facts.u_quad(lane, task, now[k], column), column);
    }
  GRPO_FAST_UNROLL
    for (int k = 0; k < kUnroll; ++k) now[k] = next[k];
  }
  if (task.overlaps) lane.sync_block();  // a row without vectors has had none: the tail is read, then written
  if (lane.thread() < part.tail) writer.column(lane, tail_u, tail_column);
  if (owner) writer.column(lane, target_u, facts.target);
}

// `slots` [kWarp]: shared memory.
template <Pass kPass, bool kTransform, DType kOut, class Lane>
GRPO_FAST_INLINE void stream_row(Lane& lane, const RowTask& task, Partial* slots) {
  const int64_t row = lane.block(), columns = task.rows.num_columns;
  RowFacts<kPass, kTransform> facts(lane, task, row);
  const Part part{0, int(columns / kVector), int(columns % kVector)};
  const float tail_u = lane.thread() < part.tail ? facts.at(lane, columns - part.tail + lane.thread()) : 0.0f;
  if (kPass == Pass::kGradient) {
    const float e = task.e != nullptr ? task.e[row] : 0.0f;
    const Coefficients coefficients =
        coefficients_of(task.given_lse[row] * kLog2E, task.given_entropy[row], task.g[row], e, facts.map.chain);
    return stream_gradient<kOut>(lane, task, facts, coefficients, part, tail_u, row);
  }
  Partial p = kNothing;
  const auto read = [&](int i) {
    const int64_t column = int64_t(i) * kVector;
    return facts.u_quad(lane, task, lane.read_quad(facts.x + column, task.wide_reads), column);
  };
  for (int tile = 0; tile * kUnroll * lane.threads() < part.vectors; ++tile) {
    absorb_tile(lane, p, tile, part, facts.map.factor, read);
  }
  if (lane.thread() < part.tail) absorb(p, {tail_u}, facts.map.factor);
  p = block_combined(lane, p, slots);  // its barrier also stands between the reads above and the writes below
  const bool writes = lane.thread() == 0;
  const RowStatistics found = recorded(task, facts, p, row, writes);
  if (kPass == Pass::kStatistics) return;
  const Coefficients coefficients = objective_coefficients(task, facts, found, row, writes);
  stream_gradient<kOut>(lane, task, facts, coefficients, part, tail_u, row);
}

}  // namespace grpo_fast

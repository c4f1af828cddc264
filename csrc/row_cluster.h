// The row kernel for GPUs with thread-block clusters: a row lies in the shared memory of 1 to 8 blocks, is read from
// device memory once, and dx is written once.
//
//   fetch        bulk copies of a block's part into a stage of shared memory, chunk by chunk (a chunk is a tile)
//   sweep 1      statistics of the part; a thread reads what its own index says, in shared memory as in device memory
//   exchange     each block sends its result to all of its cluster, one cluster barrier, all combine in block order
//   sweep 2      dx from shared memory to device memory
//
// While a row is computed the next one arrives: in a second stage of shared memory where a multiprocessor has room for
// that in two blocks, else chunk by chunk, wherever this row has been read for the last time. Of two blocks on a
// multiprocessor one computes while the other waits for copies or its cluster. In 227 KiB: V up to 114000 two blocks,
// two stages; up to 229000 two blocks, one stage; up to 462000 one block, one stage. Which of these is fastest is not
// measured.
//
// Why the barriers suffice:
//   - A stage, or a chunk of the only one, is refilled after a block barrier that follows its last read. Each chunk has
//     a barrier of its own ("full"), which completes once a use, so its parity is that of the use.
//   - Exchange slots alternate between rows. A block that writes slots of row n + 2 has passed the cluster barrier of
//     row n + 1, at which every block arrived after it had read the slots of row n.
//   - Nothing is sent after a row's cluster barrier, and every block waits at it: none leaves while others write to it.
//     The one barrier before the first row lets no block write to one that has not started.
//   - dx over the logits: all reads of a row (copies waited for, tail, target) come before its cluster barrier, all
//     writes after it. The next row's copies are of other memory.
#pragma once

#include "row_algorithm.h"

namespace grpo_fast {

constexpr int kMaxRanks = 8;  // blocks a cluster, at most: the portable limit
constexpr int kClusterThreads = 512;

// How a cluster holds a row. From V and the device's shared memory alone.
struct ClusterSplit {
  int ranks = 0;  // blocks a cluster: 1, 2, 4, 8; 0: a row does not fit
  int threads = 0;
  int stages = 0;
  int part_vectors = 0;  // of each block but the last, which may have fewer; a multiple of a warp
  int chunks = 0;        // of a full part
  int shared_bytes = 0;

  GRPO_FAST_INLINE int slots_at() const { return stages * part_vectors * 16; }           // [2][kMaxRanks], then [kWarp]
  GRPO_FAST_INLINE int barriers_at() const { return slots_at() + (2 * kMaxRanks + kWarp) * 16; }  // [stages][chunks]
};

inline ClusterSplit split_between(int64_t num_columns, int ranks, int stages) {
  ClusterSplit split;
  split.ranks = ranks;
  split.stages = stages;
  split.part_vectors = rounded_up((num_columns / kVector + ranks - 1) / ranks, kWarp);
  split.threads = threads_for(split.part_vectors, kClusterThreads);
  split.chunks = rounded_up(split.part_vectors, kUnroll * split.threads) / (kUnroll * split.threads);
  split.shared_bytes = split.barriers_at() + stages * split.chunks * 8;
  return split;
}

// The fewest blocks that hold two stages twice a multiprocessor; else one stage twice; else one stage once.
// shared_limit: bytes of shared memory that a block may have; a multiprocessor has 1024 more, and takes as many a
// block.
inline ClusterSplit split_row(int64_t num_columns, int shared_limit) {
  const int half = (shared_limit + 1024) / 2 - 1024;
  const struct {
    int stages, limit;
  } choices[] = {{2, half}, {1, half}, {1, shared_limit}};
  for (const auto& choice : choices) {
    for (int ranks = 1; ranks <= kMaxRanks; ranks *= 2) {
      if (num_columns / ranks * 4 > choice.limit) continue;  // nor would the sizes below be in range
      const ClusterSplit split = split_between(num_columns, ranks, choice.stages);
      if (split.shared_bytes <= choice.limit) return split;
    }
  }
  return {};
}

template <class Lane>
GRPO_FAST_INLINE Part part_of(const Lane& lane, const ClusterSplit& split, int64_t num_columns) {
  const int vectors = int(num_columns / kVector), begin = lane.rank() * split.part_vectors;
  const int left = vectors - begin;
  const bool last = lane.rank() == split.ranks - 1;
  return {begin, left < 0 ? 0 : (left < split.part_vectors ? left : split.part_vectors),
          last ? int(num_columns % kVector) : 0};
}

// Starts bringing a chunk of a row's part into `stage`: a bulk copy by one thread, or, for rows that do not begin on 16
// bytes, plain ones by all (a thread copies what it will read, so nobody waits).
template <class Lane>
GRPO_FAST_INLINE void fetch(Lane& lane, const RowTask& task, const ClusterSplit& split, const Part& part, int64_t row,
                            int stage, int chunk) {
  const float* source = task.rows.logits + row * task.rows.row_stride + int64_t(part.begin) * kVector;
  Quad* target = lane.template shared<Quad>(0) + stage * split.part_vectors;
  const int chunk_vectors = kUnroll * lane.threads(), first = chunk * chunk_vectors, left = part.vectors - first;
  const int count = left < chunk_vectors ? left : chunk_vectors;
  if (!task.wide_reads) {
    for (int i = first + lane.thread(); i < first + count; i += lane.threads()) {
      lane.put(target + i, lane.read_quad(source + int64_t(i) * kVector, false));
    }
  } else if (lane.thread() == 0) {
    uint64_t* full = lane.template shared<uint64_t>(split.barriers_at()) + stage * split.chunks + chunk;
    lane.expect(full, 16 * count);
    lane.copy(target + first, source + int64_t(first) * kVector, 16 * count, full);
  }
}

// All of a part.
template <class Lane>
GRPO_FAST_INLINE void fetch_part(Lane& lane, const RowTask& task, const ClusterSplit& split, const Part& part,
                                 int64_t row, int stage) {
  for (int chunk = 0; chunk * kUnroll * lane.threads() < part.vectors; ++chunk) {
    fetch(lane, task, split, part, row, stage, chunk);
  }
}

// The cluster's statistics, in every thread of it. `turn` alternates from row to row.
template <class Lane>
GRPO_FAST_INLINE Partial cluster_combined(Lane& lane, const ClusterSplit& split, Partial p, int turn) {
  Partial* slots = lane.template shared<Partial>(split.slots_at());
  Partial* mine = slots + turn * kMaxRanks;
  p = block_combined(lane, p, slots + 2 * kMaxRanks);
  if (lane.thread() < split.ranks) lane.send(lane.thread(), mine + lane.rank(), p);
  lane.sync_cluster();
  return slots_combined(lane, mine, split.ranks);
}

// `consumed(chunk)` is called by all threads when a chunk of the row has been read for the last time.
template <Pass kPass, bool kTransform, DType kOut, class Lane, class Consumed>
GRPO_FAST_INLINE void cluster_row(Lane& lane, const RowTask& task, const ClusterSplit& split, const Part& part,
                                  int64_t row, int stage, int parity, int turn, Consumed consumed) {
  RowFacts<kPass, kTransform> facts(lane, task, row);
  const int64_t tail_column = task.rows.num_columns - part.tail + lane.thread();
  const float tail_u = lane.thread() < part.tail ? facts.at(lane, tail_column) : 0.0f;
  const Quad* held = lane.template shared<Quad>(0) + stage * split.part_vectors;
  uint64_t* full = lane.template shared<uint64_t>(split.barriers_at()) + stage * split.chunks;
  const auto column_of = [&](int i) { return int64_t(part.begin + i) * kVector; };
  const auto read = [&](int i) { return facts.u_quad(lane, task, lane.get(held + i), column_of(i)); };

  Partial p = kNothing;
  const int chunk_vectors = kUnroll * lane.threads();
  for (int chunk = 0; chunk * chunk_vectors < part.vectors; ++chunk) {
    if (task.wide_reads) lane.wait(full + chunk, parity);
    absorb_tile(lane, p, chunk, part, facts.map.factor, read);
    if (kPass == Pass::kStatistics) consumed(chunk);
  }
  if (lane.thread() < part.tail) absorb(p, {tail_u}, facts.map.factor);
  p = cluster_combined(lane, split, p, turn);
  const bool writes = lane.thread() == 0 && lane.rank() == 0;
  const RowStatistics found = recorded(task, facts, p, row, writes);
  if (kPass == Pass::kStatistics) return;

  const Coefficients coefficients = objective_coefficients(task, facts, found, row, writes);
  const RowWriter<kOut, kPass, kTransform> writer{task, facts, coefficients, row * task.dx_stride};
  if (coefficients.zero) writer.clear(lane, part, tail_column);
  for (int chunk = 0; chunk * chunk_vectors < part.vectors; ++chunk) {
    if (!coefficients.zero) {
      GRPO_FAST_UNROLL
      for (int k = 0; k < kUnroll; ++k) {
        const int i = chunk * chunk_vectors + k * lane.threads() + lane.thread();
        if (i < part.vectors) writer.quad(lane, read(i), column_of(i));
      }
    }
    consumed(chunk);
  }
  if (coefficients.zero) return;
  if (lane.thread() < part.tail) writer.column(lane, tail_u, tail_column);
  if (owns(lane, part, facts.target)) writer.column(lane, facts.target_u, facts.target);
}

template <Pass kPass, bool kTransform, DType kOut, class Lane>
GRPO_FAST_INLINE void cluster_rows(Lane& lane, const RowTask& task, const ClusterSplit& split) {
  const Part part = part_of(lane, split, task.rows.num_columns);
  if (lane.thread() == 0) {
    uint64_t* full = lane.template shared<uint64_t>(split.barriers_at());
    for (int i = 0; i < split.stages * split.chunks; ++i) lane.init(full + i);
  }
  lane.publish_barriers();
  lane.sync_cluster();
  int64_t row = lane.cluster();
  if (row < task.rows.num_rows) fetch_part(lane, task, split, part, row, 0);
  for (int use = 0; row < task.rows.num_rows; ++use) {
    const int64_t following = row + lane.clusters();
    const bool more = following < task.rows.num_rows, refills = more && split.stages == 1;
    const int stage = use % split.stages, parity = use / split.stages % 2;
    if (more && !refills) fetch_part(lane, task, split, part, following, 1 - stage);
    const auto consumed = [&](int chunk) {
      if (!refills) return;
      lane.sync_block();
      fetch(lane, task, split, part, following, 0, chunk);
    };
    cluster_row<kPass, kTransform, kOut>(lane, task, split, part, row, stage, parity, use % 2, consumed);
    if (more && !refills) lane.sync_block();  // the stage has been read: the row after the next may come
    row = following;
  }
}

}  // namespace grpo_fast

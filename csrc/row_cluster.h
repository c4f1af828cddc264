// The row kernel for GPUs with thread-block clusters: a row lies in the shared memory of 1 to 8 blocks, is read from device
// memory once, and dx is written once.
//
//   fetch        bulk copies of a block's part into a stage of shared memory, chunk by chunk (a chunk is a tile)
//   sweep 1      statistics of the part; a thread reads what its own index says, in shared memory as in device memory
//   exchange     each block sends its result to all of its cluster, one cluster barrier, all combine them in block order
//   sweep 2      dx from shared memory to device memory
//
// Two stages where they fit: the next row arrives while this one is computed. With one stage (V above about 230000 in
// 227 KiB a block) it is fetched when this row is done, and sweep 1 starts at its first chunk.
//
// Why the barriers suffice:
//   - A stage is refilled after a block barrier that follows its last read. Each chunk has a barrier of its own ("full"),
//     which completes once a use, so its parity is that of the use.
//   - Exchange slots alternate between rows. A block that writes slots of row n + 2 has passed the cluster barrier of row
//     n + 1, at which every block arrived after it had read the slots of row n.
//   - Nothing is sent after a row's cluster barrier, and every block waits at it: none leaves while others write to it.
//     The one barrier before the first row lets no block write to one that has not started.
//   - dx over the logits: all reads of a row (copies waited for, tail, target) come before its cluster barrier, all writes
//     after it. The next row's copies are of other memory.
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

// The fewest blocks that hold two stages; else 8 with one.
inline ClusterSplit split_row(int64_t num_columns, int shared_limit) {
  for (const int stages : {2, 1}) {
    for (int ranks = stages == 2 ? 1 : kMaxRanks; ranks <= kMaxRanks; ranks *= 2) {
      ClusterSplit split;
      const int64_t vectors = num_columns / kVector;
      if (vectors / ranks * 16 > shared_limit) continue;
      split.ranks = ranks;
      split.stages = stages;
      split.part_vectors = rounded_up((vectors + ranks - 1) / ranks, kWarp);
      split.threads = threads_for(split.part_vectors, kClusterThreads);
      split.chunks = rounded_up(split.part_vectors, kUnroll * split.threads) / (kUnroll * split.threads);
      split.shared_bytes = split.barriers_at() + stages * split.chunks * 8;
      if (split.shared_bytes <= shared_limit) return split;
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

// Starts bringing a row's part into `stage`: bulk copies by one thread, or, for rows that do not begin on 16 bytes, plain
// ones by all (a thread copies what it will read, so nobody waits).
template <class Lane>
GRPO_FAST_INLINE void fetch(Lane& lane, const RowTask& task, const ClusterSplit& split, const Part& part, int64_t row,
                            int stage) {
  const float* source = task.rows.logits + row * task.rows.row_stride + int64_t(part.begin) * kVector;
  Quad* target = lane.template shared<Quad>(0) + stage * split.part_vectors;
  if (!task.wide_reads) {
    for (int i = lane.thread(); i < part.vectors; i += lane.threads()) {
      lane.put(target + i, lane.read_quad(source + int64_t(i) * kVector, false));
    }
    return;
  }
  if (lane.thread() != 0) return;
  const int chunk_vectors = kUnroll * lane.threads();
  uint64_t* full = lane.template shared<uint64_t>(split.barriers_at()) + stage * split.chunks;
  for (int chunk = 0; chunk * chunk_vectors < part.vectors; ++chunk) {
    const int first = chunk * chunk_vectors, left = part.vectors - first;
    const int bytes = 16 * (left < chunk_vectors ? left : chunk_vectors);
    lane.expect(full + chunk, bytes);
    lane.copy(target + first, source + int64_t(first) * kVector, bytes, full + chunk);
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
  const int index = lane.thread() % kWarp;
  return warp_combined(lane, index < split.ranks ? lane.get(mine + index) : Partial{});
}

template <Pass kPass, bool kBent, DType kOut, class Lane>
GRPO_FAST_INLINE void cluster_row(Lane& lane, const RowTask& task, const ClusterSplit& split, const Part& part,
                                  int64_t row, int stage, int parity, int turn) {
  RowFacts<kPass, kBent> facts(lane, task, row);
  const int64_t tail_column = task.rows.num_columns - part.tail + lane.thread();
  const float tail_u = lane.thread() < part.tail ? facts.at(lane, tail_column) : 0.0f;
  const Quad* held = lane.template shared<Quad>(0) + stage * split.part_vectors;
  uint64_t* full = lane.template shared<uint64_t>(split.barriers_at()) + stage * split.chunks;
  const auto column_of = [&](int i) { return int64_t(part.begin + i) * kVector; };
  const auto read = [&](int i) { return facts.bent_quad(lane, task, lane.get(held + i), column_of(i)); };

  Partial p;
  const int chunk_vectors = kUnroll * lane.threads();
  for (int chunk = 0; chunk * chunk_vectors < part.vectors; ++chunk) {
    if (task.wide_reads) lane.wait(full + chunk, parity);
    absorb_tile(lane, p, chunk, part, facts.map.factor, read);
  }
  if (lane.thread() < part.tail) absorb(p, {tail_u}, facts.map.factor);
  p = cluster_combined(lane, split, p, turn);
  const bool writes = lane.thread() == 0 && lane.rank() == 0;
  const RowStatistics found = recorded(task, facts, p, row, writes);
  if (kPass == Pass::kStatistics) return;

  const Slopes slopes = objective_slopes(task, facts, found, row, writes);
  const RowWriter<kOut, kPass, kBent> writer{task, facts, slopes, row * task.dx_stride};
  if (slopes.zero) return writer.clear(lane, part, tail_column);
  for (int first = lane.thread(); first < part.vectors; first += chunk_vectors) {
  GRPO_FAST_UNROLL
    for (int k = 0; k < kUnroll; ++k) {
      const int i = first + k * lane.threads();
      if (i < part.vectors) writer.quad(lane, read(i), column_of(i));
    }
  }
  if (lane.thread() < part.tail) writer.column(lane, tail_u, tail_column);
  if (owns(lane, part, facts.target)) writer.column(lane, facts.target_u, facts.target);
}

template <Pass kPass, bool kBent, DType kOut, class Lane>
GRPO_FAST_INLINE void cluster_rows(Lane& lane, const RowTask& task, const ClusterSplit& split) {
  const Part part = part_of(lane, split, task.rows.num_columns);
  if (lane.thread() == 0) {
    uint64_t* full = lane.template shared<uint64_t>(split.barriers_at());
    for (int i = 0; i < split.stages * split.chunks; ++i) lane.init(full + i);
  }
  lane.publish_barriers();
  lane.sync_cluster();
  int64_t row = lane.cluster();
  if (row < task.rows.num_rows) fetch(lane, task, split, part, row, 0);
  for (int use = 0; row < task.rows.num_rows; ++use) {
    const int64_t following = row + lane.clusters();
    const bool more = following < task.rows.num_rows;
    const int stage = use % split.stages, parity = use / split.stages % 2;
    if (more && split.stages == 2) fetch(lane, task, split, part, following, 1 - stage);
    cluster_row<kPass, kBent, kOut>(lane, task, split, part, row, stage, parity, use % 2);
    if (more) {
      lane.sync_block();
      if (split.stages == 1) fetch(lane, task, split, part, following, 0);
    }
    row = following;
  }
}

}  // namespace grpo_fast

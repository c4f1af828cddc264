// The row kernels' launches as row_cuda.cu does them, in the emulator.
#pragma once

#include <algorithm>

#include "emulator.h"

namespace testing {

using grpo_fast::Pass;
using grpo_fast::RowTask;

// shared_limit: bytes a block may have on the device; 0: a device without clusters. clusters: at most so many at once.
template <Pass kPass, bool kBent, DType kOut>
void launch(const RowTask& task, int shared_limit, int clusters, uint64_t seed) {
  const grpo_fast::ClusterSplit split = grpo_fast::split_row(task.rows.num_columns, shared_limit);
  if (kPass != Pass::kGradient && split.ranks > 0) {
    const int count = std::min(clusters, int(task.rows.num_rows));
    emulate({count, split.ranks, split.threads, split.shared_bytes}, seed,
            [&](Cluster::Lane& lane) { grpo_fast::cluster_rows<kPass, kBent, kOut>(lane, task, split); });
    return;
  }
  const int threads = grpo_fast::threads_for(task.rows.num_columns / kVector, grpo_fast::kStreamThreads);
  emulate({int(task.rows.num_rows), 1, threads, int(sizeof(Partial)) * kWarp}, seed, [&](Cluster::Lane& lane) {
    grpo_fast::stream_row<kPass, kBent, kOut>(lane, task, lane.shared<Partial>(0));
  });
}

template <Pass kPass>
void launch(const RowTask& task, DType dtype, int shared_limit, int clusters, uint64_t seed) {
  using Launch = void (*)(const RowTask&, int, int, uint64_t);
  constexpr Launch kLaunches[2][3] = {
      {launch<kPass, false, DType::kFloat32>, launch<kPass, false, DType::kBFloat16>,
       launch<kPass, false, DType::kFloat16>},
      {launch<kPass, true, DType::kFloat32>, launch<kPass, true, DType::kBFloat16>,
       launch<kPass, true, DType::kFloat16>}};
  const bool is_bent = task.rows.bias != nullptr || task.rows.softcap != 0.0f;
  kLaunches[is_bent][int(dtype)](task, shared_limit, clusters, seed);
}

}  // namespace testing

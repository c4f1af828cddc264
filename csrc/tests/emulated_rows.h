// The row kernels' launches as row_cuda.cu does them, in the emulator.
#pragma once

#include <algorithm>

#include "emulator.h"

namespace testing {

using grpo_fast::Pass;
using grpo_fast::RowTask;

// shared_limit: bytes a block may have on the device; 0: a device without clusters. clusters: at most so many at once.
template <Pass kPass, bool kTransform, DType kOut>
void launch(const RowTask& task, int shared_limit, int clusters, uint64_t seed) {
  const grpo_fast::ClusterSplit split = grpo_fast::split_row(task.rows.num_columns, shared_limit);
  if (kPass != Pass::kGradient && split.ranks > 0) {
    const int count = std::min(clusters, int(task.rows.num_rows));
    emulate({count, split.ranks, split.threads, split.shared_bytes}, seed,
            [&](Cluster::Lane& lane) { grpo_fast::cluster_rows<kPass, kTransform, kOut>(lane, task, split); });
    return;
  }
  const int threads = grpo_fast::threads_for(task.rows.num_columns / kVector, grpo_fast::kStreamThreads);
  emulate({int(task.rows.num_rows), 1, threads, int(sizeof(Partial)) * kWarp}, seed, [&](Cluster::Lane& lane) {
    grpo_fast::stream_row<kPass, kTransform, kOut>(lane, task, lane.shared<Partial>(0));
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
  const bool transforms = task.rows.bias != nullptr || task.rows.softcap != 0.0f;
  kLaunches[transforms][int(dtype)](task, shared_limit, clusters, seed);
}

}  // namespace testing

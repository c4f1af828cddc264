// The row kernels of row_algorithm.h and row_cluster.h, and which of them runs.

#include "row_cuda.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>

#include "lane_cuda.h"
#include "launch_cuda.h"

namespace grpo_fast {
namespace {

// Thread 0 to the last, one row. 64 registers a thread.
template <Pass kPass, bool kTransform, DType kOut>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(const __grid_constant__ RowTask task) {
  __shared__ Partial slots[kWarp];
  CudaLane lane{nullptr};
  stream_row<kPass, kTransform, kOut>(lane, task, slots);
}

// Persistent clusters, two blocks a multiprocessor: 64 registers a thread.
template <Pass kPass, bool kTransform, DType kOut>
__global__ void __launch_bounds__(kClusterThreads, 2)
    cluster_kernel(const __grid_constant__ RowTask task, const __grid_constant__ ClusterSplit split) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared_memory[];
  CudaLane lane{shared_memory};
  cluster_rows<kPass, kTransform, kOut>(lane, task, split);
#else
  __trap();  // the launcher asks the device first
#endif
}

const char* pass_name(Pass pass) {
  return pass == Pass::kStatistics ? "row_statistics" : pass == Pass::kGradient ? "row_gradient" : "row_objective";
}

const char* dtype_name(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kBFloat16 ? "bfloat16" : "float16";
}

LaunchShape described(Pass pass, const RowTask& task, DType dtype) {
  LaunchShape shape;
  shape.kernel = std::string(pass_name(pass)) + " of [" + std::to_string(task.rows.num_rows) + ", " +
                 std::to_string(task.rows.num_columns) + "]";
  if (pass != Pass::kStatistics) shape.kernel += std::string(" to ") + dtype_name(dtype);
  return shape;
}

ClusterSplit device_split(int device, int64_t num_columns, const LaunchShape& shape) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device, shape) < 9) return {};
  return split_row(num_columns, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, shape));
}

// Clusters of this shape that the device holds at once; the kernel may use its shared memory from then on.
template <class Kernel>
int resident_clusters(Kernel kernel, int device, const LaunchShape& shape) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int, int>, int> known;
  const void* function = reinterpret_cast<const void*>(kernel);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(function, device, shape.threads, shape.cluster, shape.shared_bytes);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, shape);
  check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "cudaFuncSetAttribute",
        shape);
  const LaunchConfig built(shape, nullptr);
  int clusters = 0;
  if (shape.cluster > 1) {
    check(cudaOccupancyMaxActiveClusters(&clusters, function, &built.config), "cudaOccupancyMaxActiveClusters", shape);
  } else {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&clusters, function, shape.threads,
                                                        static_cast<size_t>(shape.shared_bytes)),
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor", shape);
    clusters *= device_attribute(cudaDevAttrMultiProcessorCount, device, shape);
  }
  return known[key] = std::max(clusters, 1);
}

template <Pass kPass, bool kTransform, DType kOut>
void launch_rows(const RowTask& task, CudaQueue queue) {
  LaunchShape shape = described(kPass, task, kOut);
  const CurrentDevice current(queue.device, shape);
  if constexpr (kPass != Pass::kGradient) {
    const ClusterSplit split = device_split(queue.device, task.rows.num_columns, shape);
    if (split.ranks > 0) {
      shape.threads = split.threads, shape.cluster = split.ranks, shape.shared_bytes = split.shared_bytes;
      shape.blocks = split.ranks;  // what occupancy is asked for; then as many as there are, or rows
      const int64_t resident = resident_clusters(cluster_kernel<kPass, kTransform, kOut>, queue.device, shape);
      shape.blocks = split.ranks * std::min<int64_t>(resident, task.rows.num_rows);
      return launch(cluster_kernel<kPass, kTransform, kOut>, shape, queue.stream, task, split);
    }
  }
  shape.threads = threads_for(task.rows.num_columns / kVector, kStreamThreads);
  shape.blocks = task.rows.num_rows;
  launch(stream_kernel<kPass, kTransform, kOut>, shape, queue.stream, task);
}

template <Pass kPass, DType kOut>
void launch_transform(const RowTask& task, CudaQueue queue) {
  const bool transforms = task.rows.bias != nullptr || task.rows.softcap != 0.0f;
  (transforms ? launch_rows<kPass, true, kOut> : launch_rows<kPass, false, kOut>)(task, queue);
}

template <Pass kPass>
void launch_dtype(const RowTask& task, DType dtype, CudaQueue queue) {
  if (dtype == DType::kBFloat16) return launch_transform<kPass, DType::kBFloat16>(task, queue);
  if (dtype == DType::kFloat16) return launch_transform<kPass, DType::kFloat16>(task, queue);
  launch_transform<kPass, DType::kFloat32>(task, queue);
}

}  // namespace

RowLaunch row_launch(int device, int64_t num_columns) {
  LaunchShape shape;
  shape.kernel = "row_launch";
  const ClusterSplit split = device_split(device, num_columns, shape);
  if (split.ranks == 0) return {0, threads_for(num_columns / kVector, kStreamThreads), 0, int(sizeof(Partial)) * kWarp};
  return {split.ranks, split.threads, split.stages, split.shared_bytes};
}

void row_statistics_cuda(const Rows& rows, float* logprobs, float* entropy, float* lse, CudaQueue queue) {
  const RowTask task = statistics_task(rows, logprobs, entropy, lse);
  if (rows.num_rows > 0) launch_transform<Pass::kStatistics, DType::kFloat32>(task, queue);
}

void row_gradient_cuda(const Rows& rows, const float* lse, const float* entropy, const float* g, const float* e,
                       int64_t vocab_start, const DxOut& out, CudaQueue queue) {
  const RowTask task = gradient_task(rows, lse, entropy, g, e, vocab_start, out);
  if (rows.num_rows > 0) launch_dtype<Pass::kGradient>(task, out.dtype, queue);
}

void row_objective_cuda(const Rows& rows, const Objective& objective, const TokenArrays& tokens,
                        Scalar entropy_gradient, Scalar grad_scale, const DxOut& out, float* logprobs, float* entropy,
                        uint8_t* live, CudaQueue queue) {
  const RowTask task =
      objective_task(rows, objective, tokens, entropy_gradient, grad_scale, out, logprobs, entropy, live);
  if (rows.num_rows > 0) launch_dtype<Pass::kObjective>(task, out.dtype, queue);
}

}  // namespace grpo_fast

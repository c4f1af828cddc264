// Row functions on a chunk of logits (rows.h) for CUDA devices of compute capability 8.0 and later. Asynchronous: they
// enqueue one kernel each, allocate nothing and wait for nothing, so they can be captured in a CUDA graph.
//
// Where a row fits the shared memory of a cluster (sm_90 and later, V up to about 460000) statistics and the objective
// take row_cluster.h's kernel, else row_algorithm.h's; which of them depends on V and the device alone. Bytes of device
// memory per logit: statistics 4 read; gradient 4 read, 2 or 4 written; objective the same, and without a cluster 4
// more read, of which the L2 cache serves what it still holds.
//
// Every function throws std::invalid_argument for arguments that it cannot serve, std::runtime_error with the kernel's
// name and launch shape where CUDA returns an error.
#pragma once

#include <cstdint>

#include "rows.h"

struct CUstream_st;

namespace grpo_fast {

// Where to run.
struct CudaQueue {
  int device;
  CUstream_st* stream;  // cudaStream_t of that device
};

// A number that the host knows, or (`device` not null) one float on the device.
struct Scalar {
  const float* device;
  float host;
  GRPO_FAST_INLINE float value() const { return device != nullptr ? *device : host; }
};

// dx [R, V]. Memory of its own, the logits themselves (kFloat32), or narrow rows over the logits' own, each beginning
// `narrow_offset` bytes into its row.
struct DxOut {
  void* dx;
  int64_t row_stride;  // elements
  DType dtype;         // kFloat32, kBFloat16, kFloat16
};

// Where a narrow row of dx begins over its own logits, in bytes: in the upper half, as the last logits are read first.
inline int64_t narrow_offset(int64_t num_columns) { return num_columns / 8 * 16; }

// What runs for V columns on a device, for tests and tables.
struct RowLaunch {
  int ranks;  // blocks a cluster; 0: one block a row, streaming
  int threads;
  int stages;
  int shared_bytes;
};
RowLaunch row_launch(int device, int64_t num_columns);

// logprobs, entropy, lse [R]. The logits stay as they are.
void row_statistics_cuda(const Rows& rows, float* logprobs, float* entropy, float* lse, CudaQueue queue);

// g, e: [R] gradients of the loss in logprob and entropy (e null: zero). Rows with both zero become zeros.
// vocab_start: vocabulary index of column 0; targets outside the columns add nothing.
void row_gradient_cuda(const Rows& rows, const float* lse, const float* entropy, const float* g, const float* e,
                       int64_t vocab_start, const DxOut& out, CudaQueue queue);

// Statistics, the objective's derivative and dx, for token-local objectives. entropy_gradient: dloss/dentropy, the same
// for every row. grad_scale: multiplies dx. live: [R], 1 where dx is not all 0.
void row_objective_cuda(const Rows& rows, const Objective& objective, const TokenArrays& tokens,
                        Scalar entropy_gradient, Scalar grad_scale, const DxOut& out, float* logprobs, float* entropy,
                        uint8_t* live, CudaQueue queue);

}  // namespace grpo_fast

// Rows on their supports, for the CPU: gathered rows of the weight instead of products with all of it.
//
// Legend: R rows, N entries of all of them, H hidden size, V vocabulary. Row t has the entries j of [offsets[t],
// offsets[t + 1]), each with an id, 0 <= id < V, which the caller has checked. Matrices have no gaps between rows.
//     x_j = hidden[row of j] . weight[id of j]
// Sums are float32, in an order that depends on the number of their terms only: not on other rows, not on the number of
// threads. A row is one thread's, and so is an id's row of the weight's gradient, or a block of its columns.
// Bytes: a gathered row is read from memory once, 2 H or 4 H; a touched row of the gradient is read and written.
#pragma once

#include <cstddef>
#include <cstdint>

#include "row_cpu.h"

namespace grpo_fast {

struct Supports {
  const int32_t* ids;      // [N]
  const int64_t* offsets;  // [R+1] from 0 on
  int64_t num_rows;
};

// hidden [R, H] and weight [V, H]: float32, bf16 or fp16 both.
struct Operands {
  DType dtype;
  const void* hidden;
  const void* weight;
  int64_t width;
};

// Where sums go, rounded once: float32, bf16 or fp16.
struct Sums {
  DType dtype;
  void* values;
};

// out [N] float32: the raw products.
void sparse_logits(const Operands& operands, const Supports& supports, float* out, Launch launch);

// out [R, H] = sum_j dx_j weight[id of j]. `operands.hidden` is not read.
void sparse_grad_hidden(const float* dx, const Operands& operands, const Supports& supports, Sums out, Launch launch);

// out[v] += sum_j dx_j hidden[row of j] over the entries of id v; other rows of `out` [V, H] are not touched.
//   rows: [N], the row of each entry. N < 2^32, else std::invalid_argument. `operands.weight` is not read.
//   scratch: sparse_sort_bytes(N).
void sparse_grad_weight(const float* dx, const Operands& operands, const int32_t* ids, const int64_t* rows,
                        int64_t num_entries, int64_t vocab, Sums out, void* scratch, Launch launch);
size_t sparse_sort_bytes(int64_t num_entries);

// One visit of each row: raw products, row_objective, dx over them (`rows.logits` [N]), and dHidden if `out.values`.
void sparse_objective(const Operands& operands, const Supports& supports, const Rows& rows, const Objective& objective,
                      const TokenArrays& tokens, float entropy_gradient, float grad_scale, float* logprobs,
                      float* entropy, uint8_t* live, Sums grad_hidden, Launch launch);

}  // namespace grpo_fast

// bf16 x bf16 -> float32 (and fp16) matrix products on the CPU, from the batch-reduce GEMM inside torch's CPU library.
//
// torch offers no CPU product with narrow operands and a float32 result. The library it carries (oneDNN) does: its
// micro-kernel multiplies one block with float32 accumulation straight into C, with AMX or AVX-512 BF16. It is looked
// up at run time in the libtorch_cpu that is already loaded; blocking, packing and threads are here. On two EPYC cores
// (Zen 5) one block runs at 910 GFLOP/s, a whole product at 700 to 900; torch's own bf16 products, rounded to bf16, at
// 690 to 830, and the cblas_gemm_bf16bf16f32 that the library also exports at 163.
//
// Legend: R rows, H hidden size, V vocabulary. Narrow values are 16 bits wide, bf16 or fp16 alike.
// Packed operand ("VNNI"): rows k and k+1 of B interleaved, [K/2, N, 2]; B as it is where the library reads only that.
// All results are independent of the number of threads; a row of logits does not depend on the other rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "row_cpu.h"

namespace grpo_fast {

// Why narrow products cannot be done here, or null where they can. Looks the micro-kernel up and tries it, once.
const char* gemm_obstacle(DType dtype);

// Bytes of scratch that one thread of any product may need.
constexpr size_t kGemmScratchPerThread = size_t{1} << 20;

// out [R, V] = hidden [R, H] weight [V, H]^T. Rows of `out` are `out_stride` apart.
void gemm_logits(DType dtype, const uint16_t* hidden, const uint16_t* weight, float* out, int64_t rows, int64_t width,
                 int64_t vocab, int64_t out_stride, void* scratch, int threads);

// out [R, H] += dx [R, V] weight [V, H]. Rows of `dx` are `dx_stride` apart.
void gemm_grad_hidden(DType dtype, const uint16_t* dx, const uint16_t* weight, float* out, int64_t rows, int64_t width,
                      int64_t vocab, int64_t dx_stride, void* scratch, int threads);

// out [V, H] = base + dx [R, V]^T hidden [R, H]; float32 or narrow.
//   base: [V, H] float32, or null for zero; may be `out` itself where that is float32, and must be if it is not null.
//   packed: gemm_packed_bytes(rows, width) bytes of scratch besides the threads' own.
void gemm_grad_weight(DType dtype, const uint16_t* dx, const uint16_t* hidden, const float* base, void* out,
                      bool narrow_out, int64_t rows, int64_t width, int64_t vocab, int64_t dx_stride, void* packed,
                      void* scratch, int threads);
size_t gemm_packed_bytes(int64_t rows, int64_t width);

}  // namespace grpo_fast

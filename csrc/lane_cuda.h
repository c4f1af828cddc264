// One GPU thread, as row_algorithm.h, row_cluster.h and group_algorithm.h speak of it: intrinsics and PTX, no
// decisions. What only GPUs with clusters have (sm_90 and later) is compiled for them alone.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "row_cluster.h"

namespace grpo_fast {

struct CudaLane {
  unsigned char* shared_base;  // the block's dynamic shared memory

  __device__ __forceinline__ int thread() const { return int(threadIdx.x); }
  __device__ __forceinline__ int threads() const { return int(blockDim.x); }
  __device__ __forceinline__ int64_t block() const { return blockIdx.x; }
  __device__ __forceinline__ int64_t blocks() const { return gridDim.x; }
  __device__ __forceinline__ void sync_block() const { __syncthreads(); }

  template <class T>
  __device__ __forceinline__ T* shared(int offset) const {
    return reinterpret_cast<T*>(shared_base + offset);
  }

  // -- warps ----------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ Partial shuffle_sums(const Partial& p, int mask) const {
    return {p.top, __shfl_xor_sync(0xffffffffu, p.sum, mask), __shfl_xor_sync(0xffffffffu, p.moment, mask)};
  }
  template <class T>
  __device__ __forceinline__ T shuffle_xor(T value, int mask) const {
    return __shfl_xor_sync(0xffffffffu, value, mask);
  }
  __device__ __forceinline__ uint32_t ballot(bool vote) const { return __ballot_sync(0xffffffffu, vote); }
  __device__ __forceinline__ int count_bits(uint32_t bits) const { return __popc(bits); }

  // -- memory ---------------------------------------------------------------------------------------------------------

  // Past the first-level cache: logits are read once or from L2, and dx may be written over them.
  __device__ __forceinline__ float read(const float* p) const { return __ldcg(p); }
  __device__ __forceinline__ Quad read_quad(const float* p, bool wide) const {
    if (!wide) return {{__ldcg(p), __ldcg(p + 1), __ldcg(p + 2), __ldcg(p + 3)}};
    const float4 found = __ldcg(reinterpret_cast<const float4*>(p));
    return {{found.x, found.y, found.z, found.w}};
  }

  template <DType kOut>
  __device__ __forceinline__ void write(void* dx, int64_t index, float value) const {
    if constexpr (kOut == DType::kFloat32) {
      static_cast<float*>(dx)[index] = value;
    } else if constexpr (kOut == DType::kBFloat16) {
      static_cast<__nv_bfloat16*>(dx)[index] = __float2bfloat16_rn(value);
    } else {
      static_cast<__half*>(dx)[index] = __float2half_rn(value);
    }
  }

  template <DType kOut>
  __device__ __forceinline__ void write_quad(void* dx, int64_t index, const Quad& q, bool wide) const {
    if (!wide) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) write<kOut>(dx, index + i, q.v[i]);
    } else if constexpr (kOut == DType::kFloat32) {
      *reinterpret_cast<float4*>(static_cast<float*>(dx) + index) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
    } else {
      const uint2 packed = make_uint2(pack<kOut>(q.v[0], q.v[1]), pack<kOut>(q.v[2], q.v[3]));
      *reinterpret_cast<uint2*>(static_cast<unsigned short*>(dx) + index) = packed;
    }
  }

  template <DType kOut>
  static __device__ __forceinline__ unsigned pack(float low, float high) {
    if constexpr (kOut == DType::kBFloat16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
      return *reinterpret_cast<const unsigned*>(&pair);
    } else {
      const __half2 pair = __floats2half2_rn(low, high);
      return *reinterpret_cast<const unsigned*>(&pair);
    }
  }

  __device__ __forceinline__ Quad get(const Quad* p) const {
    const float4 found = *reinterpret_cast<const float4*>(p);
    return {{found.x, found.y, found.z, found.w}};
  }
  __device__ __forceinline__ Partial get(const Partial* p) const {
    const float4 found = *reinterpret_cast<const float4*>(p);
    return {found.x, found.y, found.z};
  }
  __device__ __forceinline__ void put(Quad* p, const Quad& q) const {
    *reinterpret_cast<float4*>(p) = make_float4(q.v[0], q.v[1], q.v[2], q.v[3]);
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // -- clusters -------------------------------------------------------------------------------------------------------

  __device__ __forceinline__ int rank() const {
    int out;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(out));
    return out;
  }
  __device__ __forceinline__ int64_t cluster() const {
    int out;
    asm("mov.u32 %0, %%clusterid.x;" : "=r"(out));
    return out;
  }
  __device__ __forceinline__ int64_t clusters() const {
    int out;
    asm("mov.u32 %0, %%nclusterid.x;" : "=r"(out));
    return out;
  }

  // Not the .aligned form: a warp may come here from a branch.
  __device__ __forceinline__ void sync_cluster() const {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
  }

  // To the same place in the shared memory of block `rank`.
  __device__ __forceinline__ void send(int rank, Partial* p, const Partial& value) const {
    unsigned there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address(p)), "r"(rank));
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(there), "f"(value.top), "f"(value.sum),
                 "f"(value.moment), "f"(0.0f)
                 : "memory");
  }

  // -- bulk copies ----------------------------------------------------------------------------------------------------

  __device__ __forceinline__ void init(uint64_t* barrier) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barrier)) : "memory");
  }
  // Initialised barriers, to the copy engine; a barrier among threads must follow.
  __device__ __forceinline__ void publish_barriers() const {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
  }
  // The one arrival of a use: it completes when `bytes` have come.
  __device__ __forceinline__ void expect(uint64_t* barrier, int bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(barrier)), "r"(bytes)
                 : "memory");
  }
  // After reads of the target by any thread, a barrier and this fence: the copy engine's writes come after them.
  __device__ __forceinline__ void copy(Quad* target, const float* source, int bytes, uint64_t* barrier) const {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     address(target)),
                 "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(address(barrier))
                 : "memory");
  }
  __device__ __forceinline__ void wait(uint64_t* barrier, int parity) const {
    unsigned done = 0;
    while (done == 0) {
      asm volatile(
          "{\n\t.reg .pred p;\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\tselp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(address(barrier)), "r"(parity)
          : "memory");
    }
  }

 private:
  __device__ __forceinline__ unsigned address(const void* p) const {
    return static_cast<unsigned>(__cvta_generic_to_shared(p));
  }
#endif
};

}  // namespace grpo_fast

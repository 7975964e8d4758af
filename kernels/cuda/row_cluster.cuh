#ifndef ADAATTN_KERNELS_CUDA_ROW_CLUSTER_CUH_
#define ADAATTN_KERNELS_CUDA_ROW_CLUSTER_CUH_

// CTAs that work on one thing together. Needs sm_90.

#include <cooperative_groups.h>

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"

namespace adaattn {

// The CTAs of one row of the grid: a thread block cluster, or a lone CTA. Barriers are for all
// threads of all of them, and order accesses to each other's shared memory, too.
struct RowCluster {
  int rank, ctas;

  __device__ __forceinline__ RowCluster()
      : rank(static_cast<int>(blockIdx.x)), ctas(static_cast<int>(gridDim.x)) {}

  // The same variable in the shared memory of CTA `of`, which must have started and not ended.
  template <typename T>
  __device__ __forceinline__ T* At(T* shared, int of) const {
    return of == rank ? shared : cooperative_groups::this_cluster().map_shared_rank(shared, of);
  }

  // Stores to it without waiting for anything: `barrier`, an mbarrier, counts the bytes there.
  __device__ __forceinline__ void Send(float* shared, int of, float x, uint64_t* barrier) const {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(
            Address(shared, of)),
        "f"(x), "r"(Address(barrier, of))
        : "memory");
  }
  // Until an mbarrier of the CTA's own, which is used once, has what it expects.
  static __device__ __forceinline__ void Receive(uint64_t* barrier) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(SharedAddress(barrier))
        : "memory");
  }

  // A barrier in two halves, for work that waits for nobody in between. Start() is the first half
  // of one that orders nothing but the mbarriers that are initialised before it.
  __device__ __forceinline__ void Start() const {
    if (ctas > 1) asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  }
  __device__ __forceinline__ void Arrive() const {
    if (ctas > 1) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  }
  __device__ __forceinline__ void Wait() const {
    if (ctas > 1) {
      asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    } else {
      __syncthreads();
    }
  }
  __device__ __forceinline__ void Sync() const {
    Arrive();
    Wait();
  }

 private:
  static __device__ __forceinline__ uint32_t Address(const void* shared, int of) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;"
        : "=r"(address)
        : "r"(SharedAddress(shared)), "r"(of));
    return address;
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_ROW_CLUSTER_CUH_

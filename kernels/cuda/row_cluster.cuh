#ifndef ADAATTN_KERNELS_CUDA_ROW_CLUSTER_CUH_
#define ADAATTN_KERNELS_CUDA_ROW_CLUSTER_CUH_

// CTAs that work on one thing together. Needs sm_90.

#include <cooperative_groups.h>

#include <cstdint>

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

  // Stores to it.
  __device__ __forceinline__ void Store(float* shared, int of, float x) const {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(Address(shared, of)), "f"(x) : "memory");
  }

  // Arrives at an mbarrier there; what the thread has stored is seen by who waits for it
  // (WaitForArrivals).
  __device__ __forceinline__ void ArriveAt(uint64_t* barrier, int of) const {
    asm volatile(
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(Address(barrier, of))
        : "memory");
  }
  // For all arrivals at an mbarrier of the CTA's own that is used once.
  static __device__ __forceinline__ void WaitForArrivals(uint64_t* barrier) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(barrier)))
        : "memory");
  }

  // A barrier in two halves, for work that waits for nobody in between.
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
        : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(of));
    return address;
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_ROW_CLUSTER_CUH_

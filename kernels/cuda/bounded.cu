#include <cooperative_groups.h>

#include "kernels/cuda/bounded.h"
#include "kernels/cuda/bounded_head.h"
#include "kernels/cuda/stage_stamps.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/warp.cuh"

namespace adaattn {
namespace {

constexpr int32_t kMaxBoundedHeadDim = 256;

// The threads of a cluster.
struct ClusterTeam {
  static constexpr int32_t kLanes = 32;
  static constexpr int32_t num_ctas = kBoundedCtas, num_threads = kBoundedThreads;
  static constexpr int32_t num_warps = kBoundedThreads / kLanes;
  int32_t cta, thread, warp, lane;

  __device__ __forceinline__ void SyncCta() const { __syncthreads(); }
  // A barrier of the cluster releases and acquires global memory, too.
  __device__ __forceinline__ void Sync() const {
    __syncwarp();
    cooperative_groups::this_cluster().sync();
  }
  __device__ __forceinline__ double Sum(double x) const { return WarpSum(x); }
  // NaN is passed on.
  __device__ __forceinline__ double Max(double x) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, x, step);
      x = other <= x ? x : other;
    }
    return x;
  }
  __device__ __forceinline__ void Add(int32_t* counter, int32_t x) const { atomicAdd(counter, x); }
  __device__ __forceinline__ void Add(int64_t* counter, int64_t bytes) const {
    atomicAdd(reinterpret_cast<unsigned long long*>(counter),
              static_cast<unsigned long long>(bytes));
  }
};

// grid (kBoundedCtas * num_kv_heads, num_sequences), clusters of kBoundedCtas
__global__ void __cluster_dims__(kBoundedCtas, 1, 1) __launch_bounds__(kBoundedThreads, 2)
    BoundedKernel(const __grid_constant__ BoundedParams p) {
  NoteTime(p.stamps, kBoundedStamp);
  extern __shared__ __align__(16) std::byte shared_bytes[];
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const ClusterTeam team{static_cast<int32_t>(blockIdx.x % kBoundedCtas), thread,
                         thread / ClusterTeam::kLanes, thread % ClusterTeam::kLanes};
  BoundedHeadStep<ClusterTeam>(p, static_cast<int32_t>(blockIdx.y),
                               static_cast<int32_t>(blockIdx.x / kBoundedCtas), team,
                               *reinterpret_cast<BoundedShared*>(shared_bytes))
      .Run();
}

}  // namespace

absl::Status RunBounded(const BoundedParams& params, cudaStream_t stream) {
  // Once, for every head_dim: graphs of other shapes keep theirs.
  static const absl::Status allowed =
      FromCuda(cudaFuncSetAttribute(BoundedKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(BoundedSharedBytes(kMaxBoundedHeadDim))),
               "cudaFuncSetAttribute(BoundedKernel)");
  ADAATTN_RETURN_IF_ERROR(allowed);
  const size_t bytes = BoundedSharedBytes(params.shape.head_dim);
  const dim3 grid(static_cast<unsigned>(kBoundedCtas * params.shape.num_kv_heads),
                  static_cast<unsigned>(params.num_sequences));
  BoundedKernel<<<grid, kBoundedThreads, bytes, stream>>>(params);
  return FromCuda(cudaGetLastError(), "BoundedKernel");
}

}  // namespace adaattn

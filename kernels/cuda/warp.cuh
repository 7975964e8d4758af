#ifndef ADAATTN_KERNELS_CUDA_WARP_CUH_
#define ADAATTN_KERNELS_CUDA_WARP_CUH_

namespace adaattn {

// The sum of x over all lanes of a warp, in the same order in each. T: float or double.
template <typename T>
__device__ __forceinline__ T WarpSum(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// The largest x of a warp, in every lane.
__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_WARP_CUH_

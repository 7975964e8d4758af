#ifndef ADAATTN_KERNELS_CUDA_HADAMARD_CUH_
#define ADAATTN_KERNELS_CUDA_HADAMARD_CUH_

namespace adaattn {

// Block Hadamard transforms of kRows vectors at once: 80 = 64 + 16, 96 = 64 + 32
// (format/hadamard.h). By a warp, channel lane + 32 j in x[.][j]; a block of less than 32 channels
// starts at a lane 0 and stays below its own length.
template <int kHeadDim, int kRows>
__device__ __forceinline__ void RotateHadamard(float (&x)[kRows][(kHeadDim + 31) / 32], int lane) {
  constexpr int kEach = (kHeadDim + 31) / 32;
  constexpr bool kWhole = (kHeadDim & (kHeadDim - 1)) == 0;
#pragma unroll
  for (int step = 1; step < kHeadDim; step *= 2) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int block = kWhole ? kHeadDim : 32 * j < 64 ? 64 : kHeadDim - 64;
      if (step >= block) continue;
      if (step < 32) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float other = __shfl_xor_sync(0xffffffffu, x[i][j], step);
          x[i][j] = (lane & step) == 0 ? x[i][j] + other : other - x[i][j];
        }
      } else if ((32 * j & step) == 0) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
          const float low = x[i][j], high = x[i][j + step / 32];
          x[i][j] = low + high;
          x[i][j + step / 32] = low - high;
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const float norm = rsqrtf(kWhole        ? float{kHeadDim}
                              : 32 * j < 64 ? 64.0f
                                            : float{kHeadDim - 64});
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i][j] *= norm;
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_HADAMARD_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_

// Rotate: queries to the rank frame of each basis of their sequence, scaled by softmax_scale
// log2(e), in the order of the scan's B fragments; q.mu likewise; the step's counters cleared.
//   qr[column][c] = scale sum_i q[column][i] Q[i][c]
// grid (num_kv_heads, num_sequences), 256 threads: a pair of channels by a slice of inputs each.

#include "kernels/cuda/progressive_dense.cuh"

namespace adaattn {

inline constexpr int kRotateThreads = 256;

template <class Traits>
struct RotateShared {
  static constexpr int kPairs = Traits::kHeadDim / 2;
  static constexpr int kSlices = kRotateThreads / kPairs;
  alignas(16) float query[kTileColumns * Traits::kHeadDim];
  alignas(16) float partial[kSlices][kTileColumns][Traits::kHeadDim];
};

template <class Traits>
__global__ void __launch_bounds__(kRotateThreads)
    ProgressiveRotateKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim;
  constexpr int kPairs = RotateShared<Traits>::kPairs, kSlices = RotateShared<Traits>::kSlices;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<RotateShared<Traits>*>(shared_bytes);
  LaunchDependents();
  const ProgressiveWorkspace& w = p.work;
  const BasisLayout layout = MakeBasisLayout(p.shape);
  const int head = blockIdx.x, sequence = blockIdx.y;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  LoadColumns<Traits>(p, s, head, s.softmax_scale * kLog2E, shared.query);
  static_assert(sizeof(HeadDecision) % 4 == 0, "cleared by words");
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(HeadDecision) / 4); i += blockDim.x) {
    reinterpret_cast<uint32_t*>(p.decisions + head_index)[i] = 0;
  }
  const int pair = threadIdx.x % kPairs, slice = threadIdx.x / kPairs;
  for (int run = 0; run < s.num_bases; ++run) {
    const std::byte* block =
        p.pool + static_cast<int64_t>(s.basis[run]) * kPageAlignment + head * layout.head_bytes;
    const auto* basis = reinterpret_cast<const __half2*>(block + layout.query_basis);
    __syncthreads();
    if (slice < kSlices) {
      float2 sums[kTileColumns] = {};
#pragma unroll 8
      for (int i = slice; i < kD; i += kSlices) {
        const float2 b = __half22float2(basis[i * kPairs + pair]);
#pragma unroll
        for (int n = 0; n < kTileColumns; ++n) {
          const float q = shared.query[n * kD + i];
          sums[n].x = fmaf(q, b.x, sums[n].x);
          sums[n].y = fmaf(q, b.y, sums[n].y);
        }
      }
#pragma unroll
      for (int n = 0; n < kTileColumns; ++n) {
        *reinterpret_cast<float2*>(&shared.partial[slice][n][2 * pair]) = sums[n];
      }
    }
    __syncthreads();
    const int64_t at = head_index * kMaxDeviceBasisRuns + run;
    float* out = reinterpret_cast<float*>(p.workspace + w.query) + at * w.columns * kD;
    for (int i = threadIdx.x; i < kTileColumns * kD; i += blockDim.x) {
      const int n = i / kD, c = i % kD;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < kSlices; ++j) sum += shared.partial[j][n][c];
      // Channel c = 16k + {2t, 2t + 1, 2t + 8, 2t + 9} of column n is element {0..3} of lane 4n +
      // t.
      const int in_tile = c % kTileChannels, lane = n * 4 + in_tile % 8 / 2;
      out[(c / kTileChannels * 32 + lane) * 4 + in_tile / 8 * 2 + in_tile % 2] = sum;
    }
    const float* mean = reinterpret_cast<const float*>(block + layout.mean);
    const int n = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp a column
    float dot = 0;
    for (int i = lane; i < kD; i += 32) dot = fmaf(shared.query[n * kD + i], mean[i], dot);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, i);
    if (lane == 0) {
      reinterpret_cast<float*>(p.workspace + w.query_mean)[at * w.columns + n] = dot;
    }
    if (threadIdx.x == 0) {
      p.decisions[head_index].basis_bytes = (run + 1) * (int64_t{2} * kD * kD + 4 * kD);
    }
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_

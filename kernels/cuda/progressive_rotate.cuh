#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_

// Rotate: queries to the rank frame of each basis of their sequence, scaled by softmax_scale
// log2(e), as halves relative to a power of two, in the order of the scan's B fragments; q.mu
// likewise; the step's counters cleared.
//   qr[column][c] = scale sum_i q[column][i] Q[i][c]
// grid (num_kv_heads, num_sequences, column tiles), 256 threads: two channels by a slice of inputs.

#include "kernels/cuda/progressive_dense.cuh"

namespace adaattn {

inline constexpr int kRotateThreads = 256;

template <class Traits>
struct RotateShared {
  static constexpr int kPairs = Traits::kHeadDim / 2;
  static constexpr int kSlices = kRotateThreads / kPairs;
  alignas(16) __half2 basis[Traits::kHeadDim * kPairs];
  alignas(16) float mean[Traits::kHeadDim];
  alignas(16) float query[kTileColumns * Traits::kHeadDim];
  alignas(16) float partial[kSlices][kTileColumns][Traits::kHeadDim];
  float max[kRotateThreads / 32];
};

template <class Traits>
__device__ __forceinline__ void FetchBasis(const std::byte* block, const BasisLayout& layout,
                                           RotateShared<Traits>& shared) {
  auto* basis = reinterpret_cast<std::byte*>(shared.basis);
  constexpr int kBytes = Traits::kHeadDim * Traits::kHeadDim * 2;
  for (int i = threadIdx.x * 16; i < kBytes; i += kRotateThreads * 16) {
    CopyAsync16(basis + i, block + layout.query_basis + i);
  }
  if (threadIdx.x < Traits::kHeadDim / 4) {
    CopyAsync16(shared.mean + threadIdx.x * 4, block + layout.mean + threadIdx.x * 16);
  }
  CommitCopies();
}

// The sums of one thread's pair of channels over its slice of inputs.
template <class Traits>
__device__ __forceinline__ void MultiplySlice(RotateShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kPairs = RotateShared<Traits>::kPairs;
  constexpr int kSlices = RotateShared<Traits>::kSlices;
  const int pair = threadIdx.x % kPairs, slice = threadIdx.x / kPairs;
  if (slice >= kSlices) return;
  float2 sums[kTileColumns] = {};
#pragma unroll 2
  for (int i = 4 * slice; i < kD; i += 4 * kSlices) {
    float2 b[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = __half22float2(shared.basis[(i + j) * kPairs + pair]);
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
      const float4 q = *reinterpret_cast<const float4*>(&shared.query[n * kD + i]);
      sums[n].x = fmaf(q.x, b[0].x, fmaf(q.y, b[1].x, sums[n].x));
      sums[n].y = fmaf(q.x, b[0].y, fmaf(q.y, b[1].y, sums[n].y));
      sums[n].x = fmaf(q.z, b[2].x, fmaf(q.w, b[3].x, sums[n].x));
      sums[n].y = fmaf(q.z, b[2].y, fmaf(q.w, b[3].y, sums[n].y));
    }
  }
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) {
    *reinterpret_cast<float2*>(&shared.partial[slice][n][2 * pair]) = sums[n];
  }
}

// The smallest power of two that is no smaller than any |qr| of the CTA; 1 where all are 0.
__device__ __forceinline__ float QueryUnit(float high, float* scratch) {
#pragma unroll
  for (int i = 16; i > 0; i /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, i));
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = high;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kRotateThreads / 32; ++i) high = fmaxf(high, scratch[i]);
  if (!(high > 0)) return 1.0f;
  return __uint_as_float((__float_as_uint(high) + 0x7fffffu) & 0x7f800000u);
}

template <class Traits>
__global__ void __launch_bounds__(kRotateThreads)
    ProgressiveRotateKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim;
  constexpr int kElements = kTileColumns * kD,
                kEach = (kElements + kRotateThreads - 1) / kRotateThreads;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<RotateShared<Traits>*>(shared_bytes);
  LaunchDependents();
  const ProgressiveWorkspace& w = p.work;
  const BasisLayout layout = MakeBasisLayout(p.shape);
  const int head = blockIdx.x, sequence = blockIdx.y, tile = blockIdx.z;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  for (int run = 0; run < s.num_bases; ++run) {
    const std::byte* block =
        p.pool + static_cast<int64_t>(s.basis[run]) * kPageAlignment + head * layout.head_bytes;
    FetchBasis<Traits>(block, layout, shared);
    if (run == 0) {
      LoadColumns<Traits>(p, s, head, tile, s.softmax_scale * kLog2E, shared.query);
    }
    WaitCopies<0>();
    __syncthreads();
    MultiplySlice<Traits>(shared);
    __syncthreads();
    float sums[kEach], high = 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = threadIdx.x + j * kRotateThreads;
      sums[j] = 0;
      if (i >= kElements) continue;
#pragma unroll
      for (int slice = 0; slice < RotateShared<Traits>::kSlices; ++slice) {
        sums[j] += shared.partial[slice][i / kD][i % kD];
      }
      high = fmaxf(high, fabsf(sums[j]));
    }
    // Halves up to 16, so that the squares of small products do not vanish.
    const float unit = QueryUnit(high, shared.max) * 0.0625f;
    const int64_t at = (head_index * kMaxDeviceBasisRuns + run) * (w.columns / kTileColumns) + tile;
    auto* out = reinterpret_cast<__half*>(p.workspace + w.query) + at * kElements;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int i = threadIdx.x + j * kRotateThreads;
      if (i >= kElements) continue;
      // Channel c = 16k + {2t, 2t + 1, 2t + 8, 2t + 9} of column n is element {0..3} of lane 4n +
      // t.
      const int n = i / kD, c = i % kD, in_tile = c % kTileChannels;
      const int lane = n * 4 + in_tile % 8 / 2;
      out[(c / kTileChannels * 32 + lane) * 4 + in_tile / 8 * 2 + in_tile % 2] =
          __float2half_rn(sums[j] / unit);
    }
    const int n = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp a column
    float dot = 0;
    for (int i = lane; i < kD; i += 32) dot = fmaf(shared.query[n * kD + i], shared.mean[i], dot);
#pragma unroll
    for (int i = 16; i > 0; i /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, i);
    if (lane == 0) {
      reinterpret_cast<float*>(p.workspace + w.query_mean)[at * kTileColumns + n] = dot;
    }
    if (threadIdx.x == 0) reinterpret_cast<float*>(p.workspace + w.query_unit)[at] = unit;
    __syncthreads();
  }
  if (blockIdx.x + blockIdx.y + blockIdx.z == 0 && threadIdx.x == 0) {
    *reinterpret_cast<int32_t*>(p.workspace + w.num_units) = 0;
  }
  static_assert(sizeof(HeadDecision) % 4 == 0, "cleared by words");
  if (tile == 0 && threadIdx.x < 32) {
    auto* words = reinterpret_cast<uint32_t*>(p.decisions + head_index);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(HeadDecision) / 4); i += 32) words[i] = 0;
    __syncwarp();
    if (threadIdx.x == 0) {
      p.decisions[head_index].basis_bytes = s.num_bases * (int64_t{2} * kD * kD + 4 * kD);
    }
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_

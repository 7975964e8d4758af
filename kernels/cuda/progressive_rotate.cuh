#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_

// Rotate: queries to the rank frame of each basis of their sequence, scaled by softmax_scale
// log2(e), as halves relative to a power of two, in the order of the scan's B fragments; q.mu
// likewise; the step's counters cleared.
//   qr[column][c] = scale sum_i q[column][i] Q[i][c]
// A CTA makes kRotateTiles tiles of channels, so that few heads still use many multiprocessors.
// grid (num_kv_heads x splits, num_sequences, column tiles)

#include "kernels/cuda/progressive_dense.cuh"

namespace adaattn {

inline constexpr int kRotateThreads = 256;
inline constexpr int kRotateTiles = 2;  // tiles of channels of one CTA
template <class Traits>
struct RotateShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kChannels = kRotateTiles * kTileChannels, kPairs = kChannels / 2;
  static constexpr int kSlices = kRotateThreads / kPairs;  // of the inputs
  alignas(16) __half2 basis[kD][kPairs];
  alignas(16) float mean[kD];
  alignas(16) float query[kTileColumns * kD];
  alignas(16) float partial[kSlices][kTileColumns][kChannels];
  float norm[kTileColumns];
};
template <class Traits>
constexpr int kRotateSplits = (Traits::kTiles + kRotateTiles - 1) / kRotateTiles;

// Starts the copies of the basis' columns [begin, begin + channels) and of mu.
template <class Traits>
__device__ __forceinline__ void FetchBasis(const std::byte* block, const BasisLayout& layout,
                                           int begin, int channels, RotateShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim;
  constexpr int kPieces = RotateShared<Traits>::kChannels / 8;  // of 16 bytes
  for (int i = threadIdx.x; i < kD * kPieces; i += kRotateThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    if (piece * 8 >= channels) break;  // the same piece in every turn
    CopyAsync16(&shared.basis[row][piece * 4],
                block + layout.query_basis + (row * kD + begin + piece * 8) * 2);
  }
  if (threadIdx.x < kD / 4) {
    CopyAsync16(shared.mean + threadIdx.x * 4, block + layout.mean + threadIdx.x * 16);
  }
  CommitCopies();
}

// The sums of one thread's pair of channels over its slice of inputs.
template <class Traits>
__device__ __forceinline__ void MultiplySlice(RotateShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kPairs = RotateShared<Traits>::kPairs;
  const int pair = threadIdx.x % kPairs, slice = threadIdx.x / kPairs;
  float2 sums[kTileColumns] = {};
#pragma unroll 4
  for (int i = 4 * slice; i < kD; i += 4 * RotateShared<Traits>::kSlices) {
    float2 b[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = __half22float2(shared.basis[i + j][pair]);
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

// A power of two that no |qr| of the tile exceeds: above every column's norm, which the rotation
// keeps to the rounding of Q; 1 where all are 0.
__device__ __forceinline__ float QueryUnit(const float* norms) {
  float high = 0;
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) high = fmaxf(high, norms[n]);
  high *= 1.01f;
  if (!(high > 0)) return 1.0f;
  return __uint_as_float((__float_as_uint(high) + 0x7fffffu) & 0x7f800000u);
}

// |q| of column `warp` and, for the first CTA of a head, its q.mu.
template <class Traits>
__device__ __forceinline__ void ColumnSums(RotateShared<Traits>& shared, int warp, int lane,
                                           float* mean_score) {
  constexpr int kD = Traits::kHeadDim;
  static_assert(kRotateThreads / 32 == kTileColumns, "a warp a column");
  float dot = 0, square = 0;
  for (int i = lane; i < kD; i += 32) {
    const float q = shared.query[warp * kD + i];
    dot = fmaf(q, shared.mean[i], dot);
    square = fmaf(q, q, square);
  }
  dot = WarpSum(dot);
  square = WarpSum(square);
  if (lane != 0) return;
  shared.norm[warp] = square > 0 ? square * rsqrtf(square) : 0.0f;
  if (mean_score != nullptr) mean_score[warp] = dot;
}

// Whether a row sees a page that was sealed with basis `run`.
__device__ __forceinline__ bool BasisIsUsed(const ProgressiveSequence& s, int run,
                                            const PageRange& visible) {
  const int begin = run > 0 ? s.basis_end[run - 1] : 0;
  return max(begin, visible.begin) < min(s.basis_end[run], visible.end);
}

// Clears the counters of a head's step.
template <class Traits>
__device__ __forceinline__ void ClearCounters(const ProgressiveArgs& p,
                                              const ProgressiveSequence& s, int64_t head_index) {
  constexpr int kD = Traits::kHeadDim;
  static_assert(sizeof(HeadDecision) % 4 == 0, "cleared by words");
  auto* words = reinterpret_cast<uint32_t*>(p.decisions + head_index);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(HeadDecision) / 4); i += 32) words[i] = 0;
  __syncwarp();
  if (threadIdx.x != 0) return;
  if (head_index == 0) *reinterpret_cast<int32_t*>(p.workspace + p.work.num_units) = 0;
  reinterpret_cast<int32_t*>(p.workspace + p.work.merged)[head_index] = 0;
  int used = 0;
  for (int run = 0; run < s.num_bases; ++run) used += BasisIsUsed(s, run, VisiblePages(s)) ? 1 : 0;
  p.decisions[head_index].basis_bytes = used * BasisReadBytes(kD);
}

template <class Traits>
__global__ void __launch_bounds__(kRotateThreads)
    ProgressiveRotateKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim, kSplits = kRotateSplits<Traits>;
  using Shared = RotateShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  LaunchDependents();
  const ProgressiveWorkspace& w = p.work;
  const BasisLayout layout = MakeBasisLayout(p.shape);
  const int head = blockIdx.x / kSplits, split = blockIdx.x % kSplits;
  const int sequence = blockIdx.y, tile = blockIdx.z;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = split * Shared::kChannels, channels = min(Shared::kChannels, kD - begin);
  const PageRange visible = VisiblePages(s);
  LoadColumns<Traits, kRotateThreads>(p, s, head, tile, s.softmax_scale * kLog2E, shared.query);
  for (int run = 0; run < s.num_bases; ++run) {
    if (!BasisIsUsed(s, run, visible)) continue;
    const std::byte* block =
        p.pool + static_cast<int64_t>(s.basis[run]) * kPageAlignment + head * layout.head_bytes;
    FetchBasis<Traits>(block, layout, begin, channels, shared);
    WaitCopies<0>();
    __syncthreads();
    const int64_t at = (head_index * kMaxDeviceBasisRuns + run) * (w.columns / kTileColumns) + tile;
    MultiplySlice<Traits>(shared);
    ColumnSums<Traits>(
        shared, warp, lane,
        split == 0 ? reinterpret_cast<float*>(p.workspace + w.query_mean) + at * kTileColumns
                   : nullptr);
    __syncthreads();
    // Halves up to 16, so that the squares of small products do not vanish.
    const float unit = QueryUnit(shared.norm) * 0.0625f;
    const float inverse = __uint_as_float(0x7f000000u - __float_as_uint(unit));  // of a power of 2
    static_assert(kTileColumns * Shared::kChannels == kRotateThreads, "a thread an element");
    const int local = threadIdx.x % Shared::kChannels, n = threadIdx.x / Shared::kChannels;
    if (local < channels) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < Shared::kSlices; ++i) sum += shared.partial[i][n][local];
      // Channel c = 16k + {2t, 2t + 1, 2t + 8, 2t + 9} of column n is element {0..3} of lane 4n +
      // t.
      const int c = begin + local, in_tile = c % kTileChannels;
      const int target = n * 4 + in_tile % 8 / 2;
      auto* out = reinterpret_cast<__half*>(p.workspace + w.query) + at * kTileColumns * kD;
      out[(c / kTileChannels * 32 + target) * 4 + in_tile / 8 * 2 + in_tile % 2] =
          __float2half_rn(sum * inverse);
    }
    if (split == 0 && threadIdx.x == 0) {
      reinterpret_cast<float*>(p.workspace + w.query_unit)[at] = unit;
    }
    __syncthreads();
  }
  if (tile == 0 && split == 0 && threadIdx.x < 32) ClearCounters<Traits>(p, s, head_index);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ROTATE_CUH_

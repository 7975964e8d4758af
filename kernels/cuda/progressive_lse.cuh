#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_LSE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_LSE_CUH_

// The global LSE of a head, from the masses that the scan left: what shares are relative to.

#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

// The head's estimated LSE L of every column, from the masses of the sequence's runs and of its
// dense tail, to `lse` [columns]. By all of kWarps warps; `parts` is scratch.
template <int kWarps>
__device__ __forceinline__ void GlobalLse(const ProgressiveArgs& p, const ProgressiveSequence& from,
                                          int64_t head_index, float* lse,
                                          float2 (*parts)[kMaxColumns]) {
  const ProgressiveWorkspace& w = p.work;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head = static_cast<int>(head_index % p.shape.num_kv_heads);
  const float* runs = RunMasses(p, p.two_stage ? w.refined_lse : w.scan_lse, from.scan_begin, head);
  const float* dense =
      reinterpret_cast<const float*>(p.workspace + w.dense_lse) + head_index * w.columns;
  const int64_t stride = MassStride(p);
  const int entries = from.num_scan_runs * ScanPlaces(p.shape.num_kv_heads);
  for (int tile = 0; tile < w.columns; tile += kTileColumns) {
    const int column = tile + lane % kTileColumns;
    constexpr int kStep = 4 * kWarps, kAtOnce = 4;
    float high = -INFINITY, sum = 0;
    for (int first = 4 * warp + lane / kTileColumns; first < entries; first += kAtOnce * kStep) {
      float x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int entry = first + i * kStep;
        x[i] = entry < entries ? runs[entry * stride + column] : -INFINITY;
      }
      float next = high;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) next = fmaxf(next, x[i]);
      const float base = next == -INFINITY ? 0.0f : next;
      sum *= Exp2(high - base);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += Exp2(x[i] - base);
      high = next;
    }
#pragma unroll
    for (int step = kTileColumns; step < 32; step *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, high, step);
      const float other_sum = __shfl_xor_sync(0xffffffffu, sum, step);
      const float next = fmaxf(high, other), base = next == -INFINITY ? 0.0f : next;
      // The same order of addition in both lanes.
      const float mine = sum * Exp2(high - base), theirs = other_sum * Exp2(other - base);
      sum = mine + theirs;
      high = next;
    }
    if (lane < kTileColumns) parts[warp][column] = make_float2(high, sum);
  }
  __syncthreads();
  for (int column = threadIdx.x; column < w.columns; column += 32 * kWarps) {
    float high = dense[column];
#pragma unroll
    for (int i = 0; i < kWarps; ++i) high = fmaxf(high, parts[i][column].x);
    const float base = high == -INFINITY ? 0.0f : high;
    float sum = Exp2(dense[column] - base);
#pragma unroll
    for (int i = 0; i < kWarps; ++i) {
      sum = fmaf(parts[i][column].y, Exp2(parts[i][column].x - base), sum);
    }
    lse[column] = high == -INFINITY ? high : high + Log2(sum);
  }
  __syncthreads();
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_LSE_CUH_

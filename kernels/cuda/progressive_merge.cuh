#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_

// Merge: the attend CTAs' sums of one column, brought back from the Hadamard frame, and the dense
// tail -> out, lse, and the column's part of the decision.
//   mass = sum of partial masses + exp2(dense_lse - L);  out = (H^T sum + exp2(...) dense_out) /
//   mass lse  = L + log2 mass
// grid (columns, num_kv_heads, num_sequences), a thread a channel.

#include "kernels/cuda/progressive_attend.cuh"

namespace adaattn {

// Block Hadamard transform of two vectors that the CTA's threads hold, a channel each, times the
// norm. 80 = 64 + 16, 96 = 64 + 32 (format/hadamard.h). Steps below 32 stay inside a warp.
template <class Traits>
__device__ __forceinline__ float2 Hadamard(float2 x, float2* scratch, int channel) {
  constexpr int kD = Traits::kHeadDim;
  constexpr bool kWhole = (kD & (kD - 1)) == 0;
  const int block = kWhole ? kD : channel < 64 ? 64 : kD - 64;
  auto butterfly = [channel](float2 mine, float2 other, int step) {
    return (channel & step) == 0 ? make_float2(mine.x + other.x, mine.y + other.y)
                                 : make_float2(other.x - mine.x, other.y - mine.y);
  };
  // Head dim 80 has half a warp at its end.
  const uint32_t mask = kD % 32 == 0 || channel < kD / 32 * 32 ? 0xffffffffu : 0x0000ffffu;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    if (step >= block) continue;
    const float2 other =
        make_float2(__shfl_xor_sync(mask, x.x, step), __shfl_xor_sync(mask, x.y, step));
    x = butterfly(x, other, step);
  }
#pragma unroll
  for (int step = 32; step < kD; step *= 2) {
    __syncthreads();
    scratch[channel] = x;
    __syncthreads();
    if (step < block) x = butterfly(x, scratch[channel ^ step], step);
  }
  const float norm = rsqrtf(static_cast<float>(block));
  return make_float2(x.x * norm, x.y * norm);
}

__device__ __forceinline__ void StoreElement(void* tensor, int64_t at, DType type, float value) {
  switch (type) {
    case DType::kF32:
      static_cast<float*>(tensor)[at] = value;
      return;
    case DType::kF16:
      static_cast<__half*>(tensor)[at] = __float2half_rn(value);
      return;
    default:
      static_cast<__nv_bfloat16*>(tensor)[at] = __float2bfloat16_rn(value);
      return;
  }
}

// The sums beside a column's partial outputs, by warp 0.
__device__ __forceinline__ AttendState SumStates(const AttendState* states, int chunks,
                                                 int64_t stride, int lane) {
  AttendState sum{};
  for (int i = lane; i < chunks; i += 32) {
    const AttendState state = states[i * stride];
    sum.mass += state.mass;
    sum.entropy += state.entropy;
    sum.weight += state.weight;
    sum.mean_squares += state.mean_squares;
    sum.rest += state.rest;
  }
  sum.mass = WarpSum(sum.mass);
  sum.entropy = WarpSum(sum.entropy);
  sum.weight = WarpSum(sum.weight);
  sum.mean_squares = WarpSum(sum.mean_squares);
  sum.rest = WarpSum(sum.rest);
  return sum;
}

// Adds one column's figures to the head's decision.
__device__ __forceinline__ void StoreFigures(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                             int64_t head_index, bool first, const AttendState& sum,
                                             float norm, float cross) {
  const float error = fmaxf(sum.mean_squares - 2 * cross + norm * sum.weight + sum.rest, 0.0f);
  HeadDecision& decision = p.decisions[head_index];
  const float share = 1.0f / static_cast<float>(p.shape.group_size() * s.q_len);
  // The mean square; the host takes the root once all columns are in.
  atomicAdd(&decision.predicted_error, norm > 0 ? share * error / norm : 0.0f);
  atomicAdd(&decision.entropy, share * sum.entropy);
  if (first && s.decision.policy >= Policy::kThreshold) {
    decision.theta = s.decision.policy == Policy::kBudget
                         ? reinterpret_cast<const float*>(p.workspace + p.work.theta)[head_index]
                         : s.decision.theta;
  }
}

template <class Traits>
__global__ void __launch_bounds__((Traits::kHeadDim + 31) / 32 * 32)
    ProgressiveMergeKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim, kWarps = (kD + 31) / 32;
  __shared__ float2 scratch[kD];
  __shared__ float2 norms[kWarps];
  __shared__ AttendState sums;
  const ProgressiveWorkspace& w = p.work;
  const int column = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z, channel = threadIdx.x;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int group_size = p.shape.group_size();
  const int columns = group_size * s.q_len, q_begin = s.q_begin;
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int chunks = CeilDiv(s.num_sealed, p.attend_chunk);
  if (column >= columns) return;
  WaitForDependencies();
  const int64_t at = head_index * w.columns + column;
  const int64_t slot = head_index * w.attend_chunks * w.columns + column;
  const float* partial = reinterpret_cast<const float*>(p.workspace + w.partial) + slot * 2 * kD;
  const float lse = reinterpret_cast<const float*>(p.workspace + w.global_lse)[at];
  const float dense_lse = reinterpret_cast<const float*>(p.workspace + w.dense_lse)[at];
  const float dense_out =
      reinterpret_cast<const float*>(p.workspace + w.dense_out)[at * kD + channel];
  float2 x = make_float2(0, 0);  // output, weighted mean
#pragma unroll 8
  for (int i = 0; i < chunks; ++i) {
    const float* from = partial + static_cast<int64_t>(i) * w.columns * 2 * kD + channel;
    x.x += from[0];
    x.y += from[kD];
  }
  if (channel < 32) {
    const AttendState sum =
        SumStates(reinterpret_cast<const AttendState*>(p.workspace + w.state) + slot, chunks,
                  w.columns, channel);
    if (channel == 0) sums = sum;
  }
  x = Hadamard<Traits>(x, scratch, channel);
  __syncthreads();
  const float dense_mass = dense_lse == -INFINITY ? 0.0f : Exp2(dense_lse - lse);
  const float mass = sums.mass + dense_mass;
  const float out = mass > 0 ? (x.x + dense_mass * dense_out) / mass : 0.0f;
  const int64_t row = static_cast<int64_t>(q_begin + column / group_size) * p.shape.num_q_heads +
                      head * group_size + column % group_size;
  StoreElement(p.out, row * kD + channel, p.out_type, out);
  const uint32_t mask = kD % 32 == 0 || channel < kD / 32 * 32 ? 0xffffffffu : 0x0000ffffu;
  float norm = out * out, cross = out * x.y;
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    if (step == 16 && mask != 0xffffffffu) continue;
    norm += __shfl_xor_sync(mask, norm, step);
    cross += __shfl_xor_sync(mask, cross, step);
  }
  if (channel % 32 == 0) norms[channel / 32] = make_float2(norm, cross);
  __syncthreads();
  if (channel != 0) return;
  norm = cross = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    norm += norms[i].x;
    cross += norms[i].y;
  }
  p.lse[row] = mass > 0 ? (lse + Log2(mass)) * kLn2 : -INFINITY;
  StoreFigures(p, s, head_index, column == 0, sums, norm, cross);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_

// Merge: the attend CTAs' sums of one column, brought back from the Hadamard frame, and the dense
// tail -> out, lse, and the column's part of the decision.
//   mass = sum of partial masses + exp2(dense_lse - L);  out = (H^T sum + exp2(...) dense_out) /
//   mass lse  = L + log2 mass
// grid (columns, num_kv_heads, num_sequences), a thread a channel.

#include "kernels/cuda/progressive_attend.cuh"

namespace adaattn {

// In-place block Hadamard transform of `values` [head_dim] by all threads of the CTA; thread c
// returns its channel's value. 80 = 64 + 16, 96 = 64 + 32 (format/hadamard.h).
template <class Traits>
__device__ __forceinline__ float Hadamard(float* values, int channel) {
  constexpr int kD = Traits::kHeadDim;
  constexpr bool kWhole = (kD & (kD - 1)) == 0;
  const int block = kWhole ? kD : channel < 64 ? 64 : kD - 64;
  float x = values[channel];
#pragma unroll
  for (int step = 1; step < kD; step *= 2) {
    __syncthreads();
    values[channel] = x;
    __syncthreads();
    if (step < block) {
      const float other = values[channel ^ step];
      x = (channel & step) == 0 ? x + other : other - x;
    }
  }
  return x * rsqrtf(static_cast<float>(block));
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

// Sum of x over the CTA's threads; every thread gets it.
template <int kThreads>
__device__ __forceinline__ float CtaSum(float x, float* scratch) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < (kThreads + 31) / 32; ++i) sum += scratch[i];
  return sum;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kHeadDim)
    ProgressiveMergeKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim;
  static_assert(kD % 16 == 0, "a thread a channel");
  __shared__ float values[kD];
  __shared__ float scratch[(kD + 31) / 32];
  const ProgressiveWorkspace& w = p.work;
  const int column = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z, channel = threadIdx.x;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int group_size = p.shape.group_size();
  if (column >= group_size * s.q_len) return;
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int chunks = CeilDiv(s.num_sealed, p.attend_chunk);
  WaitForDependencies();
  const int64_t slot = head_index * w.attend_chunks;
  const float* partial = reinterpret_cast<const float*>(p.workspace + w.partial) +
                         (slot * w.columns + column) * 2 * kD + channel;
  const AttendState* states =
      reinterpret_cast<const AttendState*>(p.workspace + w.state) + slot * w.columns + column;
  float out = 0, weighted = 0;
#pragma unroll 8
  for (int i = 0; i < chunks; ++i) {
    out += partial[static_cast<int64_t>(i) * w.columns * 2 * kD];
    weighted += partial[static_cast<int64_t>(i) * w.columns * 2 * kD + kD];
  }
  AttendState sum{};
  for (int i = channel; i < chunks; i += kD) {
    const AttendState state = states[static_cast<int64_t>(i) * w.columns];
    sum.mass += state.mass;
    sum.entropy += state.entropy;
    sum.weight += state.weight;
    sum.mean_squares += state.mean_squares;
    sum.rest += state.rest;
  }
  sum.mass = CtaSum<kD>(sum.mass, scratch);
  sum.entropy = CtaSum<kD>(sum.entropy, scratch);
  sum.weight = CtaSum<kD>(sum.weight, scratch);
  sum.mean_squares = CtaSum<kD>(sum.mean_squares, scratch);
  sum.rest = CtaSum<kD>(sum.rest, scratch);
  const float lse =
      reinterpret_cast<const float*>(p.workspace + w.global_lse)[head_index * w.columns + column];
  const float dense_lse =
      reinterpret_cast<const float*>(p.workspace + w.dense_lse)[head_index * w.columns + column];
  const float dense_mass = dense_lse == -INFINITY ? 0.0f : Exp2(dense_lse - lse);
  const float dense_out = reinterpret_cast<const float*>(
      p.workspace + w.dense_out)[(head_index * w.columns + column) * kD + channel];
  const float mass = sum.mass + dense_mass;
  values[channel] = out;
  out = Hadamard<Traits>(values, channel);
  __syncthreads();
  values[channel] = weighted;
  weighted = Hadamard<Traits>(values, channel);
  out = mass > 0 ? (out + dense_mass * dense_out) / mass : 0.0f;
  const float norm = CtaSum<kD>(out * out, scratch);
  const float cross = CtaSum<kD>(out * weighted, scratch);
  const int64_t row = static_cast<int64_t>(s.q_begin + column / group_size) * p.shape.num_q_heads +
                      head * group_size + column % group_size;
  StoreElement(p.out, row * kD + channel, p.out_type, out);
  if (channel == 0) {
    p.lse[row] = mass > 0 ? (lse + Log2(mass)) * kLn2 : -INFINITY;
    const float error = fmaxf(sum.mean_squares - 2 * cross + norm * sum.weight + sum.rest, 0.0f);
    HeadDecision& decision = p.decisions[head_index];
    const float share = 1.0f / static_cast<float>(group_size * s.q_len);
    // The mean square; the host takes the root once all columns are in.
    atomicAdd(&decision.predicted_error, norm > 0 ? share * error / norm : 0.0f);
    atomicAdd(&decision.entropy, share * sum.entropy);
    if (column == 0 && s.decision.policy >= Policy::kThreshold) {
      decision.theta = s.decision.policy == Policy::kBudget
                           ? reinterpret_cast<const float*>(p.workspace + w.theta)[head_index]
                           : s.decision.theta;
    }
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_

#ifndef ADAATTN_KERNELS_CUDA_DECODE_EPILOGUE_CUH_
#define ADAATTN_KERNELS_CUDA_DECODE_EPILOGUE_CUH_

// The two ends of an item of exact decode: q into MMA fragments, and the sums of warps and of
// splits into outputs.

#include <math_constants.h>

#include <cstdint>

#include "kernels/cuda/decode_traits.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/params.h"

namespace adaattn {

// Element index in q (and out) of channel 0 of row `row` of kv head `kv_head`: rows are q row by q
// row, the q heads of the group side by side.
__device__ __forceinline__ int64_t QueryRow(const DecodeParams& p, const DeviceSequence& sequence,
                                            int32_t kv_head, int32_t row) {
  const int32_t group_size = p.num_q_heads / p.num_kv_heads;
  return int64_t{sequence.q_row + row / group_size} * p.num_q_heads + kv_head * group_size +
         row % group_size;
}

// The power of two that brings the row's largest magnitude to [1, 2); 1 for a row of zeros.
template <class Traits>
__device__ __forceinline__ float RowScale(const DecodeParams& p, int64_t q_row, int32_t lane) {
  float most = 0;
  for (int32_t c = lane; c < Traits::kHeadDim; c += 32) {
    most = fmaxf(most, fabsf(LoadElement(p.q, p.in_type, q_row * Traits::kHeadDim + c)));
  }
  for (int offset = 1; offset < 32; offset *= 2) {
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
  }
  // Below 2^-60 the scores are 0 for any keys that FP16 holds.
  const int32_t exponent = static_cast<int32_t>(__float_as_uint(most) >> 23) - 127;
  if (exponent < -60 || exponent > 100) return 1.0f;
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

// Writes q of the item's rows to shared memory in fragment order; rows past the end are zero.
// Returns whether this thread's part of query_rest is anything but zeros, which it is for a q of
// more bits than Operand has.
template <class Traits>
__device__ __forceinline__ bool StageQuery(const DecodeParams& p, const DecodeItem& item,
                                           const DeviceSequence& sequence,
                                           typename Traits::Smem& smem) {
  const int32_t group_size = p.num_q_heads / p.num_kv_heads;
  const int32_t num_rows = group_size * sequence.q_len;
  const int32_t first_row = item.row_block * Traits::kRows;
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int32_t r = warp; r < Traits::kRows; r += Traits::kWarps) {
    float scale = 1;
    if (Traits::kScaleRows && first_row + r < num_rows) {
      scale = RowScale<Traits>(p, QueryRow(p, sequence, item.kv_head, first_row + r), lane);
    }
    if (lane == 0) {
      smem.row_scale[r] = scale;
      smem.row_keys[r] = RowKeys(sequence, min(first_row + r, num_rows - 1) / group_size);
    }
  }
  __syncthreads();
  using Operand = typename Traits::Operand;
  uint32_t rest_bits = 0;
  for (int32_t i = threadIdx.x; i < Traits::kSteps * Traits::kRowTiles * 32;
       i += Traits::kThreads) {
    const int32_t n = i / 32 % Traits::kRowTiles, step = i / 32 / Traits::kRowTiles;
    const int32_t r = n * 8 + lane / 4;
    float x[4] = {};
    if (first_row + r < num_rows) {
      const int64_t row = QueryRow(p, sequence, item.kv_head, first_row + r);
      LoadFour(p.q, p.in_type, row * Traits::kHeadDim + Traits::KeyChannel(step, lane % 4), x);
      const float inverse = 1.0f / smem.row_scale[r];
      for (float& value : x) value *= inverse;
    }
    const uint2 query = make_uint2(PackPair<Operand>(x[0], x[1]), PackPair<Operand>(x[2], x[3]));
    const float2 low = UnpackPair<Operand>(query.x), high = UnpackPair<Operand>(query.y);
    const uint2 rest = make_uint2(PackPair<Operand>(x[0] - low.x, x[1] - low.y),
                                  PackPair<Operand>(x[2] - high.x, x[3] - high.y));
    smem.query[step][n][lane] = query;
    smem.query_rest[step][n][lane] = rest;
    rest_bits |= rest.x | rest.y;
  }
  return (rest_bits & 0x7fff7fffu) != 0;
}

// A warp's state of a row: max, sum, mean.
__device__ __forceinline__ void WriteWarpState(float* at, float3 state) {
  *reinterpret_cast<float4*>(at) = make_float4(state.x, state.y, state.z, 0);
}

// Leaves the warps' states and sums in shared memory. The ring must be idle.
template <class Traits>
__device__ __forceinline__ float* SpillWarps(
    RowState<Traits>& state, const float (&sums)[Traits::kRowTiles][Traits::kSteps][4],
    typename Traits::Smem& smem) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t g = lane / 4, t = lane % 4;
  float* all = reinterpret_cast<float*>(smem.ring);
  float* mine = all + warp * Traits::kRows * Traits::kSumStride;
#pragma unroll
  for (int n = 0; n < Traits::kRowTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float sum = state.sum[n][c], mean = state.mean[n][c];
      for (int offset = 4; offset < 32; offset *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        mean += __shfl_xor_sync(0xffffffffu, mean, offset);
      }
      const int32_t row = n * 8 + 2 * t + c;
      if (g == 0) {
        WriteWarpState(mine + row * Traits::kSumStride + Traits::kHeadDim,
                       make_float3(state.max[n][c], sum, mean));
      }
#pragma unroll
      for (int i = 0; i < Traits::kSteps; ++i) {
        *reinterpret_cast<float2*>(mine + row * Traits::kSumStride + Traits::ValueChannel(i, g)) =
            make_float2(sums[n][i][c], sums[n][i][2 + c]);
      }
    }
  }
  return all;
}

// lse_log2 and mean score of a row over all warps, whose sums and states `all` holds; minus
// infinity where no key was seen.
template <class Traits>
__device__ __forceinline__ float2 JoinWarpStates(const float* all, int32_t row,
                                                 float (&weights)[Traits::kWarps]) {
  float4 states[Traits::kWarps];
  float top = kMasked, sum = 0, mean = 0;
#pragma unroll
  for (int w = 0; w < Traits::kWarps; ++w) {
    const int32_t at = (w * Traits::kRows + row) * Traits::kSumStride + Traits::kHeadDim;
    states[w] = *reinterpret_cast<const float4*>(all + at);
    top = fmaxf(top, states[w].x);
  }
#pragma unroll
  for (int w = 0; w < Traits::kWarps; ++w) {
    weights[w] = Exp2(states[w].x - top);
    sum = fmaf(weights[w], states[w].y, sum);
    mean = fmaf(weights[w], states[w].z, mean);
  }
  const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
#pragma unroll
  for (int w = 0; w < Traits::kWarps; ++w) weights[w] *= inverse;
  return make_float2(sum > 0 ? top + log2f(sum) : -CUDART_INF_F, mean * inverse);
}

// One row's lse, and its entropy for the decision: H = lse - mean score.
__device__ __forceinline__ float WriteRowState(const DecodeParams& p, int64_t q_row, float2 state) {
  p.lse[q_row] = state.x * CUDART_LN2_F;
  return state.x > kMasked ? (state.x - state.y) * CUDART_LN2_F : 0.0f;
}

// Joins the group's parts, which other CTAs wrote, and writes the outputs.
template <class Traits>
__device__ __forceinline__ float MergeSplits(const DecodeParams& p, const DecodeItem& item,
                                             const DeviceSequence& sequence, int32_t num_rows,
                                             float value_scale, typename Traits::Smem& smem) {
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float entropy = 0;
  float* weights = reinterpret_cast<float*>(smem.ring);  // [num_rows, num_splits]
  const int64_t first = int64_t{item.first_slot} * Traits::kRows;
  for (int32_t row = warp; row < num_rows; row += Traits::kWarps) {
    const float2* states = p.partial_state + first + row;
    float top = kMasked, sum = 0, mean = 0;
    for (int32_t i = lane; i < item.num_splits; i += 32) {
      top = fmaxf(top, __ldcg(states + i * Traits::kRows).x);
    }
    for (int offset = 1; offset < 32; offset *= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, offset));
    }
    for (int32_t i = lane; i < item.num_splits; i += 32) {
      const float2 state = __ldcg(states + i * Traits::kRows);
      const float weight = Exp2(state.x - top);
      weights[row * item.num_splits + i] = weight;
      sum += weight;
      mean = fmaf(weight, state.y, mean);
    }
    for (int offset = 1; offset < 32; offset *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, offset);
      mean += __shfl_xor_sync(0xffffffffu, mean, offset);
    }
    const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
    __syncwarp();
    for (int32_t i = lane; i < item.num_splits; i += 32) {
      weights[row * item.num_splits + i] *= inverse;
    }
    if (lane == 0) {
      const float2 state = make_float2(sum > 0 ? top + log2f(sum) : -CUDART_INF_F, mean * inverse);
      const int32_t at = item.row_block * Traits::kRows + row;
      entropy += WriteRowState(p, QueryRow(p, sequence, item.kv_head, at), state);
    }
  }
  __syncthreads();
  constexpr int kPieces = Traits::kHeadDim / 4;
  for (int32_t i = threadIdx.x; i < num_rows * kPieces; i += Traits::kThreads) {
    const int32_t row = i / kPieces, channel = i % kPieces * 4;
    const float* part = p.partial_out + (first + row) * Traits::kHeadDim + channel;
    float4 out = {};
#pragma unroll 8
    for (int32_t split = 0; split < item.num_splits; ++split) {
      const float weight = weights[row * item.num_splits + split] * value_scale;
      const float4 x = __ldcg(reinterpret_cast<const float4*>(
          part + int64_t{split} * Traits::kRows * Traits::kHeadDim));
      out.x = fmaf(weight, x.x, out.x), out.y = fmaf(weight, x.y, out.y);
      out.z = fmaf(weight, x.z, out.z), out.w = fmaf(weight, x.w, out.w);
    }
    const int32_t at = item.row_block * Traits::kRows + row;
    StoreFour(p.out, p.out_type,
              QueryRow(p, sequence, item.kv_head, at) * Traits::kHeadDim + channel, out);
  }
  return entropy;
}

// True in the CTA that finishes its group last, for all of its threads; by then it sees all parts.
template <class Traits>
__device__ __forceinline__ bool IsLastSplit(const DecodeParams& p, const DecodeItem& item,
                                            typename Traits::Smem& smem) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    smem.is_last = atomicAdd(p.counters + item.group, 1) == item.num_splits - 1;
    if (smem.is_last) p.counters[item.group] = 0;
  }
  __syncthreads();
  const bool is_last = smem.is_last != 0;
  if (is_last) __threadfence();
  return is_last;
}

// What the item loaded of one kv head: `bytes` of K, and as many of V.
__device__ __forceinline__ void CountTokens(HeadDecision& decision, int32_t tokens, int64_t bytes) {
  using Counter = unsigned long long;
  atomicAdd(&decision.dense_tokens, tokens);
  atomicAdd(reinterpret_cast<Counter*>(&decision.key_bytes), static_cast<Counter>(bytes));
  atomicAdd(reinterpret_cast<Counter*>(&decision.value_bytes), static_cast<Counter>(bytes));
}

// Joins the warps and writes the item's part, or, in the last part of its group, the outputs.
template <class Traits>
__device__ __forceinline__ void FinishItem(
    const DecodeParams& p, const DecodeItem& item, const DeviceSequence& sequence,
    int32_t num_tokens, RowState<Traits>& state,
    const float (&sums)[Traits::kRowTiles][Traits::kSteps][4], typename Traits::Smem& smem) {
  __syncthreads();
  const float* all = SpillWarps<Traits>(state, sums, smem);
  __syncthreads();
  const int32_t all_rows = p.num_q_heads / p.num_kv_heads * sequence.q_len;
  const int32_t num_rows = min(all_rows - item.row_block * Traits::kRows, Traits::kRows);
  const float value_scale =
      sequence.value_scales < 0 ? 1.0f : p.scales[sequence.value_scales + item.kv_head];
  const bool whole = item.num_splits == 1;
  float entropy = 0;
  constexpr int kPieces = Traits::kHeadDim / 4;
  for (int32_t i = threadIdx.x; i < num_rows * kPieces; i += Traits::kThreads) {
    const int32_t row = i / kPieces, channel = i % kPieces * 4;
    float weights[Traits::kWarps];
    const float2 joined = JoinWarpStates<Traits>(all, row, weights);
    float4 out = {};
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      const float4 x = *reinterpret_cast<const float4*>(
          all + (w * Traits::kRows + row) * Traits::kSumStride + channel);
      const float weight = whole ? weights[w] * value_scale : weights[w];
      out.x = fmaf(weight, x.x, out.x), out.y = fmaf(weight, x.y, out.y);
      out.z = fmaf(weight, x.z, out.z), out.w = fmaf(weight, x.w, out.w);
    }
    if (whole) {
      const int32_t at = item.row_block * Traits::kRows + row;
      const int64_t q_row = QueryRow(p, sequence, item.kv_head, at);
      StoreFour(p.out, p.out_type, q_row * Traits::kHeadDim + channel, out);
      if (channel == 0) entropy += WriteRowState(p, q_row, joined);
    } else {
      const int64_t at = int64_t{item.slot} * Traits::kRows + row;
      *reinterpret_cast<float4*>(p.partial_out + at * Traits::kHeadDim + channel) = out;
      if (channel == 0) p.partial_state[at] = joined;
    }
  }
  if (!whole && IsLastSplit<Traits>(p, item, smem)) {
    entropy = MergeSplits<Traits>(p, item, sequence, num_rows, value_scale, smem);
  }
  if (p.decisions != nullptr) {
    HeadDecision& decision = p.decisions[item.sequence * p.num_kv_heads + item.kv_head];
    if (entropy != 0) atomicAdd(&decision.entropy, entropy / static_cast<float>(all_rows));
    if (threadIdx.x == 0)
      CountTokens(decision, num_tokens, int64_t{num_tokens} * Traits::kRowBytes);
  }
  // The ring goes back to the copy engine.
  FenceAsyncShared();
  __syncthreads();
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_DECODE_EPILOGUE_CUH_

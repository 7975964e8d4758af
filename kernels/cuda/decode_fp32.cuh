#ifndef ADAATTN_KERNELS_CUDA_DECODE_FP32_CUH_
#define ADAATTN_KERNELS_CUDA_DECODE_FP32_CUH_

// Decode attention over FP32 pages in FP32 arithmetic: the exact tier, for judging and not for
// speed. Formula, schedule and epilogue are those of decode_exact.cuh.
// grid (num_ctas); a warp takes every fourth token, a lane every 32nd channel, eight rows at a
// time: the pages are read again, from L2, for each further eight rows of the block.

#include <math_constants.h>

#include "absl/status/status.h"
#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/decode_epilogue.cuh"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/warp.cuh"
#include "kernels/format/page_layout.h"

namespace adaattn {

template <int kHeadDimV, int kRowTilesV>
struct DecodeFp32Traits {
  static constexpr int kHeadDim = kHeadDimV, kRowTiles = kRowTilesV, kRows = 8 * kRowTiles;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kRowBytes = 4 * kHeadDim;
  static constexpr int kChannels = (kHeadDim + 31) / 32;  // of a lane
  static constexpr int kSumStride = kHeadDim + kRowStateFloats;
  // The merge keeps a weight for each row and split there.
  static constexpr int kRingFloats = kWarps * kRows * kSumStride + kRows * kMaxDecodeCtas;
  struct Smem {
    alignas(128) float ring[kRingFloats];
    int32_t is_last;
  };
};

// Softmax state of eight rows, the same in all lanes of a warp, and the lane's channels of the
// sums.
template <class Traits>
struct Fp32Rows {
  float query[8][Traits::kChannels];
  float sums[8][Traits::kChannels];
  float max[8], sum[8], mean[8];
  KeyRange keys[8];
};

template <class Traits>
__device__ __forceinline__ void StartFp32Rows(const DecodeParams& p, const DecodeItem& item,
                                              const DeviceSequence& sequence, int32_t first_row,
                                              int32_t lane, Fp32Rows<Traits>& rows) {
  const int32_t group_size = p.num_q_heads / p.num_kv_heads;
  const int32_t num_rows = group_size * sequence.q_len;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    const int32_t row = first_row + r;
    rows.keys[r] = row < num_rows ? RowKeys(sequence, row / group_size) : KeyRange{0, 0};
    rows.max[r] = kMasked;
    rows.sum[r] = rows.mean[r] = 0;
#pragma unroll
    for (int i = 0; i < Traits::kChannels; ++i) {
      const int32_t channel = lane + 32 * i;
      rows.sums[r][i] = 0;
      rows.query[r][i] =
          row < num_rows && channel < Traits::kHeadDim
              ? LoadElement(p.q, p.in_type,
                            QueryRow(p, sequence, item.kv_head, row) * Traits::kHeadDim + channel)
              : 0.0f;
    }
  }
}

// Moves the state on by one token. `scale` brings scores to base 2.
template <class Traits>
__device__ __forceinline__ void AttendFp32Token(const float* key, const float* value, int32_t token,
                                                float scale, float cap, int32_t lane,
                                                Fp32Rows<Traits>& rows) {
  float k[Traits::kChannels], v[Traits::kChannels];
#pragma unroll
  for (int i = 0; i < Traits::kChannels; ++i) {
    const int32_t channel = lane + 32 * i;
    k[i] = channel < Traits::kHeadDim ? key[channel] : 0.0f;
    v[i] = channel < Traits::kHeadDim ? value[channel] : 0.0f;
  }
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    if (token < rows.keys[r].begin || token >= rows.keys[r].end) continue;
    float s = 0;
#pragma unroll
    for (int i = 0; i < Traits::kChannels; ++i) s = fmaf(rows.query[r][i], k[i], s);
    s = WarpSum(s);
    s *= scale;
    if (cap > 0) s = cap * tanhf(s / cap);
    const float top = fmaxf(rows.max[r], s);
    const float old = exp2f(rows.max[r] - top), weight = exp2f(s - top);
    rows.max[r] = top;
    rows.sum[r] = fmaf(rows.sum[r], old, weight);
    rows.mean[r] = fmaf(rows.mean[r], old, weight * s);
#pragma unroll
    for (int i = 0; i < Traits::kChannels; ++i) {
      rows.sums[r][i] = fmaf(rows.sums[r][i], old, weight * v[i]);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void SpillFp32Rows(const Fp32Rows<Traits>& rows, int32_t first,
                                              int32_t warp, int32_t lane,
                                              typename Traits::Smem& smem) {
  float* mine = smem.ring + (warp * Traits::kRows + first) * Traits::kSumStride;
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    if (lane == 0) {
      WriteWarpState(mine + r * Traits::kSumStride + Traits::kHeadDim,
                     make_float3(rows.max[r], rows.sum[r], rows.mean[r]));
    }
#pragma unroll
    for (int i = 0; i < Traits::kChannels; ++i) {
      const int32_t channel = lane + 32 * i;
      if (channel < Traits::kHeadDim) mine[r * Traits::kSumStride + channel] = rows.sums[r][i];
    }
  }
}

// Joins the warps, whose states and sums lie in shared memory, and writes the item's part, or, in
// the last part of its group, the outputs.
template <class Traits>
__device__ __forceinline__ void FinishFp32Item(const DecodeParams& p, const DecodeItem& item,
                                               const DeviceSequence& sequence, int32_t num_tokens,
                                               typename Traits::Smem& smem) {
  const float* all = reinterpret_cast<const float*>(smem.ring);
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
  __syncthreads();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    DecodeFp32Kernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) uint8_t raw[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(raw);
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int32_t last_item = p.cta_items[blockIdx.x + 1];
  for (int32_t index = p.cta_items[blockIdx.x]; index < last_item; ++index) {
    const DecodeItem item = p.items[index];
    const DeviceSequence& sequence = p.sequences[item.sequence];
    const KeyRange range = AttendedKeys(sequence);
    const int32_t begin = max(item.page_begin * kPageTokens, range.begin);
    const int32_t end = min(item.page_end * kPageTokens, range.end);
    const float scale = sequence.softmax_scale * CUDART_L2E_F,
                cap = sequence.softcap * CUDART_L2E_F;
#pragma unroll 1  // Eight rows fill the registers.
    for (int32_t first = 0; first < Traits::kRows; first += 8) {
      Fp32Rows<Traits> rows;
      StartFp32Rows<Traits>(p, item, sequence, item.row_block * Traits::kRows + first, lane, rows);
#pragma unroll 1
      for (int32_t token = begin + warp; token < end; token += Traits::kWarps) {
        const PageId page{p.page_table[sequence.page_table + token / kPageTokens]};
        const auto* keys =
            reinterpret_cast<const float*>(p.memory.At(page)) +
            (int64_t{item.kv_head} * kPageTokens + token % kPageTokens) * Traits::kHeadDim;
        const float* values = keys + int64_t{p.num_kv_heads} * kPageTokens * Traits::kHeadDim;
        AttendFp32Token<Traits>(keys, values, token, scale, cap, lane, rows);
      }
      SpillFp32Rows<Traits>(rows, first, warp, lane, smem);
    }
    __syncthreads();
    FinishFp32Item<Traits>(p, item, sequence, max(end - begin, 0), smem);
  }
}

template <class Traits>
absl::Status LaunchDecodeFp32(const DecodeParams& p, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(typename Traits::Smem));
  static const cudaError_t configured = cudaFuncSetAttribute(
      DecodeFp32Kernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  ADAATTN_RETURN_IF_ERROR(FromCuda(configured, "cudaFuncSetAttribute(DecodeFp32Kernel)"));
  DecodeFp32Kernel<Traits><<<p.num_ctas, Traits::kThreads, kBytes, stream>>>(p);
  return FromCuda(cudaGetLastError(), "DecodeFp32Kernel");
}

// Picks the variant for `row_tiles` (1, 2 or 4; head_dim 256: 1 or 2).
template <int kHeadDim>
absl::Status LaunchDecodeFp32Rows(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream) {
  if (row_tiles == 1) return LaunchDecodeFp32<DecodeFp32Traits<kHeadDim, 1>>(p, stream);
  if (row_tiles == 2) return LaunchDecodeFp32<DecodeFp32Traits<kHeadDim, 2>>(p, stream);
  if constexpr (kHeadDim <= 128) {
    if (row_tiles == 4) return LaunchDecodeFp32<DecodeFp32Traits<kHeadDim, 4>>(p, stream);
  }
  return absl::InternalError("DecodeFp32Kernel: no variant for these row tiles");
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_DECODE_FP32_CUH_

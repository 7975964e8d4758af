#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_DENSE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_DENSE_CUH_

// The dense tail of a progressive sequence: its newest pages, BF16 or FP16, attended exactly by one
// CTA per (sequence, kv head) beside the scan. Usually 64 to 128 tokens, so plain FP32 arithmetic.
//   dense_lse = log2 sum_t exp2(s_t);  dense_out = sum_t exp2(s_t - dense_lse) v_t

#include <cuda_bf16.h>

#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

inline constexpr int kDenseThreads = 256;

template <class Traits>
struct DenseShared {
  static constexpr int kStride = Traits::kHeadDim + 8;  // keeps 16-byte rows off one bank
  alignas(16) uint16_t key[kPageTokens * kStride];
  alignas(16) uint16_t value[kPageTokens * kStride];
  alignas(16) float query[kTileColumns][Traits::kHeadDim];
  float score[kTileColumns][kPageTokens];
  float rescale[kTileColumns];
  float max[kTileColumns];
  float sum[kTileColumns];
};

__device__ __forceinline__ float LoadElement(const void* tensor, int64_t at, DType type) {
  switch (type) {
    case DType::kF32:
      return static_cast<const float*>(tensor)[at];
    case DType::kF16:
      return __half2float(static_cast<const __half*>(tensor)[at]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(tensor)[at]);
  }
}

// Two neighbours of a dense page; the lower half comes first.
__device__ __forceinline__ float2 UnpackPair(uint32_t pair, DType type) {
  if (type == DType::kF16) return HalvesToFloats(pair);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Copies the queries of a head's columns to `query` [8][head_dim], times `scale`; absent columns 0.
// By the first kThreads threads of the CTA.
template <class Traits, int kThreads>
__device__ __forceinline__ void LoadColumns(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                            int head, int column_tile, float scale, float* query) {
  const int group_size = p.shape.group_size();
  for (int i = threadIdx.x; i < kTileColumns * Traits::kHeadDim; i += kThreads) {
    const int column = column_tile * kTileColumns + i / Traits::kHeadDim;
    const int channel = i % Traits::kHeadDim;
    float x = 0;
    if (column < group_size * s.q_len) {
      const int64_t row =
          static_cast<int64_t>(s.q_begin + column / group_size) * p.shape.num_q_heads +
          head * group_size + column % group_size;
      x = scale * LoadElement(p.q, row * Traits::kHeadDim + channel, p.in_type);
    }
    query[i] = x;
  }
}

// One warp per column: scores of 64 tokens to exp2(score - max), the running state updated.
template <class Traits>
__device__ __forceinline__ void DenseSoftmax(DenseShared<Traits>& shared, int warp, int lane) {
  float* score = shared.score[warp];
  float high = fmaxf(score[lane], score[lane + 32]);
#pragma unroll
  for (int i = 16; i > 0; i /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, i));
  const float old = shared.max[warp], next = fmaxf(old, high);
  const float base = next == -INFINITY ? 0.0f : next;
  const float a = Exp2(score[lane] - base), b = Exp2(score[lane + 32] - base);
  score[lane] = a;
  score[lane + 32] = b;
  float sum = a + b;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
  __syncwarp();
  if (lane == 0) {
    const float rescale = Exp2(old - base);
    shared.rescale[warp] = rescale;
    shared.sum[warp] = shared.sum[warp] * rescale + sum;
    shared.max[warp] = next;
  }
}

template <class Traits>
__device__ __noinline__ void DenseTail(const ProgressiveArgs& p, int sequence, int head,
                                       int column_tile) {
  constexpr int kD = Traits::kHeadDim, kStride = DenseShared<Traits>::kStride;
  constexpr int kParts = kDenseThreads / kD;  // threads that share a channel
  constexpr int kColumnsEach = (kTileColumns + kParts - 1) / kParts;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<DenseShared<Traits>*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const ProgressiveSequence& s = p.sequences[sequence];
  const SequenceView view(s);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int part = threadIdx.x / kD, channel = threadIdx.x % kD;
  const int group_size = p.shape.group_size();
  LoadColumns<Traits, kDenseThreads>(p, s, head, column_tile, s.softmax_scale * kLog2E,
                                     &shared.query[0][0]);
  const int column_begin = column_tile * kTileColumns;
  if (threadIdx.x < kTileColumns) {
    shared.max[threadIdx.x] = -INFINITY;
    shared.sum[threadIdx.x] = 0;
  }
  float out[kColumnsEach] = {};
  const int num_pages = CeilDiv(s.kv_len, kPageTokens);
  int64_t tokens_read = 0;
  for (int page = s.num_sealed; page < num_pages; ++page) {
    if (PageVisibility(view, page) == Visibility::kNone) continue;
    const std::byte* base =
        p.pool + static_cast<int64_t>(p.table[s.table_begin + page]) * kPageAlignment;
    const int tokens = min(kPageTokens, s.kv_len - page * kPageTokens);
    tokens_read += tokens;
    const std::byte* key = base + DenseKeyOffset(head, kD, p.page_type);
    const std::byte* value = base + DenseValueOffset(p.shape, head, p.page_type);
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * (kD / 8); i += kDenseThreads) {
      const int row = i / (kD / 8), at = i % (kD / 8) * 8;
      CopyAsync16(shared.key + row * kStride + at, key + i * 16);
      CopyAsync16(shared.value + row * kStride + at, value + i * 16);
    }
    CommitCopies();
    WaitCopies<0>();
    __syncthreads();
    const int token = threadIdx.x % kPageTokens;
    for (int column = threadIdx.x / kPageTokens; column < kTileColumns;
         column += kDenseThreads / kPageTokens) {
      float score = -INFINITY;
      if (token < tokens && column_begin + column < group_size * s.q_len &&
          TokenVisible(view, page * kPageTokens + token, (column_begin + column) / group_size)) {
        score = 0;
        const uint4* row = reinterpret_cast<const uint4*>(shared.key + token * kStride);
#pragma unroll 1
        for (int i = 0; i < kD / 8; ++i) {
          const uint4 words = row[i];
          const float* q = &shared.query[column][i * 8];
          const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float2 k = UnpackPair(word[j], p.page_type);
            score = fmaf(q[2 * j], k.x, score);
            score = fmaf(q[2 * j + 1], k.y, score);
          }
        }
        score = SoftCap<Traits>(score, s.softcap);
      }
      shared.score[column][token] = score;
    }
    __syncthreads();
    DenseSoftmax<Traits>(shared, warp, lane);
    __syncthreads();
    if (part < kParts) {
#pragma unroll
      for (int j = 0; j < kColumnsEach; ++j) {
        out[j] *= shared.rescale[min(part * kColumnsEach + j, kTileColumns - 1)];
      }
#pragma unroll 2
      for (int t = 0; t < tokens; ++t) {
        const float v = LoadElement(shared.value, t * kStride + channel, p.page_type);
#pragma unroll
        for (int j = 0; j < kColumnsEach; ++j) {
          out[j] = fmaf(shared.score[min(part * kColumnsEach + j, kTileColumns - 1)][t], v, out[j]);
        }
      }
    }
  }
  LaunchDependents();
  __syncthreads();
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int64_t first = head_index * w.columns + column_begin;
  float* lse = reinterpret_cast<float*>(p.workspace + w.dense_lse) + first;
  float* result = reinterpret_cast<float*>(p.workspace + w.dense_out) + first * kD;
#pragma unroll
  for (int j = 0; j < kColumnsEach; ++j) {
    const int column = part * kColumnsEach + j;
    if (part >= kParts || column >= kTileColumns) continue;
    const float sum = shared.sum[column];
    result[column * kD + channel] = sum > 0 ? out[j] / sum : 0.0f;
    if (channel == 0) lse[column] = sum > 0 ? shared.max[column] + Log2(sum) : -INFINITY;
  }
  // The rotate kernel clears the decisions: count after it.
  WaitForDependencies();
  if (threadIdx.x == 0 && column_tile == 0) {
    HeadDecision& decision = p.decisions[head_index];
    atomicAdd(&decision.dense_tokens, static_cast<int32_t>(tokens_read));
    AddBytes(&decision.key_bytes, tokens_read * kD * 2);
    AddBytes(&decision.value_bytes, tokens_read * kD * 2);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_DENSE_CUH_

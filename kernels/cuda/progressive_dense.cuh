#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_DENSE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_DENSE_CUH_

// The dense tail of a progressive sequence: its newest pages, BF16 or FP16, attended exactly by one
// CTA per (sequence, kv head) beside the scan. Usually 64 to 128 tokens, so plain FP32 arithmetic.
//   dense_lse = log2 sum_t exp2(s_t);  dense_out = sum_t exp2(s_t - dense_lse) v_t

#include <cuda_bf16.h>

#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

inline constexpr int kDenseThreads = 256;

inline constexpr int kDenseTokens = 2 * kPageTokens;  // fetched at once

template <class Traits>
struct DenseShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kStride = kD + 8;                 // keeps 16-byte rows off one bank
  static constexpr int kPairs = kD / 2;                  // of channels, a thread each
  static constexpr int kParts = kDenseThreads / kPairs;  // of the tokens
  // Later the parts' sums.
  alignas(16) uint16_t key[kDenseTokens * kStride];
  alignas(16) uint16_t value[kDenseTokens * kStride];
  alignas(16) float query[kTileColumns][kD];
  alignas(16) float score[kDenseTokens][kTileColumns];
  float rescale[kTileColumns];
  float max[kTileColumns];
  float sum[kTileColumns];
  float score_sum[kTileColumns];  // of exp2(score - max) * score
  static_assert(2 * kDenseTokens * kStride * 2 >= kParts * kTileColumns * kD * 4,
                "the parts' sums take the place of keys and values");
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

// Tokens [begin, end) of the dense tail that some row sees.
struct TokenRange {
  int begin, end;
};
__device__ __forceinline__ TokenRange VisibleTail(const ProgressiveSequence& s) {
  TokenRange range;
  range.end = min(s.kv_len, s.q_start + s.q_len);
  range.begin = max(s.num_sealed * kPageTokens, s.window > 0 ? s.q_start - s.window + 1 : 0);
  range.begin = min(range.begin, range.end);
  return range;
}

// Starts the copies of K and V rows of tokens [begin, end) of the cache.
template <class Traits>
__device__ __forceinline__ void FetchTail(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                          int head, int begin, int end,
                                          DenseShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kPieces = kD / 8;
  const int64_t key = DenseKeyOffset(head, kD, p.page_type);
  const int64_t value = DenseValueOffset(p.shape, head, p.page_type);
  for (int i = threadIdx.x; i < (end - begin) * kPieces; i += kDenseThreads) {
    const int row = i / kPieces, at = i % kPieces * 8, token = begin + row;
    const std::byte* page =
        p.pool +
        static_cast<int64_t>(p.table[s.table_begin + token / kPageTokens]) * kPageAlignment +
        (token % kPageTokens * kD + at) * 2;
    CopyAsync16(shared.key + row * DenseShared<Traits>::kStride + at, page + key);
    CopyAsync16(shared.value + row * DenseShared<Traits>::kStride + at, page + value);
  }
  CommitCopies();
}

// Scores of `tokens` fetched tokens from `begin` on: two threads a token, that take two columns of
// every four.
template <class Traits>
__device__ __forceinline__ void ScoreTail(const ProgressiveArgs& p, const SequenceView& view,
                                          int begin, int tokens, int column_begin, int columns,
                                          DenseShared<Traits>& shared) {
  const int token = threadIdx.x % kDenseTokens;
  if (token >= tokens) return;
  const uint4* row =
      reinterpret_cast<const uint4*>(shared.key + token * DenseShared<Traits>::kStride);
#pragma unroll 1
  for (int first = threadIdx.x / kDenseTokens * 2; first < kTileColumns; first += 4) {
    float score[2] = {};
    if (first < columns) {
#pragma unroll 4
      for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
        const uint4 words = row[i];
        const float2 k[4] = {UnpackPair(words.x, p.page_type), UnpackPair(words.y, p.page_type),
                             UnpackPair(words.z, p.page_type), UnpackPair(words.w, p.page_type)};
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const auto* q = reinterpret_cast<const float4*>(&shared.query[first + n][8 * i]);
          score[n] = fmaf(q[0].x, k[0].x, fmaf(q[0].y, k[0].y, score[n]));
          score[n] = fmaf(q[0].z, k[1].x, fmaf(q[0].w, k[1].y, score[n]));
          score[n] = fmaf(q[1].x, k[2].x, fmaf(q[1].y, k[2].y, score[n]));
          score[n] = fmaf(q[1].z, k[3].x, fmaf(q[1].w, k[3].y, score[n]));
        }
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const bool visible =
          first + n < columns &&
          TokenVisible(view, begin + token, (column_begin + first + n) / p.shape.group_size());
      shared.score[token][first + n] =
          visible ? SoftCap<Traits>(score[n], view.softcap) : -INFINITY;
    }
  }
}

// One warp per column: scores to exp2(score - max), the running state updated.
template <class Traits>
__device__ __forceinline__ void DenseSoftmax(DenseShared<Traits>& shared, int tokens, int warp,
                                             int lane) {
  constexpr int kEach = kDenseTokens / 32;
  float score[kEach], high = -INFINITY;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int token = lane + 32 * i;
    score[i] = token < tokens ? shared.score[token][warp] : -INFINITY;
    high = fmaxf(high, score[i]);
  }
#pragma unroll
  for (int i = 16; i > 0; i /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, i));
  const float old = shared.max[warp], next = fmaxf(old, high);
  const float base = next == -INFINITY ? 0.0f : next;
  float sum = 0, score_sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float weight = Exp2(score[i] - base);
    if (lane + 32 * i < tokens) shared.score[lane + 32 * i][warp] = weight;
    sum += weight;
    score_sum += weight > 0 ? weight * score[i] : 0.0f;
  }
  sum = WarpSum(sum);
  score_sum = WarpSum(score_sum);
  __syncwarp();
  if (lane == 0) {
    const float rescale = Exp2(old - base);
    shared.rescale[warp] = rescale;
    shared.sum[warp] = shared.sum[warp] * rescale + sum;
    shared.score_sum[warp] = shared.score_sum[warp] * rescale + score_sum;
    shared.max[warp] = next;
  }
}

// Adds the fetched values, weighted by `score`, to out: a thread's pair of channels, every
// kParts-th token.
template <class Traits>
__device__ __forceinline__ void AddTail(const ProgressiveArgs& p, const DenseShared<Traits>& shared,
                                        int tokens, int columns, int pair, int part,
                                        float2 (&out)[kTileColumns]) {
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) {
    out[n].x *= shared.rescale[n];
    out[n].y *= shared.rescale[n];
  }
  const auto* values = reinterpret_cast<const uint32_t*>(shared.value) + pair;
#pragma unroll 4
  for (int t = part; t < tokens; t += DenseShared<Traits>::kParts) {
    const float2 v = UnpackPair(values[t * (DenseShared<Traits>::kStride / 2)], p.page_type);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (4 * half >= columns) break;
      const float4 w = *reinterpret_cast<const float4*>(&shared.score[t][4 * half]);
      const float weight[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        out[4 * half + n].x = fmaf(weight[n], v.x, out[4 * half + n].x);
        out[4 * half + n].y = fmaf(weight[n], v.y, out[4 * half + n].y);
      }
    }
  }
}

// The parts' sums to dense_out, the state to dense_lse and dense_score.
template <class Traits>
__device__ __forceinline__ void StoreTail(const ProgressiveArgs& p, int64_t first, int pair,
                                          int part, const float2 (&out)[kTileColumns],
                                          DenseShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kParts = DenseShared<Traits>::kParts;
  auto* sums = reinterpret_cast<float*>(shared.key);  // [parts][columns][D], over key and value
  __syncthreads();
  if (part < kParts) {
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
      *reinterpret_cast<float2*>(&sums[(part * kTileColumns + n) * kD + 2 * pair]) = out[n];
    }
  }
  __syncthreads();
  const ProgressiveWorkspace& w = p.work;
  float* result = reinterpret_cast<float*>(p.workspace + w.dense_out) + first * kD;
  for (int i = threadIdx.x; i < kTileColumns * kD; i += kDenseThreads) {
    float total = 0;
#pragma unroll
    for (int j = 0; j < kParts; ++j) total += sums[j * kTileColumns * kD + i];
    const float sum = shared.sum[i / kD];
    result[i] = sum > 0 ? total / sum : 0.0f;
  }
  if (threadIdx.x < kTileColumns) {
    const float sum = shared.sum[threadIdx.x];
    reinterpret_cast<float*>(p.workspace + w.dense_lse)[first + threadIdx.x] =
        sum > 0 ? shared.max[threadIdx.x] + Log2(sum) : -INFINITY;
    reinterpret_cast<float*>(p.workspace + w.dense_score)[first + threadIdx.x] =
        sum > 0 ? shared.score_sum[threadIdx.x] / sum : 0.0f;
  }
}

template <class Traits>
__device__ __noinline__ void DenseTail(const ProgressiveArgs& p, int sequence, int head,
                                       int column_tile) {
  constexpr int kD = Traits::kHeadDim;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<DenseShared<Traits>*>(shared_bytes);
  const ProgressiveSequence& s = p.sequences[sequence];
  const TokenRange tail = VisibleTail(s);
  FetchTail<Traits>(p, s, head, tail.begin, min(tail.begin + kDenseTokens, tail.end), shared);
  LoadColumns<Traits, kDenseThreads>(p, s, head, column_tile, s.softmax_scale * kLog2E,
                                     &shared.query[0][0]);
  const SequenceView view(s);
  const int column_begin = column_tile * kTileColumns;
  const int columns = min(p.shape.group_size() * s.q_len - column_begin, kTileColumns);
  if (threadIdx.x < kTileColumns) {
    shared.max[threadIdx.x] = -INFINITY;
    shared.sum[threadIdx.x] = shared.score_sum[threadIdx.x] = 0;
  }
  const int pair = threadIdx.x % DenseShared<Traits>::kPairs;
  const int part = threadIdx.x / DenseShared<Traits>::kPairs;
  float2 out[kTileColumns] = {};
  for (int begin = tail.begin; begin < tail.end; begin += kDenseTokens) {
    const int tokens = min(kDenseTokens, tail.end - begin);
    if (begin > tail.begin) {
      __syncthreads();
      FetchTail<Traits>(p, s, head, begin, begin + tokens, shared);
    }
    WaitCopies<0>();
    __syncthreads();
    ScoreTail<Traits>(p, view, begin, tokens, column_begin, columns, shared);
    __syncthreads();
    DenseSoftmax<Traits>(shared, tokens, threadIdx.x / 32, threadIdx.x % 32);
    __syncthreads();
    if (part < DenseShared<Traits>::kParts) {
      AddTail<Traits>(p, shared, tokens, columns, pair, part, out);
    }
  }
  LaunchDependents();
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  StoreTail<Traits>(p, head_index * p.work.columns + column_begin, pair, part, out, shared);
  // The rotate kernel clears the decisions: count after it.
  WaitForDependencies();
  if (threadIdx.x == 0 && column_tile == 0) {
    HeadDecision& decision = p.decisions[head_index];
    const int64_t bytes = int64_t{tail.end - tail.begin} * kD * 2;
    atomicAdd(&decision.dense_tokens, tail.end - tail.begin);
    AddBytes(&decision.key_bytes, bytes);
    AddBytes(&decision.value_bytes, bytes);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_DENSE_CUH_

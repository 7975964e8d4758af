#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCORES_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCORES_CUH_

// The arithmetic of one scanned page and where its results go.
//   s[t] = sum_c q_c r_c (n_tc - 7.5) / 8 + q.mu     n: nibbles; r: the page's channel ranges
// Tokens are the M of the MMA, columns the N. Nibbles enter the MMA as FP16 subnormals (n 2^-24, or
// 16 n 2^-24 for the upper nibble, which only ever holds rows 8..15 of a tile), so that unpacking
// is one AND; products are exact and the sums FP32. The offset 7.5 is one more MMA, with ones; so
// are the page's sums. Queries and ranges are halves relative to their largest: nothing overflows,
// whatever the keys.

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

// Sums over rank chunks [chunk_begin, chunk_end) of q r n: sums[t] is the accumulator of tokens
// 16t..16t+15 (rows 8..15 of it 16 times larger), ones[0] and ones[1] the sums of q r. squares:
// halves of (q r)^2 for the column lane / 4. `chunks`: shared addresses of the rank chunks' tiles.
template <class Traits>
__device__ __forceinline__ void MultiplyPage(
    const uint32_t (&chunks)[NumRankChunks(Traits::kHeadDim)], const __half* ranges,
    const uint2 (&query)[Traits::kTiles], int chunk_begin, int chunk_end, int lane,
    float (&sums)[4][4], float (&ones)[4], uint32_t* squares) {
  const uint32_t kOnes[4] = {kOneHalves, kOneHalves, kOneHalves, kOneHalves};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    ones[e] = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) sums[t][e] = 0;
  }
  const auto multiply = [&](int c) {
#pragma unroll
    for (int k = c * Traits::kChunkTiles; k < (c + 1) * Traits::kChunkTiles; ++k) {
      if (k >= Traits::kTiles) break;
      const uint2 range = reinterpret_cast<const uint2*>(ranges)[k * 4 + lane % 4];
      const uint32_t b0 = MultiplyHalves(query[k].x, range.x);
      const uint32_t b1 = MultiplyHalves(query[k].y, range.y);
      *squares = FmaHalves(b0, b0, *squares);
      *squares = FmaHalves(b1, b1, *squares);
      uint32_t word[4];
      LoadShared(word, chunks[c] + (k - c * Traits::kChunkTiles) * kKeyTileBytes + lane * 16);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t upper = word[t] >> 8;
        const uint32_t a[4] = {word[t] & 0x000f000fu, word[t] & 0x00f000f0u, upper & 0x000f000fu,
                               upper & 0x00f000f0u};
        Mma16x8x16<__half>(sums[t], a, b0, b1);
      }
      Mma16x8x16<__half>(ones, kOnes, b0, b1);
    }
  };
  constexpr int kChunks = NumRankChunks(Traits::kHeadDim);
  if (chunk_begin == 0 && chunk_end == kChunks) {  // the usual case, without a branch
#pragma unroll
    for (int c = 0; c < kChunks; ++c) multiply(c);
  } else {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c >= chunk_begin && c < chunk_end) multiply(c);
    }
  }
}

// The sum of (q r)^2 over the chunks from chunk_begin on, as MultiplyPage's squares.
template <class Traits>
__device__ __forceinline__ uint32_t UnreadSquares(const __half* ranges,
                                                  const uint2 (&query)[Traits::kTiles],
                                                  int chunk_begin, int lane) {
  uint32_t squares = 0;
#pragma unroll
  for (int k = 0; k < Traits::kTiles; ++k) {
    if (k / Traits::kChunkTiles < chunk_begin) continue;
    const uint2 range = reinterpret_cast<const uint2*>(ranges)[k * 4 + lane % 4];
    const uint32_t b0 = MultiplyHalves(query[k].x, range.x);
    const uint32_t b1 = MultiplyHalves(query[k].y, range.y);
    squares = FmaHalves(b0, b0, squares);
    squares = FmaHalves(b1, b1, squares);
  }
  return squares;
}
__device__ __forceinline__ float SumHalves(uint32_t pair) {
  const float2 x = UnpackPair<__half>(pair);
  return x.x + x.y;
}

// Masks the tokens that a row does not see.
__device__ __forceinline__ void MaskPage(const SequenceView& s, int page, int group_size,
                                         int column, int lane, float (&sums)[4][4]) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = page * kPageTokens + 16 * t + lane / 4 + (e >= 2 ? 8 : 0);
      if (!TokenVisible(s, token, (column + e % 2) / group_size)) sums[t][e] = -INFINITY;
    }
  }
}

// What a page's accumulators are worth: times `unit` (rows 0..7; a 16th of it for rows 8..15) plus
// `offset` of the column they are the scores of columns 2 (lane % 4) and + 1.
struct ScoreUnits {
  float unit;
  float offset[2];
};

// The largest scores of the lane's two columns.
__device__ __forceinline__ void LargestScores(const float (&sums)[4][4], const ScoreUnits& units,
                                              float (&high)[2]) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float low = fmaxf(fmaxf(sums[0][c], sums[1][c]), fmaxf(sums[2][c], sums[3][c]));
    const float up =
        fmaxf(fmaxf(sums[0][c + 2], sums[1][c + 2]), fmaxf(sums[2][c + 2], sums[3][c + 2]));
    high[c] = ColumnMax(fmaxf(low * units.unit, up * (units.unit * 0.0625f))) + units.offset[c];
  }
}

// Scores minus `high`, the column's maximum, as B fragments of halves.
__device__ __forceinline__ void PackScores(const float (&sums)[4][4], const ScoreUnits& units,
                                           const float (&high)[2], uint32_t (&packed)[8]) {
  const float unit[2] = {units.unit, units.unit * 0.0625f};
  const float shift[2] = {high[0] == -INFINITY ? 0.0f : units.offset[0] - high[0],
                          high[1] == -INFINITY ? 0.0f : units.offset[1] - high[1]};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      packed[2 * t + half] =
          Transpose8x8(PackPair<__half>(fmaf(sums[t][2 * half], unit[half], shift[0]),
                                        fmaf(sums[t][2 * half + 1], unit[half], shift[1])));
    }
  }
}

// log2 of the sum of exp2(score) of the lane's two columns, and the concentration. `base`: what the
// sum is relative to, after the soft cap; where it is too low, or -inf, the page's own maximum is.
// inf: anything will do.
template <class Traits>
__device__ __forceinline__ void SumScores(const float (&sums)[4][4], const ScoreUnits& units,
                                          float cap, const float (&base)[2], float (&lse)[2],
                                          float (&concentration)[2]) {
  const float unit[2] = {units.unit, units.unit * 0.0625f};
  float sum[2], squares[2], from[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) from[c] = base[c] == INFINITY ? 0.0f : base[c];
  const auto add = [&] {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float shift = Traits::kSoftCap ? units.offset[c] : units.offset[c] - from[c];
      float x[2] = {0, 0}, xx[2] = {0, 0};  // shorter chains
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float y = fmaf(sums[t][2 * half + c], unit[half], shift);
          if constexpr (Traits::kSoftCap) y = SoftCap<Traits>(y, cap) - from[c];
          y = Exp2(y);
          x[half] += y;
          xx[half] = fmaf(y, y, xx[half]);
        }
      }
      sum[c] = ColumnSum(x[0] + x[1]);
      squares[c] = ColumnSum(xx[0] + xx[1]);
    }
  };
  add();
  constexpr float kMost = 1e18f;  // whose square is finite
  if (__any_sync(0xffffffffu, !(sum[0] < kMost && sum[1] < kMost))) {
    LargestScores(sums, units, from);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      from[c] = from[c] == -INFINITY ? 0.0f : SoftCap<Traits>(from[c], cap);
    }
    add();
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    lse[c] = from[c] + Log2(sum[c]);
    concentration[c] = sum[c] > 0 ? __fdividef(squares[c], sum[c] * sum[c]) : 0.0f;
  }
}

// The same from packed scores, whose maximum is `high`.
template <class Traits>
__device__ __forceinline__ void SumPacked(const uint32_t (&packed)[8], const float (&high)[2],
                                          float cap, int lane, float (&lse)[2],
                                          float (&concentration)[2]) {
  // Packed scores are of column lane / 4.
  const float even = __shfl_sync(0xffffffffu, high[0], lane / 8);
  const float odd = __shfl_sync(0xffffffffu, high[1], lane / 8);
  const float max = lane / 4 % 2 == 0 ? even : odd, top = SoftCap<Traits>(max, cap);
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float2 y = UnpackPair<__half>(packed[i]);
    if constexpr (Traits::kSoftCap) {
      y = make_float2(SoftCap<Traits>(y.x + max, cap) - top, SoftCap<Traits>(y.y + max, cap) - top);
    }
    const float2 x = make_float2(Exp2(y.x), Exp2(y.y));
    sum += x.x + x.y;
    squares = fmaf(x.x, x.x, fmaf(x.y, x.y, squares));
  }
  sum = QuadSum(sum);
  squares = QuadSum(squares);
  const float all = max == -INFINITY ? max : top + Log2(sum);
  const float share = max == -INFINITY ? 0.0f : __fdividef(squares, sum * sum);
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    lse[c] = __shfl_sync(0xffffffffu, all, lane % 4 * 8 + 4 * c);
    concentration[c] = __shfl_sync(0xffffffffu, share, lane % 4 * 8 + 4 * c);
  }
}

// Where a warp puts what it finds of its pages: the stats of the lane's two columns and the scores.
struct PageSinks {
  uint32_t stats;   // of page 0 of the head, in PageStats of the workspace
  uint32_t scores;  // likewise, in 16 bytes
  int columns;      // of the tile

  __device__ __forceinline__ bool HasScores(int lane) const { return lane / 4 < columns; }
};
template <class Traits>
__device__ __forceinline__ PageSinks MakePageSinks(const ProgressiveArgs& p, int columns,
                                                   int64_t head_index, int column_tile, int lane) {
  const ProgressiveWorkspace& w = p.work;
  const int64_t page = head_index * p.max_sealed;
  PageSinks sinks;
  sinks.stats = static_cast<uint32_t>(w.stats / 16 + page * w.columns + column_tile * kTileColumns +
                                      lane % 4 * 2);
  sinks.scores = static_cast<uint32_t>(
      w.scores / 16 + (page * (w.columns / kTileColumns) + column_tile) * 64 + lane);
  sinks.columns = columns - column_tile * kTileColumns;
  return sinks;
}

// The variance of the lane's two columns; `variance` is of column lane / 4.
__device__ __forceinline__ void SpreadVariance(float variance, int lane, PageStats (&stats)[2]) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    stats[c].variance = __shfl_sync(0xffffffffu, variance, lane % 4 * 8 + 4 * c);
  }
}

// `opened`: by the second stage.
__device__ __forceinline__ void StoreStats(const ProgressiveArgs& p, const PageSinks& sinks,
                                           int page, const PageStats (&stats)[2], bool opened,
                                           int lane) {
  if (lane >= 4 || 2 * lane >= sinks.columns) return;
  float4* target = reinterpret_cast<float4*>(p.workspace) + sinks.stats + page * p.work.columns;
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    target[c] = make_float4(stats[c].max, stats[c].lse, stats[c].variance,
                            opened ? -stats[c].concentration : stats[c].concentration);
  }
}

__device__ __forceinline__ void StoreScores(const ProgressiveArgs& p, const PageSinks& sinks,
                                            int page, const uint32_t (&packed)[8], int lane) {
  if (!sinks.HasScores(lane)) return;
  uint4* target = reinterpret_cast<uint4*>(p.workspace) + sinks.scores +
                  static_cast<int64_t>(page) * (p.work.columns * 8);
  target[0] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
  target[32] = make_uint4(packed[4], packed[5], packed[6], packed[7]);
}

// The sum of page masses seen so far, for the lane's two columns.
struct RunningMass {
  float high[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  __device__ __forceinline__ void Add(float2 mass) {
    const float x[2] = {mass.x, mass.y};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float next = fmaxf(high[c], x[c]), base = next == -INFINITY ? 0.0f : next;
      sum[c] = fmaf(sum[c], Exp2(high[c] - base), Exp2(x[c] - base));
      high[c] = next;
    }
  }
  __device__ __forceinline__ float2 Log2Sum() const {
    return make_float2(high[0] + Log2(sum[0]), high[1] + Log2(sum[1]));
  }
};

// Which pages' scores may be wanted later, by what is known of L before the scan is through.
struct ScoreFilter {
  float threshold = -INFINITY;  // log2 of theta, a little less; -inf: every page's
  float lower[2] = {};          // the dense tail's part of L, of the lane's columns; inf: no column

  ScoreFilter() = default;
  __device__ __forceinline__ ScoreFilter(const ProgressiveArgs& p, const DecisionParams& decision,
                                         int64_t head_index, int column, int columns) {
    if (decision.policy == Policy::kThreshold && decision.floor_value_bits == 0 &&
        decision.theta > 0) {
      threshold = Log2(decision.theta) - 0.02f;
    }
    const float2 lse = *reinterpret_cast<const float2*>(p.workspace + p.work.dense_lse +
                                                        (head_index * p.work.columns + column) * 4);
    lower[0] = column < columns ? lse.x : INFINITY;
    lower[1] = column + 1 < columns ? lse.y : INFINITY;
  }

  // What L is known to be at least, of the lane's columns; inf: no column. `mass`: log mass of
  // pages so far.
  __device__ __forceinline__ void Bound(const float (&mass)[2], float (&bound)[2]) const {
#pragma unroll
    for (int c = 0; c < 2; ++c) bound[c] = fmaxf(lower[c], mass[c]);
  }

  // For the warp. `spread`: two stages: standard deviations that a page's log mass may gain, log2
  // units.
  __device__ __forceinline__ bool Wants(const PageStats (&stats)[2], float2 mass,
                                        const float (&bound)[2], float spread) const {
    const float x[2] = {mass.x, mass.y};
    bool wanted = false;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float most = x[c];
      if (spread > 0) most = fmaxf(most, stats[c].lse + spread * __fsqrt_rn(stats[c].variance));
      wanted |= most - bound[c] >= threshold;
    }
    return __any_sync(0xffffffffu, wanted) != 0;
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCORES_CUH_

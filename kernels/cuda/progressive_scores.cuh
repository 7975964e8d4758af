#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCORES_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCORES_CUH_

// The arithmetic of one scanned page and where its results go.
//   s[t] = sum_c q_c r_c (n_tc - 7.5) / 8 + q.mu     n: nibbles; r: the page's channel ranges
// Tokens are the M of the MMA, columns the N. Nibbles enter the MMA as FP16 subnormals (n 2^-24, or
// 16 n 2^-24 for the upper nibble, which only ever holds rows 8..15 of a tile), so that unpacking
// is one AND; products are exact and the sums FP32. The offset 7.5 is one more MMA, with ones.
// Queries and ranges are halves relative to their largest: nothing overflows,
// whatever the keys.

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

// Columns that a lane's accumulators are of: kLaneColumns (lane % 4) and what follows.
template <class Traits>
inline constexpr int kLaneColumns = Traits::kColumns / 4;

// Tiles of channels whose queries a lane holds. An MMA has eight columns: where columns are few,
// each takes two of them, 2n with the first half of the tiles and 2n + 1 with the others.
template <class Traits>
inline constexpr int kLaneTiles = kLaneColumns<Traits> == 2 ? Traits::kTiles
                                                            : (Traits::kTiles + 1) / 2;
// The first of them.
template <class Traits>
__device__ __forceinline__ int FirstLaneTile(int lane) {
  return kLaneColumns<Traits> == 1 && lane / 4 % 2 == 1 ? kLaneTiles<Traits> : 0;
}
// The column that they are of.
template <class Traits>
__device__ __forceinline__ int MmaColumn(int lane) {
  return lane * kLaneColumns<Traits> / 8;
}

// Where a lane finds the ranges of the first and of the other tiles: in zeros where its column of
// the MMA has nothing of them. Both are indexed by tile.
struct LaneRanges {
  const uint2* half[2];
};
template <class Traits>
__device__ __forceinline__ LaneRanges MakeLaneRanges(const __half* ranges, const __half* zeros,
                                                     int lane) {
  const bool other = FirstLaneTile<Traits>(lane) > 0;
  const auto* x = reinterpret_cast<const uint2*>(ranges) + lane % 4;
  if constexpr (kLaneColumns<Traits> == 2) return LaneRanges{{x, x}};
  const auto* none = reinterpret_cast<const uint2*>(zeros) + lane % 4;
  return LaneRanges{{other ? none : x, other ? x : none}};
}

// Of a page's products.
struct PageProducts {
  float sums[4][4];  // accumulators of tokens 16t..16t+15 (rows 8..15 of them 16 times larger)
  // The accumulator of q r times itself and times ones: [0] and [1] of row g, the sum of products
  // of columns g and 2t (2t + 1); [2] and [3] sums of q r.
  float own[4];
};

// Sums over rank chunks [chunk_begin, chunk_end) of q r n and of q r. `chunks`: shared addresses of
// the rank chunks' tiles.
//
// A byte holds a nibble of row g (lower) and one of row g + 8. Row g multiplies the whole byte,
// which takes one instruction of four less to bring in place, and has the other row taken off.
template <class Traits>
__device__ __forceinline__ void MultiplyPage(
    const uint32_t (&chunks)[NumRankChunks(Traits::kHeadDim)], const LaneRanges& ranges,
    const uint2 (&query)[kLaneTiles<Traits>], int chunk_begin, int chunk_end, int lane,
    PageProducts* products) {
  constexpr int kN = kLaneColumns<Traits>;
  float(&sums)[4][4] = products->sums;
  float(&own)[4] = products->own;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    own[e] = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) sums[t][e] = 0;
  }
  const auto multiply = [&](int c) {
#pragma unroll
    for (int k = c * Traits::kChunkTiles; k < (c + 1) * Traits::kChunkTiles; ++k) {
      if (k >= Traits::kTiles) break;
      const int half = k / kLaneTiles<Traits>;
      const uint2 range = ranges.half[half][k * 4];
      const uint2 q = query[k - half * kLaneTiles<Traits>];
      const uint32_t b0 = MultiplyHalves(q.x, range.x);
      const uint32_t b1 = MultiplyHalves(q.y, range.y);
      uint32_t word[4];
      LoadShared(word, chunks[c] + (k - c * Traits::kChunkTiles) * kKeyTileBytes + lane * 16);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t upper = __byte_perm(word[t], 0, 0x4341u);
        const uint32_t a[4] = {word[t] & 0x00ff00ffu, word[t] & 0x00f000f0u, upper,
                               upper & 0x00f000f0u};
        Mma16x8x16<__half>(sums[t], a, b0, b1);
      }
      // What is k = 2t of column g in B is k = 2t of row g in A.
      const uint32_t itself[4] = {b0, kOneHalves, b1, kOneHalves};
      Mma16x8x16<__half>(own, itself, b0, b1);
    }
  };
  constexpr int kChunks = NumRankChunks(Traits::kHeadDim);
  if (chunk_begin == 0 && chunk_end == kChunks) {  // the usual case, without a branch
#pragma unroll
    for (int c = 0; c < kChunks; ++c) multiply(c);
  } else {
    asm volatile("");  // or the compiler makes one path of both
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c >= chunk_begin && c < chunk_end) multiply(c);
    }
  }
  if constexpr (kN == 1) own[2] += own[3];
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    if constexpr (kN == 1) {
      sums[t][0] += sums[t][1];
      sums[t][2] += sums[t][3];
    }
    sums[t][0] -= sums[t][2];
    sums[t][1] -= sums[t][3];
  }
}

// The sums of (q r)^2 over what was read, for the lane's columns.
template <class Traits>
__device__ __forceinline__ void ReadSquares(const PageProducts& products, int lane,
                                            float (&squares)[kLaneColumns<Traits>]) {
  // Columns 2t and 2t + 1 of the MMA: of rows 2t and 2t + 1.
  const float even = __shfl_sync(0xffffffffu, products.own[0], lane % 4 * 9);
  const float odd = __shfl_sync(0xffffffffu, products.own[1], lane % 4 * 9 + 4);
  if constexpr (kLaneColumns<Traits> == 2) {
    squares[0] = even;
    squares[1] = odd;
  } else {
    squares[0] = even + odd;
  }
}

// Those over the chunks from chunk_begin on.
template <class Traits>
__device__ __forceinline__ void UnreadSquares(const LaneRanges& ranges,
                                              const uint2 (&query)[kLaneTiles<Traits>],
                                              int chunk_begin, int lane,
                                              float (&squares)[kLaneColumns<Traits>]) {
  constexpr int kN = kLaneColumns<Traits>;
  const int first = FirstLaneTile<Traits>(lane);
  const uint2* own = (first > 0 ? ranges.half[1] : ranges.half[0]) + first * 4;
  uint32_t pair = 0;
#pragma unroll
  for (int i = 0; i < kLaneTiles<Traits>; ++i) {
    if (first + i < chunk_begin * Traits::kChunkTiles) continue;
    if (Traits::kTiles % 2 != 0 && first + i >= Traits::kTiles) continue;  // behind the ranges
    const uint2 range = own[i * 4];
    const uint32_t b0 = MultiplyHalves(query[i].x, range.x);
    const uint32_t b1 = MultiplyHalves(query[i].y, range.y);
    pair = FmaHalves(b0, b0, pair);
    pair = FmaHalves(b1, b1, pair);
  }
  const float2 x = UnpackPair<__half>(pair);
  float sum = QuadSum(x.x + x.y);  // of column lane / 4 of the MMA
  if constexpr (kN == 1) sum += __shfl_xor_sync(0xffffffffu, sum, 4);
#pragma unroll
  for (int c = 0; c < kN; ++c) {
    squares[c] = __shfl_sync(0xffffffffu, sum, lane % 4 * 8 + 4 * c);
  }
}

// Masks the tokens that a row does not see. `column`: the lane's first.
template <int kN>
__device__ __forceinline__ void MaskPage(const SequenceView& s, int page, const QueryGroup& group,
                                         int column, int lane, float (&sums)[4][4]) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = page * kPageTokens + 16 * t + lane / 4 + 8 * half;
#pragma unroll
      for (int c = 0; c < kN; ++c) {
        if (!TokenVisible(s, token, group.Row(column + c))) sums[t][2 * half + c] = -INFINITY;
      }
    }
  }
}

// What a page's accumulators are worth: times `unit` (rows 0..7; a 16th of it for rows 8..15) plus
// `offset` of the column they are the scores of the lane's columns.
template <int kN>
struct ScoreUnits {
  float unit;
  float offset[kN];
};

// The largest scores of the lane's columns.
template <int kN>
__device__ __forceinline__ void LargestScores(const float (&sums)[4][4],
                                              const ScoreUnits<kN>& units, float (&high)[kN]) {
#pragma unroll
  for (int c = 0; c < kN; ++c) {
    const float low = fmaxf(fmaxf(sums[0][c], sums[1][c]), fmaxf(sums[2][c], sums[3][c]));
    const float up =
        fmaxf(fmaxf(sums[0][c + 2], sums[1][c + 2]), fmaxf(sums[2][c + 2], sums[3][c + 2]));
    high[c] = ColumnMax(fmaxf(low * units.unit, up * (units.unit * 0.0625f))) + units.offset[c];
  }
}

// Scores minus `high`, the column's maximum, as halves in the order of StoreScores.
template <int kN>
__device__ __forceinline__ void PackScores(const float (&sums)[4][4], const ScoreUnits<kN>& units,
                                           const float (&high)[kN], uint32_t (&packed)[4 * kN]) {
  const float unit[2] = {units.unit, units.unit * 0.0625f};
  float shift[kN];
#pragma unroll
  for (int c = 0; c < kN; ++c) shift[c] = high[c] == -INFINITY ? 0.0f : units.offset[c] - high[c];
  const auto score = [&](int octet, int c) {  // of eight tokens
    return fmaf(sums[octet / 2][octet % 2 * 2 + c], unit[octet % 2], shift[c]);
  };
#pragma unroll
  for (int i = 0; i < 4 * kN; ++i) {
    packed[i] = Transpose8x8(kN == 2 ? PackPair<__half>(score(i, 0), score(i, kN - 1))
                                     : PackPair<__half>(score(i, 0), score(i + 4, 0)));
  }
}

// log2 of the sum of exp2(score) of the lane's columns, and the concentration. `base`: what the
// sum is relative to, after the soft cap; where it is too low, or -inf, the page's own maximum is.
// inf: anything will do.
template <class Traits, int kN>
__device__ __forceinline__ void SumScores(const float (&sums)[4][4], const ScoreUnits<kN>& units,
                                          float cap, const float (&base)[kN], float (&lse)[kN],
                                          float (&concentration)[kN]) {
  const float unit[2] = {units.unit, units.unit * 0.0625f};
  float sum[kN], squares[kN], from[kN];
#pragma unroll
  for (int c = 0; c < kN; ++c) from[c] = base[c] == INFINITY ? 0.0f : base[c];
  constexpr float kMost = 1e18f, kLeast = 1e-37f;  // whose square, whose reciprocal is finite
  const auto add = [&] {
    bool fits = true;
#pragma unroll
    for (int c = 0; c < kN; ++c) {
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
      fits = fits && sum[c] < kMost;
    }
    return fits;
  };
  if (!__all_sync(0xffffffffu, add())) {
    LargestScores(sums, units, from);
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      from[c] = from[c] == -INFINITY ? 0.0f : SoftCap<Traits>(from[c], cap);
    }
    add();
  }
#pragma unroll
  for (int c = 0; c < kN; ++c) {
    lse[c] = from[c] + Log2(sum[c]);
    const float inverse = Reciprocal(sum[c]);
    concentration[c] = sum[c] > kLeast ? squares[c] * inverse * inverse : 0.0f;
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

// Where a warp puts what it finds of its pages: the stats of the lane's columns and the scores.
struct PageSinks {
  uint32_t stats;   // of page 0 of the head, in PageStats of the workspace
  uint32_t scores;  // likewise, in 16 bytes
  int stored;       // by the lane: stats; -4 where it has no scores: they are of no column

  __device__ __forceinline__ bool StoresScores() const { return stored >= 0; }
  __device__ __forceinline__ bool StoresStats(int column) const { return (stored & 3) > column; }
};
template <class Traits>
__device__ __forceinline__ PageSinks MakePageSinks(const ProgressiveArgs& p, int columns,
                                                   int64_t head_index, int column_tile, int lane) {
  constexpr int kN = kLaneColumns<Traits>;
  const ProgressiveWorkspace& w = p.work;
  const int64_t page = head_index * p.max_sealed;
  const int in_tile = columns - column_tile * kTileColumns;
  PageSinks sinks;
  sinks.stats = static_cast<uint32_t>((w.stats >> 4) + page * w.columns +
                                      column_tile * kTileColumns + lane % 4 * kN);
  const int place = kN == 2 ? lane : lane / 4 % 2 * 32 + lane / 8 * 4 + lane % 4;
  sinks.scores = static_cast<uint32_t>(
      (w.scores >> 4) + (page * (w.columns / kTileColumns) + column_tile) * 64 + place);
  sinks.stored = lane < 4 ? min(max(in_tile - lane * kN, 0), kN) : 0;
  if (lane / 4 * kN / 2 >= in_tile) sinks.stored -= 4;
  return sinks;
}

// `opened`: by the second stage.
template <int kN>
__device__ __forceinline__ void StoreStats(const ProgressiveArgs& p, const PageSinks& sinks,
                                           int page, const PageStats (&stats)[kN], bool opened) {
  float4* target = reinterpret_cast<float4*>(p.workspace) + sinks.stats + page * p.work.columns;
#pragma unroll
  for (int c = 0; c < kN; ++c) {
    if (!sinks.StoresStats(c)) continue;
    target[c] = make_float4(stats[c].max, stats[c].lse, stats[c].variance,
                            opened ? -stats[c].concentration : stats[c].concentration);
  }
}

// Scores lie as B fragments: of column lane / 4, eight octets of tokens. With one column a lane,
// PackScores leaves octets 0..3 of column lane / 8 in one quad and 4..7 in the next.
template <int kWords>
__device__ __forceinline__ void StoreScores(const ProgressiveArgs& p, const PageSinks& sinks,
                                            int page, const uint32_t (&packed)[kWords]) {
  if (!sinks.StoresScores()) return;
  uint4* target = reinterpret_cast<uint4*>(p.workspace) + sinks.scores +
                  static_cast<int64_t>(page) * (p.work.columns * 8);
#pragma unroll
  for (int i = 0; i < kWords; i += 4) {
    target[8 * i] = make_uint4(packed[i], packed[i + 1], packed[i + 2], packed[i + 3]);
  }
}

// The sum of page masses seen so far, for the lane's columns.
template <int kN>
struct RunningMass {
  float high[kN], sum[kN];

  __device__ __forceinline__ RunningMass() {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      high[c] = -INFINITY;
      sum[c] = 0;
    }
  }
  __device__ __forceinline__ void Add(const float (&mass)[kN]) {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      const float next = fmaxf(high[c], mass[c]), base = next == -INFINITY ? 0.0f : next;
      sum[c] = fmaf(sum[c], Exp2(high[c] - base), Exp2(mass[c] - base));
      high[c] = next;
    }
  }
  __device__ __forceinline__ void Log2Sum(float (&mass)[kN]) const {
#pragma unroll
    for (int c = 0; c < kN; ++c) mass[c] = high[c] + Log2(sum[c]);
  }
};

// Which pages' scores may be wanted later, by what is known of L before the scan is through.
template <int kN>
struct ScoreFilter {
  float threshold = -INFINITY;  // log2 of theta, a little less; -inf: every page's
  float bound[kN] = {};         // L of the lane's columns is at least that; inf: no column

  ScoreFilter() = default;
  __device__ __forceinline__ ScoreFilter(const DecisionParams& decision, float theta) {
    if (decision.policy == Policy::kThreshold && decision.floor_value_bits == 0 && theta > 0) {
      threshold = Log2(theta) - 0.02f;
    }
  }
  // Begins with the dense tail's part of L, if the tails are attended. `column`: the lane's first.
  __device__ __forceinline__ void Load(const ProgressiveArgs& p, int64_t head_index, int column,
                                       int columns, bool tails) {
    const float* lse = reinterpret_cast<const float*>(p.workspace + p.work.dense_lse) +
                       head_index * p.work.columns + column;
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      bound[c] = column + c >= columns ? INFINITY : tails ? lse[c] : -INFINITY;
    }
  }
  // `mass`: log mass of the pages so far.
  __device__ __forceinline__ void Raise(const float (&mass)[kN]) {
#pragma unroll
    for (int c = 0; c < kN; ++c) bound[c] = fmaxf(bound[c], mass[c]);
  }

  // For the warp. `spread`: two stages: standard deviations that a page's log mass may gain, log2
  // units.
  __device__ __forceinline__ bool Wants(const PageStats (&stats)[kN], const float (&mass)[kN],
                                        float spread) const {
    bool wanted = false;
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      float most = mass[c];
      if (spread > 0) most = fmaxf(most, stats[c].lse + spread * __fsqrt_rn(stats[c].variance));
      wanted |= most - bound[c] >= threshold;
    }
    return __any_sync(0xffffffffu, wanted) != 0;
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCORES_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_DECIDE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_DECIDE_CUH_

// Deciding a chunk of pages: global LSE, depths, the list of attended pages, the weights of the
// means, and the sums of the error terms (policy/ladder.h, policy/error_model.h).

#include "kernels/cuda/progressive_values.cuh"
#include "kernels/policy/error_model.h"

namespace adaattn {

// The head's estimated LSE L of every column, from the chunks' and the dense tail's, to `lse`
// [columns]. By all threads of the CTA; `parts` is scratch.
template <int kThreads>
__device__ __forceinline__ void GlobalLse(const ProgressiveArgs& p, int64_t head_index, float* lse,
                                          float (*parts)[kTileColumns]) {
  const ProgressiveWorkspace& w = p.work;
  constexpr int kParts = kThreads / kTileColumns;
  const int part = threadIdx.x / kTileColumns, n = threadIdx.x % kTileColumns;
  const float* chunks = ChunkMasses(p, head_index);
  const float* dense =
      reinterpret_cast<const float*>(p.workspace + w.dense_lse) + head_index * w.columns;
  for (int column = n; column < w.columns; column += kTileColumns) {
    float sum = part == 0 ? dense[column] : -INFINITY;
    for (int i = part; i < w.scan_chunks; i += kParts) {
      sum = AddLog2(sum, chunks[i * w.columns + column]);
    }
    // Four parts lie in one warp.
    sum = AddLog2(sum, __shfl_xor_sync(0xffffffffu, sum, 8));
    sum = AddLog2(sum, __shfl_xor_sync(0xffffffffu, sum, 16));
    __syncthreads();
    if (part % 4 == 0) parts[part / 4][n] = sum;
    __syncthreads();
    if (part == 0) {
      sum = parts[0][n];
      for (int i = 1; i < kThreads / 32; ++i) sum = AddLog2(sum, parts[i][n]);
      lse[column] = sum;
    }
  }
  __syncthreads();
}

// What one column of a page contributes to the decision's figures.
struct ColumnTerms {
  float share = 0, entropy = 0;
};

__device__ __forceinline__ ColumnTerms TermsOf(const PageStats& stats, float lse) {
  ColumnTerms terms;
  const float mass = EstimatedLog2Mass(stats);
  if (mass == -INFINITY) return terms;
  terms.share = Exp2(mass - lse);
  terms.entropy = terms.share * kLn2 * (lse - mass);
  return terms;
}
__device__ __forceinline__ PageStats LoadStats(const float4* stats, int column) {
  const float4 x = stats[column];
  return PageStats{x.x, x.y, x.z, x.w};
}

// The depth of one page, from all columns.
template <class Traits>
__device__ __forceinline__ PageDepth DecidePage(const ProgressiveArgs& p,
                                                const DecisionParams& decision, float theta,
                                                const float4* stats, const float* lse, int columns,
                                                int page, Visibility visibility) {
  constexpr int kD = Traits::kHeadDim;
  if (decision.policy == Policy::kFullDepth) return FullDepth(kD, p.stored_bits);
  if (decision.policy == Policy::kStatic) return StaticDepth(decision, kD, p.stored_bits);
  bool opened = CoarseStage<Traits>(p, decision) == 0;
  float share = 0;
  for (int n = 0; n < columns; ++n) {
    const PageStats page_stats = LoadStats(stats, n);
    opened |= page_stats.squares < 0;
    share = fmaxf(share, TermsOf(page_stats, lse[n]).share);
  }
  return LadderDepth(decision, theta, share,
                     PageFacts{page == 0, visibility == Visibility::kPart, opened}, kD,
                     p.stored_bits);
}

// Weights as halves relative to the largest of their row; an eighth of the rows per warp.
template <class Traits>
__device__ __forceinline__ void ScaleWeights(AttendShared<Traits>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  static_assert(kMaxAttendChunk == 64, "two pages a lane");
  for (int row = warp; row < 2 * kTileColumns; row += kAttendWarps) {
    const float2 x = *reinterpret_cast<const float2*>(&shared.weights[row][2 * lane]);
    float high = fmaxf(x.x, x.y);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
    }
    const float inverse = high > 0 ? 1.0f / high : 0.0f;
    *reinterpret_cast<uint32_t*>(&shared.scaled[row][2 * lane]) =
        PackPair<__half>(x.x * inverse, x.y * inverse);
    if (lane == 0) shared.row_scale[row] = high;
  }
}

// |mean|^2 of a page's values, a quarter of the channels per thread of a quad.
template <class Traits>
__device__ __forceinline__ float MeanSquare(const std::byte* summary, int quarter) {
  constexpr int kWords = Traits::kHeadDim / 16;
  const auto* words =
      reinterpret_cast<const int*>(summary + sizeof(ValueSummary)) + quarter * kWords;
  int sum = 0;
#pragma unroll 4
  for (int i = 0; i < kWords; ++i) sum = __dp4a(words[i], words[i], sum);
  const float scale = reinterpret_cast<const ValueSummary*>(summary)->mean_scale;
  return QuadSum(static_cast<float>(sum) * scale * scale);
}

// One column's weights and figures of a page whose depth is decided.
struct ColumnWeights {
  float skipped = 0, weight = 0, mass = 0, entropy = 0, rest = 0;
};
template <class Traits>
__device__ __forceinline__ ColumnWeights WeighColumn(const SequenceView& s, const PageStats& stats,
                                                     const ValueSummary& summary, float lse,
                                                     PageDepth depth) {
  ColumnWeights out;
  const ColumnTerms terms = TermsOf(stats, lse);
  const float spread2 = summary.spread * summary.spread;
  out.entropy = terms.entropy;
  if (depth.value_bits == 0) {
    out.skipped = out.mass = terms.share;
    out.weight = terms.share * terms.share * stats.variance;
    out.rest = terms.share * terms.share * spread2;
  } else if (stats.max != -INFINITY) {
    const float variance = ScoreVarianceAt(stats.variance, depth.key.bits);
    const float peak = Exp2(SoftCap<Traits>(stats.max, s.softcap) - lse);
    const float squares = peak * peak * fabsf(stats.squares);
    out.weight = squares * variance;
    out.rest = squares * (variance * spread2 +
                          Traits::kHeadDim * CodeVariance(summary.scale_rms, depth.value_bits));
  }
  return out;
}

// The sum of squares of a page's probabilities, relative to the square of its share.
template <class Traits>
__device__ __forceinline__ float Concentration(const PageStats& stats, float softcap) {
  if (stats.max == -INFINITY) return 0;
  return fminf(fabsf(stats.squares) * Exp2(2 * (SoftCap<Traits>(stats.max, softcap) - stats.lse)),
               1.0f);
}

// Where most of the sink page's mass lies on its first token, that token's value stands for the
// page's mean in the error terms (policy/error_model.h): it replaces the mean in the CTA's copy of
// the summary, which nothing else uses, since the sink is never skipped.
template <class Traits>
__device__ __forceinline__ void SubstituteSink(const ProgressiveArgs& p, const SequenceView& s,
                                               int64_t head_index, AttendShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kGroups = Traits::kValueGroups;
  const int head = static_cast<int>(head_index % p.shape.num_kv_heads);
  bool concentrated = false;
  const int columns = p.shape.group_size() * s.q_len;
  if (static_cast<int>(threadIdx.x) < columns) {
    const PageStats stats = LoadStats(PageStatsOf(p, head_index, 0), threadIdx.x);
    concentrated = TokenVisible(s, 0, threadIdx.x / p.shape.group_size()) &&
                   FirstTokenStandsForPage(true, true, Concentration<Traits>(stats, s.softcap));
  }
  if (__syncthreads_or(concentrated) == 0) return;
  const std::byte* page = p.pool + static_cast<int64_t>(shared.base[0]) * kPageAlignment;
  const auto* scales = reinterpret_cast<const uint8_t*>(page + p.layout.value_scales.offset +
                                                        head * p.layout.value_scales.bytes);
  float top = 0, squares = 0;
  for (int g = 0; g < kGroups; ++g) {
    const float range = RangeOf(scales[g]);
    top = fmaxf(top, range);
    squares = fmaf(range, range, squares);
  }
  const float step = top / 127.0f;
  for (int c = threadIdx.x; c < kD; c += kAttendThreads) {
    const float x =
        FirstValue<Traits>(p.layout, page, head, c) * RangeOf(scales[c / (kD / kGroups)]) / step;
    shared.summaries[0][sizeof(ValueSummary) + c] =
        static_cast<std::byte>(static_cast<int8_t>(__float2int_rn(x)));
  }
  if (threadIdx.x == 0) {
    auto& summary = *reinterpret_cast<ValueSummary*>(shared.summaries[0]);
    summary.mean_scale = step;
    summary.spread = 0;
    summary.scale_rms = sqrtf(squares / kGroups);
  }
  __syncthreads();
}

// Decides the chunk's pages, four threads a page: depth, list of attended pages, weights, counts.
template <class Traits>
__device__ __forceinline__ void DecidePages(const ProgressiveArgs& p,
                                            const DecisionParams& decision, const SequenceView& s,
                                            int64_t head_index, int column_begin, float theta,
                                            int begin, int end, AttendShared<Traits>& shared) {
  static_assert(kAttendThreads == 4 * kMaxAttendChunk, "four threads a page");
  constexpr int kEach = kTileColumns / 4;
  const int local = threadIdx.x / 4, quarter = threadIdx.x % 4, page = begin + local;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int columns = p.shape.group_size() * s.q_len;
  const std::byte* summary_bytes = shared.summaries[local];
  PageDepth depth;
  Visibility visibility = Visibility::kNone;
  if (page < end) visibility = PageVisibility(s, page);
  const bool visible = visibility != Visibility::kNone;
  float figures[kEach][5] = {};  // as in AttendShared
  if (!visible) summary_bytes = shared.summaries[0];
  const float mean2 = MeanSquare<Traits>(summary_bytes, quarter);
  const float4* stats = reinterpret_cast<const float4*>(p.workspace + p.work.stats) +
                        (head_index * p.max_sealed + page) * p.work.columns;
  if (visible) {
    depth = DecidePage<Traits>(p, decision, theta, stats, shared.lse, columns, page, visibility);
    if (quarter == 0) {
      shared.key_bits[local] = depth.key.bits;
      shared.key_chunks[local] = depth.key.chunks;
      shared.value_bits[local] = depth.value_bits;
      atomicAdd(&shared.key_pages[KeyDepthIndex(depth.key.bits, depth.key.chunks)], 1);
      atomicAdd(&shared.value_pages[depth.value_bits / 2], 1);
    }
  }
  const auto summary = *reinterpret_cast<const ValueSummary*>(summary_bytes);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int n = quarter * kEach + i;
    ColumnWeights column;
    if (visible && column_begin + n < columns) {
      column = WeighColumn<Traits>(s, LoadStats(stats, column_begin + n), summary,
                                   shared.lse[column_begin + n], depth);
    }
    shared.weights[n][local] = column.skipped * summary.mean_scale;
    shared.weights[kTileColumns + n][local] = column.weight * summary.mean_scale;
    figures[i][0] = column.mass;
    figures[i][1] = column.entropy;
    figures[i][2] = column.rest;
    figures[i][3] = column.weight * mean2;
    figures[i][4] = column.weight;
  }
  // Attended pages in order, whatever the thread timing: sums stay reproducible.
  const uint32_t attended = __ballot_sync(0xffffffffu, depth.value_bits > 0) & 0x11111111u;
  if (lane == 0) shared.warp_count[warp] = __popc(attended);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < 5; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        figures[i][j] += __shfl_xor_sync(0xffffffffu, figures[i][j], step);
      }
      if (lane / 4 == 0) shared.warp_figures[warp][quarter * kEach + i][j] = figures[i][j];
    }
  }
  __syncthreads();
  if (depth.value_bits > 0 && quarter == 0) {
    int at = __popc(attended & ((1u << lane) - 1));
    for (int i = 0; i < warp; ++i) at += shared.warp_count[i];
    shared.list[at] = local;
  }
  if (threadIdx.x < kTileColumns * 5) {
    float sum = 0;
    for (int i = 0; i < kAttendWarps; ++i) {
      sum += shared.warp_figures[i][threadIdx.x / 5][threadIdx.x % 5];
    }
    shared.figures[threadIdx.x / 5][threadIdx.x % 5] = sum;
  }
  ScaleWeights<Traits>(shared);
  __syncthreads();
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_DECIDE_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

// Attend: depths from the global LSE, then the values.
//   out = sum over attended tokens exp2(s - L) x_b(v) + sum over skipped pages share * mean
//   x_b(code) r = (sum_i m_i 4^-i / 2 + 2^-b - 1) r         m_i: 2-bit plane i, most significant
//   first
// L is the estimated global LSE, the same for every CTA of a head, so partial results just add up.
//
// A CTA takes a chunk of one head's pages: a thread decides each page, then every warp takes
// attended pages in turn (planes arrive by asynchronous copies one page ahead), then all threads
// add the means of the skipped ones. Values enter the MMA transposed: channels are its M, tokens
// its K, columns its N; 2-bit fields enter in place as FP16 subnormals, and the powers of 4 that
// their places add are taken out of B (fields of token + 8) and of the sums (channels + 8). grid
// (attend_chunks, num_kv_heads, num_sequences).

#include "kernels/cuda/progressive_scan.cuh"
#include "kernels/policy/error_model.h"

namespace adaattn {

template <class Traits>
struct AttendShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kPlaneBytes = Traits::kTiles * kPlaneTileBytes;
  static constexpr int kScaleBytes = kPageTokens * Traits::kValueGroups;
  static constexpr int kSummaryBytes = static_cast<int>(sizeof(ValueSummary)) + kD;
  // Room for all that a page's values bring in (scales and planes), or for its keys' finer planes
  // and scales; pages whose keys and values fit together come in one go, several at a time.
  static constexpr int kBufferBytes = kScaleBytes + 4 * kPlaneBytes;
  struct Warp {
    alignas(16) std::byte pages[kBufferBytes];
    alignas(16) __half ranges[kD];  // of channels, spread for the MMA
    alignas(16) float token_ranges[kPageTokens * Traits::kValueGroups];
  };
  Warp warps[kAttendWarps];
  alignas(16) std::byte summaries[kMaxAttendChunk][kSummaryBytes];
  float lse[kTileColumns];  // L
  float lse_parts[kAttendThreads / kTileColumns][kTileColumns];
  uint32_t base[kMaxAttendChunk];  // page ids, by position in the chunk
  uint8_t key_bits[kMaxAttendChunk], key_chunks[kMaxAttendChunk], value_bits[kMaxAttendChunk];
  // What the means are weighted with, by page: rows 0..7 the share of a skipped page (else 0), rows
  // 8..15 w^2 var_s, of the tile's columns; then as halves relative to the row's largest.
  float weights[2 * kTileColumns][kMaxAttendChunk];
  alignas(16) __half scaled[2 * kTileColumns][kMaxAttendChunk + 8];
  float row_scale[2 * kTileColumns];
  float figures[kTileColumns][5];  // skipped mass, entropy, rest, mean squares, weight
  float warp_figures[kAttendWarps][kTileColumns][5];
  int list[kMaxAttendChunk];  // attended pages, in order
  int warp_count[kAttendWarps];
  int key_pages[kNumKeyDepths], value_pages[kNumValueDepths];
  float mass[kAttendWarps][kTileColumns];  // of attended pages, by warp
  // The warps' parts overlay their partial outputs [columns][D] once the pages are done with.
  static_assert(sizeof(Warp) >= kTileColumns * kD * sizeof(float), "partial outputs fit");
};

// How an attended page lies in a warp's buffer: values [scales, planes], keys [scales, fine
// planes].
template <class Traits>
struct AttendedPage {
  using Shared = AttendShared<Traits>;
  int value_bits, fine_planes;

  __device__ __forceinline__ AttendedPage(const Shared& shared, int local)
      : value_bits(shared.value_bits[local]), fine_planes((shared.key_bits[local] - 4) / 2) {}
  __device__ __forceinline__ int value_bytes() const {
    return Shared::kScaleBytes + value_bits / 2 * Shared::kPlaneBytes;
  }
  __device__ __forceinline__ int key_bytes() const {
    return fine_planes > 0 ? Traits::kHeadDim + fine_planes * Shared::kPlaneBytes : 0;
  }
};

// Scores of a page refined by `planes` 2-bit planes of its keys: what to add to the packed scores,
// in their layout. x_6 - x_4 = (m - 1.5) / 32, x_8 - x_6 = (m' - 1.5) / 128. `scale`: units of
// query and ranges.
template <class Traits>
__device__ __forceinline__ void RefineScores(const std::byte* fine, const __half* ranges,
                                             const uint2* query, float scale, int planes, int tiles,
                                             int lane, uint32_t (&packed)[8]) {
  const uint32_t kOnes[4] = {kOneHalves, kOneHalves, 0x4c004c00u, 0x4c004c00u};  // 1, 1, 16, 16
  float sums[4][4] = {}, ones[4] = {};
#pragma unroll 2
  for (int k = 0; k < tiles; ++k) {
    const uint2 q = query[k * 32 + lane];
    const uint2 range = reinterpret_cast<const uint2*>(ranges)[k * 4 + lane % 4];
    uint32_t b0 = MultiplyHalves(q.x, range.x);
    uint32_t b1 = MultiplyHalves(MultiplyHalves(q.y, range.y), 0x2c002c00u);  // 1/16
    Mma16x8x16<__half>(ones, kOnes, b0, b1);
    for (int plane = 0; plane < planes; ++plane) {
      const uint2 words = reinterpret_cast<const uint2*>(
          fine + plane * AttendShared<Traits>::kPlaneBytes)[k * 32 + lane];
      const uint32_t word[4] = {words.x, words.x >> 8, words.y, words.y >> 8};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t a[4] = {word[t] & 0x00030003u, word[t] & 0x000c000cu, word[t] & 0x00300030u,
                               word[t] & 0x00c000c0u};
        Mma16x8x16<__half>(sums[t], a, b0, b1);
      }
      b0 = MultiplyHalves(b0, 0x34003400u);  // 1/4
      b1 = MultiplyHalves(b1, 0x34003400u);
    }
  }
  const float offset = -scale * (planes == 2 ? 1.5f / 32 + 1.5f / 128 : 1.5f / 32);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // 2^24 / 32, and / 4 for rows 8..15.
      const float unit = scale * (half == 0 ? 524288.0f : 131072.0f);
      const float x = fmaf(sums[t][2 * half], unit, offset * ones[0]);
      const float y = fmaf(sums[t][2 * half + 1], unit, offset * ones[1]);
      const uint32_t delta = Transpose8x8(PackPair<__half>(x, y));
      packed[2 * t + half] = FmaHalves(kOneHalves, delta, packed[2 * t + half]);
    }
  }
}

// Adds one page's values to out[tile] (channels 16 tile + lane / 4 and + 8, columns 2 (lane % 4)
// and
// + 1), weighted by probability[i] (tokens of packed scores) times exp2(`log_weight`) of the
// column.
template <class Traits>
__device__ __forceinline__ void AddValues(const std::byte* planes, const float* token_ranges,
                                          int bits, const float2 (&probability)[8],
                                          const float (&weight)[2], int lane,
                                          float (&out)[Traits::kTiles][4]) {
  const uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x4c004c00u, 0x4c004c00u};
  const float offset = 1.0f / static_cast<float>(1 << bits) - 1.0f;
#pragma unroll
  for (int group = 0; group < Traits::kValueGroups; ++group) {
    uint32_t b[4][2];
    float ones[4] = {};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 range = *reinterpret_cast<const float2*>(token_ranges + group * kPageTokens +
                                                              16 * t + 8 * half + lane % 4 * 2);
        const float scale = half == 0 ? 1.0f : 0.0625f;
        b[t][half] = PackPair<__half>(probability[2 * t + half].x * range.x * scale,
                                      probability[2 * t + half].y * range.y * scale);
      }
      Mma16x8x16<__half>(ones, kOnes, b[t][0], b[t][1]);
    }
    float sums[Traits::kTilesPerGroup][4];
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] = 0;
    }
    for (int plane = 0; plane < bits / 2; ++plane) {
#pragma unroll
      for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
        const uint2 words = reinterpret_cast<const uint2*>(
            planes +
            plane * AttendShared<Traits>::kPlaneBytes)[(group * Traits::kTilesPerGroup + i) * 32 +
                                                       lane];
        const uint32_t word[4] = {words.x, words.x >> 8, words.y, words.y >> 8};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const uint32_t a[4] = {word[t] & 0x00030003u, word[t] & 0x000c000cu,
                                 word[t] & 0x00300030u, word[t] & 0x00c000c0u};
          Mma16x8x16<__half>(sums[i], a, b[t][0], b[t][1]);
        }
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        b[t][0] = MultiplyHalves(b[t][0], 0x34003400u);
        b[t][1] = MultiplyHalves(b[t][1], 0x34003400u);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float unit = e < 2 ? 8388608.0f : 2097152.0f;  // 2^24 / 2, and / 4 for channels + 8
        float& target = out[group * Traits::kTilesPerGroup + i][e];
        target = fmaf(weight[e % 2], fmaf(sums[i][e], unit, offset * ones[e % 2]), target);
      }
    }
  }
}

// The head's estimated LSE of every column, from the chunks' and the dense tail's.
template <class Traits>
__device__ __forceinline__ void GlobalLse(const ProgressiveArgs& p, int64_t head_index,
                                          AttendShared<Traits>& shared) {
  const ProgressiveWorkspace& w = p.work;
  constexpr int kParts = kAttendThreads / kTileColumns;
  const int part = threadIdx.x / kTileColumns;
  const float* chunks = reinterpret_cast<const float*>(p.workspace + w.scan_lse) +
                        head_index * w.scan_chunks * w.columns;
  const float* dense =
      reinterpret_cast<const float*>(p.workspace + w.dense_lse) + head_index * w.columns;
  for (int column = threadIdx.x % kTileColumns; column < w.columns; column += kTileColumns) {
    float lse = part == 0 ? dense[column] : -INFINITY;
    for (int i = part; i < w.scan_chunks; i += kParts) {
      lse = AddLog2(lse, chunks[i * w.columns + column]);
    }
    // Four parts lie in one warp.
    lse = AddLog2(lse, __shfl_xor_sync(0xffffffffu, lse, 8));
    lse = AddLog2(lse, __shfl_xor_sync(0xffffffffu, lse, 16));
    __syncthreads();
    if (part % 4 == 0) shared.lse_parts[part / 4][column % kTileColumns] = lse;
    __syncthreads();
    if (part == 0) {
      lse = shared.lse_parts[0][column % kTileColumns];
      for (int i = 1; i < kAttendWarps; ++i) {
        lse = AddLog2(lse, shared.lse_parts[i][column % kTileColumns]);
      }
      shared.lse[column] = lse;
      if (blockIdx.x == 0) {
        reinterpret_cast<float*>(p.workspace + w.global_lse)[head_index * w.columns + column] = lse;
      }
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
  bool opened = CoarseChunks(decision, kD) == 0;
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

// The packed scores of a page and the maximum that they are relative to, column lane / 4.
struct PageScores {
  uint32_t packed[8];
  float max;
};

template <class Traits>
__device__ __forceinline__ PageScores LoadScores(const ProgressiveArgs& p, const SequenceView& s,
                                                 int64_t page_index, int column_tile, int lane) {
  const ProgressiveWorkspace& w = p.work;
  PageScores scores;
  uint4 low = make_uint4(0, 0, 0, 0), high = low;
  scores.max = -INFINITY;
  const int column = column_tile * kTileColumns + lane / 4;
  if (column < p.shape.group_size() * s.q_len) {
    const uint4* from = reinterpret_cast<const uint4*>(p.workspace + w.scores) +
                        (page_index * (w.columns / kTileColumns) + column_tile) * 64 + lane;
    low = from[0];
    high = from[32];
    scores.max =
        reinterpret_cast<const float4*>(p.workspace + w.stats)[page_index * w.columns + column].x;
  }
  const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) scores.packed[i] = words[i];
  return scores;
}

// Adds one page whose value scales and planes stand at `data`.
template <class Traits>
__device__ __forceinline__ void AttendValues(const SequenceView& s, const std::byte* data,
                                             int value_bits, const PageScores& scores, float lse,
                                             int lane, typename AttendShared<Traits>::Warp& mine,
                                             float (&out)[Traits::kTiles][4], float* mass) {
  using Shared = AttendShared<Traits>;
  // Token ranges relative to the page's largest, so that probability times range fits FP16.
  uint32_t top = 0;
  const auto* scales = reinterpret_cast<const uint8_t*>(data);
#pragma unroll
  for (int i = lane; i < Shared::kScaleBytes; i += 32) top = umax(top, scales[i]);
  top = __reduce_max_sync(0xffffffffu, top);
#pragma unroll
  for (int i = lane; i < Shared::kScaleBytes; i += 32) {
    mine.token_ranges[i % Traits::kValueGroups * kPageTokens + i / Traits::kValueGroups] =
        Exp2(0.25f * (static_cast<float>(scales[i]) - static_cast<float>(top)));
  }
  __syncwarp();
  float2 probability[8];
  const float base = SoftCap<Traits>(scores.max, s.softcap);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float2 y = HalvesToFloats(scores.packed[i]);
    if (s.softcap != 0) {
      y.x = SoftCap<Traits>(y.x + scores.max, s.softcap) - base;
      y.y = SoftCap<Traits>(y.y + scores.max, s.softcap) - base;
    }
    probability[i] =
        scores.max == -INFINITY ? make_float2(0, 0) : make_float2(Exp2(y.x), Exp2(y.y));
    sum += probability[i].x + probability[i].y;
  }
  const float weight = scores.max == -INFINITY ? 0.0f : Exp2(base - lse);
  *mass += QuadSum(sum) * weight;
  const float scaled = weight * RangeOf(top);
  const float weights[2] = {__shfl_sync(0xffffffffu, scaled, lane % 4 * 8),
                            __shfl_sync(0xffffffffu, scaled, lane % 4 * 8 + 4)};
  AddValues<Traits>(data + Shared::kScaleBytes, mine.token_ranges, value_bits, probability, weights,
                    lane, out);
  __syncwarp();
}

// A warp's share of the listed pages; sums go to out and mass (column lane / 4).
template <class Traits>
struct PageAttender {
  using Shared = AttendShared<Traits>;
  const ProgressiveArgs& p;
  const SequenceView& s;
  Shared& shared;
  typename Shared::Warp& mine;
  int64_t head_index;
  int head, begin, column_tile, lane;
  int64_t key_bytes = 0, value_bytes = 0;

  __device__ __forceinline__ void Copy(std::byte* to, const std::byte* base,
                                       const PageLayout::Section& from, int bytes) const {
    WarpCopyAsync(to, base + from.offset + head * from.bytes, bytes, lane);
  }
  __device__ __forceinline__ const std::byte* Base(int local) const {
    return p.pool + static_cast<int64_t>(shared.base[local]) * kPageAlignment;
  }
  __device__ __forceinline__ int KeyTiles(int local) const {
    return min(shared.key_chunks[local] * Traits::kChunkTiles, Traits::kTiles);
  }

  __device__ __forceinline__ void FetchValues(int local, std::byte* target) {
    const AttendedPage<Traits> page(shared, local);
    Copy(target, Base(local), p.layout.value_scales, Shared::kScaleBytes);
    for (int i = 0; i < page.value_bits / 2; ++i) {
      Copy(target + Shared::kScaleBytes + i * Shared::kPlaneBytes, Base(local),
           p.layout.value_plane[i], Shared::kPlaneBytes);
    }
    value_bytes += page.value_bytes();
  }
  __device__ __forceinline__ void FetchKeys(int local, std::byte* target) {
    const AttendedPage<Traits> page(shared, local);
    if (page.fine_planes == 0) return;
    Copy(target, Base(local), p.layout.key_scales, Traits::kHeadDim);
    for (int i = 0; i < page.fine_planes; ++i) {
      Copy(target + Traits::kHeadDim + i * Shared::kPlaneBytes, Base(local), p.layout.key_fine[i],
           KeyTiles(local) * kPlaneTileBytes);
    }
    key_bytes += page.fine_planes * KeyTiles(local) * kPlaneTileBytes;
  }
  __device__ __forceinline__ void Refine(int local, const std::byte* data, PageScores* scores) {
    const AttendedPage<Traits> page(shared, local);
    if (page.fine_planes == 0) return;
    const float top = SpreadKeyRanges<Traits>(data, mine.ranges, lane);
    __syncwarp();
    const QueryFragments<Traits> query(p, head_index, BasisOfPage(s, begin + local), column_tile);
    RefineScores<Traits>(data + Traits::kHeadDim, mine.ranges, query.halves, query.unit * top,
                         page.fine_planes, KeyTiles(local), lane, scores->packed);
  }
  __device__ __forceinline__ PageScores Scores(int local) const {
    return LoadScores<Traits>(p, s, head_index * p.max_sealed + begin + local, column_tile, lane);
  }
  __device__ __forceinline__ static void Arrive() {
    CommitCopies();
    WaitCopies<0>();
    __syncwarp();
  }

  __device__ __forceinline__ void Run(int count, int warp, float (&out)[Traits::kTiles][4],
                                      float* mass) {
    const float lse = shared.lse[column_tile * kTileColumns + lane / 4];
    for (int item = warp; item < count;) {
      int bytes = 0, next = item;
      while (next < count) {
        const int local = shared.list[next];
        const AttendedPage<Traits> page(shared, local);
        if (bytes + page.key_bytes() + page.value_bytes() > Shared::kBufferBytes) break;
        FetchKeys(local, mine.pages + bytes);
        FetchValues(local, mine.pages + bytes + page.key_bytes());
        bytes += page.key_bytes() + page.value_bytes();
        next += kAttendWarps;
      }
      if (next == item) {  // Too deep for one go: keys, then values.
        const int local = shared.list[item];
        FetchKeys(local, mine.pages);
        PageScores scores = Scores(local);
        Arrive();
        Refine(local, mine.pages, &scores);
        __syncwarp();
        FetchValues(local, mine.pages);
        Arrive();
        AttendValues<Traits>(s, mine.pages, shared.value_bits[local], scores, lse, lane, mine, out,
                             mass);
        item += kAttendWarps;
        continue;
      }
      PageScores scores = Scores(shared.list[item]);
      Arrive();
      bytes = 0;
      for (; item < next; item += kAttendWarps) {
        const int local = shared.list[item];
        const AttendedPage<Traits> page(shared, local);
        PageScores current = scores;
        if (item + kAttendWarps < next) scores = Scores(shared.list[item + kAttendWarps]);
        Refine(local, mine.pages + bytes, &current);
        AttendValues<Traits>(s, mine.pages + bytes + page.key_bytes(), page.value_bits, current,
                             lse, lane, mine, out, mass);
        bytes += page.key_bytes() + page.value_bytes();
      }
    }
  }
};

// Four 8x8 tiles of 16-bit units, transposed: register i holds (2t, 2t + 1; g) of tile i, whose row
// r the lane 8 i + r names.
__device__ __forceinline__ void LoadTransposed(uint32_t (&tile)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(tile[0]), "=r"(tile[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// Bytes 0 and 2 of `bytes` ^ 0x80 (selector 0x4240) or 1 and 3 (0x4341) as halves, signed.
__device__ __forceinline__ uint32_t HalvesFromBytes(uint32_t bytes, uint32_t selector) {
  const uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, selector);  // 1152 more
  return FmaHalves(biased, kOneHalves, 0xe480e480u);                                // - 1152
}

// The CTA's sums: means of the skipped pages plus the warps' partial outputs, and the weighted
// mean.
//   sum[n][c] = sum_page weight[n][page] mean[page][c]: weights are the A of the MMA, rows of the
// means its B, two channels at a time (a transposed load pairs the bytes of two pages).
template <class Traits>
__device__ __forceinline__ void AddMeans(int pages, AttendShared<Traits>& shared, float* partial) {
  constexpr int kD = Traits::kHeadDim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const float scale[2] = {shared.row_scale[g], shared.row_scale[kTileColumns + g]};
  for (int tile = warp; tile < Traits::kTiles; tile += kAttendWarps) {
    float even[4] = {}, odd[4] = {};
    for (int first = 0; first < pages; first += 16) {
      uint32_t a[4], bytes[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = *reinterpret_cast<const uint32_t*>(
            &shared.scaled[g + i % 2 * 8][first + 2 * t + i / 2 * 8]);
      }
      LoadTransposed(bytes, shared.summaries[first + lane % 16] + sizeof(ValueSummary) + tile * 16);
      Mma16x8x16<__half>(even, a, HalvesFromBytes(bytes[0], 0x4240u),
                         HalvesFromBytes(bytes[1], 0x4240u));
      Mma16x8x16<__half>(odd, a, HalvesFromBytes(bytes[0], 0x4341u),
                         HalvesFromBytes(bytes[1], 0x4341u));
    }
    // Column j of an accumulator is channel 16 tile + 2 j (+ 1): the lane has four in a row.
    const int channel = tile * 16 + 4 * t;
    float4 sum =
        make_float4(even[0] * scale[0], odd[0] * scale[0], even[1] * scale[0], odd[1] * scale[0]);
#pragma unroll
    for (int i = 0; i < kAttendWarps; ++i) {
      const float4 more = *reinterpret_cast<const float4*>(
          reinterpret_cast<const float*>(&shared.warps[i]) + g * kD + channel);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    float* target = partial + 2 * g * kD + channel;
    *reinterpret_cast<float4*>(target) = sum;
    *reinterpret_cast<float4*>(target + kD) =
        make_float4(even[2] * scale[1], odd[2] * scale[1], even[3] * scale[1], odd[3] * scale[1]);
  }
}

// Starts the copies of the chunk's value summaries, which depend on no earlier kernel.
template <class Traits>
__device__ __forceinline__ void FetchSummaries(const ProgressiveArgs& p,
                                               const ProgressiveSequence& from, int head, int begin,
                                               int pages, AttendShared<Traits>& shared) {
  if (threadIdx.x < pages) {
    shared.base[threadIdx.x] = p.table[from.table_begin + begin + threadIdx.x];
  }
  if (threadIdx.x < kNumKeyDepths) shared.key_pages[threadIdx.x] = 0;
  if (threadIdx.x < kNumValueDepths) shared.value_pages[threadIdx.x] = 0;
  __syncthreads();
  const PageLayout::Section& section = p.layout.value_summary;
  constexpr int kPieces = AttendShared<Traits>::kSummaryBytes / 16;
  for (int i = threadIdx.x; i < pages * kPieces; i += kAttendThreads) {
    CopyAsync16(shared.summaries[i / kPieces] + i % kPieces * 16,
                p.pool + static_cast<int64_t>(shared.base[i / kPieces]) * kPageAlignment +
                    section.offset + head * section.bytes + i % kPieces * 16);
  }
  CommitCopies();
}

// Writes the CTA's sums beside its partial output.
template <class Traits>
__device__ __forceinline__ void StoreState(const ProgressiveArgs& p, int64_t head_index,
                                           int64_t slot, const AttendShared<Traits>& shared) {
  const int n = threadIdx.x;
  if (n >= kTileColumns) return;
  AttendState state{};
  state.mass = shared.figures[n][0];
  for (int i = 0; i < kAttendWarps; ++i) state.mass += shared.mass[i][n];
  state.entropy = shared.figures[n][1];
  state.rest = shared.figures[n][2];
  state.mean_squares = shared.figures[n][3];
  state.weight = shared.figures[n][4];
  reinterpret_cast<AttendState*>(p.workspace + p.work.state)[slot + n] = state;
}

// Adds the CTA's page counts and what it loaded to the head's decision.
template <class Traits>
__device__ __forceinline__ void CountReads(HeadDecision* decision,
                                           const PageAttender<Traits>& attender,
                                           const AttendShared<Traits>& shared) {
  const int i = threadIdx.x;
  if (i < kNumKeyDepths && shared.key_pages[i] > 0) {
    atomicAdd(&decision->key_pages[i], shared.key_pages[i]);
  }
  if (i < kNumValueDepths && shared.value_pages[i] > 0) {
    atomicAdd(&decision->value_pages[i], shared.value_pages[i]);
  }
  int64_t value_bytes = attender.value_bytes;
  if (i == 0) {
    for (int j = 0; j < kNumValueDepths; ++j) {
      value_bytes += shared.value_pages[j] * AttendShared<Traits>::kSummaryBytes;
    }
  }
  if (i % 32 != 0) return;
  if (attender.key_bytes > 0) AddBytes(&decision->key_bytes, attender.key_bytes);
  if (value_bytes > 0) AddBytes(&decision->value_bytes, value_bytes);
}

template <class Traits>
__global__ void __launch_bounds__(kAttendThreads, Traits::kHeadDim <= 128 ? 2 : 1)
    ProgressiveAttendKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim;
  using Shared = AttendShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const int tiles = w.columns / kTileColumns;
  const int chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int head = blockIdx.y, sequence = blockIdx.z;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = chunk * p.attend_chunk, end = min(begin + p.attend_chunk, from.num_sealed);
  const int pages = max(end - begin, 0);
  FetchSummaries<Traits>(p, from, head, begin, pages, shared);
  WaitForDependencies();
  LaunchDependents();
  GlobalLse<Traits>(p, head_index, shared);
  if (pages == 0) return;  // The merge knows how many chunks there are.
  const float theta = from.decision.policy == Policy::kBudget
                          ? reinterpret_cast<const float*>(p.workspace + w.theta)[head_index]
                          : from.decision.theta;
  WaitCopies<0>();
  __syncthreads();
  DecidePages<Traits>(p, from.decision, s, head_index, tile * kTileColumns, theta, begin, end,
                      shared);
  int count = 0;
#pragma unroll
  for (int i = 0; i < kAttendWarps; ++i) count += shared.warp_count[i];

  float out[Traits::kTiles][4];
#pragma unroll
  for (int i = 0; i < Traits::kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[i][e] = 0;
  }
  float mass = 0;
  PageAttender<Traits> attender{p,     s,    shared, shared.warps[warp], head_index, head,
                                begin, tile, lane};
  attender.Run(count, warp, out, &mass);
  if (lane % 4 == 0) shared.mass[warp][lane / 4] = mass;
  __syncthreads();  // every warp is done with its pages: they become partial outputs
#pragma unroll
  for (int i = 0; i < Traits::kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = lane % 4 * 2 + e % 2, channel = 16 * i + lane / 4 + (e >= 2 ? 8 : 0);
      reinterpret_cast<float*>(&shared.warps[warp])[column * kD + channel] = out[i][e];
    }
  }
  __syncthreads();
  const int64_t slot = (head_index * w.attend_chunks + chunk) * w.columns + tile * kTileColumns;
  AddMeans<Traits>(pages, shared,
                   reinterpret_cast<float*>(p.workspace + w.partial) + slot * 2 * kD);
  StoreState<Traits>(p, head_index, slot, shared);
  if (tile == 0) CountReads(&p.decisions[head_index], attender, shared);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

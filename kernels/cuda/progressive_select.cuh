#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_

// Select: what every page's share of the global LSE earns it (policy/ladder.h).
//   skipped pages   sum of share * mean, here
//   attended pages  one list for the whole step, in units of a CTA's work: the attend kernel's
//                   CTAs take it in turn, so heads with much to read do not keep others waiting
//   error terms     policy/error_model.h, with o left open
// A CTA takes kSelectPages pages of one head, four threads a page, and then adds the means by an
// MMA over pages. Sums keep an order of their own in every CTA: they do not depend on timing.
// grid (chunks x column tiles, num_kv_heads, num_sequences); decisions come from all columns, so
// every tile makes the same, and the first one lists them.

#include "kernels/cuda/progressive_lse.cuh"
#include "kernels/cuda/progressive_scan.cuh"
#include "kernels/policy/error_model.h"

namespace adaattn {

inline constexpr int kSelectThreads = 4 * kSelectPages;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kSelectFigures = 6;

template <class Traits>
struct SelectShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kSummaryBytes = static_cast<int>(sizeof(ValueSummary)) + kD;
  alignas(16) std::byte summaries[kSelectPages][kSummaryBytes];
  float lse[kMaxColumns];  // L
  float2 lse_parts[kSelectWarps][kMaxColumns];
  uint32_t base[kSelectPages];    // page ids, by position in the chunk
  uint32_t packed[kSelectPages];  // PackedPage, likewise
  // What the means are weighted with, by page: rows 0..7 the share of a skipped page (else 0), rows
  // 8..15 w^2 var_s, of the tile's columns; then as halves relative to the row's largest.
  float weights[2 * kTileColumns][kSelectPages];
  alignas(16) __half scaled[2 * kTileColumns][kSelectPages + 8];
  float row_scale[2 * kTileColumns];
  // mass, entropy, rest, mean squares, weight, amplitude
  float warp_figures[kSelectWarps][kTileColumns][kSelectFigures];
  int list[kSelectPages];  // attended pages, in order
  int warp_count[kSelectWarps];
  int unit_begin;
  int key_pages[kNumKeyDepths], value_pages[kNumValueDepths];
};

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

// The depth of one page whose largest share over the columns is `share`.
template <class Traits>
__device__ __forceinline__ PageDepth DecidePage(const ProgressiveArgs& p,
                                                const DecisionParams& decision, float theta,
                                                float share, bool opened, int page,
                                                Visibility visibility) {
  constexpr int kD = Traits::kHeadDim;
  if (decision.policy == Policy::kFullDepth) return FullDepth(kD, p.stored_bits);
  if (decision.policy == Policy::kStatic) return StaticDepth(decision, kD, p.stored_bits);
  return LadderDepth(decision, theta, share,
                     PageFacts{page == 0, visibility == Visibility::kPart, opened}, kD,
                     p.stored_bits);
}

// Weights as halves relative to the largest of their row; an eighth of the rows per warp.
template <class Traits>
__device__ __forceinline__ void ScaleWeights(SelectShared<Traits>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  static_assert(kSelectPages == 64, "two pages a lane");
  for (int row = warp; row < 2 * kTileColumns; row += kSelectWarps) {
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

// The sum of squares of a page's probabilities, relative to the square of its share.
template <class Traits>
__device__ __forceinline__ float Concentration(const PageStats& stats, float softcap) {
  if (stats.max == -INFINITY) return 0;
  return fminf(fabsf(stats.squares) * Exp2(2 * (SoftCap<Traits>(stats.max, softcap) - stats.lse)),
               1.0f);
}

// One column's weights and figures of a page whose depth is decided.
struct ColumnWeights {
  float skipped = 0, weight = 0, mass = 0, entropy = 0, rest = 0, amplitude = 0;
};
template <class Traits>
__device__ __forceinline__ ColumnWeights WeighColumn(const SequenceView& s, const PageStats& stats,
                                                     const ValueSummary& summary, float lse,
                                                     PageDepth depth) {
  ColumnWeights out;
  const ColumnTerms terms = TermsOf(stats, lse);
  PageErrorInputs inputs;
  inputs.share = terms.share;
  inputs.concentration = Concentration<Traits>(stats, s.softcap);
  inputs.score_variance = stats.variance;
  inputs.spread = summary.spread;
  inputs.scale_rms = summary.scale_rms;
  // With mean_distance2 open, `score` is what goes with the spread: weight * (spread^2 + |mean -
  // o|^2).
  const PageErrorParts parts = ErrorParts(inputs, Traits::kHeadDim);
  const ErrorTerms error = TermsOf(parts, ScoreVarianceAt(1.0f, depth.key.bits), depth.value_bits);
  out.entropy = terms.entropy;
  out.rest = error.square;
  out.amplitude = error.amplitude;
  if (depth.value_bits == 0) {
    out.skipped = out.mass = terms.share;
  } else {
    const float away = 1.0f - inputs.share * inputs.concentration;
    out.weight = inputs.share * inputs.share * inputs.concentration * away * away *
                 ScoreVarianceAt(stats.variance, depth.key.bits);
  }
  return out;
}

// Where most of the sink page's mass lies on its first token, that token's value stands for the
// page's mean in the error terms (policy/error_model.h): it replaces the mean in the CTA's copy of
// the summary, which nothing else uses, since the sink is never skipped.
template <class Traits>
__device__ __forceinline__ void SubstituteSink(const ProgressiveArgs& p, const SequenceView& s,
                                               int64_t head_index, SelectShared<Traits>& shared) {
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
  for (int c = threadIdx.x; c < kD; c += kSelectThreads) {
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

// The largest share of a page over all columns, by a quad; and whether any column opened it.
struct QuadShare {
  float share;
  bool opened;
};
__device__ __forceinline__ QuadShare ShareOfPage(const float4* stats, const float* lse, int columns,
                                                 int quarter, bool visible, bool opened) {
  float share = 0;
  if (visible) {
    for (int n = quarter; n < columns; n += 4) {
      const PageStats page_stats = LoadStats(stats, n);
      opened |= page_stats.squares < 0;
      share = fmaxf(share, TermsOf(page_stats, lse[n]).share);
    }
  }
  const int quads = static_cast<int>(__ballot_sync(0xffffffffu, opened));
  return QuadShare{QuadMax(share), (quads >> (threadIdx.x % 32 / 4 * 4) & 15) != 0};
}

// Decides the chunk's pages, four threads a page: depth, weights, list of attended pages, counts,
// and the sums that go beside the means.
template <class Traits>
__device__ __forceinline__ int DecidePages(const ProgressiveArgs& p, const DecisionParams& decision,
                                           const SequenceView& s, int64_t head_index, int64_t slot,
                                           int column_begin, float theta, int begin, int end,
                                           SelectShared<Traits>& shared) {
  constexpr int kEach = kTileColumns / 4;
  const int local = threadIdx.x / 4, quarter = threadIdx.x % 4, page = begin + local;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int columns = p.shape.group_size() * s.q_len;
  Visibility visibility = Visibility::kNone;
  if (page < end) visibility = PageVisibility(s, page);
  const bool visible = visibility != Visibility::kNone;
  const std::byte* summary_bytes = shared.summaries[visible ? local : 0];
  const float mean2 = MeanSquare<Traits>(summary_bytes, quarter);
  const float4* stats = PageStatsOf(p, head_index, page);
  const QuadShare quad = ShareOfPage(stats, shared.lse, columns, quarter, visible,
                                     CoarseStage<Traits>(p, decision) == 0);
  PageDepth depth;
  if (visible) {
    depth = DecidePage<Traits>(p, decision, theta, quad.share, quad.opened, page, visibility);
    if (quarter == 0) {
      shared.packed[local] =
          PackPage(PackedPage{page, depth.value_bits / 2, (depth.key.bits - kScanBits) / 2,
                              depth.key.chunks, BasisOfPage(s, page)});
      atomicAdd(&shared.key_pages[KeyDepthIndex(depth.key.bits, depth.key.chunks)], 1);
      atomicAdd(&shared.value_pages[depth.value_bits / 2], 1);
    }
  }
  // Attended pages in order, whatever the thread timing.
  const uint32_t attended = __ballot_sync(0xffffffffu, depth.value_bits > 0) & 0x11111111u;
  if (lane == 0) shared.warp_count[warp] = __popc(attended);
  const auto summary = *reinterpret_cast<const ValueSummary*>(summary_bytes);
  float figures[kEach][kSelectFigures];  // as warp_figures
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
    figures[i][5] = column.amplitude;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
#pragma unroll
    for (int j = 0; j < kSelectFigures; ++j) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        figures[i][j] += __shfl_xor_sync(0xffffffffu, figures[i][j], step);
      }
      if (lane / 4 == 0) shared.warp_figures[warp][quarter * kEach + i][j] = figures[i][j];
    }
  }
  __syncthreads();
  int count = 0, before = 0;
#pragma unroll
  for (int i = 0; i < kSelectWarps; ++i) {
    if (i == warp) before = count;
    count += shared.warp_count[i];
  }
  if (depth.value_bits > 0 && quarter == 0) {
    shared.list[before + __popc(attended & ((1u << lane) - 1))] = local;
  }
  if (threadIdx.x < kTileColumns) {
    float sums[kSelectFigures] = {};
    for (int i = 0; i < kSelectWarps; ++i) {
#pragma unroll
      for (int j = 0; j < kSelectFigures; ++j) sums[j] += shared.warp_figures[i][threadIdx.x][j];
    }
    SelectState state;
    state.mass = sums[0];
    state.entropy = sums[1];
    state.rest = sums[2];
    state.mean_squares = sums[3];
    state.weight = sums[4];
    state.amplitude = sums[5];
    reinterpret_cast<SelectState*>(p.workspace + p.work.state)[slot + threadIdx.x] = state;
  }
  ScaleWeights<Traits>(shared);
  __syncthreads();
  return count;
}

// Puts the `count` attended pages of the chunk on the step's list. The list's order depends on
// timing; a unit's slot does not.
template <class Traits>
__device__ __forceinline__ void ListUnits(const ProgressiveArgs& p, int64_t head_index,
                                          int64_t chunk_index, int count, int columns,
                                          SelectShared<Traits>& shared) {
  const int units = CeilDiv(count, kUnitPages);
  auto* num_units = reinterpret_cast<int32_t*>(p.workspace + p.work.num_units);
  if (threadIdx.x == 0) {
    num_units[1 + chunk_index] = units;
    shared.unit_begin = units > 0 ? atomicAdd(num_units, units) : 0;
  }
  __syncthreads();
  constexpr int kWords = sizeof(AttendUnit) / 4;
  auto* words =
      reinterpret_cast<uint32_t*>(p.workspace + p.work.units) + int64_t{shared.unit_begin} * kWords;
  for (int i = threadIdx.x; i < units * kWords; i += kSelectThreads) {
    const int unit = i / kWords, word = i % kWords, first = unit * kUnitPages;
    uint32_t value = 0;
    if (word == 0) value = static_cast<uint32_t>(head_index);
    if (word == 1) value = static_cast<uint32_t>(chunk_index * kSelectUnits + unit);
    if (word == 2) value = static_cast<uint32_t>(min(kUnitPages, count - first));
    if (word == 3) value = static_cast<uint32_t>(columns);
    if (word >= 4 && word < 4 + 2 * kUnitPages) {
      const int at = first + word % kUnitPages;
      if (at < count) {
        const int local = shared.list[at];
        value = word < 4 + kUnitPages ? shared.base[local] : shared.packed[local];
      }
    }
    words[i] = value;
  }
}

// Starts the copies of the chunk's value summaries, which depend on no earlier kernel.
template <class Traits>
__device__ __forceinline__ void FetchSummaries(const ProgressiveArgs& p,
                                               const ProgressiveSequence& from, int head, int begin,
                                               int pages, SelectShared<Traits>& shared) {
  if (threadIdx.x < pages) {
    shared.base[threadIdx.x] = p.table[from.table_begin + begin + threadIdx.x];
  }
  if (threadIdx.x < kNumKeyDepths) shared.key_pages[threadIdx.x] = 0;
  if (threadIdx.x < kNumValueDepths) shared.value_pages[threadIdx.x] = 0;
  __syncthreads();
  const PageLayout::Section& section = p.layout.value_summary;
  constexpr int kPieces = SelectShared<Traits>::kSummaryBytes / 16;
  for (int i = threadIdx.x; i < pages * kPieces; i += kSelectThreads) {
    CopyAsync16(shared.summaries[i / kPieces] + i % kPieces * 16,
                p.pool + static_cast<int64_t>(shared.base[i / kPieces]) * kPageAlignment +
                    section.offset + head * section.bytes + i % kPieces * 16);
  }
  CommitCopies();
}

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

// The weighted sums of the chunk's means, for `columns` columns of the tile, to target [8][2][D].
//   sum[n][c] = sum_page weight[n][page] mean[page][c]: weights are the A of the MMA, rows of the
// means its B, two channels at a time (a transposed load pairs the bytes of two pages).
template <class Traits>
__device__ __forceinline__ void AddMeans(int pages, int columns, SelectShared<Traits>& shared,
                                         float* target) {
  constexpr int kD = Traits::kHeadDim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const float scale[2] = {shared.row_scale[g], shared.row_scale[kTileColumns + g]};
  for (int tile = warp; tile < Traits::kTiles; tile += kSelectWarps) {
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
    if (g >= columns) continue;
    // Column j of an accumulator is channel 16 tile + 2 j (+ 1): the lane has four in a row.
    float* row = target + 2 * g * kD + tile * 16 + 4 * t;
    *reinterpret_cast<float4*>(row) =
        make_float4(even[0] * scale[0], odd[0] * scale[0], even[1] * scale[0], odd[1] * scale[0]);
    *reinterpret_cast<float4*>(row + kD) =
        make_float4(even[2] * scale[1], odd[2] * scale[1], even[3] * scale[1], odd[3] * scale[1]);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kSelectThreads, 4)
    ProgressiveSelectKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<SelectShared<Traits>*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const int tiles = w.columns / kTileColumns;
  const int chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int head = blockIdx.y, sequence = blockIdx.z;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int begin = chunk * kSelectPages, end = min(begin + kSelectPages, from.num_sealed);
  const int pages = max(end - begin, 0);
  FetchSummaries<Traits>(p, from, head, begin, pages, shared);
  WaitForDependencies();
  LaunchDependents();
  if (pages == 0) return;  // The merge knows how many chunks there are.
  GlobalLse<kSelectWarps>(p, from, head_index, shared.lse, shared.lse_parts);
  if (blockIdx.x == 0 && threadIdx.x < w.columns) {
    reinterpret_cast<float*>(p.workspace + w.global_lse)[head_index * w.columns + threadIdx.x] =
        shared.lse[threadIdx.x];
  }
  const float theta = from.decision.policy == Policy::kBudget
                          ? reinterpret_cast<const float*>(p.workspace + w.theta)[head_index]
                          : from.decision.theta;
  WaitCopies<0>();
  __syncthreads();
  if (begin == 0) SubstituteSink<Traits>(p, s, head_index, shared);
  const int64_t chunk_index = head_index * w.chunks + chunk;
  const int64_t slot = chunk_index * w.columns + tile * kTileColumns;
  const int count = DecidePages<Traits>(p, from.decision, s, head_index, slot, tile * kTileColumns,
                                        theta, begin, end, shared);
  AddMeans<Traits>(pages, p.shape.group_size() * s.q_len - tile * kTileColumns, shared,
                   reinterpret_cast<float*>(p.workspace + w.means) + slot * 2 * Traits::kHeadDim);
  if (tile > 0) return;
  ListUnits<Traits>(p, head_index, chunk_index, count, p.shape.group_size() * s.q_len, shared);
  HeadDecision& decision = p.decisions[head_index];
  const int i = threadIdx.x;
  if (i < kNumKeyDepths && shared.key_pages[i] > 0) {
    atomicAdd(&decision.key_pages[i], shared.key_pages[i]);
  }
  if (i < kNumValueDepths && shared.value_pages[i] > 0) {
    atomicAdd(&decision.value_pages[i], shared.value_pages[i]);
    AddBytes(&decision.value_bytes,
             int64_t{shared.value_pages[i]} * SelectShared<Traits>::kSummaryBytes);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_CUH_

// Budget: theta of one (sequence, kv head) from the predicted error, as policy/budget.h states it.
//   o_n     = sum over pages share * mean + dense share * dense_out, in the Hadamard frame
//   inputs  share, concentration, var_s, |mean - o|^2, spread, scale_rms of each page and column
//   theta   the largest of the grid whose predicted relative error stays under the target
// A part of the kernel in progressive_theta.cuh.

#include "kernels/cuda/progressive_select.cuh"

namespace adaattn {

inline constexpr int kBudgetThreads = 256;
inline constexpr int kBudgetPages = 64;  // in shared memory at a time; four threads a page

template <class Traits>
struct BudgetShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kSummaryBytes = SelectShared<Traits>::kSummaryBytes;
  alignas(16) std::byte summaries[kBudgetPages][kSummaryBytes];
  float share[kBudgetPages][kTileColumns];
  float out[kTileColumns][kD];  // o, unnormalised shares: they sum to 1
  float part[kTileColumns][kD];
  float2 scratch[kD];
  float first[kD];                     // the value of token 0, at the stored depth
  float first_rms;                     // root mean square of its ranges
  bool stands[kTileColumns];           // it stands for page 0 in the column's terms
  float norm[kTileColumns];            // |o|^2
  float first_distance[kTileColumns];  // |v_0 - o|^2
  float lse[kMaxColumns];
  float2 lse_parts[kBudgetThreads / 32][kMaxColumns];
  ErrorTerms sums[kBudgetThreads / 32][kNumBudgetThetas + 1];
};

template <class Traits>
__device__ __forceinline__ float ShareOf(const PageStats& stats, float lse) {
  return TermsOf(stats, lse).share;
}

// Brings the summaries of pages [first, first + 64) and their shares for one tile of columns.
template <class Traits>
__device__ __forceinline__ void LoadBudgetPages(const ProgressiveArgs& p,
                                                const ProgressiveSequence& from,
                                                const SequenceView& s, int64_t head_index, int head,
                                                int first, int column_begin,
                                                BudgetShared<Traits>& shared) {
  constexpr int kPieces = BudgetShared<Traits>::kSummaryBytes / 16;
  const PageLayout::Section& section = p.layout.value_summary;
  const int count = min(kBudgetPages, from.num_sealed - first);
  __syncthreads();
  for (int i = threadIdx.x; i < count * kPieces; i += kBudgetThreads) {
    const int local = i / kPieces;
    CopyAsync16(
        shared.summaries[local] + i % kPieces * 16,
        p.pool + static_cast<int64_t>(p.table[from.table_begin + first + local]) * kPageAlignment +
            section.offset + head * section.bytes + i % kPieces * 16);
  }
  CommitCopies();
  const int columns = p.shape.group_size() * s.q_len;
  for (int i = threadIdx.x; i < kBudgetPages * kTileColumns; i += kBudgetThreads) {
    const int local = i / kTileColumns, n = i % kTileColumns, page = first + local;
    float share = 0;
    if (local < count && column_begin + n < columns &&
        PageVisibility(s, page) != Visibility::kNone) {
      share = ShareOf<Traits>(LoadStats(PageStatsOf(p, head_index, page), column_begin + n),
                              shared.lse[column_begin + n]);
    }
    shared.share[local][n] = share;
  }
  WaitCopies<0>();
  __syncthreads();
}

template <class Traits>
__device__ __forceinline__ float MeanOf(const std::byte* summary, int channel) {
  return reinterpret_cast<const ValueSummary*>(summary)->mean_scale *
         static_cast<float>(
             reinterpret_cast<const int8_t*>(summary + sizeof(ValueSummary))[channel]);
}

// The first token's value, and for which columns of the tile it stands for page 0.
template <class Traits>
__device__ __forceinline__ void LoadFirstToken(const ProgressiveArgs& p,
                                               const ProgressiveSequence& from,
                                               const SequenceView& s, int64_t head_index, int head,
                                               int column_begin, BudgetShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kGroups = Traits::kValueGroups;
  const std::byte* page = p.pool + static_cast<int64_t>(p.table[from.table_begin]) * kPageAlignment;
  const auto* scales = reinterpret_cast<const uint8_t*>(page + p.layout.value_scales.offset +
                                                        head * p.layout.value_scales.bytes);
  for (int c = threadIdx.x; c < kD; c += kBudgetThreads) {
    shared.first[c] =
        FirstValue<Traits>(p.layout, page, head, c) * RangeOf(scales[c / (kD / kGroups)]);
  }
  if (threadIdx.x == 0) {
    float squares = 0;
    for (int g = 0; g < kGroups; ++g) squares += RangeOf(scales[g]) * RangeOf(scales[g]);
    shared.first_rms = sqrtf(squares / kGroups);
  }
  const int group_size = p.shape.group_size();
  if (threadIdx.x < kTileColumns) {
    const int column = column_begin + threadIdx.x;
    bool stands = false;
    if (column < group_size * s.q_len && TokenVisible(s, 0, column / group_size)) {
      const PageStats stats = LoadStats(PageStatsOf(p, head_index, 0), column);
      stands = FirstTokenStandsForPage(true, true, fabsf(stats.concentration));
    }
    shared.stands[threadIdx.x] = stands;
  }
  __syncthreads();
}

// o of a tile's columns: shares times means, and the dense tail's output in the Hadamard frame.
template <class Traits>
__device__ __forceinline__ void EstimateOutput(const ProgressiveArgs& p,
                                               const ProgressiveSequence& from,
                                               const SequenceView& s, int64_t head_index, int head,
                                               int column_begin, BudgetShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim;
  const bool lower = threadIdx.x < kD;
  float sum[kTileColumns] = {};
  for (int first = 0; first < from.num_sealed; first += kBudgetPages) {
    LoadBudgetPages<Traits>(p, from, s, head_index, head, first, column_begin, shared);
    const int count = min(kBudgetPages, from.num_sealed - first);
    for (int i = 0; lower && i < count; ++i) {
      const float mean = MeanOf<Traits>(shared.summaries[i], threadIdx.x);
#pragma unroll
      for (int n = 0; n < kTileColumns; ++n) {
        const bool token = first + i == 0 && shared.stands[n];
        sum[n] = fmaf(shared.share[i][n], token ? shared.first[threadIdx.x] : mean, sum[n]);
      }
    }
  }
  const ProgressiveWorkspace& w = p.work;
#pragma unroll 1
  for (int n = 0; n < kTileColumns; ++n) {
    const int64_t at = head_index * w.columns + column_begin + n;
    const float dense_lse = reinterpret_cast<const float*>(p.workspace + w.dense_lse)[at];
    const float share =
        dense_lse == -INFINITY ? 0.0f : Exp2(dense_lse - shared.lse[column_begin + n]);
    __syncthreads();
    if (lower) {
      shared.part[n][threadIdx.x] =
          share * reinterpret_cast<const float*>(p.workspace + w.dense_out)[at * kD + threadIdx.x];
    }
    __syncthreads();
    // The block transform by definition: D is small and this runs once a step and head.
    if (lower) {
      constexpr bool kWhole = (kD & (kD - 1)) == 0;
      const int c = threadIdx.x;
      const int begin = kWhole || c < 64 ? 0 : 64, size = kWhole ? kD : c < 64 ? 64 : kD - 64;
      float dense = 0;
      for (int i = 0; i < size; ++i) {
        const float x = shared.part[n][begin + i];
        dense += __popc(i & (c - begin)) % 2 == 0 ? x : -x;
      }
      shared.out[n][c] = sum[n] + dense * rsqrtf(static_cast<float>(size));
    }
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float square = 0, distance = 0;
  for (int c = lane; c < kD; c += 32) {
    const float o = shared.out[warp][c], off = shared.first[c] - o;
    square = fmaf(o, o, square);
    distance = fmaf(off, off, distance);
  }
  square = WarpSum(square);
  distance = WarpSum(distance);
  if (lane == 0) {
    shared.norm[warp] = square;
    shared.first_distance[warp] = distance;
  }
  __syncthreads();
}

// |mean - o_n|^2 of a page for every column of the tile, by the four threads of a quad.
template <class Traits>
__device__ __forceinline__ void MeanDistances(const std::byte* summary, int quarter,
                                              const BudgetShared<Traits>& shared,
                                              float (&distance)[kTileColumns]) {
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) distance[n] = 0;
  for (int c = quarter; c < Traits::kHeadDim; c += 4) {
    const float mean = MeanOf<Traits>(summary, c);
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
      const float off = mean - shared.out[n][c];
      distance[n] = fmaf(off, off, distance[n]);
    }
  }
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) distance[n] = QuadSum(distance[n]);
}

// The part of one tile of columns in every page's budget.
template <class Traits>
__device__ __forceinline__ void AddTile(const ProgressiveArgs& p, const ProgressiveSequence& from,
                                        const SequenceView& s, int64_t head_index, int head,
                                        int column_begin, BudgetShared<Traits>& shared) {
  const int columns = p.shape.group_size() * s.q_len;
  const int local = threadIdx.x / 4, quarter = threadIdx.x % 4;
  PageBudget* budgets =
      reinterpret_cast<PageBudget*>(p.workspace + p.work.budget) + head_index * p.max_sealed;
  for (int first = 0; first < from.num_sealed; first += kBudgetPages) {
    LoadBudgetPages<Traits>(p, from, s, head_index, head, first, column_begin, shared);
    const int page = first + local;
    float distance[kTileColumns];  // of rows past the end: of no use to anyone
    MeanDistances<Traits>(shared.summaries[local], quarter, shared, distance);
    if (quarter != 0 || page >= from.num_sealed) continue;
    const Visibility visibility = PageVisibility(s, page);
    PageBudget budget;
    if (column_begin > 0) budget = budgets[page];
    budget.facts = PageFacts{page == 0, visibility == Visibility::kPart, true};
    const auto& summary = *reinterpret_cast<const ValueSummary*>(shared.summaries[local]);
    for (int n = 0; n < kTileColumns && column_begin + n < columns; ++n) {
      if (visibility == Visibility::kNone) break;
      const PageStats stats = LoadStats(PageStatsOf(p, head_index, page), column_begin + n);
      PageErrorInputs inputs;
      inputs.share = ShareOf<Traits>(stats, shared.lse[column_begin + n]);
      inputs.concentration = fabsf(stats.concentration);
      inputs.score_variance = stats.variance;
      inputs.mean_distance2 = distance[n];
      inputs.spread = summary.spread;
      inputs.scale_rms = summary.scale_rms;
      if (page == 0 && shared.stands[n]) {
        inputs.mean_distance2 = shared.first_distance[n];
        inputs.spread = 0;
        inputs.scale_rms = shared.first_rms;
      }
      const float weight = shared.norm[n] > 0 ? 1.0f / (shared.norm[n] * columns) : 0.0f;
      AddToBudget(inputs.share, ErrorParts(inputs, Traits::kHeadDim), weight, &budget);
    }
    budgets[page] = budget;
  }
  __syncthreads();
}

// Sums the predicted square over the pages for every theta of the grid; thread 0 chooses.
template <class Traits>
__device__ __forceinline__ void ChooseThetaOfHead(const ProgressiveArgs& p,
                                                  const ProgressiveSequence& from,
                                                  const SequenceView& s, int64_t head_index,
                                                  BudgetShared<Traits>& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const PageBudget* budgets =
      reinterpret_cast<const PageBudget*>(p.workspace + p.work.budget) + head_index * p.max_sealed;
#pragma unroll 1
  for (int i = 0; i <= kNumBudgetThetas; ++i) {
    const float theta = i < kNumBudgetThetas ? BudgetTheta(i) : 0.0f;
    ErrorTerms sum;
    for (int page = threadIdx.x; page < from.num_sealed; page += kBudgetThreads) {
      if (PageVisibility(s, page) == Visibility::kNone) continue;
      AddTerms(BudgetTermsAt(from.decision, budgets[page], theta, Traits::kHeadDim, p.stored_bits),
               &sum);
    }
    sum.square = WarpSum(sum.square);
    sum.amplitude = WarpSum(sum.amplitude);
    if (lane == 0) shared.sums[warp][i] = sum;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 0; i <= kNumBudgetThetas; ++i) {
    for (int j = 1; j < kBudgetThreads / 32; ++j) AddTerms(shared.sums[j][i], &shared.sums[0][i]);
  }
  const BudgetChoice choice = ChooseThetaFromTerms(shared.sums[0], shared.sums[0][kNumBudgetThetas],
                                                   from.decision.target_relative_error);
  reinterpret_cast<float*>(p.workspace + p.work.theta)[head_index] = choice.theta;
}

// By all threads of a CTA; thread 0 stores theta.
template <class Traits>
__device__ __forceinline__ void ThetaFromBudget(const ProgressiveArgs& p,
                                                const ProgressiveSequence& from,
                                                const SequenceView& s, int64_t head_index, int head,
                                                BudgetShared<Traits>& shared) {
  GlobalLse<kBudgetThreads / 32>(p, from, head_index, shared.lse, shared.lse_parts);
  const int columns = p.shape.group_size() * s.q_len;
  for (int column_begin = 0; column_begin < columns; column_begin += kTileColumns) {
    LoadFirstToken<Traits>(p, from, s, head_index, head, column_begin, shared);
    EstimateOutput<Traits>(p, from, s, head_index, head, column_begin, shared);
    AddTile<Traits>(p, from, s, head_index, head, column_begin, shared);
  }
  ChooseThetaOfHead<Traits>(p, from, s, head_index, shared);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_CUH_

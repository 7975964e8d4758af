#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_TERMS_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_TERMS_CUH_

// What a scanned page adds to a column's figures: its share of the global LSE and the terms of
// policy/error_model.h, with o left open.

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/progressive_common.cuh"
#include "kernels/policy/error_model.h"

namespace adaattn {

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
  float share = 0, weight = 0, mass = 0, entropy = 0, rest = 0, amplitude = 0;
};
template <class Traits>
__device__ __forceinline__ ColumnWeights WeighColumn(const PageStats& stats,
                                                     const ValueSummary& summary, float lse,
                                                     PageDepth depth) {
  ColumnWeights out;
  const ColumnTerms terms = TermsOf(stats, lse);
  PageErrorInputs inputs;
  inputs.share = terms.share;
  inputs.concentration = fabsf(stats.concentration);
  inputs.score_variance = stats.variance;
  inputs.spread = summary.spread;
  inputs.scale_rms = summary.scale_rms;
  // With mean_distance2 open, `score` is what goes with the spread: weight * (spread^2 + |mean -
  // o|^2).
  const PageErrorParts parts = ErrorParts(inputs, Traits::kHeadDim);
  const ErrorTerms error = TermsOf(parts, ScoreVarianceAt(1.0f, depth.key.bits), depth.value_bits);
  out.share = terms.share;
  out.entropy = terms.entropy;
  out.rest = error.square;
  out.amplitude = error.amplitude;
  if (depth.value_bits == 0) {
    out.mass = terms.share;
  } else {
    const float away = 1.0f - inputs.share * inputs.concentration;
    out.weight = inputs.share * inputs.share * inputs.concentration * away * away *
                 ScoreVarianceAt(stats.variance, depth.key.bits);
  }
  return out;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_TERMS_CUH_

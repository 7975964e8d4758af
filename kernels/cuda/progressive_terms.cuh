#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_TERMS_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_TERMS_CUH_

// What a scanned page adds to a column's figures: its share of the global LSE and the terms of
// policy/error_model.h, with o left open.

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/progressive_common.cuh"
#include "kernels/policy/error_model.h"

namespace adaattn {

__device__ __forceinline__ float Sqrt(float x) {
  float out;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
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
// From L2: the kernel may not have waited for the scan itself (progressive_select.cuh).
__device__ __forceinline__ PageStats LoadStats(const float4* stats, int column) {
  const float4 x = __ldcg(stats + column);
  return PageStats{x.x, x.y, x.z, x.w};
}

// |mean|^2 of a page's values, some of the channels per thread of a quad.
template <class Traits>
__device__ __forceinline__ float MeanSquare(const std::byte* summary, int quarter) {
  constexpr int kPieces = Traits::kHeadDim / 16;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < kPieces; i += 4) {
    if (i + 4 > kPieces && i + quarter >= kPieces) break;
    const int4 x = reinterpret_cast<const int4*>(summary + sizeof(ValueSummary))[i + quarter];
    sum = __dp4a(x.x, x.x, __dp4a(x.y, x.y, __dp4a(x.z, x.z, __dp4a(x.w, x.w, sum))));
  }
  const float scale = reinterpret_cast<const ValueSummary*>(summary)->mean_scale;
  return QuadSum(static_cast<float>(sum) * scale * scale);
}

// What reading a page at its depth leaves of its errors: of the scan's score variance, and of the
// values' per square of their range; 0: their mean stands for them.
struct DepthFactors {
  float score, value;
};
__device__ __forceinline__ DepthFactors FactorsAt(const PageDepth& depth) {
  const int bits = depth.value_bits;
  return DepthFactors{ScoreVarianceAt(1.0f, depth.key.bits), bits == 0   ? 0.0f
                                                             : bits == 2 ? CodeVariance(1.0f, 2)
                                                             : bits == 4 ? CodeVariance(1.0f, 4)
                                                             : bits == 6 ? CodeVariance(1.0f, 6)
                                                                         : CodeVariance(1.0f, 8)};
}

// One column's weights and figures of a page whose depth is decided.
struct ColumnWeights {
  float share, weight, mass, entropy, rest, amplitude;
};
template <class Traits>
__device__ __forceinline__ ColumnWeights WeighColumn(const PageStats& stats,
                                                     const ColumnTerms& terms,
                                                     const ValueSummary& summary,
                                                     const DepthFactors& depth) {
  PageErrorInputs inputs;
  inputs.share = terms.share;
  inputs.concentration = fabsf(stats.concentration);
  inputs.score_variance = stats.variance;
  inputs.spread = summary.spread;
  inputs.scale_rms = summary.scale_rms;
  // With mean_distance2 open, `score` is what goes with the spread: weight * (spread^2 + |mean -
  // o|^2).
  const PageErrorParts parts = ErrorParts(inputs, Traits::kHeadDim);
  ColumnWeights out;
  out.share = terms.share;
  out.entropy = terms.entropy;
  const bool skipped = depth.value == 0.0f;
  const float away = 1.0f - inputs.share * inputs.concentration;
  const float weight = inputs.share * inputs.share * inputs.concentration * inputs.score_variance *
                       away * away * depth.score;
  // As TermsOf of the error model, whose factors are at hand.
  out.rest = skipped ? parts.skipped : parts.score * depth.score + parts.value * depth.value;
  out.amplitude = skipped ? Sqrt(parts.skipped) : 0.0f;
  out.weight = skipped ? 0.0f : weight;
  out.mass = skipped ? terms.share : 0.0f;
  return out;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_TERMS_CUH_

#ifndef ADAATTN_KERNELS_POLICY_ERROR_MODEL_H_
#define ADAATTN_KERNELS_POLICY_ERROR_MODEL_H_

// The statistical error model: what rounding the codes does to scores and outputs. It predicts an
// expected square; it bounds nothing.
//
//   var_s     = scale^2 sum_c (qQ)_c^2 * (r_c 2^(1-b))^2 / 12, an unread channel r_c^2 / 6
//   E|do|^2   = sum over attended tokens j  p_j^2 (var_s |v_j - o|^2 + var_v)
//             + sum over skipped pages      a^2
//             + kCoherence (sum over skipped pages  a)^2,   a^2 = sum_j p_j^2 |v_j - mean|^2
//
// Within a page, sum_j p_j^2 = share^2 * concentration, |v_j - mean|^2 = spread^2 on average, and
// var_v = head_dim * (scale_rms 2^(1-b))^2 / 12. A token with most of a row's mass pulls o toward
// itself: |v_j - o|^2 = (1 - p_j)^2 (spread^2 + |mean - o|^2), with share * concentration for p_j.
// The Hadamard rotation changes no length, so all of it may be taken in the rotated frame.
//
// Rounding errors of different tokens are taken as independent. What skipping loses is not: the
// tokens of different pages that a query looks at resemble each other, so their distances from
// their pages' means share a direction, and amplitudes a add up. kCoherence is how much of that
// adds: least squares of log(actual / predicted) over the traces of tests/data and a 32k one, with
// the other coefficients free too, gave 0.30 (and .95, 1.1 for the squares of skipping and values).
// It takes the standard deviation of that logarithm from .54, .48, .57 to .46, .39, .33.
// Heads differ in both: what is measured when a basis is fitted (value_factors.h) multiplies spread
// and scale_rms in the summaries of the pages that are sealed with it.
//
// Values that all share one channel much larger than the rest, after the Hadamard rotation, break
// the independence of rounding: that channel always falls into the same cell, its rounding adds up
// over tokens, and the actual error at 2 bits can be twice the predicted.

#include <cmath>
#include <cstdint>

#include "kernels/format/nested_code.h"
#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"
#include "kernels/policy/decision.h"

namespace adaattn {

// Where a page's log mass is corrected for rounding, at most this variance is believed.
inline constexpr float kMaxScoreVariance = 4.0f;

// Estimated log of a page's softmax mass from its scan: E[exp(s + e)] = exp(s + var / 2) for a
// normal e turned around: rounding errors hide mass rather than make it up.
ADAATTN_HD constexpr float PageLogMass(float page_lse, float score_variance) {
  return page_lse +
         0.5f * (score_variance < kMaxScoreVariance ? score_variance : kMaxScoreVariance);
}

// var_s of one query for one page, in nats^2.
//
//   query       [head_dim], rotated (q Q), without the softmax scale
//   key_scales  [head_dim], the page's scale bytes
//
// Channels below `rank` were read at `bits`, the others not at all.
ADAATTN_HD float ScoreVariance(const float* query, const uint8_t* key_scales, int32_t head_dim,
                               int32_t bits, int32_t rank, float softmax_scale) {
  float read = 0.0f, unread = 0.0f;
  for (int32_t c = 0; c < head_dim; ++c) {
    const float term = query[c] * RangeFromScale(key_scales[c]);
    if (c < rank) {
      read += term * term;
    } else {
      unread += term * term;
    }
  }
  return softmax_scale * softmax_scale *
         (read * CodeVariance(1.0f, bits) + unread * UnreadVariance(1.0f));
}

// var_s at `bits` of every channel from var_s at kScanBits (4) of every channel.
ADAATTN_HD constexpr float ScoreVarianceAt(float scan_variance, int32_t bits) {
  return scan_variance * (bits <= 4 ? 1.0f : bits <= 6 ? 1.0f / 16 : 1.0f / 256);
}

// The sink page's mass usually sits on its first token, whose value is unlike the page's mean (near
// zero in many models). Taking the page by its mean there overstates the error two- to fourfold, so
// where a row sees that token and the page's concentration is above this, the token stands for the
// page: in the estimate of o its value replaces the mean; in PageErrorInputs mean_distance2 is
// |v_0 - o|^2, spread is 0 and scale_rms is the root mean square of the token's own ranges. v_0 is
// decoded at the depth at which the page's values are read, and is counted with them.
inline constexpr float kSinkConcentration = 0.5f;

ADAATTN_HD constexpr bool FirstTokenStandsForPage(bool sink, bool sees_first_token,
                                                  float concentration) {
  return sink && sees_first_token && concentration > kSinkConcentration;
}

// One page as one row of one q head sees it.
struct PageErrorInputs {
  float share = 0;           // fraction of the row's softmax mass
  float concentration = 1;   // sum_j p_j^2 / share^2 over its tokens: 1/64 flat, 1 a single token
  float score_variance = 0;  // var_s at the depth at which K is read
  float mean_distance2 = 0;  // |mean - o|^2, mean as stored, o the estimated output
  float spread = 0;          // ValueSummary::spread, the head's factor included, as is the next
  float scale_rms = 0;       // ValueSummary::scale_rms
};

// How much of the skipped pages' amplitudes adds up.
inline constexpr float kCoherence = 0.3f;

// What one page costs one row of one q head (or, weighted, many of them) by what is read of it.
struct PageErrorParts {
  float skipped = 0;  // a^2, if the mean stands in
  float score = 0;    // from the keys at the depth of PageErrorInputs::score_variance
  float value = 0;    // from the values, per unit of CodeVariance
};

ADAATTN_HD constexpr PageErrorParts ErrorParts(const PageErrorInputs& page, int32_t head_dim) {
  const float share2 = page.share * page.share * page.concentration;  // sum_j p_j^2
  const float spread2 = page.spread * page.spread;
  const float away = 1.0f - page.share * page.concentration;
  PageErrorParts parts;
  parts.skipped = share2 * spread2;
  parts.score = share2 * page.score_variance * away * away * (spread2 + page.mean_distance2);
  parts.value = share2 * static_cast<float>(head_dim) * page.scale_rms * page.scale_rms;
  return parts;
}

// What one or many pages add to E|do|^2 of one row of one q head. Sums over pages are by member.
struct ErrorTerms {
  float square = 0;     // of errors that are independent of other pages'
  float amplitude = 0;  // sum of a over skipped pages
};

ADAATTN_HD constexpr void AddTerms(const ErrorTerms& page, ErrorTerms* sum) {
  sum->square += page.square;
  sum->amplitude += page.amplitude;
}

// E|do|^2 of the pages summed in `terms`.
ADAATTN_HD constexpr float ErrorSquare(const ErrorTerms& terms) {
  return terms.square + kCoherence * terms.amplitude * terms.amplitude;
}

// The page's terms with its values read at `value_bits` (0: replaced by the mean) and its keys as
// deep as leaves `score_factor` of the variance that the parts were made with.
ADAATTN_HD ErrorTerms TermsOf(const PageErrorParts& parts, float score_factor, int32_t value_bits) {
  ErrorTerms terms;
  if (value_bits == 0) {
    terms.square = parts.skipped;
    terms.amplitude = sqrtf(parts.skipped);
  } else {
    terms.square = parts.score * score_factor + parts.value * CodeVariance(1.0f, value_bits);
  }
  return terms;
}

// TermsOf as a sum of parts: what each is multiplied by at one depth.
struct TermFactors {
  float skipped = 0;  // and the root of it
  float score = 0;
  float value = 0;
};

ADAATTN_HD constexpr TermFactors FactorsOf(float score_factor, int32_t value_bits) {
  if (value_bits == 0) return TermFactors{1.0f, 0.0f, 0.0f};
  return TermFactors{0.0f, score_factor, CodeVariance(1.0f, value_bits)};
}

ADAATTN_HD ErrorTerms TermsOf(const PageErrorParts& parts, const TermFactors& factors) {
  ErrorTerms terms;
  terms.square =
      factors.skipped * parts.skipped + factors.score * parts.score + factors.value * parts.value;
  terms.amplitude = factors.skipped * sqrtf(parts.skipped);
  return terms;
}

// E|do|^2 / |o|^2. `norm2` is that of the estimate or of the output, which lack what skipping lost:
// it is at right angles to them, and added. So the result stays below 1; it is 0 where both are 0.
ADAATTN_HD constexpr float RelativeErrorSquare(const ErrorTerms& terms, float norm2) {
  const float square = ErrorSquare(terms);
  return square > 0.0f ? square / (norm2 + square) : 0.0f;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_ERROR_MODEL_H_

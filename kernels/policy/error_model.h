#ifndef ADAATTN_KERNELS_POLICY_ERROR_MODEL_H_
#define ADAATTN_KERNELS_POLICY_ERROR_MODEL_H_

// The statistical error model: what rounding the codes does to scores and outputs. It predicts an
// expected square; it bounds nothing.
//
//   var_s     = scale^2 sum_c (qQ)_c^2 * (r_c 2^(1-b))^2 / 12, an unread channel r_c^2 / 6
//   E|do|^2   = sum over attended tokens j  p_j^2 (var_s |v_j - o|^2 + var_v)
//             + sum over skipped pages      share^2 (spread^2 + var_s |mean - o|^2)
//
// Within a page, sum_j p_j^2 = share^2 * concentration, |v_j - o|^2 = spread^2 + |mean - o|^2 on
// average, and var_v = head_dim * (scale_rms 2^(1-b))^2 / 12. The Hadamard rotation changes no
// length, so all of it may be taken in the rotated frame.
//
// Errors of different tokens are taken as independent. Values that all share one channel much
// larger than the rest, after the Hadamard rotation, break this: that channel always falls into the
// same cell, its rounding adds up over tokens, and the actual error at 2 bits can be twice the
// predicted.

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
  float spread = 0;          // ValueSummary::spread
  float scale_rms = 0;       // ValueSummary::scale_rms
};

// The page's part of E|do|^2 with its values read at `value_bits` (0: replaced by the mean).
ADAATTN_HD constexpr float PredictedPageError(const PageErrorInputs& page, int32_t value_bits,
                                              int32_t head_dim) {
  const float spread2 = page.spread * page.spread;
  const float share2 = page.share * page.share;
  if (value_bits == 0) return share2 * (spread2 + page.score_variance * page.mean_distance2);
  const float value_variance =
      static_cast<float>(head_dim) * CodeVariance(page.scale_rms, value_bits);
  return share2 * page.concentration *
         (page.score_variance * (spread2 + page.mean_distance2) + value_variance);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_ERROR_MODEL_H_

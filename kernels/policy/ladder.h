#ifndef ADAATTN_KERNELS_POLICY_LADDER_H_
#define ADAATTN_KERNELS_POLICY_LADDER_H_

// The decision itself: how deeply a sealed page is read, given its share of the softmax mass.
// Reverse water-filling: bits = log2(share / theta) + constant, in steps of 2 bits.
//
//   share  largest over the q heads of the kv head and over the rows of q: they share the read
//   theta  the share up to which a page's values are not read but replaced by their mean
//
// Pure functions, host and device alike. A page that no row sees (window, causality) gets no
// decision, no read and no count: callers leave it out before they come here.

#include <cmath>
#include <cstdint>

#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"
#include "kernels/policy/decision.h"

namespace adaattn {

// Key bits of the scan that every page gets (one stage) or that opened pages get (two stages).
inline constexpr int32_t kScanBits = 4;

// Facts of one sealed page that the decision needs besides its share.
struct PageFacts {
  bool sink = false;   // the sequence's first page: always read at full depth
  bool cut = false;    // some row sees a part of its tokens only: never replaced by its mean
  bool opened = true;  // its scan planes were read; false: only the coarse prefix was
};

// Value bits of the ladder: share <= theta 0, <= 4 theta 2, <= 16 theta 4, <= 64 theta 6, above 8.
// A NaN share gives 0.
ADAATTN_HD constexpr int32_t LadderValueBits(float share, float theta) {
  return share > 64.0f * theta   ? 8
         : share > 16.0f * theta ? 6
         : share > 4.0f * theta  ? 4
         : share > theta         ? 2
                                 : 0;
}

// A page's rung: how many of theta, 4 theta, 16 theta and 64 theta its share exceeds. It stands for
// twice as many bits of the values.
inline constexpr int32_t kNumRungs = 5;

// Key bits that go with values read at `value_bits`: the scan's where they are skipped, else two
// more than the values', from 4 to 8.
ADAATTN_HD constexpr int32_t LadderKeyBits(int32_t value_bits) {
  return value_bits == 0 ? kScanBits : value_bits + 2 > 8 ? 8 : value_bits + 2;
}

// Leading rank chunks that the coarse scan reads; 0: the scan has one stage. Two stages need the
// threshold policy, a coarse rank below the whole, and leave to skip (no floor under the values).
ADAATTN_HD constexpr int32_t CoarseChunks(const DecisionParams& params, int32_t head_dim) {
  if (params.policy != Policy::kThreshold || params.coarse_rank <= 0 || params.bounded) return 0;
  if (params.floor_value_bits > 0) return 0;
  const int32_t chunks = ChunksForRank(head_dim, params.coarse_rank);
  return chunks < NumRankChunks(head_dim) ? chunks : 0;
}

// Two-stage scan: whether a page whose coarse prefix alone was read must be opened. All in nats:
// the page's log sum of exponentials and score variance from the coarse scan (without the variance
// correction of PageLogMass), the global LSE from the coarse masses and the dense tokens. A page
// opens if any row and q head opens it; sink and cut pages always do.
ADAATTN_HD bool OpensPage(float coarse_page_lse, float coarse_variance, float coarse_z,
                          float global_lse, float theta) {
  return coarse_page_lse + coarse_z * sqrtf(coarse_variance) - global_lse > logf(theta);
}

// Every bit that is stored.
ADAATTN_HD constexpr PageDepth FullDepth(int32_t head_dim, int32_t stored_bits) {
  PageDepth depth;
  depth.key.bits = static_cast<uint8_t>(stored_bits);
  depth.key.chunks = static_cast<uint8_t>(NumRankChunks(head_dim));
  depth.value_bits = static_cast<uint8_t>(stored_bits);
  return depth;
}

// The caller's static depth, raised to the floors and cut to what is stored. Applies to every page,
// the sink too.
ADAATTN_HD constexpr PageDepth StaticDepth(const DecisionParams& params, int32_t head_dim,
                                           int32_t stored_bits) {
  int32_t key = params.static_key_bits > params.floor_key_bits ? params.static_key_bits
                                                               : params.floor_key_bits;
  int32_t value = params.static_value_bits > params.floor_value_bits ? params.static_value_bits
                                                                     : params.floor_value_bits;
  key = key < kScanBits ? kScanBits : key > stored_bits ? stored_bits : key;
  value = value < 2 ? 2 : value > stored_bits ? stored_bits : value;
  PageDepth depth;
  depth.key.bits = static_cast<uint8_t>(key);
  depth.key.chunks =
      static_cast<uint8_t>(params.static_rank <= 0 ? NumRankChunks(head_dim)
                                                   : ChunksForRank(head_dim, params.static_rank));
  depth.value_bits = static_cast<uint8_t>(value);
  return depth;
}

// The depth of one page on rung `rung` of the ladder. An unopened page stays at its coarse prefix.
ADAATTN_HD constexpr PageDepth RungDepth(const DecisionParams& params, int32_t rung,
                                         const PageFacts& facts, int32_t head_dim,
                                         int32_t stored_bits) {
  if (facts.sink) return FullDepth(head_dim, stored_bits);
  PageDepth depth;
  if (!facts.opened && !facts.cut) {
    depth.key.bits = static_cast<uint8_t>(kScanBits);
    depth.key.chunks = static_cast<uint8_t>(CoarseChunks(params, head_dim));
    return depth;
  }
  int32_t value = 2 * rung;
  if (facts.cut && value < 2) value = 2;
  if (value < params.floor_value_bits) value = params.floor_value_bits;
  int32_t key = LadderKeyBits(value);
  if (value > 0 && key < params.floor_key_bits) key = params.floor_key_bits;
  depth.key.bits = static_cast<uint8_t>(key > stored_bits ? stored_bits : key);
  depth.key.chunks = static_cast<uint8_t>(NumRankChunks(head_dim));
  depth.value_bits = static_cast<uint8_t>(value > stored_bits ? stored_bits : value);
  return depth;
}

// The ladder's depth of one page. `theta` is what the policy gives the head (0 reads every
// page that has any mass at full depth).
ADAATTN_HD constexpr PageDepth LadderDepth(const DecisionParams& params, float theta, float share,
                                           const PageFacts& facts, int32_t head_dim,
                                           int32_t stored_bits) {
  return RungDepth(params, LadderValueBits(share, theta) / 2, facts, head_dim, stored_bits);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_LADDER_H_

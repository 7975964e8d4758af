#ifndef ADAATTN_KERNELS_POLICY_DECISION_H_
#define ADAATTN_KERNELS_POLICY_DECISION_H_

#include <cstdint>

#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"

namespace adaattn {

// What decides how deeply each sealed page is read.
//   kFullDepth   every sealed page at its stored depth
//   kStatic      every sealed page at static_key_bits, static_rank and static_value_bits
//   kThreshold   the ladder: bits follow a page's share of the softmax mass, against theta
//   kBudget      the ladder with theta chosen per kv head from the predicted error (budget.h)
//   kEntropy     the ladder with theta relative to the entropy of the page shares (theta.h)
//   kLearned     the ladder with theta from a fitted model of how the mass lies (theta.h)
//   kFeedback    the ladder with theta per kv head from what the last step's error was predicted to
//                be (feedback.h); for whoever runs a layer's steps one after another, since a
//                backend sees them as kBudget first and then as kThreshold with
//                SequenceStep::thetas
// The session's exact data (mode EXACT) are not a policy: the server then passes dense pages only.
enum class Policy : uint8_t {
  kFullDepth = 0,
  kStatic = 1,
  kThreshold = 2,
  kBudget = 3,
  kEntropy = 4,
  kLearned = 5,
  kFeedback = 6
};

inline constexpr int kNumPolicies = 7;

// Whether pages are read by the ladder, whatever chooses theta: the policies that scan first.
ADAATTN_HD constexpr bool UsesLadder(Policy policy) { return policy >= Policy::kThreshold; }

// Whether a step chooses theta per kv head from what its own scan found.
ADAATTN_HD constexpr bool ChoosesTheta(Policy policy) {
  return policy == Policy::kBudget || policy == Policy::kEntropy || policy == Policy::kLearned;
}

// Whether theta comes from predicted errors.
ADAATTN_HD constexpr bool FollowsBudget(Policy policy) {
  return policy == Policy::kBudget || policy == Policy::kFeedback;
}

// Whether the policy follows target_relative_error.
ADAATTN_HD constexpr bool AimsAtError(Policy policy) {
  return FollowsBudget(policy) || policy == Policy::kLearned;
}

// The learned policy's model: log2(theta) = sum of weights[i] * ThetaFeatures[i] (theta.h).
inline constexpr int32_t kNumThetaFeatures = 8;
struct ThetaModel {
  float weights[kNumThetaFeatures] = {};
};

// How one sequence's sealed pages are to be read. Plain data: host and device share it.
struct DecisionParams {
  Policy policy = Policy::kThreshold;
  float theta = 0.004f;                 // kThreshold: (0, 1]; kEntropy: in units of exp(-entropy)
  float target_relative_error = 0.05f;  // kBudget, kFeedback, kLearned: (0, 1]; what the error
                                        // aims at
  int32_t static_key_bits = 8;          // kStatic: 4, 6, 8
  int32_t static_rank = 0;              // kStatic: leading channels of K, rounded up to chunks;
                                        // 0 = all
  int32_t static_value_bits = 8;        // kStatic: 2, 4, 6, 8
  int32_t floor_key_bits = 4;           // never fewer key bits on a page that is attended
  int32_t floor_value_bits = 0;         // never fewer value bits; 0 allows skipping
  int32_t coarse_rank = 0;              // two-stage scan: leading channels read first, rounded up
                                        // to chunks; 0 = one stage
  float coarse_z = 2.0f;                // two-stage scan: margin in standard deviations
  ThetaModel theta_model;               // kLearned
  // Deterministic mode: read deeper than the policy (a ladder, scanned in one stage) says until
  // HeadDecision::error_bound is at most target_relative_error: every stored bit, then the dense
  // originals (SequenceStep::exact_pages) of the pages that hold the bound up, then of all.
  bool bounded = false;
};

// Key reads of a page: `bits` of the leading `chunks` rank chunks. chunks == 0: not read.
struct KeyDepth {
  uint8_t bits = 0;
  uint8_t chunks = 0;
};

struct PageDepth {
  KeyDepth key;
  uint8_t value_bits = 0;  // 0: the page's mean stands for its values
};

inline constexpr int32_t kNumKeyDepths = 3 * kMaxRankChunks;
inline constexpr int32_t kNumValueDepths = 5;

// Index into HeadDecision::key_pages of a read at `bits` (4, 6, 8) of `chunks` (>= 1) chunks.
ADAATTN_HD constexpr int32_t KeyDepthIndex(int32_t bits, int32_t chunks) {
  return (bits / 2 - 2) * kMaxRankChunks + chunks - 1;
}
ADAATTN_HD constexpr int32_t KeyDepthBits(int32_t index) { return index / kMaxRankChunks * 2 + 4; }
ADAATTN_HD constexpr int32_t KeyDepthChunks(int32_t index) { return index % kMaxRankChunks + 1; }

// How deep a bounded step had to read.
enum class BoundDepth : int32_t {
  kPolicy = 0,  // as the policy says; also of steps that are not bounded
  kStoredBits = 1,
  kExactPages = 2,
  kUnmet = 3  // all that is kept was read; error_bound exceeds the target
};

// What was decided and done for one kv head of one sequence in one step. Counts are of pages of
// this kv head; a page outside every row's window is in no count.
struct HeadDecision {
  int32_t key_pages[kNumKeyDepths];      // sealed pages by the depth at which K was read
  int32_t value_pages[kNumValueDepths];  // sealed pages by value bits / 2; [0] were skipped
  int32_t dense_tokens;                  // tokens read from dense pages
  float theta;                           // that the ladder used; 0 where no ladder ran
  float entropy;          // nats: entropy of the page shares (dense tokens as single items), mean
                          // over q heads and rows
  float predicted_error;  // relative, root mean square over q heads and rows; see policy/budget.h
  int64_t key_bytes;      // loaded, counted by the kernel where it loads; sealed and dense
  int64_t value_bytes;
  int64_t basis_bytes;  // Q and mu, read once per step and kv head
  // Bounded steps only; 0 in all others. A step that had to read again counts every byte, and pages
  // by how they were read last.
  float error_bound;  // on the relative error of each row and q head, rounding of out included;
                      // infinity: nothing can be said
  float lse_below;    // nats: every row's true lse lies in [lse - lse_below, lse + lse_above]
  float lse_above;
  int32_t exact_pages;  // sealed pages whose originals were read; counted by their scan, too
  BoundDepth bound_depth;
};

// The bytes that `decision`'s page counts imply. The kernels count on their own; tests hold the two
// equal.
struct ReadBytes {
  int64_t key = 0;
  int64_t value = 0;
};
ReadBytes RecountBytes(const HeadDecision& decision, int32_t head_dim, DType dense_type);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_DECISION_H_

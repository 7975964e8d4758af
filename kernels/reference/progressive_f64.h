#ifndef ADAATTN_KERNELS_REFERENCE_PROGRESSIVE_F64_H_
#define ADAATTN_KERNELS_REFERENCE_PROGRESSIVE_F64_H_

// One whole progressive step of one kv head, slowly and plainly, in double precision over decoded
// codes. It judges the depths, outputs and reports of the backends.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/format/basis.h"
#include "kernels/format/seal.h"
#include "kernels/policy/decision.h"

namespace adaattn {

// A step of the q heads of one kv head; see SequenceStep for the meaning of the fields. The cache
// is num_sealed_pages pages of the ProgressiveHeadF64, then the dense tokens.
struct ProgressiveStepF64 {
  const float* q = nullptr;  // [q_len, group_size, head_dim]
  int32_t q_len = 1;
  int32_t group_size = 1;
  int64_t q_start = 0;
  int32_t num_sealed_pages = 0;
  int64_t num_dense_tokens = 0;
  const float* dense_keys = nullptr;    // [num_dense_tokens, head_dim]
  const float* dense_values = nullptr;  // likewise
  double softmax_scale = 0;
  double softcap = 0;
  int64_t window = 0;
  DecisionParams decision;
};

struct ProgressiveResultF64 {
  std::vector<double> out;        // [q_len, group_size, head_dim]
  std::vector<double> lse;        // [q_len, group_size]; empty range: -inf, out 0
  std::vector<double> predicted;  // [q_len, group_size]: predicted |do| / |o|; 0 if empty
  std::vector<double> shares;     // [num_sealed_pages]: what the ladder saw; 0 if invisible
  std::vector<PageDepth> depths;  // [num_sealed_pages]; all zero if no row sees the page
  // Bytes by RecountBytes; dense_tokens counts the tokens of dense pages that some row sees. Where
  // no scan ran (full depth, static), entropy comes from the masses as attended.
  HeadDecision decision = {};
};

// The sealed pages of one kv head, decoded at every depth. Copies what it needs; the pages may go.
class ProgressiveHeadF64 {
 public:
  // `head` names the kv head's part of every page that will be added.
  explicit ProgressiveHeadF64(const SealedHead& head) : head_(head) {}

  // Adds the next page. Pages with the same `basis.mean` pointer belong to one basis.
  void AddPage(const BasisView& basis, const std::byte* page);

  // Requires: step.num_sealed_pages pages or more have been added.
  ProgressiveResultF64 Run(const ProgressiveStepF64& step) const;

  struct Page {
    size_t basis = 0;                 // index of bases()
    std::vector<float> keys[3];       // [64, head_dim] rotated, at 4, 6, 8 bits
    std::vector<float> values[5];     // [64, head_dim] in the Hadamard frame, by bits / 2
    std::vector<uint8_t> key_scales;  // [head_dim]
    ValueSummary summary = {};
    float first_scale_rms = 0;  // of the first token's ranges
  };
  struct HeldBasis {
    const float* identity = nullptr;
    std::vector<double> mean;      // [head_dim]
    std::vector<double> rotation;  // Q [head_dim, head_dim]
  };
  const SealedHead& head() const { return head_; }
  const std::vector<Page>& pages() const { return pages_; }
  const std::vector<HeldBasis>& bases() const { return bases_; }

 private:
  SealedHead head_;
  std::vector<Page> pages_;
  std::vector<HeldBasis> bases_;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_REFERENCE_PROGRESSIVE_F64_H_

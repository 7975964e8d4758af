#ifndef ADAATTN_TESTS_BACKEND_PROGRESSIVE_HARNESS_H_
#define ADAATTN_TESTS_BACKEND_PROGRESSIVE_HARNESS_H_

// Progressive caches whose bases and sealed pages the test makes a second time on the host, for
// kernels/reference/progressive_f64 to judge the backend by.

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/reference/progressive_f64.h"
#include "tests/backend/backend_harness.h"

namespace adaattn {

struct ProgressiveOptions {
  AttentionShape shape;
  PageFormat format = PageFormat::kProgressive;
  int64_t length = 700;
  int32_t stored_bits = 8;
  int32_t num_bases = 1;  // runs of equal length
  uint32_t seed = 7;
  int32_t num_threads = 0;
  int32_t num_pages = 64;
  bool keep_exact = false;
  int32_t num_tier_pages = 0;  // as in HarnessOptions
  DType out_type = DType::kF32;
  // What one channel of keys and of values is multiplied by. Such a channel takes a code's range
  // for itself: bases are orthogonal, so it stays where it is among the keys' ranks.
  float outlier = 1;
  // Rows of queries that the backend fits its basis with, and measures values by; 0: bases are
  // brought, and values taken as the error model has them. One basis.
  int32_t sample_rows = 0;
  // Of predicted errors, [num_kv_heads]; empty: 1.
  std::vector<float> error_factors;
  // Every so many tokens the same one comes back, which queries look for; 0 = none.
  int32_t repeat = 0;
};

// One sequence of keys with a mean, decaying channels and pages of their own direction, so that
// shares of pages spread over several octaves. All but the last full page and the open one are
// sealed.
class ProgressiveHarness {
 public:
  explicit ProgressiveHarness(const ProgressiveOptions& options);

  BackendHarness& harness() { return harness_; }
  TestSequence& sequence() { return sequence_; }
  // Of the first basis.
  ValueFactors value_factors(int32_t kv_head) const {
    return *ViewBasis(basis_blocks_[0].data(), options_.shape, kv_head).value_factors;
  }

  // A step with queries that look like the keys.
  StepCase NewStep(int32_t q_len);

  // What the reference makes of the same step, for one kv head. `output` gives the queries.
  ProgressiveResultF64 Reference(const StepCase& step, const StepOutput& output, int32_t kv_head);

  // Runs the step and holds every head against the reference: page counts by depth (but for pages
  // whose share lies on a threshold as far as sealed_limits() tell), out and lse, entropy,
  // predicted error, bytes.
  StepOutput RunAndCompare(const StepCase& step);

 private:
  std::vector<float> StructuredRows(int64_t rows, int32_t heads, bool keys);
  void RepeatOneToken(std::vector<float>* keys, std::vector<float>* values);
  void SealRun(int32_t first_page, int32_t count);
  // The host's bases of the pages' heads, into the newest block; the backend's own.
  PageId BringBasis(int32_t first_page, int32_t count);
  PageId FitBasis(int32_t count);
  // The reference at the theta that the output names, or the closest beside it that gives the
  // depths which the output counts, since rounding moves pages that are next to a threshold; at the
  // last theta tried where none does.
  ProgressiveResultF64 ReferenceNear(const StepCase& step, const StepOutput& output,
                                     int32_t kv_head);
  void CompareHead(const StepCase& step, const StepOutput& output, int32_t kv_head);

  const ProgressiveOptions options_;
  BackendHarness harness_;
  TestSequence sequence_;
  std::vector<float> repeated_keys_;  // [num_kv_heads, head_dim] of the token that comes back
  std::vector<std::vector<std::byte>> basis_blocks_;
  std::vector<std::vector<std::byte>> pages_;  // sealed on the host
  std::vector<int32_t> page_bases_;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_BACKEND_PROGRESSIVE_HARNESS_H_

#ifndef ADAATTN_TESTS_BACKEND_BACKEND_HARNESS_H_
#define ADAATTN_TESTS_BACKEND_BACKEND_HARNESS_H_

// What the backend suite is written in: caches of random tokens on any Backend, steps over them,
// and what float64 says about the same. ADAATTN_TEST_BACKEND names the backend (default cpu), so
// that every backend runs the same tests.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention.h"

namespace adaattn {

// The backend under test; fails the running test and returns null when it cannot be created.
std::unique_ptr<Backend> MakeTestBackend(int64_t pool_bytes, int32_t num_threads = 0,
                                         int64_t exact_tier_bytes = 0);

// `value` as an element of `type` would hold it.
float RoundTo(DType type, float value);

// A sequence's cache as the test knows it: pages and the values that the pages hold.
struct TestSequence {
  std::vector<PageId> pages;
  int32_t num_sealed_pages = 0;
  std::vector<BasisRun> bases;
  int32_t stored_bits = 8;
  bool keep_exact = false;  // of what is sealed from here on
  std::vector<PageId> exact_pages;
  int64_t length = 0;
  std::vector<float> k;  // [length, num_kv_heads, head_dim] rounded to the page type
  std::vector<float> v;
  std::vector<float> key_scales;  // FP8 pages
  std::vector<float> value_scales;
};

// One sequence's part of a step.
struct StepCase {
  TestSequence* sequence = nullptr;
  int32_t append_len = 0;
  int32_t q_len = 1;
  int64_t q_start = -1;  // -1: the last q_len tokens
  int64_t window = 0;
  float softcap = 0;
  float softmax_scale = 0;  // 0: 1 / sqrt(head_dim)
  DecisionParams decision;
  std::vector<float> thetas;   // as in SequenceStep
  std::vector<float> q, k, v;  // empty: random
};

// What came out of one sequence.
struct StepOutput {
  std::vector<float> q;    // as given, rounded to in_type
  std::vector<float> out;  // [q_len, num_q_heads, head_dim]
  std::vector<float> lse;  // [q_len, num_q_heads]
  SequenceResult result;
  std::vector<HeadDecision> decisions;  // [num_kv_heads]
};

// A step that may still be running.
struct PendingStep {
  std::vector<StepCase> cases;
  std::unique_ptr<StepBuffers> buffers;
  StepTicket ticket;
};

// Largest error of a row of out (relative L2) and of lse.
struct ErrorLimits {
  double out = 0;
  double lse = 0;
};

// Largest deviation of a step over sealed pages from the reference's.
struct SealedLimits {
  double share = 0;      // of a page's share, relative: which pages may pass a threshold
  double theta = 0;      // relative, of policies that sum exponentials: entropy and learned
  double entropy = 0;    // nats
  double predicted = 0;  // of the predicted error, relative
  // Likewise where a static policy reads more of the keys than the scan, whose shares CUDA predicts
  // with.
  double static_predicted = 0;
  ErrorLimits error;  // of out and lse, given the same depths
};

struct HarnessOptions {
  AttentionShape shape;
  PageFormat format = PageFormat::kBf16;
  DType in_type = DType::kF32;
  DType out_type = DType::kF32;
  int32_t num_pages = 64;  // slots of the pool, each as large as any kind of page or basis
  // Dense pages of the exact tier: where there are any, they keep the originals that are asked for.
  int32_t num_tier_pages = 0;
  int32_t num_threads = 0;
  uint32_t seed = 1;
  bool shuffle = true;  // of the order in which pages are handed out
  bool poison = true;   // pages hold NaN until they are written
};

class BackendHarness {
 public:
  explicit BackendHarness(const HarnessOptions& options);

  Backend& backend() { return *backend_; }
  bool Supports(Policy policy) const {
    const std::vector<Policy>& policies = backend_->info().policies;
    return std::find(policies.begin(), policies.end(), policy) != policies.end();
  }
  bool ok() const { return backend_ != nullptr; }
  const HarnessOptions& options() const { return options_; }
  std::mt19937& random() { return random_; }

  PageId NewPage();
  PageId NewTierPage();
  bool has_tier() const { return backend_->info().exact_tier_bytes > 0; }
  std::vector<float> RandomRows(int64_t rows, int32_t heads, float spread = 1.0f);

  // A sequence of `length` random tokens, or of the given ones.
  TestSequence NewSequence(int64_t length);
  void AppendTokens(TestSequence* sequence, const std::vector<float>& k,
                    const std::vector<float>& v);

  // Fits a basis on the sequence's first `fit_pages` pages and seals pages
  // [num_sealed_pages, num_sealed_pages + count) with it into new pages.
  void Seal(TestSequence* sequence, int32_t count, int32_t fit_pages,
            const std::vector<float>& query_sample = {});
  PageId FitBasis(const TestSequence& sequence, int32_t fit_pages,
                  const std::vector<float>& query_sample = {},
                  const std::vector<float>& error_factors = {});
  void SealWith(TestSequence* sequence, int32_t count, PageId basis);

  // One step over all cases; appended tokens become part of the sequences. Scratch memory is
  // poisoned before.
  std::vector<StepOutput> Run(std::vector<StepCase> cases);
  // Its two halves: tokens count as appended once their step has finished.
  PendingStep Start(std::vector<StepCase> cases);
  std::vector<StepOutput> Finish(PendingStep step);

  // Of the step that was finished last.
  const StageTimes& stage_times() const { return stage_times_; }

  // Tokens [begin, end) as the backend reads them back.
  void Read(const TestSequence& sequence, int64_t begin, int64_t end, std::vector<float>* k,
            std::vector<float>* v);

  // What exact attention over the options' pages may err by: FP32 arithmetic, but that the tensor
  // cores of the cuda backend take the probabilities in BF16 over BF16 pages and in FP16 over FP16
  // and FP8 ones, which leaves half a unit in the last place of each, and q as two such values.
  ErrorLimits exact_limits() const;

  // What steps over sealed pages may be off by: FP32 arithmetic, but that the cuda backend keeps
  // scores as FP16, which moves shares by up to 5e-3.
  SealedLimits sealed_limits() const;

  // Compares an output with float64 attention over the sequence's tokens: relative L2 error of each
  // row of out, absolute error of lse; empty rows exactly.
  void ExpectExact(const StepCase& step, const StepOutput& output, const ErrorLimits& limits);

 private:
  // All pages as one sequence of NaN tokens: written, flagged, never counted.
  void PoisonPages();
  // What steps leave for themselves in memory, by the same steps before they append, with queries
  // of NaN; and a device's shared memory. Not where ADAATTN_TEST_POISON_SCRATCH is 0.
  void PoisonScratch(std::vector<StepCase> cases);
  // What `buffers` hold for each of the steps.
  std::vector<StepOutput> TakeOutputs(const std::vector<StepCase>& cases,
                                      StepBuffers* buffers) const;
  void CountAppended(StepCase* step, const std::vector<float>& k, const std::vector<float>& v);
  SequenceStep MakeStep(const StepCase& step) const;

  const HarnessOptions options_;
  std::mt19937 random_;
  std::unique_ptr<Backend> backend_;
  std::vector<PageId> free_pages_;
  int32_t next_tier_page_ = 0;
  StageTimes stage_times_;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_BACKEND_BACKEND_HARNESS_H_

#ifndef ADAATTN_LOADTEST_PROGRESSIVE_CASE_H_
#define ADAATTN_LOADTEST_PROGRESSIVE_CASE_H_

// A batch of sequences over a captured trace's sealed pages, ready for progressive decode.

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/stream.h"
#include "kernels/cuda/tuning.h"
#include "kernels/feedback_state.h"
#include "kernels/policy/decision.h"
#include "loadtest/l2_flush.h"
#include "loadtest/row_judge.h"
#include "loadtest/trace_pool.h"

namespace adaattn {

struct ProgressiveCaseOptions {
  int32_t num_sequences = 1;
  int32_t kv_len = 0;  // of each
  DecisionParams decision;
  CudaTuning tuning;
};

// What one run of a case gave.
struct ProgressiveOutput {
  std::vector<float> out;               // [num_sequences, num_q_heads, head_dim]
  std::vector<HeadDecision> decisions;  // [num_sequences, num_kv_heads]
};

// One q row a sequence, FP16 in and out. Owns everything but the pages, which it takes from the
// pool for as long as it lives. Not thread-safe.
class ProgressiveCase {
 public:
  // Fills the pool with the sequences (TracePool::FillSequences) and captures the step's kernels.
  // Errors: as FillSequences and RunProgressive.
  static absl::StatusOr<std::unique_ptr<ProgressiveCase>> Create(
      TracePool* pool, const ProgressiveCaseOptions& options);

  // For the runs that follow. Requires: the policy and coarse_rank given to Create.
  absl::Status SetDecision(const DecisionParams& decision);

  // Under kFeedback: so many steps of the same queries, each with thetas by what the one before was
  // predicted to err by; they begin at decision.theta. The runs that follow have the last ones.
  absl::Status Follow(int num_steps);

  absl::StatusOr<ProgressiveOutput> Run();

  // Microseconds of each of `runs` replays of the captured step, ascending, by device events; L2 is
  // flushed before each.
  absl::StatusOr<std::vector<double>> Time(int runs, const L2Flush& flush);

  // Where row (sequence, q_head) of the output comes from.
  TraceRow Source(int32_t sequence, int32_t q_head) const {
    return SourceRow(pool_->trace(), pool_->shape(), options_.kv_len, sequence, q_head);
  }

  std::string Name() const;  // progressive_d128_n8_kv32768_h32/8
  const AttentionShape& shape() const { return pool_->shape(); }
  int32_t num_sequences() const { return options_.num_sequences; }
  int32_t kv_len() const { return options_.kv_len; }
  int64_t bytes_as_bf16() const;  // of K and V
  std::string plan() const { return plan_->DebugString(); }

 private:
  ProgressiveCase(TracePool* pool, const ProgressiveCaseOptions& options)
      : pool_(pool), options_(options) {}
  absl::Status Prepare();
  absl::Status MakePlan(const AttendBatch& batch);
  std::vector<SequenceStep> Steps(const DecisionParams& decision);
  int32_t num_pages() const { return options_.kv_len / kPageTokens; }

  TracePool* const pool_;
  const ProgressiveCaseOptions options_;
  std::vector<FeedbackState> feedback_;  // by sequence; empty unless kFeedback
  std::vector<float> thetas_;            // [num_sequences, num_kv_heads] of these
  std::vector<PageId> tables_;           // [num_sequences, num_pages]
  BasisRun basis_run_;
  int32_t group_ = 0;  // of the plan's sealed groups
  std::unique_ptr<StepBuffers> buffers_;
  std::unique_ptr<CudaPlan> plan_;
  Stream stream_;
  Scratch scratch_;
  GraphExec graph_;
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_PROGRESSIVE_CASE_H_

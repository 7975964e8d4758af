#ifndef ADAATTN_LOADTEST_PROGRESSIVE_BENCH_H_
#define ADAATTN_LOADTEST_PROGRESSIVE_BENCH_H_

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/cuda/tuning.h"
#include "kernels/policy/decision.h"
#include "kernels/shape.h"
#include "loadtest/l2_flush.h"

namespace adaattn {

struct ProgressiveBenchOptions {
  struct Size {
    int32_t num_sequences = 0;
    int32_t kv_len = 0;
  };
  // What to run on (bench_trace.h); empty: those that BenchTraces finds.
  std::vector<std::string> traces;
  std::vector<Size> sizes;  // empty: the cases of docs/kernels.md that suit the trace's length
  int32_t num_q_heads = 0;  // 0: 32 over 8, or what the cases say
  int32_t num_kv_heads = 0;
  int32_t stored_bits = 8;
  Policy policy = Policy::kThreshold;
  double theta = 0;   // kThreshold; 0: searched
  double target = 0;  // kBudget: target_relative_error; 0: searched. kFeedback: likewise, given
  double goal = 0;    // mean error that the search aims at; 0: by dense FP8's
  bool two_stage = false;  // half of the rank first
  double coarse_z = 2;
  int32_t conclude_pages = CudaTuning().conclude_pages;
  int32_t sample = 128;  // rows of q heads whose error is taken; float64 on the host
};

// Whether `flag` is one of this benchmark's and fine; then it stands in `options`.
//
//   --trace=FILE|joined:FILE|random:HEAD_DIM --cases=BATCHxTOKENS,... --heads=Q/KV
//   --stored-bits=4|6|8 --policy=threshold|budget|feedback --theta=X --target=X --goal=X
//   --two-stage --z=X --sample=N --conclude-pages=N
bool ParseProgressiveFlag(absl::string_view flag, ProgressiveBenchOptions* options);

// The heads of cases: those of `options`, else 32 over 8, or 16 over 4 at head_dim 256.
AttentionShape BenchShape(const ProgressiveBenchOptions& options, int32_t head_dim);

// options.traces, or those of tests/data and shared/data that the working directory, or one above
// it, has.
std::vector<std::string> BenchTraces(const ProgressiveBenchOptions& options);

// Times progressive decode on captured traces and judges its error. Theta (or the target) that is
// searched is the largest whose mean error is at most the goal: half of dense FP8's on the same
// rows (K and V in e4m3, all else exact), FP8's own where the trace is tiled, which divides the
// shares. Prints one line a case and appends to `report`; a budget's line names the mean theta that
// it chose, whose threshold is the same step without the theta launch. False when a kernel's count
// of bytes is not what its page counts imply, an output is not finite, or no theta reaches the
// goal.
absl::StatusOr<bool> BenchProgressive(const ProgressiveBenchOptions& options, int runs,
                                      const L2Flush& flush, nlohmann::json* report);

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_PROGRESSIVE_BENCH_H_

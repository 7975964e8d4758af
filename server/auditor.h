#ifndef ADAATTN_SERVER_AUDITOR_H_
#define ADAATTN_SERVER_AUDITOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "server/engine_observer.h"
#include "server/session.h"

namespace adaattn {

// One answered statistical or deterministic step to recompute: what went in and what came out.
struct AuditStep {
  std::shared_ptr<Session> session;
  int32_t layer = 0;
  DType in_type = DType::kBf16;
  DType out_type = DType::kBf16;
  int32_t q_len = 0;
  int64_t q_start = 0;
  int64_t window = 0;
  float softcap = 0;
  absl::Span<const std::byte> q;    // [q_len, num_q_heads, head_dim] in_type
  absl::Span<const std::byte> out;  // likewise, out_type
  bool deterministic = false;       // the heads have bounds, not predictions
  bool budget = false;              // theta was chosen so that the prediction meets a target
  absl::Span<const HeadDecision> heads;
};

// Recomputes a sample of statistical and deterministic steps with every bit that the session keeps
// (the exact tier's where there is one) and compares. Threads: the engine's only.
class Auditor {
 public:
  // `share` of the steps, in [0, 1], spread evenly and the same in every run.
  Auditor(double share, Backend* backend, EngineObserver* observer);

  // Whether the next step is in the sample.
  bool Samples();
  // Copies a step, to be recomputed by RunAll. Steps too large for the audit's buffers, or more
  // than a handful at once, are left out.
  void Keep(const AuditStep& step);
  // Recomputes what was kept and tells the observer. The sessions have not changed since.
  // Errors: those of the backend.
  absl::Status RunAll();

 private:
  struct Kept {
    AuditStep step;  // its spans lie in the vectors
    std::vector<std::byte> q, out;
    std::vector<HeadDecision> heads;
  };

  absl::Status RunOne(const Kept& kept);
  void Compare(const Kept& kept, const float* reference, bool exact);

  const double share_;
  Backend* const backend_;
  EngineObserver* const observer_;
  double due_ = 0;
  std::unique_ptr<StepBuffers> buffers_;  // made with the first audit
  std::vector<Kept> kept_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_AUDITOR_H_

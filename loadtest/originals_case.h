#ifndef ADAATTN_LOADTEST_ORIGINALS_CASE_H_
#define ADAATTN_LOADTEST_ORIGINALS_CASE_H_

// Sequences of a trace that keep their originals, in the pool and in the exact tier alike, and
// whole steps over either.

#include <cstdint>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/trace.h"
#include "kernels/attention.h"
#include "loadtest/trace_cache.h"

namespace adaattn {

// Which originals a step reads.
enum class Originals { kNone, kPool, kTier };
const char* OriginalsName(Originals originals);  // "none", "pool", "tier"

// One decode step of every sequence, FP16 in, FP32 out.
struct OriginalsStep {
  std::vector<SequenceStep> sequences;
  AttendBatch batch;  // of those
};

// Owns the backend. Sequences share the basis and no page. Not thread-safe.
class OriginalsCase {
 public:
  using CreateBackendFn =
      std::function<absl::StatusOr<std::unique_ptr<Backend>>(const BackendOptions&)>;

  // Puts `trace`, to which it keeps a reference, into a backend with room for `max_sequences`.
  // Errors: as `create`; kInvalidArgument for a trace of less than 1024 tokens.
  static absl::StatusOr<std::unique_ptr<OriginalsCase>> Create(const CreateBackendFn& create,
                                                               const Trace* trace,
                                                               int32_t stored_bits,
                                                               int32_t max_sequences);

  // Gives `num_sequences` sequences the first `kv_len` tokens of the trace, and the rows of q that
  // row_judge.h says. Errors: kInvalidArgument for more sequences or tokens than there are, or less
  // than two pages.
  absl::Status Fill(int32_t num_sequences, int32_t kv_len);

  // A bounded step over sealed pages, as DETERMINISTIC asks for by default, with these originals.
  // Valid until the next step is made.
  absl::StatusOr<OriginalsStep> Bounded(Originals originals, float target);
  // An exact step over all tokens as dense pages, likewise. Requires: not kNone.
  absl::StatusOr<OriginalsStep> Exact(Originals originals);

  // Returns when the step's results stand in its buffers.
  absl::Status Run(const OriginalsStep& step);

  const AttentionShape& shape() const { return trace_->shape; }
  int32_t num_sequences() const { return static_cast<int32_t>(sequences_.size()); }
  int32_t kv_len() const { return kv_len_; }
  int32_t num_sealed_pages() const { return kv_len_ / kPageTokens - 1; }    // of each sequence
  int32_t row(int32_t sequence) const { return sequences_[sequence].row; }  // of the trace

 private:
  struct Sequence {
    int32_t row = 0;
    std::vector<PageId> pages;       // sealed, then dense
    std::vector<PageId> pool, tier;  // all of them dense
  };

  OriginalsCase(const Trace* trace, std::unique_ptr<Backend> backend, int32_t max_sequences)
      : trace_(trace), backend_(std::move(backend)), max_sequences_(max_sequences) {}
  absl::Status CopySequence(const SequenceStep& source, int64_t* pool_end, int64_t* tier_end,
                            Sequence* sequence);
  // To `*end`, which moves on; the copy is added to `pages`.
  absl::Status CopyPage(PageId source, int64_t bytes, int64_t* end, std::vector<PageId>* pages);
  // The sequences' steps before they are told which originals to read.
  std::vector<SequenceStep> Steps(const DecisionParams& decision) const;
  absl::StatusOr<OriginalsStep> Prepare(std::vector<SequenceStep> sequences, PageFormat format);

  const Trace* const trace_;
  const std::unique_ptr<Backend> backend_;
  const int32_t max_sequences_;
  std::unique_ptr<TraceCache> cache_;
  int32_t kv_len_ = 0;
  std::vector<Sequence> sequences_;
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_ORIGINALS_CASE_H_

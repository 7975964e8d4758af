#ifndef ADAATTN_LOADTEST_TRACE_CACHE_H_
#define ADAATTN_LOADTEST_TRACE_CACHE_H_

// A captured trace in a backend's pool: what benchmarks and acceptance tests of the kernels attend.

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/trace.h"
#include "kernels/attention.h"

namespace adaattn {

// One row of the trace after a step, for all q heads.
struct TraceRowResult {
  std::vector<float> out;               // [num_q_heads, head_dim]
  std::vector<float> lse;               // [num_q_heads]
  std::vector<HeadDecision> decisions;  // [num_kv_heads]
};

// Every token of the trace in dense pages, and for progressive caches every full page a second time
// as a sealed one, so that a step can be taken at any length. Keeps a reference to the trace. Not
// thread-safe.
class TraceCache {
 public:
  // Bytes of pool that Make takes.
  static int64_t PoolBytes(const Trace& trace, PageFormat format, int32_t stored_bits);

  // `backend` gives all of its pool. Bases are fitted on the first 1024 tokens, their channels
  // ordered by the first quarter of the trace's rows.
  static absl::StatusOr<std::unique_ptr<TraceCache>> Make(Backend* backend, const Trace* trace,
                                                          PageFormat format, int32_t stored_bits);

  // The step of one row: attend only, over the `kv_len` tokens that it sees (negative: as many as
  // it saw when captured). Of n full pages the first n - 1 are sealed. Valid as long as the cache.
  SequenceStep Step(int32_t row, const DecisionParams& decision, int64_t kv_len = -1) const;

  // Attends all given steps, `rows[i]` being the row of the trace whose q step i takes.
  absl::StatusOr<std::vector<TraceRowResult>> Attend(const std::vector<SequenceStep>& steps,
                                                     const std::vector<int32_t>& rows);

  // A batch of those steps whose buffers hold the queries already, to be run many times.
  absl::StatusOr<AttendBatch> Prepare(const std::vector<SequenceStep>& steps,
                                      const std::vector<int32_t>& rows);

  Backend& backend() { return *backend_; }
  const Trace& trace() const { return *trace_; }
  int32_t stored_bits() const { return stored_bits_; }

 private:
  TraceCache(Backend* backend, const Trace* trace, PageFormat format, int32_t stored_bits);

  absl::Status ImportTokens();
  absl::Status SealAll();

  Backend* const backend_;
  const Trace* const trace_;
  const PageFormat format_;
  const int32_t stored_bits_;
  PageId basis_ = kNoPage;
  std::vector<PageId> dense_;                // by page
  std::vector<PageId> sealed_;               // by page; progressive only
  std::vector<std::vector<PageId>> tables_;  // by number of sealed pages
  std::vector<BasisRun> runs_;               // likewise
  std::unique_ptr<StepBuffers> buffers_;
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_TRACE_CACHE_H_

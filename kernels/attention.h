#ifndef ADAATTN_KERNELS_ATTENTION_H_
#define ADAATTN_KERNELS_ATTENTION_H_

// Attention over a paged KV cache: everything that the server and the bindings see of the kernels.
//
// A Backend owns one device and one pool of memory on it. It knows nothing of sessions: callers
// allocate ranges of the pool (PageId), keep page tables and pass both in. Planning is host work
// that depends on shapes only; running enqueues device work and returns.

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/format/page_layout.h"
#include "kernels/policy/decision.h"
#include "kernels/shape.h"

namespace adaattn {

struct BackendOptions {
  int64_t pool_bytes = int64_t{1} << 30;  // one allocation, made at start and never grown
  // Host memory (pinned where the device wants it) for the exact tier, see PageId space below;
  // likewise one allocation. 0 = none.
  int64_t exact_tier_bytes = 0;
  int32_t num_threads = 0;  // cpu only; 0 = one per core
  int32_t device = 0;       // cuda only: ordinal
  std::string tuning_file;  // cuda only: see cuda/tuning.h; "" = the table of known devices
};

// Where a step over sealed pages began to take less time than one over dense 16-bit pages, of those
// lengths at which both were timed: `tokens` in each sequence, sequences times kv heads together
// `kv_heads`.
struct SealCrossover {
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();  // at none of them
  int32_t kv_heads = 0;
  int64_t tokens = 0;
};

// The length from which on sealed pages pay in steps of `kv_heads` kv heads: the crossover of the
// nearest number below (else the first), moved so that heads times tokens stay the same, since that
// is how long a step reads. 0 where nothing was timed. Requires: `crossovers` stand by kv_heads,
// ascending, and kv_heads > 0.
int64_t TokensToSeal(absl::Span<const SealCrossover> crossovers, double kv_heads);

struct BackendInfo {
  std::string name;     // "cpu" or "cuda"
  std::string device;   // processor or GPU name
  std::string kernels;  // instruction set or architecture the kernels run with
  std::vector<int32_t> head_dims;
  std::vector<PageFormat> formats;
  std::vector<Policy> policies = {Policy::kFullDepth, Policy::kStatic, Policy::kThreshold,
                                  Policy::kBudget, Policy::kFeedback};
  int32_t max_group_size = 0;
  int32_t max_q_len = 0;  // rows of q per sequence and step
  int64_t pool_bytes = 0;
  std::string tuning = "built-in";             // whose numbers split the work; see cuda/tuning.h
  std::vector<SealCrossover> seal_crossovers;  // by kv_heads, ascending; empty: not timed
  int64_t exact_tier_bytes = 0;                // 0: the backend has no exact tier in host memory
  bool bounds_errors = false;                  // whether DecisionParams::bounded is supported
};

// Page ids name the pool and the exact tier alike: offsets in [0, pool_bytes) lie in the pool,
// those in [pool_bytes, pool_bytes + exact_tier_bytes) in host memory. The tier holds dense pages
// only: the originals of sealed ones, written once by SealPages and read by
//   - tables of dense pages (mode exact, audits, exports): any page may lie in the tier;
//   - SequenceStep::exact_pages (bounded steps), one by one, where the bound asks for them;
//   - CopyPage (a truncation into a sealed page), ZeroPage.
// Nothing rewrites a tier page while a table names it: a device may read it over its bus, where it
// is, while it computes.

// A run of consecutive sealed pages that were encoded with one basis, in table order.
struct BasisRun {
  int32_t num_pages = 0;
  PageId basis = kNoPage;  // a block of BasisLayout
};

// One sequence's part of a step: append `append_len` rows of k and v, then attend `q_len` rows.
struct SequenceStep {
  int64_t kv_len = 0;      // tokens in the cache before the append
  int32_t append_len = 0;  // rows of k and v; 0 = attend only
  int32_t q_len = 0;       // rows of q; 0 = append only
  // Cache position of the first q row; row i sees keys 0..q_start+i that exist, causally. Usually
  // kv_len + append_len - q_len; larger when the cache is a shard of a longer sequence.
  int64_t q_start = 0;
  // Covers kv_len + append_len tokens. The first num_sealed_pages are sealed, the rest dense.
  absl::Span<const PageId> pages;
  int32_t num_sealed_pages = 0;
  absl::Span<const BasisRun> bases;  // cover the sealed pages; at most kMaxBasisRuns
  int32_t stored_bits = 8;           // of the sealed pages: 8, 6, 4
  // [num_sealed_pages]: the dense originals of the sealed pages; empty = not kept.
  absl::Span<const PageId> exact_pages;
  float softmax_scale = 0;
  float softcap = 0;   // s = softcap * tanh(s / softcap); 0 = none
  int64_t window = 0;  // a row at position p sees keys in (p - window, p]; 0 = all
  // FP8 pages: [num_kv_heads], stored = value / scale; empty = 1.
  absl::Span<const float> key_scales;
  absl::Span<const float> value_scales;
  DecisionParams decision;
  // [num_kv_heads], each in (0, 1]: a theta of its own for each kv head under kThreshold,
  // unbounded; empty: decision.theta for all.
  absl::Span<const float> thetas;
};
// The caller's theta of one kv head.
inline float GivenTheta(const SequenceStep& sequence, int32_t kv_head) {
  return sequence.thetas.empty() ? sequence.decision.theta
                                 : sequence.thetas[static_cast<size_t>(kv_head)];
}
inline constexpr int32_t kMaxBasisRuns = 4;

// Facts about one sequence's part of a step that only running it shows.
struct SequenceResult {
  // A value was NaN or infinite; of k or v also: beyond what the pages' FP16 holds (kFp16Max). With
  // nonfinite_kv the rows were written but must not be counted: the caller keeps the old length.
  // The outputs of such a sequence are unspecified.
  bool nonfinite_q = false;
  bool nonfinite_kv = false;
};

// Device time by stage of one batch; zero where the backend ran no such stage or did not measure.
struct StageTimes {
  absl::Duration append, scan, select, attend, merge;
};

// How large the batches of one StepBuffers can be.
struct StepLimits {
  int32_t max_sequences = 0;
  int64_t max_q_bytes = 0;        // of q, and of out
  int64_t max_kv_bytes = 0;       // of k, and of v
  int64_t max_q_rows = 0;         // q_len * num_q_heads over all sequences: entries of lse
  int64_t max_decisions = 0;      // num_sequences * num_kv_heads
  int64_t max_table_entries = 0;  // pages over all sequences
};

// Host memory of one batch in flight, pinned where the device wants it. Made once and reused; the
// caller fills the inputs before RunAttend and reads the rest after Wait. Not thread-safe.
class StepBuffers {
 public:
  virtual ~StepBuffers() = default;

  virtual const StepLimits& limits() const = 0;
  virtual std::byte* q() = 0;    // [sum q_len, num_q_heads, head_dim] in_type
  virtual std::byte* k() = 0;    // [sum append_len, num_kv_heads, head_dim] in_type
  virtual std::byte* v() = 0;    // likewise
  virtual std::byte* out() = 0;  // [sum q_len, num_q_heads, head_dim] out_type
  virtual float* lse() = 0;      // [sum q_len, num_q_heads] natural log; empty range: -inf, out 0
  virtual SequenceResult* results() = 0;  // [num_sequences]
  virtual HeadDecision* decisions() = 0;  // [num_sequences, num_kv_heads]; q_len 0: zeros
  virtual StageTimes* stage_times() = 0;
};

// One batch: sequences of one shape and page format. No (session, layer) appears twice.
struct AttendBatch {
  AttentionShape shape;
  PageFormat format = PageFormat::kBf16;
  DType in_type = DType::kBf16;   // of q, k, v: kF32, kF16 or kBf16
  DType out_type = DType::kBf16;  // of out: likewise
  absl::Span<const SequenceStep> sequences;
  StepBuffers* buffers = nullptr;
};

// The host's decisions for one batch shape: splits, grids, workspace. Owned by the backend's cache.
class AttendPlan {
 public:
  virtual ~AttendPlan() = default;
  virtual std::string DebugString() const = 0;
};

// Names a RunAttend that may still be running.
struct StepTicket {
  int64_t value = 0;
};

// Re-encodes one full dense page (all kv heads) as a sealed page. source and target do not overlap.
struct SealTask {
  AttentionShape shape;
  PageId source = kNoPage;
  PageId target = kNoPage;
  PageId basis = kNoPage;
  int32_t stored_bits = 8;
  DType page_type = DType::kBf16;  // of the dense page: kBf16 or kF16
  PageId exact_copy = kNoPage;     // a page of the exact tier that the source is copied to; or none
};
struct SealResult {
  // Energy of the page's keys outside the leading half of the basis over what the fit left there:
  // 1 when the basis fits as well as when it was made, mean over kv heads.
  float drift_ratio = 0;
};

// Decodes a sealed page at its stored depth into a dense page (truncation into sealed tokens).
struct ReopenTask {
  AttentionShape shape;
  PageId source = kNoPage;
  PageId target = kNoPage;
  PageId basis = kNoPage;
  int32_t stored_bits = 8;
  DType page_type = DType::kBf16;  // of the dense page
};

// That of one kv head, of factors [num_kv_heads] that are 1 where there are none.
inline float HeadFactor(absl::Span<const float> factors, int32_t kv_head) {
  return factors.empty() ? 1.0f : factors[static_cast<size_t>(kv_head)];
}

// Fits the PCA basis of one layer on its first tokens; see format/basis.h.
struct FitBasisTask {
  AttentionShape shape;
  absl::Span<const PageId> pages;  // full dense pages
  DType page_type = DType::kBf16;  // of `pages`
  // [rows, num_q_heads, head_dim] queries that order the channels by E[(qB)^2] E[(kB)^2]; empty:
  // by key energy alone.
  absl::Span<const float> query_sample;
  // Of the layer's steps, by which the queries say how far its values err (policy/value_factors.h).
  float softmax_scale = 0;
  float softcap = 0;
  absl::Span<const float> error_factors;  // [num_kv_heads] of predicted errors; empty: 1
  PageId target = kNoPage;                // a block of BasisLayout
};

// Loads a basis that the caller brings: mean [num_kv_heads, head_dim] and basis [num_kv_heads,
// head_dim, head_dim], column = rank, orthonormal.
struct LoadBasisTask {
  AttentionShape shape;
  absl::Span<const float> mean;
  absl::Span<const float> basis;
  absl::Span<const float> error_factors;  // as above
  PageId target = kNoPage;
};

// Reads tokens back as the cache holds them (sealed pages at their stored depth).
struct ReadTask {
  AttentionShape shape;
  PageFormat format = PageFormat::kBf16;
  absl::Span<const PageId> pages;
  int32_t num_sealed_pages = 0;
  absl::Span<const BasisRun> bases;
  int32_t stored_bits = 8;
  absl::Span<const float> key_scales;  // as in SequenceStep
  absl::Span<const float> value_scales;
  int64_t begin = 0;   // cache position of the first token
  int64_t end = 0;     // one past the last
  float* k = nullptr;  // host, [end - begin, num_kv_heads, head_dim]
  float* v = nullptr;  // likewise
};

// A device and its pool. Threads: every call comes from one thread (the engine's), but info() may
// be called from any. Errors: kUnavailable when the device is lost; all later calls fail alike.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const BackendInfo& info() const = 0;

  // kResourceExhausted when host memory is short.
  virtual absl::StatusOr<std::unique_ptr<StepBuffers>> CreateStepBuffers(
      const StepLimits& limits) = 0;

  // kUnimplemented, listing what is supported, for a shape without a kernel. The plan lives as long
  // as the backend.
  virtual absl::StatusOr<const AttendPlan*> PlanAttend(const AttendBatch& batch) = 0;

  // Enqueues append and attend of every sequence. The batch's spans are read before it returns; its
  // buffers belong to the backend until Wait.
  virtual absl::StatusOr<StepTicket> RunAttend(const AttendPlan& plan,
                                               const AttendBatch& batch) = 0;

  // Returns when the results of `ticket` stand in the batch's buffers.
  virtual absl::Status Wait(StepTicket ticket) = 0;

  // Page work, ordered after everything enqueued before and before everything enqueued later.
  // SealPages returns when the results are known.
  virtual absl::Status SealPages(absl::Span<const SealTask> tasks,
                                 absl::Span<SealResult> results) = 0;
  virtual absl::Status ReopenPages(absl::Span<const ReopenTask> tasks) = 0;
  virtual absl::Status FitBasis(const FitBasisTask& task) = 0;
  virtual absl::Status LoadBasis(const LoadBasisTask& task) = 0;
  virtual absl::Status ReadTokens(const ReadTask& task) = 0;
  virtual absl::Status CopyPage(PageId source, PageId target, int64_t bytes) = 0;
  virtual absl::Status ZeroPage(PageId page, int64_t bytes) = 0;
};

// The embedded default. kResourceExhausted when the pool cannot be had.
absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const BackendOptions& options);

// kUnimplemented in a build without CUDA, kFailedPrecondition without a usable device or driver
// (naming what is missing), kResourceExhausted when the pool does not fit, kNotFound or
// kInvalidArgument for a tuning file that cannot be read.
absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const BackendOptions& options);

// "cpu", "cuda", or "auto": cuda where it can be created, else cpu with the reason in `note`.
absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(const std::string& name,
                                                       const BackendOptions& options,
                                                       std::string* note);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_ATTENTION_H_

#ifndef ADAATTN_KERNELS_CUDA_BOUNDED_H_
#define ADAATTN_KERNELS_CUDA_BOUNDED_H_

// Bounded steps (DecisionParams::bounded) on the device: a path of their own, so that the kernels
// of the others stay as they are. One launch: a cluster of CTAs takes a kv head of a sequence
// through scan, choice of depths, planning, attending and the bound, and reads deeper until the
// bound holds or nothing is left to read (bounded_head.h).

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/page_memory.h"
#include "kernels/cuda/paged_sequence.h"
#include "kernels/host_device.h"
#include "kernels/policy/bound_terms.h"
#include "kernels/policy/budget.h"
#include "kernels/policy/decision.h"
#include "kernels/shape.h"

namespace adaattn {

inline constexpr int32_t kBoundedCtas = 8;  // of a cluster
inline constexpr int32_t kBoundedThreads = 256;
inline constexpr int32_t kBoundedMaxColumns = 128;  // rows of q times q heads of a kv head

// One sequence of a bounded launch; it may have no sealed pages.
struct BoundedSequence : PagedSequence {
  int32_t exact_begin = -1;  // first table entry of the originals [num_sealed]; -1 = not kept
  int32_t stored_bits = 8;
  int32_t key_scales = -1;  // index of [num_kv_heads] floats in `scales`; -1 = all 1
  int32_t value_scales = -1;
};

struct BoundedParams {
  // Shapes; the grid and the workspace depend on these alone.
  AttentionShape shape;
  int32_t num_sequences = 0;
  int32_t max_q_len = 1;
  int32_t max_pages = 0;  // of the longest sequence, sealed and dense
  DType in_type = DType::kBf16;
  DType out_type = DType::kBf16;
  DType page_type = DType::kBf16;
  // Device memory, but for originals.
  PageMemory memory;
  const BoundedSequence* sequences = nullptr;
  const uint32_t* table = nullptr;
  const float* scales = nullptr;
  const std::byte* q = nullptr;       // [rows, num_q_heads, head_dim] in_type
  std::byte* out = nullptr;           // likewise, out_type
  float* lse = nullptr;               // [rows, num_q_heads]
  HeadDecision* decisions = nullptr;  // [num_sequences, num_kv_heads]
  std::byte* workspace = nullptr;
  uint64_t* stamps = nullptr;  // [kNumStamps] of stage_stamps.h
};

// What is known of a page while a step goes on.
struct BoundedPage {
  PageDepth depth;     // of a sealed page: how it is to be read
  int32_t key_bits;    // that have been read
  int32_t rank;        // among the sealed pages by `weight`
  bool cut;            // some row sees a part of its tokens only
  bool saturated;      // SealedFacts: once values are to be read
  double token_range;  // likewise
  double weight;       // how much it may add to the error, at most
  double key_norm;     // of dense tokens and of originals that were read: the largest norms
  double value_norm;
};

// A row's figures.
struct BoundedRow {
  double query_norm;
  double dense_lse;  // of the dense tokens: what their sums are relative to
  double scan_lse;   // over all masses as scanned
  double lse;        // as read so far
  double entropy;
  double estimate_norm, out_norm;
  double first_distance2;  // |v_0 - o|^2, o as estimated, where the first token stands for its page
  double relative, below, above;  // the bound
};

// What a page adds to a budget's error on every rung of the ladder.
struct PageRungs {
  ErrorTerms at[kNumRungs];
  int32_t below;  // NumThetasBelow of its share; -1: it has none
};

// Of a page for a row, as scanned.
struct ScanFigures {
  float concentration;
  float variance;
};

// Byte offsets into one kv head's part of the workspace. Row-major, outermost first; C rows of q
// times q heads, P pages, D channels, T CTAs.
struct BoundedWorkspace {
  int64_t query = 0;        // float [C, D]
  int64_t rotated = 0;      // float [bases, C, D]: q Q
  int64_t mean_score = 0;   // double [bases, C]: q.mu
  int64_t raw = 0;          // float [P, C, 64]: scores before the cap, nats; -inf: not seen
  int64_t lse = 0;          // double [C, P]: of the page's scores
  int64_t log_mass = 0;     // double [C, P]: what the page counts for
  int64_t score_error = 0;  // double [C, P]: sealed pages, as deep as they were read
  int64_t share = 0;        // double [C, P]: of the masses as scanned; then of skipped pages
  int64_t scan = 0;         // ScanFigures [C, P]: concentration, variance of the scan
  int64_t to_mean = 0;      // double [C, P]: |mean - o|, o as estimated
  int64_t to_mean_out = 0;  // double [C, P]: o as attended
  int64_t terms = 0;        // PreparedTerm [C, P + 1]
  int64_t pages = 0;        // BoundedPage [P]
  int64_t budget = 0;       // PageRungs [P]
  int64_t rows = 0;         // BoundedRow [C]
  int64_t estimate = 0;     // double [C, D]: o before attending, Hadamard frame
  int64_t sealed = 0;       // double [T, C, D]: sums of weighted means and values, Hadamard frame
  int64_t dense = 0;        // double [T, C, D]: of dense tokens, model frame
  int64_t exact = 0;        // double [T, C, D]: of originals
  int64_t out = 0;          // double [C, D]
  int64_t rotated_out = 0;  // double [C, D]
  int64_t theta = 0;        // float
  int64_t theta_sums = 0;   // ErrorTerms [thetas of the grid + 1]
  int64_t bytes = 0;
  int32_t columns = 0;
};

ADAATTN_HD BoundedWorkspace MakeBoundedWorkspace(const BoundedParams& p) {
  BoundedWorkspace w;
  w.columns = p.shape.group_size() * p.max_q_len;
  const int64_t c = w.columns, pages = p.max_pages, d = p.shape.head_dim;
  int64_t end = 0;
  const auto add = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += AlignPage(bytes);
    return begin;
  };
  w.query = add(c * d * 4);
  w.rotated = add(kMaxDeviceBasisRuns * c * d * 4);
  w.mean_score = add(kMaxDeviceBasisRuns * c * 8);
  w.raw = add(pages * c * kPageTokens * 4);
  w.lse = add(c * pages * 8);
  w.log_mass = add(c * pages * 8);
  w.score_error = add(c * pages * 8);
  w.share = add(c * pages * 8);
  w.scan = add(c * pages * static_cast<int64_t>(sizeof(ScanFigures)));
  w.to_mean = add(c * pages * 8);
  w.to_mean_out = add(c * pages * 8);
  w.terms = add(c * (pages + 1) * static_cast<int64_t>(sizeof(PreparedTerm)));
  w.pages = add(pages * static_cast<int64_t>(sizeof(BoundedPage)));
  w.budget = add(pages * static_cast<int64_t>(sizeof(PageRungs)));
  w.rows = add(c * static_cast<int64_t>(sizeof(BoundedRow)));
  w.estimate = add(c * d * 8);
  w.sealed = add(kBoundedCtas * c * d * 8);
  w.dense = add(kBoundedCtas * c * d * 8);
  w.exact = add(kBoundedCtas * c * d * 8);
  w.out = add(c * d * 8);
  w.rotated_out = add(c * d * 8);
  w.theta = add(4);
  w.theta_sums = add((kNumBudgetThetas + 1) * static_cast<int64_t>(sizeof(ErrorTerms)));
  w.bytes = end;
  return w;
}

// Of all heads.
inline int64_t BoundedWorkspaceBytes(const BoundedParams& params) {
  return MakeBoundedWorkspace(params).bytes * params.num_sequences * params.shape.num_kv_heads;
}

// Enqueues a step's bounded sequences.
absl::Status RunBounded(const BoundedParams& params, cudaStream_t stream);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_BOUNDED_H_

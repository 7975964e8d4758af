#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_H_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_H_

// Progressive decode on the device: what backend.cc fills in and calls. A step is
//
//   prepare  q to the rank frame of each basis, in MMA fragment order; q.mu; the dense tail exactly
//   scan     4 bits of every sealed page's keys -> page log mass, scores where they may be wanted
//   refine   two-stage sequences only: the rest of the rank where the coarse page log mass asks
//   theta    policies that choose theta only: per kv head, from page masses or predicted errors
//   select   depths from the global LSE; lists of what to read; means of the rest
//   attend   finer key planes and value planes of what is listed, shared out evenly
//   merge    partial results -> out, lse, decision
//
// or, where heads are few (conclude_parts.h), with `conclude` for the last three.
//
// Each is one launch with a grid that depends on shapes only, so a captured graph stays valid while
// lengths grow inside the planned table size.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/cuda/paged_sequence.h"
#include "kernels/cuda/params.h"
#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"
#include "kernels/policy/decision.h"
#include "kernels/shape.h"

namespace adaattn {

// One sequence of a progressive batch.
struct ProgressiveSequence : PagedSequence {
  int32_t scan_begin = 0;  // its first ScanRun
  int32_t num_scan_runs = 0;
};

// Neighbouring sealed pages of one sequence, scanned by the same CTA.
struct ScanRun {
  int32_t sequence = -1;  // -1: no run
  int32_t page_begin = 0;
  int32_t page_end = 0;
};

struct ProgressiveParams {
  // Shapes; the grid and the workspace depend on these alone.
  AttentionShape shape;
  int32_t stored_bits = 8;
  int32_t num_sequences = 0;
  int32_t max_q_len = 1;
  int32_t max_sealed = 0;      // pages of the longest sequence
  bool two_stage = false;      // some sequence scans in two stages
  bool softcap = false;        // some sequence has a soft cap
  bool theta = false;          // some sequence's policy chooses theta
  bool head_thetas = false;    // theta is each kv head's own: chosen, or the step's
  bool budget = false;         // and is kBudget
  int32_t conclude_pages = 0;  // CudaTuning
  int32_t num_sms = 0;
  int32_t scan_ctas = 0;    // that a head group and tile of columns may count on
  bool early_scan = false;  // the scan waits for rotated queries only, not for the dense tails
  DType in_type = DType::kBf16;
  DType out_type = DType::kBf16;
  DType page_type = DType::kBf16;  // of the dense pages: kBf16 or kF16
  // Device memory.
  std::byte* pool = nullptr;
  const ProgressiveSequence* sequences = nullptr;
  // [num_sequences, num_kv_heads]: the step's; where a policy chooses, what the theta launch chose.
  float* thetas = nullptr;
  const uint32_t* table = nullptr;
  const ScanRun* scan_runs = nullptr;  // [NumScanRuns(params)]
  const void* q = nullptr;             // [rows, num_q_heads, head_dim] in_type
  void* out = nullptr;                 // likewise, out_type
  float* lse = nullptr;                // [rows, num_q_heads]
  HeadDecision* decisions = nullptr;   // [num_sequences, num_kv_heads]
  std::byte* workspace = nullptr;
  int32_t* rotated = nullptr;  // counts rotated queries; 0 before and after every step
  uint64_t* stamps = nullptr;  // [kNumGroupStamps] of stage_stamps.h
};

// Fills num_sms, scan_ctas and early_scan, from the other shapes, for a device with `num_sms`
// multiprocessors: one wave, beside the dense tails where an early scan has many pages.
void PlanProgressive(int32_t num_sms, ProgressiveParams* params);

// Short runs that a scan CTA takes, on average, after its long one.
inline constexpr int32_t kShortScanRuns = 2;

// An upper bound on the runs of a step: every sequence may end inside one.
ADAATTN_HD constexpr int32_t NumScanRuns(const ProgressiveParams& params) {
  return params.scan_ctas * (1 + kShortScanRuns) + params.num_sequences;
}

// The sealed pages that any row of the sequence sees.
PageRun VisibleSealedPages(const ProgressiveSequence& sequence);

// Cuts these pages of `sequences` into runs and tells each sequence which are its own;
// what is left of `runs` [NumScanRuns(params)] becomes empty. The first params.scan_ctas of them
// hold seven eighths of the pages, behind many dense tails three quarters; the rest are short, so
// that CTAs, which take runs in turn, end together. Long and short sequences of a batch share the
// device by their pages.
void ScheduleScan(const ProgressiveParams& params, absl::Span<ProgressiveSequence> sequences,
                  ScanRun* runs);

// Bytes of workspace that params' shapes need.
int64_t ProgressiveWorkspaceBytes(const ProgressiveParams& params);

// Workspace that 32-bit indices of 16 bytes reach.
inline constexpr int64_t kMaxProgressiveWorkspace = int64_t{64} << 30;

// Enqueues a step. Errors, before anything is enqueued: kUnimplemented for a shape without a
// kernel, kResourceExhausted where the workspace would exceed kMaxProgressiveWorkspace.
absl::Status RunProgressive(const ProgressiveParams& params, cudaStream_t stream);

// Re-encodes dense pages; all pointers device memory. drift [num_tasks, num_kv_heads] receives each
// page's energy outside the leading half of the rank over what the basis had there when fitted.
struct SealParams {
  AttentionShape shape;
  int32_t stored_bits = 8;
  DType page_type = DType::kBf16;  // of the dense pages
  int32_t num_tasks = 0;
  std::byte* pool = nullptr;
  const uint32_t* source = nullptr;  // [num_tasks] PageId of dense pages
  const uint32_t* target = nullptr;  // [num_tasks] PageId of sealed pages
  const uint32_t* basis = nullptr;   // [num_tasks] PageId of basis blocks
  float* drift = nullptr;
};
absl::Status LaunchSeal(const SealParams& params, cudaStream_t stream);

// Decodes sealed pages at their stored depth into dense pages: SealParams with source sealed and
// target dense; drift is not used.
absl::Status LaunchReopen(const SealParams& params, cudaStream_t stream);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_H_

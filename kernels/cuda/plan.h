#ifndef ADAATTN_KERNELS_CUDA_PLAN_H_
#define ADAATTN_KERNELS_CUDA_PLAN_H_

// What of a step is decided by shapes alone: which kernels run, with what grids, in how much
// memory. Plain host code. Batches whose PlanKey is equal share a plan and its captured graph.

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "kernels/cuda/bounded.h"
#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/params.h"
#include "kernels/cuda/progressive.h"
#include "kernels/cuda/step_params.h"
#include "kernels/cuda/stream.h"
#include "kernels/cuda/tuning.h"

namespace adaattn {

inline constexpr int32_t kCudaMaxGroupSize = 16;
inline constexpr int32_t kCudaMaxQLen = 8;
// 8.4 million tokens: the merge lists a head's partial outputs in shared memory.
inline constexpr int32_t kCudaMaxSealedPages = 1 << 17;
inline constexpr int32_t kCudaHeadDims[] = {64, 80, 96, 128, 256};
static_assert(kCudaMaxGroupSize * kCudaMaxQLen <= kBoundedMaxColumns, "all shapes are bounded");

// The sealed sequences of one depth of storage: one progressive launch.
struct SealedGroup {
  int32_t num_sequences = 0;
  int32_t max_q_len = 0;
  int32_t max_sealed = 0;  // rounded up, so that a plan lasts while lengths grow
  bool two_stage = false;
  bool theta = false;
  bool head_thetas = false;
  bool budget = false;
  bool softcap = false;

  friend bool operator==(const SealedGroup& a, const SealedGroup& b) {
    return a.num_sequences == b.num_sequences && a.max_q_len == b.max_q_len &&
           a.max_sealed == b.max_sealed && a.two_stage == b.two_stage && a.theta == b.theta &&
           a.head_thetas == b.head_thetas && a.budget == b.budget && a.softcap == b.softcap;
  }
};
inline constexpr int32_t kNumSealedGroups = 3;  // 4, 6, 8 bits
constexpr int32_t SealedGroupOf(int32_t stored_bits) { return stored_bits / 2 - 2; }
constexpr int32_t SealedGroupBits(int32_t group) { return 4 + 2 * group; }

// The bounded sequences: one launch.
struct BoundedGroup {
  int32_t num_sequences = 0;
  int32_t max_q_len = 0;
  int32_t max_pages = 0;  // sealed and dense; rounded up

  friend bool operator==(const BoundedGroup& a, const BoundedGroup& b) {
    return a.num_sequences == b.num_sequences && a.max_q_len == b.max_q_len &&
           a.max_pages == b.max_pages;
  }
};

struct PlanKey {
  AttentionShape shape;
  PageFormat format = PageFormat::kBf16;
  DType in_type = DType::kBf16;
  DType out_type = DType::kBf16;
  int32_t max_sequences = 0;    // rounded up to a power of two
  int32_t exact_row_tiles = 0;  // of the sequences without sealed pages; 0 = none attends
  int32_t exact_row_blocks = 0;
  std::array<SealedGroup, kNumSealedGroups> sealed;
  BoundedGroup bounded;

  friend bool operator==(const PlanKey& a, const PlanKey& b) {
    return a.shape == b.shape && a.format == b.format && a.in_type == b.in_type &&
           a.out_type == b.out_type && a.max_sequences == b.max_sequences &&
           a.exact_row_tiles == b.exact_row_tiles && a.exact_row_blocks == b.exact_row_blocks &&
           a.sealed == b.sealed && a.bounded == b.bounded;
  }
};

// Whether a sequence's rows are answered by the bounded kernel.
inline bool IsBounded(const SequenceStep& sequence) {
  return sequence.decision.bounded && sequence.q_len > 0;
}

// Whether they are answered by the progressive kernels: it has sealed pages.
inline bool UsesSealedPages(const SequenceStep& sequence) {
  return sequence.num_sealed_pages > 0 && sequence.q_len > 0 && !IsBounded(sequence);
}

// The key of `batch`. kUnimplemented, listing what is supported, for a shape without a kernel.
absl::StatusOr<PlanKey> MakePlanKey(const AttendBatch& batch);

// Byte offsets of the packed block of a step. Everything before `tail` has a fixed place, which the
// graph's kernels know; the tail holds the AppendRuns, then the page tables (those of originals,
// too, where steps are bounded), whose entries are numbered from `tail` on.
struct BlockLayout {
  int64_t steps = 0;        // StepSequence [max_sequences]
  int64_t sequences = 0;    // DeviceSequence [max_sequences]
  int64_t progressive = 0;  // ProgressiveSequence, group after group
  int64_t thetas = 0;       // float [num_kv_heads] of each of these, likewise
  int64_t scan_runs = 0;    // ScanRun, likewise
  int64_t bounded = 0;      // BoundedSequence
  int64_t scales = 0;       // float [max_sequences, 2, num_kv_heads], FP8 only
  int64_t cta_items = 0;    // int32_t [num_ctas + 1]
  int64_t items = 0;        // DecodeItem [max_items]
  int64_t tail = 0;
};

// Bytes of scratch that a step needs.
struct ScratchNeeds {
  int64_t block = 0, q = 0, out = 0, lse = 0, decisions = 0, flags = 0, arrivals = 0, stamps = 0;
  int64_t partial_out = 0, partial_state = 0, counters = 0, rotated = 0, workspace = 0;
};

// Steps in flight at most. Each has a block of its own in pinned memory, which its graph knows.
inline constexpr int32_t kStepsInFlight = 2;

// A captured step.
struct StepGraph {
  GraphExec exec;
  int64_t generation = -1;            // that of the scratch it was captured with
  const std::byte* source = nullptr;  // the block that it reads
};

class CudaPlan final : public AttendPlan {
 public:
  // For a device of `num_sms` multiprocessors. `tuning` says how many CTAs of exact decode go to
  // each of them, and how many of them progressive launches count on.
  CudaPlan(const PlanKey& key, int32_t num_sms, const CudaTuning& tuning = CudaTuning());
  std::string DebugString() const override;

  const PlanKey& key() const { return key_; }
  const BlockLayout& layout() const { return layout_; }
  const DecodeKernel* exact() const { return exact_; }
  int32_t num_ctas() const { return num_ctas_; }
  int32_t max_items() const { return max_items_; }
  int32_t max_groups() const { return max_groups_; }
  // On the device: exact rows first, then the progressive groups, then bounded sequences.
  int32_t num_decisions() const;
  int32_t FirstBounded() const { return FirstSealed(kNumSealedGroups); }
  // Sequences of the groups before `group`.
  int32_t FirstSealed(int32_t group) const;
  // Shapes of one progressive launch; memory not filled in.
  ProgressiveParams GroupParams(int32_t group) const;
  // Shapes of the bounded launch, likewise.
  BoundedParams BoundedShapes() const;
  // ScanRuns of the groups before `group`.
  int32_t FirstScanRun(int32_t group) const;
  // Scratch for `batch`, whose key this plan has.
  ScratchNeeds Needs(const AttendBatch& batch) const;

  std::array<StepGraph, kStepsInFlight> graphs;

 private:
  ScratchNeeds ShapeNeeds() const;

  const PlanKey key_;
  const int32_t num_sms_;  // that progressive launches count on
  const int32_t conclude_pages_;
  const int32_t num_ctas_;  // of exact decode
  const DecodeKernel* exact_ = nullptr;
  int32_t max_groups_ = 0;
  int32_t max_items_ = 0;
  BlockLayout layout_;
  ScratchNeeds shape_needs_;  // what does not depend on the batch
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PLAN_H_

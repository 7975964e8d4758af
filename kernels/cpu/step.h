#ifndef ADAATTN_KERNELS_CPU_STEP_H_
#define ADAATTN_KERNELS_CPU_STEP_H_

// One batch on the CPU: append, then dense and sealed parts of the attention, then their merge.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/arena.h"
#include "kernels/cpu/dense_attend.h"
#include "kernels/cpu/sealed_kernels.h"
#include "kernels/cpu/worker_pool.h"

namespace adaattn {

// Working memory of one thread on sealed pages.
struct SealedWorker {
  SealedScratch scratch;
  std::vector<KeyRange> visible;
  std::vector<float> floats;
  Arena arena;  // of what selects one head's depths
};

// What the backend owns and lends to each step.
struct CpuContext {
  std::byte* pool = nullptr;
  WorkerPool* workers = nullptr;
  Arena* arena = nullptr;
  Arena* wave_arena = nullptr;                   // taken back several times a step
  std::vector<DenseScratch>* scratch = nullptr;  // one a worker
  std::vector<SealedWorker>* sealed_scratch = nullptr;
};

// A softmax state and what its acc is still to be multiplied by.
struct WeightedPartial {
  PartialRows rows;
  float factor = 1;
  int64_t key_bytes = 0;  // loaded to make it
};

// The q heads of one kv head of one sequence: the unit of planning, deciding and merging. Row
// i * group_size + g is q row i of the group's q head g.
struct HeadJob {
  const SequenceStep* sequence = nullptr;
  int32_t sequence_idx = 0;
  int32_t kv_head = 0;
  int32_t rows = 0;
  int64_t first_q_row = 0;           // of the sequence, in the batch's q
  float* q = nullptr;                // [rows, head_dim]
  float* rotated = nullptr;          // [basis runs, rows, head_dim] q Q
  float* mean_scores = nullptr;      // [basis runs, rows] q.mu
  const KeyRange* ranges = nullptr;  // [q_len]
  int64_t dense_begin = 0;           // cache positions read from dense pages
  int64_t dense_end = 0;
  int32_t num_splits = 0;
  // Dense, in order; then one for all sealed pages; then, bounded, one for exact pages.
  WeightedPartial* splits = nullptr;
  HeadDecision* decision = nullptr;
};

// The dense attention of the head's rows; pages are the sequence's, begin and end are left to set.
DenseWork MakeDenseWork(const CpuContext& context, const AttendBatch& batch, const HeadJob& job);

// The keys that row `row` of q sees: causal, windowed, and existing.
KeyRange VisibleKeys(const SequenceStep& sequence, int32_t row);

// Pages of one split. Splits are independent of threads and of the rest of the batch, so that a
// sequence alone gives the bits that it gives in a batch. At least 16 pages (1024 tokens: below, a
// split costs more to merge than it spreads), at most 64 splits: 8192 tokens give 8 splits. Splits
// begin at whole vectors of pages.
inline constexpr int32_t kPagesInVector = 8;  // of the widest vectors
int64_t SplitPages(int64_t num_pages);

// Runs `batch` to the end and measures its stages.
void RunStep(const CpuContext& context, const AttendBatch& batch);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_STEP_H_

#ifndef ADAATTN_KERNELS_CPU_SEALED_JOB_H_
#define ADAATTN_KERNELS_CPU_SEALED_JOB_H_

// The sealed pages of one kv head of one sequence on their way through scan, select and attend.

#include <cstdint>
#include <vector>

#include "kernels/cpu/sealed_kernels.h"
#include "kernels/cpu/step.h"
#include "kernels/policy/ladder.h"

namespace adaattn {

// What a scan found for one row on one page.
struct RowScan {
  float lse = 0;            // log sum exp of the visible scores; -inf: sees none
  float concentration = 1;  // sum_t p_t^2 / share^2
  float energy = 0;         // RowEnergy::total
  float variance = 0;       // var_s at the depth read so far
  float log_mass = 0;       // what counts for the page until it is attended
};

// Pages are numbered from the first that some row sees.
struct SealedJob {
  HeadJob* head = nullptr;
  PageLayout layout;
  int32_t first_page = 0;
  int32_t num_pages = 0;
  bool ladder = false;  // threshold or budget; else every page is read at `fixed`
  PageDepth fixed;
  int32_t first_chunks = 0;     // that the first scan reads
  float* raw = nullptr;         // [num_pages, rows, 64]
  RowScan* scans = nullptr;     // [num_pages, rows]
  float* masses = nullptr;      // [num_pages, rows] exp(log_mass - row_max)
  PageFacts* facts = nullptr;   // [num_pages]
  PageDepth* depths = nullptr;  // [num_pages]
  float* row_max = nullptr;     // [rows] largest log mass of a page or dense token
  float* row_lse = nullptr;     // [rows] global, from the scans and the dense pages

  // Bounded steps: null in all others.
  uint8_t* raw_bits = nullptr;  // [num_pages] of the keys, in `raw`
  uint8_t* exact = nullptr;     // [num_pages] 1: the original is attended instead
  float* estimate = nullptr;    // [rows, head_dim] o before attending, Hadamard frame
  bool done = false;            // attended for good

  int32_t split_pages = 0;
  int32_t num_splits = 0;
  PartialRows* splits = nullptr;       // of attend
  int64_t* split_key_bytes = nullptr;  // loaded by scan and attend, by split
  int64_t* split_value_bytes = nullptr;
};

// The sealed pages that some row of the head sees: [first, end), empty where there are none.
struct PageRange {
  int32_t first = 0;
  int32_t end = 0;
};
PageRange VisibleSealedPages(const HeadJob& head);

// The tokens of page `page` of the sequence (counted from its start) that each row sees, as offsets
// in the page; out [rows].
void LocalRanges(const HeadJob& head, int32_t group_size, int32_t page, KeyRange* out);

// Masses and global LSE of each row from log masses and dense splits.
void FinishMasses(SealedJob* job);

// Two-stage scan: marks the pages that the coarse scan cannot rule out.
void OpenPages(SealedJob* job);

// Depths of all pages, and the head's decision apart from its bytes of planes.
void SelectDepths(SealedJob* job, const AttentionShape& shape, const std::byte* pool);

// The head's part of page `page` of the job.
SealedPage JobPage(const SealedJob& job, int32_t head_dim, const std::byte* pool, int32_t page);
// The head's rows in the frame of the page's basis.
RotatedRows JobRows(const SealedJob& job, int32_t head_dim, int32_t page);
PageMean JobPageMean(const SealedJob& job, const std::byte* pool, int32_t page);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_SEALED_JOB_H_

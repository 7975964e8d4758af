#ifndef ADAATTN_KERNELS_CPU_SEALED_JOB_H_
#define ADAATTN_KERNELS_CPU_SEALED_JOB_H_

// The sealed pages of one kv head of one sequence on their way through scan, select and attend.

#include <cstdint>
#include <vector>

#include "kernels/cpu/sealed_kernels.h"
#include "kernels/cpu/select_rows.h"
#include "kernels/cpu/step.h"
#include "kernels/policy/ladder.h"

namespace adaattn {

// [first, end).
struct PageRange {
  int32_t first = 0;
  int32_t end = 0;
};

// Pages are numbered from the first that some row sees.
struct SealedJob {
  HeadJob* head = nullptr;
  PageLayout layout;
  SealedSections sections;
  int32_t first_page = 0;
  int32_t num_pages = 0;
  int32_t stride = 0;   // num_pages, rounded up to whole vectors
  PageRange whole;      // pages of which every row sees every token
  bool ladder = false;  // threshold or budget; else every page is read at `fixed`
  PageDepth fixed;
  int32_t first_chunks = 0;     // that the first scan reads
  float* raw = nullptr;         // [num_pages, rows, 64]
  RowScans scans;               // [rows, stride]; after num_pages: pages that no row sees
  float* masses = nullptr;      // [rows, stride] exp(log_mass - row_max)
  PageFacts* facts = nullptr;   // [num_pages]
  PageMean* means = nullptr;    // [num_pages]
  float* spreads = nullptr;     // [stride] of the means' summaries, as is the next
  float* scale_rms = nullptr;   // [stride]
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
  // By split: after the scan all pages by their means, then of attend.
  PartialRows* splits = nullptr;
  int64_t* split_key_bytes = nullptr;  // loaded by scan and attend, by split
  int64_t* split_value_bytes = nullptr;
};

// Pages of whole vectors that hold `pages`.
inline int32_t WholeVectors(int32_t pages) {
  return (pages + kPagesInVector - 1) / kPagesInVector * kPagesInVector;
}

// The sealed pages that some row of the head sees; empty where there are none.
PageRange VisibleSealedPages(const HeadJob& head);

// The tokens of page `page` of the sequence (counted from its start) that each row sees, as offsets
// in the page; out [rows].
void LocalRanges(const HeadJob& head, int32_t group_size, int32_t page, KeyRange* out);

// LSE, concentration, variance and log mass of pages [first, end) for all rows, as deep as they
// were scanned; `first` begins a vector.
void FinishScans(SealedJob* job, int32_t first, int32_t end);

// Those pages by their means, into the split's partial result.
void SumMeans(SealedJob* job, int32_t head_dim, int32_t split, int32_t first, int32_t end);

// Masses and global LSE of each row from log masses and dense splits.
void FinishMasses(SealedJob* job);

// Two-stage scan: marks the pages that the coarse scan cannot rule out.
void OpenPages(SealedJob* job, Arena* arena);

// Depths of all pages, and the head's decision apart from its bytes of planes.
void SelectDepths(SealedJob* job, const AttentionShape& shape, const std::byte* pool, Arena* arena);

// The head's part of page `page` of the job; lives as long as the job stays where it is.
inline SealedPage JobPage(const SealedJob& job, const std::byte* pool, int32_t page) {
  return SealedPage{pool + PageOffset(job.head->sequence->pages[job.first_page + page]),
                    &job.sections};
}
// The head's rows in the frame of the page's basis.
RotatedRows JobRows(const SealedJob& job, int32_t head_dim, int32_t page);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_SEALED_JOB_H_

#ifndef ADAATTN_KERNELS_CUDA_PAGED_SEQUENCE_H_
#define ADAATTN_KERNELS_CUDA_PAGED_SEQUENCE_H_

#include <cstdint>

#include "kernels/format/page_layout.h"
#include "kernels/policy/decision.h"

namespace adaattn {

inline constexpr int32_t kMaxDeviceBasisRuns = 4;

// What progressive and bounded launches know alike of one sequence; in device memory.
struct PagedSequence {
  int32_t table_begin = 0;  // first entry in the page table
  int32_t num_sealed = 0;   // pages; the dense ones follow in the table
  int32_t kv_len = 0;       // tokens, appended ones included
  int32_t q_begin = 0;      // first row of q
  int32_t q_len = 0;
  int32_t q_start = 0;  // cache position of the first row
  int32_t window = 0;   // 0 = all
  float softmax_scale = 0;
  float softcap = 0;  // 0 = none
  int32_t num_bases = 0;
  int32_t basis_end[kMaxDeviceBasisRuns] = {};  // first page after each run
  PageId basis[kMaxDeviceBasisRuns] = {};       // its block
  DecisionParams decision;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PAGED_SEQUENCE_H_

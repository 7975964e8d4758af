#ifndef ADAATTN_KERNELS_CUDA_PARAMS_H_
#define ADAATTN_KERNELS_CUDA_PARAMS_H_

// What the host passes to the kernels: plain structs that a plain C++ compiler understands.

#include <vector_types.h>

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/page_memory.h"
#include "kernels/policy/decision.h"
#include "kernels/shape.h"

namespace adaattn {

// One sequence of a step as the kernels see it. Rows of q are numbered over the whole batch.
struct DeviceSequence {
  int64_t q_start = 0;  // cache position of the first q row
  int64_t window = 0;   // 0 = all
  int32_t q_row = 0;    // first row of q, out and lse
  int32_t q_len = 0;
  int32_t kv_row = 0;  // first row of k and v to append
  int32_t append_len = 0;
  int32_t kv_len = 0;       // tokens before the append
  int32_t total_len = 0;    // kv_len + append_len
  int32_t page_table = 0;   // index of the first entry
  int32_t key_scales = -1;  // index of [num_kv_heads] floats in `scales`; -1 = all 1
  int32_t value_scales = -1;
  float softmax_scale = 0;
  float softcap = 0;  // 0 = none
};

// Keys as a range of cache positions.
struct KeyRange {
  int32_t begin = 0;
  int32_t end = 0;
};

// Neighbouring pages of one sequence, as its page table has them.
struct PageRun {
  int32_t begin = 0;
  int32_t end = 0;

  friend bool operator==(const PageRun& a, const PageRun& b) {
    return a.begin == b.begin && a.end == b.end;
  }
};

// What q row `row` (0 .. q_len) of the sequence sees.
ADAATTN_HD KeyRange RowKeys(const DeviceSequence& sequence, int32_t row) {
  const int64_t position = sequence.q_start + row;
  const int64_t end = position + 1 < sequence.total_len ? position + 1 : sequence.total_len;
  int64_t begin = sequence.window > 0 ? position + 1 - sequence.window : 0;
  begin = begin < 0 ? 0 : begin > end ? end : begin;
  return KeyRange{static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// What any of its rows sees. Requires: q_len > 0.
ADAATTN_HD KeyRange AttendedKeys(const DeviceSequence& sequence) {
  return KeyRange{RowKeys(sequence, 0).begin, RowKeys(sequence, sequence.q_len - 1).end};
}

// A run of whole pages of one (sequence, kv head, row block), given to one CTA. The runs of one
// such group are numbered and hold neighbouring partial slots; a group of one run writes its
// outputs at once.
struct DecodeItem {
  int32_t sequence = 0;
  int32_t kv_head = 0;
  int32_t row_block = 0;
  int32_t page_begin = 0;
  int32_t page_end = 0;
  int32_t group = 0;  // counter index
  int32_t num_splits = 1;
  int32_t first_slot = 0;  // partial slot of the group's first run
  int32_t slot = 0;        // this run's
};

// All pointers are device memory, but for pages that lie in the exact tier.
struct DecodeParams {
  PageMemory memory;
  const uint32_t* page_table = nullptr;
  const DeviceSequence* sequences = nullptr;
  const DecodeItem* items = nullptr;
  const int32_t* cta_items = nullptr;  // [num_ctas + 1]: a CTA's items
  const float* scales = nullptr;
  const void* q = nullptr;            // [rows, num_q_heads, head_dim] in_type
  void* out = nullptr;                // likewise, out_type
  float* lse = nullptr;               // [rows, num_q_heads] natural log
  HeadDecision* decisions = nullptr;  // [num_sequences, num_kv_heads], zeroed before; may be null
  float* partial_out = nullptr;       // [slots, rows of a block, head_dim]
  float2* partial_state = nullptr;    // [slots, rows of a block]: lse_log2, mean score (log 2)
  int32_t* counters = nullptr;        // [groups], zero before and after every launch
  int32_t num_ctas = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  DType in_type = DType::kBf16;
  DType out_type = DType::kBf16;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PARAMS_H_

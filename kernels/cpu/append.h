#ifndef ADAATTN_KERNELS_CPU_APPEND_H_
#define ADAATTN_KERNELS_CPU_APPEND_H_

#include <cstdint>

#include "kernels/attention.h"

namespace adaattn {

// Rows [begin, end) of a sequence's new k and v, which all go into one page.
struct AppendWork {
  const SequenceStep* sequence = nullptr;
  int32_t sequence_idx = 0;
  int64_t first_kv_row = 0;  // of the sequence, in the batch's k and v
  int32_t begin = 0;
  int32_t end = 0;
};

// Writes the rows in the page's format; false if a value is NaN or infinite (the rows are written
// all the same).
bool AppendRows(const AttendBatch& batch, const AppendWork& work, std::byte* pool);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_APPEND_H_

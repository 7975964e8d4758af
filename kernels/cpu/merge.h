#ifndef ADAATTN_KERNELS_CPU_MERGE_H_
#define ADAATTN_KERNELS_CPU_MERGE_H_

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cpu/step.h"

namespace adaattn {

// Joins a kv head's splits in their order and writes its rows of out and lse.
//   max = max_i max_i;  lse = max + ln sum_i sum_i exp(max_i - max)
//   out = sum_i factor_i acc_i exp(max_i - lse)
// Rows without any key get out = 0 and lse = -inf. Returns the mean over rows of the entropy of the
// tokens in the splits that carry a moment, under the joint softmax.
float MergeHead(const AttendBatch& batch, const HeadJob& job);

// Adds one row of `part` to `sum`, whose moments are left alone.
void MergeRow(const PartialRows& part, int32_t row, int32_t head_dim, PartialRows* sum);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_MERGE_H_

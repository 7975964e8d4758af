#ifndef ADAATTN_KERNELS_CUDA_BUDGET_PARTS_H_
#define ADAATTN_KERNELS_CUDA_BUDGET_PARTS_H_

// How the theta launch shares a head's pages among CTAs, from shapes alone.

#include <cstdint>

#include "kernels/cuda/progressive.h"
#include "kernels/host_device.h"

namespace adaattn {

inline constexpr int32_t kBudgetThreads = 256;
inline constexpr int32_t kBudgetWarps = kBudgetThreads / 32;
inline constexpr int32_t kMaxBudgetCtas = 8;  // what every device's clusters may have
inline constexpr int32_t kWarpPages = 16;     // of a warp at a time: the rows of an MMA

// Pages whose summaries a CTA holds at most; it takes more one block of them after the other.
ADAATTN_HD constexpr int32_t BudgetBlockPages(int32_t head_dim) {
  return (head_dim <= 128 ? 2 : 1) * kBudgetWarps * kWarpPages;
}

// CTAs that share a head, a power of two: 128 pages each where the device has room, else a block.
// On 132 multiprocessors 8 heads at 8k take one each, at 32k four, at 128k eight; 512 heads at 32k
// two.
ADAATTN_HD constexpr int32_t BudgetCtas(const ProgressiveParams& p) {
  const int64_t heads = int64_t{p.num_sequences} * p.shape.num_kv_heads;
  int32_t ctas = 1;
  while (ctas < kMaxBudgetCtas) {
    const bool room = ctas * heads <= p.num_sms;  // for twice as many, two a multiprocessor
    const int32_t most = room ? kBudgetWarps * kWarpPages : BudgetBlockPages(p.shape.head_dim);
    if (p.max_sealed <= ctas * most) break;
    ctas *= 2;
  }
  return ctas;
}

// Pages of one CTA where `pages` are shared among `ctas`: whole warps. The last ones may have
// fewer, or none.
ADAATTN_HD constexpr int32_t BudgetPart(int32_t pages, int32_t ctas) {
  const int32_t each = (pages + ctas - 1) / ctas;
  return (each + kWarpPages - 1) / kWarpPages * kWarpPages;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_BUDGET_PARTS_H_

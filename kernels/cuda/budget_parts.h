#ifndef ADAATTN_KERNELS_CUDA_BUDGET_PARTS_H_
#define ADAATTN_KERNELS_CUDA_BUDGET_PARTS_H_

// How the theta launch shares a head's pages among CTAs, from shapes alone.

#include <cstdint>

#include "kernels/cuda/progressive.h"
#include "kernels/host_device.h"

namespace adaattn {

inline constexpr int32_t kBudgetWarps = 8;     // of a CTA
inline constexpr int32_t kFewBudgetWarps = 4;  // where a head's pages keep no more of them busy
inline constexpr int32_t kMaxBudgetCtas = 8;   // what every device's clusters may have
inline constexpr int32_t kWarpPages = 16;      // of a warp at a time: the rows of an MMA

// Pages whose summaries a CTA of `warps` holds at most; it takes more one block of them after the
// other.
ADAATTN_HD constexpr int32_t BudgetBlockPages(int32_t head_dim, int32_t warps = kBudgetWarps) {
  return (head_dim <= 128 ? 2 : 1) * warps * kWarpPages;
}

// Whether CTAs of kFewBudgetWarps, twice as many of which a multiprocessor holds, do for a step of
// at most kFewColumns columns: each warp takes pages once. (At 64 x 2k eight warps came in two
// waves of CTAs, in which six idled.)
ADAATTN_HD constexpr bool FewBudgetWarpsDo(const ProgressiveParams& p) {
  return p.shape.head_dim <= 128 && p.max_sealed <= kFewBudgetWarps * kWarpPages;
}

// CTAs that share a head, a power of two: 128 pages each where the device, a multiprocessor of
// which holds `ctas_per_sm`, has room, else a block. An eighth of it is no room, since a cluster's
// CTAs need neighbouring multiprocessors: those that found none would come when the others have
// left. On 132 multiprocessors of two CTAs 8 heads at 8k take one each, at 32k four, at 128k eight;
// 64 heads at 32k two.
ADAATTN_HD constexpr int32_t BudgetCtas(const ProgressiveParams& p, int32_t ctas_per_sm) {
  const int64_t heads = int64_t{p.num_sequences} * p.shape.num_kv_heads;
  const int64_t room = int64_t{p.num_sms} * ctas_per_sm * 7 / 8;
  int32_t ctas = 1;
  while (ctas < kMaxBudgetCtas) {
    const bool few = 2 * ctas * heads <= room;
    const int32_t most = few ? kBudgetWarps * kWarpPages : BudgetBlockPages(p.shape.head_dim);
    if (p.max_sealed <= ctas * most) break;
    ctas *= 2;
  }
  return ctas;
}

// Pages of one CTA where `pages` are shared among `ctas`, a power of two: whole warps. The last
// ones may have fewer, or none.
ADAATTN_HD constexpr int32_t BudgetPart(int32_t pages, int32_t ctas) {
  for (; ctas > 1; ctas /= 2) pages = (pages + 1) / 2;  // the device has no division
  return (pages + kWarpPages - 1) / kWarpPages * kWarpPages;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_BUDGET_PARTS_H_

#ifndef ADAATTN_KERNELS_CUDA_CONCLUDE_PARTS_H_
#define ADAATTN_KERNELS_CUDA_CONCLUDE_PARTS_H_

// Which steps the conclude launch ends, and how many CTAs share a head's pages, from shapes alone.

#include <array>
#include <cstdint>

#include "kernels/cuda/progressive_workspace.h"

namespace adaattn {

// CTAs of a head: every device's clusters may have eight.
inline constexpr int32_t kMinConcludeCtas = 2, kMaxConcludeCtas = 8;
inline constexpr int32_t kConcludePages = 128;  // of a CTA, at most

// Pages of a CTA, at most, of a head with `ctas`. A head of which most pages are attended keeps the
// others waiting, the more so the fewer of all CTAs it has: what the other launches share out
// evenly. Under a threshold for all heads such a head is rare; thetas by head make them. Measured
// (docs/kernels.md).
constexpr int32_t MaxConcludePages(const ProgressiveParams& p, int32_t ctas) {
  const int32_t pages = p.conclude_pages * ctas / (p.head_thetas ? 2 : 1);
  const int32_t most = p.head_thetas ? kConcludePages / 2 : kConcludePages;
  return pages < most ? pages : most;
}

// Whether there is a kernel: shared memory must hold what select, attend and merge each have to
// themselves. `columns`: of a kv head.
constexpr bool Concludes(int32_t head_dim, int32_t columns) {
  return AttendWarps(head_dim) == kMaxAttendWarps &&
         columns <= (head_dim > 128 ? kFewColumns : kTileColumns);
}

// Sums of columns that a CTA gets from its cluster, its own among them, at most: each of its
// columns from each CTA.
constexpr int32_t ConcludeParts(int32_t columns) {
  int32_t most = 0;
  for (int32_t ctas = kMinConcludeCtas; ctas <= kMaxConcludeCtas; ++ctas) {
    const int32_t parts = CeilDiv(columns, ctas) * ctas;
    if (parts > most) most = parts;
  }
  return most;
}

// Element i: clusters of i CTAs, each with a multiprocessor to itself, that the device holds at
// once.
using ConcludeClusters = std::array<int32_t, kMaxConcludeCtas + 1>;

// CTAs of a head: as many as there is room for. 0: the step has so many heads or pages that these
// are better shared out among all CTAs.
inline int32_t ConcludeCtas(const ProgressiveParams& p, const ConcludeClusters& clusters) {
  const int32_t heads = p.num_sequences * p.shape.num_kv_heads;
  for (int32_t ctas = kMaxConcludeCtas; ctas >= kMinConcludeCtas; --ctas) {
    if (clusters[ctas] < heads || ctas * heads > p.num_sms) continue;
    return p.max_sealed <= ctas * MaxConcludePages(p, ctas) ? ctas : 0;
  }
  return 0;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_CONCLUDE_PARTS_H_

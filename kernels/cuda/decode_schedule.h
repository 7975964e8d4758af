#ifndef ADAATTN_KERNELS_CUDA_DECODE_SCHEDULE_H_
#define ADAATTN_KERNELS_CUDA_DECODE_SCHEDULE_H_

// Which CTA of a persistent decode kernel reads which pages. A pure function of shapes.

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/cuda/params.h"

namespace adaattn {

// Rows of q that a CTA carries, in blocks of 8 (1, 2 or 4): the fewest that hold the group size
// times the longest q, so that K and V are read once; larger groups are cut into row blocks that
// read them again. head_dim 256 has no room for 4.
int32_t ChooseRowTiles(int32_t head_dim, int32_t group_size, int32_t max_q_len);

// CTAs of one launch at most, and so parts of one group: who joins them keeps a weight for each
// part and row in shared memory.
inline constexpr int32_t kMaxDecodeCtas = 384;

// The pages that any of its rows attends. Requires: q_len > 0.
PageRun AttendedPages(const DeviceSequence& sequence);

struct DecodeScheduleSize {
  int32_t num_items = 0;
  int32_t num_groups = 0;  // counters that the kernel needs
  int32_t num_slots = 0;   // partial slots
};

struct DecodeSchedule {
  std::vector<DecodeItem> items;
  std::vector<int32_t> cta_items;  // [num_ctas + 1]
  int32_t num_groups = 0;
  int32_t num_slots = 0;
};

// Deals the pages of all (sequence, kv head, row block) groups to `num_ctas` CTAs, in order, in
// equal runs. A run that would end or start close to a group's edge ends there instead: a part
// costs a merge, and a short one costs more than the imbalance.
//
// Example: 64 sequences of 32 pages, 8 kv heads, 264 CTAs: 16384 pages, 62.06 a CTA. The first CTA
// would leave 1.94 pages of its second group and takes them; so do all after it, and 256 CTAs read
// two whole groups each with nothing to merge. One sequence of 512 pages, 8 kv heads: 15.5 pages a
// CTA, 33 parts a kv head.
//
// Of a sequence q_len and AttendedPages matter, nothing else. Without q rows it gets no item,
// without a key one empty item, which writes out = 0, lse = -inf. Requires: num_ctas > 0, row_tiles
// as from ChooseRowTiles.
DecodeSchedule ScheduleDecode(absl::Span<const DeviceSequence> sequences, int32_t num_kv_heads,
                              int32_t group_size, int32_t row_tiles, int32_t num_ctas);
// Likewise, into memory of the caller's: items [MaxDecodeItems of its groups], cta_items
// [num_ctas + 1].
DecodeScheduleSize ScheduleDecode(absl::Span<const DeviceSequence> sequences, int32_t num_kv_heads,
                                  int32_t group_size, int32_t row_tiles, int32_t num_ctas,
                                  DecodeItem* items, int32_t* cta_items);

// Bounds on a schedule of `num_groups` (sequence, kv head, row block) groups: every CTA's end adds
// at most one item, and at most two partial slots.
constexpr int32_t MaxDecodeItems(int32_t num_groups, int32_t num_ctas) {
  return num_groups + num_ctas;
}
constexpr int32_t MaxDecodeSlots(int32_t num_ctas) { return 2 * num_ctas; }

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_DECODE_SCHEDULE_H_

#include "kernels/cuda/decode_schedule.h"

#include <algorithm>

namespace adaattn {
namespace {

int32_t NumRowBlocks(const DeviceSequence& sequence, int32_t group_size, int32_t row_tiles) {
  const int32_t rows = 8 * row_tiles;
  return (group_size * sequence.q_len + rows - 1) / rows;
}

// Hands out pages in order. What some CTAs left is shared by all that follow; what they took too
// much only idles the last ones, or the shares would shrink until whole groups no longer fit.
class Dealer {
 public:
  Dealer(int64_t pages, int32_t num_ctas, DecodeItem* items, int32_t* cta_items)
      : items_(items), cta_items_(cta_items), spare_(-pages), ctas_left_(num_ctas) {
    *cta_items_++ = 0;
    spare_ += share_ * num_ctas;
    StartCta();
  }

  void AddGroup(int32_t sequence, int32_t kv_head, int32_t row_block, PageRun pages) {
    int32_t num_parts = 0;
    do {
      const int64_t rest = pages.end - pages.begin;
      if (rest > 0 && room_ < std::min<int64_t>(slack_ + 1, rest) && ctas_left_ > 1) EndCta();
      const bool ends_here = rest <= room_ + slack_ || ctas_left_ <= 1;
      const int64_t take = ends_here ? rest : room_;
      // Field by field and in its place: copies of an item just made wait for its stores.
      DecodeItem& item = items_[size_.num_items++];
      item.sequence = sequence;
      item.kv_head = kv_head;
      item.row_block = row_block;
      item.page_begin = pages.begin;
      item.page_end = pages.begin += static_cast<int32_t>(take);
      item.group = size_.num_groups;
      item.num_splits = 1;
      item.first_slot = size_.num_slots;
      item.slot = size_.num_slots + num_parts++;
      room_ -= take;
    } while (pages.begin < pages.end);
    ++size_.num_groups;
    if (num_parts == 1) return;
    DecodeItem* const parts = items_ + size_.num_items - num_parts;
    for (int32_t i = 0; i < num_parts; ++i) parts[i].num_splits = num_parts;
    size_.num_slots += num_parts;
  }

  DecodeScheduleSize Finish() {
    while (ctas_left_ > 0) EndCta();
    return size_;
  }

 private:
  void StartCta() {
    if (spare_ < 0) {  // Rarely so: a division for every CTA would take longer than the rest.
      const int64_t more = (ctas_left_ - 1 - spare_) / std::max(ctas_left_, 1);
      share_ += more;
      spare_ += more * ctas_left_;
      slack_ = std::max<int64_t>(1, share_ / 16);
    }
    room_ = share_;
  }
  void EndCta() {
    *cta_items_++ = size_.num_items;
    --ctas_left_;
    spare_ -= room_;
    StartCta();
  }

  // Fewer leave the warps of a CTA without a unit each.
  static constexpr int64_t kMinPages = 2;

  DecodeItem* const items_;
  int32_t* cta_items_;  // where the current CTA's end goes
  DecodeScheduleSize size_;
  int64_t spare_;  // what this CTA and those that follow would take at `share_`, less what is left
  int32_t ctas_left_;
  int64_t share_ = kMinPages;
  int64_t room_ = 0;   // pages that the current CTA still takes
  int64_t slack_ = 1;  // pages that it may take or leave to end at a group's edge
};

}  // namespace

PageRun AttendedPages(const DeviceSequence& sequence) {
  const KeyRange keys = AttendedKeys(sequence);
  if (keys.end <= keys.begin) return PageRun{};
  return PageRun{keys.begin / kPageTokens, (keys.end + kPageTokens - 1) / kPageTokens};
}

int32_t ChooseRowTiles(int32_t head_dim, int32_t group_size, int32_t max_q_len) {
  const int32_t rows = group_size * max_q_len;
  const int32_t most = head_dim > 128 ? 2 : 4;
  return rows <= 8 ? 1 : rows <= 16 ? 2 : most;
}

DecodeSchedule ScheduleDecode(absl::Span<const DeviceSequence> sequences, int32_t num_kv_heads,
                              int32_t group_size, int32_t row_tiles, int32_t num_ctas) {
  int32_t num_groups = 0;
  for (const DeviceSequence& sequence : sequences) {
    num_groups += num_kv_heads * NumRowBlocks(sequence, group_size, row_tiles);
  }
  DecodeSchedule schedule;
  schedule.items.resize(MaxDecodeItems(num_groups, num_ctas));
  schedule.cta_items.resize(num_ctas + 1);
  const DecodeScheduleSize size =
      ScheduleDecode(sequences, num_kv_heads, group_size, row_tiles, num_ctas,
                     schedule.items.data(), schedule.cta_items.data());
  schedule.items.resize(size.num_items);
  schedule.num_groups = size.num_groups;
  schedule.num_slots = size.num_slots;
  return schedule;
}

DecodeScheduleSize ScheduleDecode(absl::Span<const DeviceSequence> sequences, int32_t num_kv_heads,
                                  int32_t group_size, int32_t row_tiles, int32_t num_ctas,
                                  DecodeItem* items, int32_t* cta_items) {
  int64_t pages = 0;
  for (const DeviceSequence& sequence : sequences) {
    if (sequence.q_len == 0) continue;
    const PageRun range = AttendedPages(sequence);
    pages += int64_t{range.end - range.begin} * num_kv_heads *
             NumRowBlocks(sequence, group_size, row_tiles);
  }
  Dealer dealer(pages, num_ctas, items, cta_items);
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i].q_len == 0) continue;
    const PageRun range = AttendedPages(sequences[i]);
    const int32_t num_blocks = NumRowBlocks(sequences[i], group_size, row_tiles);
    for (int32_t head = 0; head < num_kv_heads; ++head) {
      for (int32_t block = 0; block < num_blocks; ++block) {
        dealer.AddGroup(static_cast<int32_t>(i), head, block, range);
      }
    }
  }
  return dealer.Finish();
}

}  // namespace adaattn

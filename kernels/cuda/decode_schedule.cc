#include "kernels/cuda/decode_schedule.h"

#include <algorithm>

namespace adaattn {
namespace {

// The pages of one sequence that its rows attend.
struct PageRange {
  int32_t begin = 0;
  int32_t end = 0;
};

PageRange AttendedPages(const DeviceSequence& sequence) {
  const KeyRange keys = AttendedKeys(sequence);
  if (keys.end <= keys.begin) return PageRange{};
  return PageRange{keys.begin / kPageTokens, (keys.end + kPageTokens - 1) / kPageTokens};
}

int32_t NumRowBlocks(const DeviceSequence& sequence, int32_t group_size, int32_t row_tiles) {
  const int32_t rows = 8 * row_tiles;
  return (group_size * sequence.q_len + rows - 1) / rows;
}

// Hands out pages in order. What some CTAs left is shared by all that follow; what they took too
// much only idles the last ones, or the shares would shrink until whole groups no longer fit.
class Dealer {
 public:
  Dealer(DecodeSchedule* schedule, int64_t pages, int32_t num_ctas)
      : schedule_(schedule), pages_left_(pages), ctas_left_(num_ctas) {
    schedule_->cta_items.push_back(0);
    StartCta();
  }

  void AddGroup(DecodeItem item, PageRange pages) {
    const size_t first_item = schedule_->items.size();
    item.group = schedule_->num_groups++;
    item.page_begin = pages.begin;
    do {
      const int64_t rest = pages.end - item.page_begin;
      if (ctas_left_ > 1 && rest > 0 && room_ < std::min<int64_t>(slack_ + 1, rest)) EndCta();
      const bool last_cta = ctas_left_ <= 1;
      const bool ends_here = rest == 0 || rest <= room_ + slack_;
      const int64_t take = last_cta || ends_here ? rest : room_;
      item.page_end = item.page_begin + static_cast<int32_t>(take);
      schedule_->items.push_back(item);
      item.page_begin = item.page_end;
      room_ -= take;
      pages_left_ -= take;
    } while (item.page_begin < pages.end);
    NumberParts(first_item);
  }

  void Finish() {
    while (ctas_left_ > 0) EndCta();
  }

 private:
  void StartCta() {
    const int64_t ctas = std::max(ctas_left_, 1);
    // Rarely so: a division for every CTA would take longer than the rest.
    if (share_ * ctas < pages_left_) share_ = (pages_left_ + ctas - 1) / ctas;
    room_ = share_;
    slack_ = std::max<int64_t>(1, room_ / 16);
  }
  void EndCta() {
    schedule_->cta_items.push_back(static_cast<int32_t>(schedule_->items.size()));
    --ctas_left_;
    StartCta();
  }
  void NumberParts(size_t first_item) {
    const auto parts = static_cast<int32_t>(schedule_->items.size() - first_item);
    for (int32_t i = 0; i < parts; ++i) {
      DecodeItem& item = schedule_->items[first_item + i];
      item.num_splits = parts;
      item.first_slot = schedule_->num_slots;
      item.slot = schedule_->num_slots + i;
    }
    if (parts > 1) schedule_->num_slots += parts;
  }

  // Fewer leave the warps of a CTA without a unit each.
  static constexpr int64_t kMinPages = 2;

  DecodeSchedule* schedule_;
  int64_t pages_left_;
  int32_t ctas_left_;
  int64_t share_ = kMinPages;
  int64_t room_ = 0;   // pages that the current CTA still takes
  int64_t slack_ = 0;  // pages that it may take or leave to end at a group's edge
};

}  // namespace

int32_t ChooseRowTiles(int32_t head_dim, int32_t group_size, int32_t max_q_len) {
  const int32_t rows = group_size * max_q_len;
  const int32_t most = head_dim > 128 ? 2 : 4;
  return rows <= 8 ? 1 : rows <= 16 ? 2 : most;
}

DecodeSchedule ScheduleDecode(absl::Span<const DeviceSequence> sequences, int32_t num_kv_heads,
                              int32_t group_size, int32_t row_tiles, int32_t num_ctas) {
  DecodeSchedule schedule;
  ScheduleDecode(sequences, num_kv_heads, group_size, row_tiles, num_ctas, &schedule);
  return schedule;
}

void ScheduleDecode(absl::Span<const DeviceSequence> sequences, int32_t num_kv_heads,
                    int32_t group_size, int32_t row_tiles, int32_t num_ctas,
                    DecodeSchedule* schedule) {
  schedule->items.clear();
  schedule->cta_items.clear();
  schedule->num_groups = schedule->num_slots = 0;
  int64_t pages = 0;
  for (const DeviceSequence& sequence : sequences) {
    if (sequence.q_len == 0) continue;
    const PageRange range = AttendedPages(sequence);
    pages += int64_t{range.end - range.begin} * num_kv_heads *
             NumRowBlocks(sequence, group_size, row_tiles);
  }
  Dealer dealer(schedule, pages, num_ctas);
  for (size_t i = 0; i < sequences.size(); ++i) {
    if (sequences[i].q_len == 0) continue;
    const PageRange range = AttendedPages(sequences[i]);
    const int32_t num_blocks = NumRowBlocks(sequences[i], group_size, row_tiles);
    for (int32_t head = 0; head < num_kv_heads; ++head) {
      for (int32_t block = 0; block < num_blocks; ++block) {
        DecodeItem item;
        item.sequence = static_cast<int32_t>(i);
        item.kv_head = head;
        item.row_block = block;
        dealer.AddGroup(item, range);
      }
    }
  }
  dealer.Finish();
}

}  // namespace adaattn

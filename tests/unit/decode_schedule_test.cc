#include "kernels/cuda/decode_schedule.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "kernels/cuda/kernel_table.h"

namespace adaattn {
namespace {

DeviceSequence Sequence(int32_t kv_len, int32_t q_len = 1, int64_t window = 0) {
  DeviceSequence sequence;
  sequence.total_len = kv_len;
  sequence.q_len = q_len;
  sequence.q_start = std::max(kv_len - q_len, 0);
  sequence.window = window;
  return sequence;
}

int64_t PagesOf(const DecodeSchedule& schedule, int32_t cta) {
  int64_t pages = 0;
  for (int32_t i = schedule.cta_items[cta]; i < schedule.cta_items[cta + 1]; ++i) {
    pages += schedule.items[i].page_end - schedule.items[i].page_begin;
  }
  return pages;
}

// Every page of every group is read once, parts are numbered without gaps, slots are distinct.
void ExpectSound(const DecodeSchedule& schedule, const std::vector<DeviceSequence>& sequences,
                 int32_t num_kv_heads, int32_t group_size, int32_t row_tiles, int32_t num_ctas) {
  ASSERT_EQ(static_cast<int32_t>(schedule.cta_items.size()), num_ctas + 1);
  EXPECT_EQ(schedule.cta_items.front(), 0);
  EXPECT_EQ(schedule.cta_items.back(), static_cast<int32_t>(schedule.items.size()));
  EXPECT_TRUE(std::is_sorted(schedule.cta_items.begin(), schedule.cta_items.end()));
  std::map<std::tuple<int32_t, int32_t, int32_t>, std::vector<DecodeItem>> groups;
  for (const DecodeItem& item : schedule.items) {
    groups[{item.sequence, item.kv_head, item.row_block}].push_back(item);
  }
  std::vector<int32_t> slot_uses(schedule.num_slots, 0);
  size_t expected_groups = 0;
  for (int32_t s = 0; s < static_cast<int32_t>(sequences.size()); ++s) {
    if (sequences[s].q_len == 0) continue;
    const KeyRange keys = AttendedKeys(sequences[s]);
    const bool empty = keys.begin >= keys.end;
    const int32_t blocks = (group_size * sequences[s].q_len + 8 * row_tiles - 1) / (8 * row_tiles);
    for (int32_t h = 0; h < num_kv_heads; ++h) {
      for (int32_t b = 0; b < blocks; ++b) {
        ++expected_groups;
        const auto& parts = groups[{s, h, b}];
        ASSERT_FALSE(parts.empty());
        EXPECT_EQ(parts.front().page_begin, empty ? 0 : keys.begin / kPageTokens);
        EXPECT_EQ(parts.back().page_end, empty ? 0 : (keys.end + kPageTokens - 1) / kPageTokens);
        for (size_t i = 0; i < parts.size(); ++i) {
          EXPECT_EQ(parts[i].num_splits, static_cast<int32_t>(parts.size()));
          EXPECT_EQ(parts[i].group, parts[0].group);
          EXPECT_LT(parts[i].group, schedule.num_groups);
          if (!empty) {
            EXPECT_LT(parts[i].page_begin, parts[i].page_end);
          }
          if (i > 0) {
            EXPECT_EQ(parts[i].page_begin, parts[i - 1].page_end);
          }
          if (parts.size() == 1) continue;
          EXPECT_EQ(parts[i].slot, parts[0].first_slot + static_cast<int32_t>(i));
          ASSERT_LT(parts[i].slot, schedule.num_slots);
          ++slot_uses[parts[i].slot];
        }
      }
    }
  }
  EXPECT_EQ(groups.size(), expected_groups);
  EXPECT_EQ(std::count(slot_uses.begin(), slot_uses.end(), 1), schedule.num_slots);
}

TEST(ScheduleDecodeTest, LeavesWholeGroupsToCtasThatHoldThem) {
  const std::vector<DeviceSequence> sequences(64, Sequence(2048));
  const DecodeSchedule schedule = ScheduleDecode(sequences, 8, 4, 1, 264);
  ExpectSound(schedule, sequences, 8, 4, 1, 264);
  EXPECT_EQ(schedule.num_slots, 0);
  for (int32_t cta = 0; cta < 256; ++cta) EXPECT_EQ(PagesOf(schedule, cta), 64);
}

TEST(ScheduleDecodeTest, SplitsOneLongSequenceOverAllCtas) {
  const std::vector<DeviceSequence> sequences(1, Sequence(32768));
  const DecodeSchedule schedule = ScheduleDecode(sequences, 8, 4, 1, 264);
  ExpectSound(schedule, sequences, 8, 4, 1, 264);
  int64_t most = 0;
  for (int32_t cta = 0; cta < 264; ++cta) most = std::max(most, PagesOf(schedule, cta));
  EXPECT_LE(most, 17);
}

TEST(ScheduleDecodeTest, BalancesWithinOneSixteenth) {
  std::vector<DeviceSequence> sequences;
  std::mt19937 engine(5);
  for (int i = 0; i < 40; ++i)
    sequences.push_back(Sequence(1 + static_cast<int>(engine() % 40000)));
  const DecodeSchedule schedule = ScheduleDecode(sequences, 8, 4, 1, 264);
  ExpectSound(schedule, sequences, 8, 4, 1, 264);
  int64_t total = 0, most = 0;
  for (int32_t cta = 0; cta < 264; ++cta) {
    total += PagesOf(schedule, cta);
    most = std::max(most, PagesOf(schedule, cta));
  }
  EXPECT_LE(static_cast<double>(most), total / 264.0 * 1.08 + 2);
}

TEST(ScheduleDecodeTest, IsSoundForAnyMixture) {
  std::mt19937 engine(11);
  for (int trial = 0; trial < 300; ++trial) {
    std::vector<DeviceSequence> sequences;
    const int32_t count = 1 + static_cast<int32_t>(engine() % 20);
    for (int32_t i = 0; i < count; ++i) {
      const int32_t kv_len =
          static_cast<int32_t>(engine() % 3 == 0 ? engine() % 100 : engine() % 9000);
      sequences.push_back(Sequence(kv_len, static_cast<int32_t>(engine() % 9),
                                   engine() % 4 == 0 ? 1 + static_cast<int>(engine() % 500) : 0));
    }
    const int32_t heads = 1 + static_cast<int32_t>(engine() % 8);
    const int32_t group_size = 1 + static_cast<int32_t>(engine() % 16);
    const int32_t num_ctas = 1 + static_cast<int32_t>(engine() % 300);
    const int32_t tiles = ChooseRowTiles(128, group_size, 8);
    SCOPED_TRACE(trial);
    ExpectSound(ScheduleDecode(sequences, heads, group_size, tiles, num_ctas), sequences, heads,
                group_size, tiles, num_ctas);
  }
}

TEST(ScheduleDecodeTest, GivesAnEmptySequenceOneEmptyItem) {
  const std::vector<DeviceSequence> sequences = {Sequence(0), Sequence(100, 0), Sequence(0)};
  const DecodeSchedule schedule = ScheduleDecode(sequences, 2, 4, 1, 16);
  ExpectSound(schedule, sequences, 2, 4, 1, 16);
  EXPECT_EQ(schedule.items.size(), 4u);
}

TEST(ChooseRowTilesTest, ReadsKeysOnceForUpToThirtyTwoRows) {
  EXPECT_EQ(ChooseRowTiles(128, 4, 1), 1);
  EXPECT_EQ(ChooseRowTiles(128, 8, 1), 1);
  EXPECT_EQ(ChooseRowTiles(128, 7, 2), 2);
  EXPECT_EQ(ChooseRowTiles(128, 4, 8), 4);
  EXPECT_EQ(ChooseRowTiles(128, 16, 8), 4);
  EXPECT_EQ(ChooseRowTiles(256, 16, 8), 2);
}

TEST(KernelTableTest, HoldsEveryTypeAndHeadDimOnce) {
  for (const DType type : {DType::kF32, DType::kF16, DType::kBf16, DType::kF8E4m3}) {
    for (const int32_t d : {64, 80, 96, 128, 256}) {
      const DecodeKernel* kernel = FindDecodeKernel(type, d);
      ASSERT_NE(kernel, nullptr) << DTypeName(type) << " " << d;
      EXPECT_NE(kernel->run, nullptr);
    }
  }
  EXPECT_EQ(DecodeKernels().size(), 20u);
  EXPECT_EQ(FindDecodeKernel(DType::kBf16, 72), nullptr);
}

}  // namespace
}  // namespace adaattn

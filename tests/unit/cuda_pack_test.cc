// Packed blocks: their size, and what they keep of the step that was packed there before.

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <vector>

#include "kernels/cuda/plan.h"
#include "kernels/cuda/step.h"
#include "tests/unit/cuda_packed.h"

namespace adaattn {
namespace {

// What kernels are told to read in which order, and by which CTA.
std::vector<int32_t> Schedules(const Packed& packed) {
  const BlockLayout& layout = packed.plan.layout();
  std::vector<int32_t> numbers;
  if (packed.plan.exact() != nullptr) {
    for (int32_t i = 0; i <= packed.plan.num_ctas(); ++i) {
      numbers.push_back(packed.At<int32_t>(layout.cta_items, i));
    }
    for (const DecodeItem& item : packed.Items()) {
      for (const int32_t number :
           {item.sequence, item.kv_head, item.row_block, item.page_begin, item.page_end, item.group,
            item.num_splits, item.first_slot, item.slot}) {
        numbers.push_back(number);
      }
    }
  }
  for (int32_t i = 0; i < packed.plan.FirstScanRun(kNumSealedGroups); ++i) {
    const auto run = packed.At<ScanRun>(layout.scan_runs, i);
    for (const int32_t number : {run.sequence, run.page_begin, run.page_end}) {
      numbers.push_back(number);
    }
  }
  for (int32_t i = 0; i < packed.plan.FirstSealed(kNumSealedGroups); ++i) {
    const auto sequence = packed.At<ProgressiveSequence>(layout.progressive, i);
    numbers.push_back(sequence.scan_begin);
    numbers.push_back(sequence.num_scan_runs);
  }
  return numbers;
}

TEST(PackStepTest, LeavesTheSchedulesThatANewBlockWouldHave) {
  std::mt19937 random(5);
  Batch batch({640, 1000, 6400, 70}, PageFormat::kProgressive);
  batch.Seal(0, 9);
  batch.Seal(2, 98);
  Packed packed(&batch);
  int32_t changes = 0;
  for (int32_t step = 0; step < 300; ++step) {
    const std::vector<int32_t> before = Schedules(packed);
    for (SequenceStep& sequence : batch.steps) {
      sequence.window = step % 50 == 0 && random() % 2 == 0 ? 128 + random() % 100 : 0;
      if (sequence.kv_len >= 6460) continue;  // the plan's most
      sequence.kv_len += random() % 3;
      sequence.q_start = sequence.kv_len;
      sequence.pages = absl::MakeConstSpan(batch.steps[2].pages.data(), sequence.kv_len / 64 + 1);
    }
    ASSERT_TRUE(*MakePlanKey(batch.get()) == packed.plan.key());
    packed.Pack(&batch);
    const std::vector<int32_t> schedules = Schedules(packed);
    ASSERT_EQ(schedules, Schedules(Packed(&batch))) << step;
    changes += schedules == before ? 0 : 1;
  }
  EXPECT_GT(changes, 10);
  EXPECT_LT(changes, 150);
}

TEST(PackStepTest, GivesEveryHeadItsTheta) {
  Batch batch({640, 1000, 6400}, PageFormat::kProgressive);
  batch.Seal(0, 9);
  batch.Seal(2, 98);
  batch.steps[0].decision.theta = 0.02f;
  const std::vector<float> own = {1, 2, 3, 4, 5, 6, 7, 8};
  batch.steps[2].thetas = own;
  const Packed packed(&batch);
  for (int32_t head = 0; head < 8; ++head) {
    EXPECT_EQ(packed.At<float>(packed.plan.layout().thetas, head), 0.02f);
    EXPECT_EQ(packed.At<float>(packed.plan.layout().thetas, 8 + head), own[head]);
  }
}

TEST(PackStepTest, MakesAScheduleOnlyWhenItsPagesChange) {
  for (const bool sealed : {false, true}) {
    Batch batch({640, 1000}, PageFormat::kProgressive);
    if (sealed) {
      batch.Seal(0, 9);
      batch.Seal(1, 15);
    }
    Packed packed(&batch);
    const BlockLayout& layout = packed.plan.layout();
    const auto grow = [&](int32_t tokens) {
      for (SequenceStep& sequence : batch.steps) {
        sequence.q_start = sequence.kv_len += tokens;
        sequence.pages = absl::MakeConstSpan(batch.steps[1].pages.data(), sequence.kv_len / 64 + 1);
      }
    };
    std::byte* const mark = packed.block.data() + (sealed ? layout.scan_runs : layout.items);
    const std::byte made = mark[4];
    mark[4] = std::byte{77};
    grow(3);
    packed.Pack(&batch);
    EXPECT_EQ(mark[4], std::byte{77});
    if (sealed) {
      batch.steps[0].num_sealed_pages = 10;
    } else {
      grow(64);
    }
    packed.Pack(&batch);
    EXPECT_EQ(mark[4], made);
    // Another plan has a layout of its own, and leaves nothing behind for this one.
    mark[4] = std::byte{77};
    const CudaPlan other(packed.plan.key(), kNumSms);
    PackStep(other, batch.get(), packed.block.data(), &packed.schedules);
    EXPECT_EQ(mark[4], made);
    mark[4] = std::byte{77};
    packed.Pack(&batch);
    EXPECT_EQ(mark[4], made);
  }
}

TEST(PackStepTest, PutsRunsBeforeTables) {
  for (const int32_t count : {1, 3, 5}) {
    for (const int32_t append_len : {0, 1, 63, 64, 65, 200}) {
      Batch batch(std::vector<int64_t>(count, 700));
      for (SequenceStep& step : batch.steps) {
        step.kv_len -= append_len;
        step.append_len = append_len;
      }
      const Packed packed(&batch);
      const int64_t tail = packed.plan.layout().tail;
      const auto header = packed.At<StepHeader>(0, 0);
      const int64_t tables = tail + header.num_runs * int64_t{sizeof(AppendRun)};
      const auto first = packed.At<DeviceSequence>(packed.plan.layout().sequences, 0);
      EXPECT_EQ(tail + first.page_table * int64_t{4}, tables);
      EXPECT_EQ(header.block_bytes, (tables + count * 11 * int64_t{4} + 15) / 16 * 16);
      EXPECT_EQ(header.block_bytes, packed.bytes);
      // The first kernel asks for the runs of so many sequences before it knows how many there are.
      EXPECT_GE(static_cast<int64_t>(packed.block.size()),
                tail + packed.plan.key().max_sequences * int64_t{sizeof(AppendRun)});
    }
  }
}

}  // namespace
}  // namespace adaattn

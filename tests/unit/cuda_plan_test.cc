// Plans and packed blocks of the CUDA backend: host work that needs no GPU.

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/stage_stamps.h"
#include "kernels/cuda/step.h"
#include "tests/unit/cuda_packed.h"

namespace adaattn {
namespace {

TEST(PlanKeyTest, StaysWhileLengthsGrowInsideAStep) {
  Batch shorter({500 * 64}), longer({510 * 64});
  shorter.Seal(0, 498);
  longer.Seal(0, 508);
  EXPECT_TRUE(*MakePlanKey(shorter.get()) == *MakePlanKey(longer.get()));
  longer.Seal(0, 513);
  EXPECT_FALSE(*MakePlanKey(shorter.get()) == *MakePlanKey(longer.get()));
}

TEST(PlanKeyTest, RefusesWhatHasNoKernelAndSaysWhatHas) {
  Batch batch({100});
  batch.mutable_batch()->shape.head_dim = 72;
  const absl::Status status = MakePlanKey(batch.get()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_NE(status.message().find("64, 80, 96, 128, 256"), absl::string_view::npos);
  batch.mutable_batch()->shape = {34, 2, 128};
  EXPECT_EQ(MakePlanKey(batch.get()).status().code(), absl::StatusCode::kUnimplemented);
  batch.mutable_batch()->shape = {32, 8, 128};
  batch.steps[0].q_len = 9;
  EXPECT_EQ(MakePlanKey(batch.get()).status().code(), absl::StatusCode::kUnimplemented);
  batch.steps[0].q_len = 8;
  EXPECT_TRUE(MakePlanKey(batch.get()).ok());
  batch.steps[0].num_sealed_pages = kCudaMaxSealedPages + 1;
  EXPECT_EQ(MakePlanKey(batch.get()).status().code(), absl::StatusCode::kUnimplemented);
  batch.steps[0].num_sealed_pages = 0;
  batch.steps[0].kv_len = int64_t{1} << 31;
  EXPECT_EQ(MakePlanKey(batch.get()).status().code(), absl::StatusCode::kUnimplemented);
}

TEST(PlanKeyTest, RunsTheThetaKernelWhereAPolicyChoosesTheta) {
  for (const Policy policy : {Policy::kFullDepth, Policy::kStatic, Policy::kThreshold,
                              Policy::kBudget, Policy::kEntropy, Policy::kLearned}) {
    Batch batch({640, 640}, PageFormat::kProgressive);
    batch.Seal(0, 9);
    batch.Seal(1, 9);
    batch.steps[1].decision.policy = policy;
    const absl::StatusOr<PlanKey> key = MakePlanKey(batch.get());
    ASSERT_TRUE(key.ok()) << key.status();
    const ProgressiveParams params = CudaPlan(*key, kNumSms).GroupParams(SealedGroupOf(8));
    EXPECT_EQ(params.theta, ChoosesTheta(policy));
    EXPECT_EQ(params.head_thetas, ChoosesTheta(policy));
    EXPECT_EQ(params.budget, policy == Policy::kBudget) << "only a budget needs page budgets";
  }
}

TEST(PlanKeyTest, KnowsWhereEachHeadHasItsTheta) {
  Batch batch({640, 640}, PageFormat::kProgressive);
  batch.Seal(0, 9);
  batch.Seal(1, 9);
  const PlanKey plain = *MakePlanKey(batch.get());
  const std::vector<float> own(8, 0.01f);
  batch.steps[1].thetas = own;
  const PlanKey key = *MakePlanKey(batch.get());
  EXPECT_FALSE(key == plain);
  const ProgressiveParams params = CudaPlan(key, kNumSms).GroupParams(SealedGroupOf(8));
  EXPECT_TRUE(params.head_thetas);
  EXPECT_FALSE(params.theta) << "nothing is chosen";
}

TEST(PackStepTest, FitsTheBoundsOfItsPlan) {
  for (const int32_t count : {1, 3, 32}) {
    std::vector<int64_t> lengths(count);
    std::iota(lengths.begin(), lengths.end(), 6000);
    Batch batch(lengths);
    const Packed packed(&batch);
    EXPECT_LE(packed.bytes, static_cast<int64_t>(packed.block.size()));
    const std::vector<DecodeItem> items = packed.Items();
    ASSERT_GE(static_cast<int32_t>(items.size()), 8 * count);
    EXPECT_LE(static_cast<int32_t>(items.size()), packed.plan.max_items());
    for (const DecodeItem& item : items) {
      EXPECT_LT(item.group, packed.plan.max_groups());
      EXPECT_LE(item.first_slot + item.num_splits, MaxDecodeSlots(packed.plan.num_ctas()));
    }
  }
}

TEST(PackStepTest, CutsAppendsAtPageEdges) {
  Batch batch({63, 128});
  batch.steps[0].append_len = 70;
  batch.steps[0].pages = absl::MakeConstSpan(batch.steps[1].pages.data(), 3);
  const Packed packed(&batch);
  const auto header = packed.At<StepHeader>(0, 0);
  ASSERT_EQ(header.num_runs, 4);
  const int32_t slots[] = {63, 0, 0, 0}, rows[] = {1, 64, 5, 1};
  const int64_t kv_rows[] = {0, 1, 65, 70};
  const uint32_t pages[] = {3, 10, 17, 17};
  for (int32_t i = 0; i < 4; ++i) {
    const auto run = packed.At<AppendRun>(packed.plan.layout().tail, i);
    EXPECT_EQ(run.slot, slots[i]);
    EXPECT_EQ(run.num_rows, rows[i]);
    EXPECT_EQ(run.kv_row, kv_rows[i]);
    EXPECT_EQ(run.page, pages[i]);
    EXPECT_EQ(run.sequence, i / 3);
  }
}

TEST(PackStepTest, SendsSealedSequencesToTheProgressiveKernelsAndTheRestToTheExactOnes) {
  Batch batch({640, 6400, 640}, PageFormat::kProgressive);
  batch.Seal(1, 98);
  const Packed packed(&batch);
  const BlockLayout& layout = packed.plan.layout();
  EXPECT_EQ(packed.At<DeviceSequence>(layout.sequences, 0).q_len, 1);
  EXPECT_EQ(packed.At<DeviceSequence>(layout.sequences, 1).q_len, 0);
  EXPECT_EQ(packed.At<DeviceSequence>(layout.sequences, 2).q_len, 1);
  for (const DecodeItem& item : packed.Items()) EXPECT_NE(item.sequence, 1);
  const auto sealed = packed.At<ProgressiveSequence>(layout.progressive, 0);
  constexpr int32_t kRunEntries = sizeof(AppendRun) / sizeof(uint32_t);
  EXPECT_EQ(sealed.table_begin, 3 * kRunEntries + 11);
  EXPECT_EQ(sealed.num_sealed, 98);
  EXPECT_EQ(sealed.kv_len, 6401);
  EXPECT_EQ(sealed.q_begin, 1);
  EXPECT_EQ(sealed.num_bases, 1);
  EXPECT_EQ(sealed.basis_end[0], 98);
  EXPECT_EQ(sealed.basis[0], PageId{99});
  // Decisions of the progressive launch follow those of all exact sequences, rounded up to 4.
  EXPECT_EQ(packed.At<StepSequence>(layout.steps, 0).decision, 0);
  EXPECT_EQ(packed.At<StepSequence>(layout.steps, 1).decision, 4);
  EXPECT_EQ(packed.At<StepSequence>(layout.steps, 2).decision, 2);
  EXPECT_EQ(packed.plan.num_decisions(), 5 * 8);
}

TEST(PackStepTest, SendsBoundedSequencesToTheirOwnKernelWithTheirOriginals) {
  Batch batch({640, 640, 6400, 6400}, PageFormat::kProgressive);
  batch.Seal(2, 98);
  batch.Seal(3, 98);
  batch.steps[1].decision.bounded = true;
  batch.steps[2].decision.bounded = true;
  const std::vector<PageId> originals(98, PageId{5});
  batch.steps[2].exact_pages = originals;
  batch.steps[3].exact_pages = originals;  // of no use to a step without a bound
  const Packed packed(&batch);
  const BlockLayout& layout = packed.plan.layout();
  EXPECT_LE(packed.bytes, static_cast<int64_t>(packed.block.size()));
  EXPECT_EQ(packed.plan.key().bounded.num_sequences, 2);
  EXPECT_EQ(packed.plan.key().bounded.max_pages, 112);  // 101, rounded up
  EXPECT_EQ(packed.plan.key().sealed[SealedGroupOf(8)].num_sequences, 1);
  for (const DecodeItem& item : packed.Items()) EXPECT_EQ(item.sequence, 0);
  EXPECT_EQ(packed.At<BoundedSequence>(layout.bounded, 0).exact_begin, -1);
  const auto bounded = packed.At<BoundedSequence>(layout.bounded, 1);
  constexpr int32_t kTables = 4 * sizeof(AppendRun) / sizeof(uint32_t);
  EXPECT_EQ(bounded.table_begin, kTables + 22);
  EXPECT_EQ(bounded.exact_begin, kTables + 22 + 101);
  EXPECT_EQ(bounded.num_sealed, 98);
  EXPECT_EQ(bounded.kv_len, 6401);
  EXPECT_EQ(bounded.q_begin, 2);
  EXPECT_EQ(packed.At<uint32_t>(layout.tail, bounded.exact_begin), 5u);
  EXPECT_EQ(packed.At<ProgressiveSequence>(layout.progressive, 0).table_begin,
            kTables + 22 + 101 + 98);
  // Decisions: four exact rows, one progressive, then the bounded.
  EXPECT_EQ(packed.At<StepSequence>(layout.steps, 1).decision, 5);
  EXPECT_EQ(packed.At<StepSequence>(layout.steps, 2).decision, 6);
  EXPECT_EQ(packed.At<StepSequence>(layout.steps, 3).decision, 4);
  EXPECT_EQ(packed.plan.num_decisions(), 7 * 8);
}

TEST(StageStampsTest, GivesEachStageTheTimeUntilTheNext) {
  uint64_t stamps[kNumStamps] = {};
  stamps[kAppendStamp] = 1000;
  stamps[kAppendedStamp] = 1005;
  uint64_t* const group = stamps + kFirstGroupStamp + SealedGroupOf(8) * kNumGroupStamps;
  const uint64_t starts[kNumGroupStamps] = {1020, 1050, 1057, 1070, 1090};
  std::copy(std::begin(starts), std::end(starts), group);
  stamps[kBoundedStamp] = 1100;
  stamps[kReturnStamp] = 1400;
  stamps[kReturnedStamp] = 1407;
  PlanKey key;
  key.exact_row_tiles = 1;
  key.sealed[SealedGroupOf(8)].num_sequences = 1;
  key.sealed[SealedGroupOf(8)].theta = true;
  key.bounded.num_sequences = 1;
  StageTimes times = StagesFromStamps(key, stamps);
  EXPECT_EQ(times.append, absl::Nanoseconds(5));
  EXPECT_EQ(times.scan, absl::Nanoseconds(30));
  EXPECT_EQ(times.select, absl::Nanoseconds(20));
  EXPECT_EQ(times.attend, absl::Nanoseconds(15 + 20 + 300));
  EXPECT_EQ(times.merge, absl::Nanoseconds(10 + 7));
  // What a plan does not launch left stamps of other steps.
  key = PlanKey();
  times = StagesFromStamps(key, stamps);
  EXPECT_EQ(times.append, absl::Nanoseconds(400));
  EXPECT_EQ(times.scan + times.select + times.attend, absl::ZeroDuration());
  EXPECT_EQ(times.merge, absl::Nanoseconds(7));
}

// Sequences of the given numbers of sealed pages, scheduled on an H100.
struct Scan {
  explicit Scan(const std::vector<int32_t>& sealed, AttentionShape shape = {32, 8, 128},
                int32_t window = 0, int32_t num_sms = kNumSms) {
    params.shape = shape;
    params.num_sequences = static_cast<int32_t>(sealed.size());
    params.max_sealed = *std::max_element(sealed.begin(), sealed.end());
    PlanProgressive(num_sms, &params);
    for (const int32_t pages : sealed) {
      ProgressiveSequence sequence;
      sequence.num_sealed = pages;
      sequence.kv_len = (pages + 1) * kPageTokens;
      sequence.q_len = 1;
      sequence.q_start = sequence.kv_len - 1;
      sequence.window = window;
      sequences.push_back(sequence);
    }
    const auto bound = static_cast<size_t>(NumScanRuns(params));
    runs.resize(bound + 20000);
    for (size_t i = bound; i < runs.size(); ++i) runs[i].sequence = kUntouched;
    ScheduleScan(params, absl::MakeSpan(sequences), runs.data());
    for (size_t i = bound; i < runs.size(); ++i) within_bound &= runs[i].sequence == kUntouched;
    runs.resize(bound);
  }
  // Pages that `sequence`'s runs cover, each once and in order, from `first` on.
  int32_t Covered(int32_t sequence, int32_t first = 0) const {
    const ProgressiveSequence& s = sequences[sequence];
    int32_t next = first;
    for (int32_t i = s.scan_begin; i < s.scan_begin + s.num_scan_runs; ++i) {
      EXPECT_EQ(runs[i].sequence, sequence);
      EXPECT_EQ(runs[i].page_begin, next);
      EXPECT_GT(runs[i].page_end, runs[i].page_begin);
      next = runs[i].page_end;
    }
    return next;
  }
  int32_t Longest() const {
    int32_t longest = 0;
    for (const ScanRun& run : runs) longest = std::max(longest, run.page_end - run.page_begin);
    return longest;
  }

  static constexpr int32_t kUntouched = -7;
  ProgressiveParams params;
  std::vector<ProgressiveSequence> sequences;
  std::vector<ScanRun> runs;
  bool within_bound = true;
};

TEST(RunProgressiveTest, RefusesAWorkspaceBeyondItsIndices) {
  ProgressiveParams params;
  params.shape = {32, 8, 128};
  params.num_sequences = 512;
  params.max_sealed = kCudaMaxSealedPages;
  PlanProgressive(kNumSms, &params);
  ASSERT_GT(ProgressiveWorkspaceBytes(params), kMaxProgressiveWorkspace);
  const absl::Status status = RunProgressive(params, nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
}

TEST(PlanProgressiveTest, AnEarlyScanOfManyPagesLeavesRoomForTheTails) {
  const Scan one({510}), longer({2040}), four({510, 510, 510, 510});
  const Scan five({510, 510, 510, 510, 510});
  EXPECT_TRUE(one.params.early_scan);
  EXPECT_EQ(one.params.scan_ctas, 2 * kNumSms) << "in time for a page or two";
  EXPECT_EQ(longer.params.scan_ctas, 2 * kNumSms - 8);
  EXPECT_TRUE(four.params.early_scan);
  EXPECT_EQ(four.params.scan_ctas, 2 * kNumSms - 32);
  EXPECT_FALSE(five.params.early_scan) << "the tails would come behind the scan's reads";
  EXPECT_EQ(five.params.scan_ctas, 2 * kNumSms);
}

TEST(ScheduleScanTest, CoversEveryPageOnce) {
  for (const std::vector<int32_t>& sealed :
       std::vector<std::vector<int32_t>>{{1}, {510}, {126, 126, 126}, {510, 1, 30, 7}}) {
    const Scan scan(sealed);
    int32_t used = 0;
    for (size_t i = 0; i < sealed.size(); ++i) {
      EXPECT_EQ(scan.Covered(static_cast<int32_t>(i)), sealed[i]);
      used += scan.sequences[i].num_scan_runs;
    }
    for (size_t i = used; i < scan.runs.size(); ++i) EXPECT_EQ(scan.runs[i].sequence, -1);
  }
}

// Runs end with their sequences, so long ones hold fewer pages than they could: what is left must
// fit all the same.
TEST(ScheduleScanTest, StaysWithinItsBound) {
  std::mt19937 random(11);
  for (int32_t trial = 0; trial < 2000; ++trial) {
    const int32_t sms = 1 + static_cast<int32_t>(random() % kNumSms);
    std::vector<int32_t> sealed(1 + random() % 64);
    const int32_t most = 1 + static_cast<int32_t>(random() % 200);
    for (int32_t& pages : sealed) pages = most - static_cast<int32_t>(random() % most) / 8;
    const Scan scan(sealed, {32, 8, 128}, /*window=*/0, sms);
    ASSERT_TRUE(scan.within_bound) << trial;
    for (size_t i = 0; i < sealed.size(); ++i) {
      ASSERT_EQ(scan.Covered(static_cast<int32_t>(i)), sealed[i]) << trial;
    }
  }
  const Scan scan(std::vector<int32_t>(32, 127), {32, 8, 128}, 0, kNumSms / 2);
  EXPECT_TRUE(scan.within_bound);
}

TEST(ScheduleScanTest, SharesTheDeviceByPagesNotBySequences) {
  std::vector<int32_t> sealed(32, 30);
  sealed[5] = 510;
  const Scan scan(sealed);
  EXPECT_GE(scan.sequences[5].num_scan_runs, 85);  // a third of the pages, a third of 264 CTAs
  EXPECT_LE(scan.Longest(), 6);
}

TEST(ScheduleScanTest, DealsOutLessWhereCtasBeginLate) {
  const Scan few(std::vector<int32_t>(33, 400)), many(std::vector<int32_t>(34, 400));
  ASSERT_EQ(few.params.scan_ctas, 2 * kNumSms);
  ASSERT_EQ(many.params.scan_ctas, 2 * kNumSms);
  EXPECT_EQ(few.Longest(), 44);   // 264 tails: 7/8 of 13200 pages, over as many CTAs
  EXPECT_EQ(many.Longest(), 39);  // 272: 3/4 of 13600
}

TEST(ScheduleScanTest, GivesACtaWithFewHeadsWholeStages) {
  const Scan scan({500}, {4, 2, 128});  // four pages at a time
  EXPECT_EQ(scan.Covered(0), 500);
  EXPECT_EQ(scan.Longest() % 4, 0);
}

TEST(ScheduleScanTest, LeavesOutWhatNoRowSees) {
  const Scan scan({100}, {32, 8, 128}, /*window=*/640);
  EXPECT_EQ(scan.Covered(0, 91), 100);  // of 101 pages the last 640 tokens
}

TEST(PackStepTest, KeepsTheWindowWhenAShardLiesFarBehind) {
  Batch batch({6400}, PageFormat::kProgressive);
  batch.Seal(0, 98);
  batch.steps[0].q_start = int64_t{1} << 40;
  batch.steps[0].window = (int64_t{1} << 40) - 6000;
  const Packed packed(&batch);
  const auto sealed = packed.At<ProgressiveSequence>(packed.plan.layout().progressive, 0);
  EXPECT_GT(sealed.q_start, 6400);
  EXPECT_EQ(int64_t{sealed.q_start} - sealed.window, 6000);
}

TEST(CudaPlanTest, SplitsWorkAsTheTuningSays) {
  Batch exact({6400}), sealed({6400}, PageFormat::kProgressive);
  sealed.Seal(0, 98);
  const PlanKey exact_key = *MakePlanKey(exact.get()), sealed_key = *MakePlanKey(sealed.get());
  EXPECT_EQ(CudaPlan(exact_key, kNumSms).num_ctas(), 2 * kNumSms);
  EXPECT_EQ(CudaPlan(sealed_key, kNumSms).GroupParams(2).num_sms, kNumSms);
  CudaTuning tuning;
  tuning.exact_ctas_per_sm = 1;
  tuning.progressive_cta_percent = 50;
  const CudaPlan tuned(exact_key, kNumSms, tuning), plain(exact_key, kNumSms);
  EXPECT_EQ(tuned.num_ctas(), kNumSms);
  EXPECT_LT(tuned.max_items(), plain.max_items());
  EXPECT_LT(tuned.Needs(exact.get()).partial_out, plain.Needs(exact.get()).partial_out);
  EXPECT_EQ(CudaPlan(sealed_key, kNumSms, tuning).GroupParams(2).num_sms, kNumSms / 2);
  // The merge has room for the weights of so many parts.
  tuning.exact_ctas_per_sm = 8;
  EXPECT_EQ(CudaPlan(exact_key, kNumSms, tuning).num_ctas(), kMaxDecodeCtas);
}

TEST(CreateCudaBackendTest, NamesWhatIsMissing) {
  BackendOptions options;
  options.device = 1 << 20;
  const auto backend = CreateCudaBackend(options);
  ASSERT_FALSE(backend.ok());
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_FALSE(backend.status().message().empty());
}

}  // namespace
}  // namespace adaattn

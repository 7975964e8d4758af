#include "kernels/cuda/stage_stamps.h"

#include "absl/time/time.h"
#include "kernels/cuda/plan.h"

namespace adaattn {
namespace {

static_assert(kNumStamps == kFirstGroupStamp + kNumSealedGroups * kNumGroupStamps,
              "stamps for every depth of storage");

// Gives each stage the time until the next begins.
class StageClock {
 public:
  StageClock(const uint64_t* stamps, StageTimes* times) : stamps_(stamps), times_(times) {}

  void Begin(absl::Duration StageTimes::*stage, int32_t stamp) {
    if (stage_ != nullptr) End(stamp);
    stage_ = stage;
    begin_ = stamps_[stamp];
  }
  void End(int32_t stamp) {
    if (stamps_[stamp] > begin_) {
      times_->*stage_ += absl::Nanoseconds(static_cast<int64_t>(stamps_[stamp] - begin_));
    }
  }

 private:
  const uint64_t* const stamps_;
  StageTimes* const times_;
  absl::Duration StageTimes::*stage_ = nullptr;
  uint64_t begin_ = 0;
};

}  // namespace

StageTimes StagesFromStamps(const PlanKey& key, const uint64_t* stamps) {
  StageTimes times;
  StageClock clock(stamps, &times);
  clock.Begin(&StageTimes::append, kAppendStamp);
  if (key.exact_row_tiles > 0) clock.Begin(&StageTimes::attend, kAppendedStamp);
  for (int32_t i = 0; i < kNumSealedGroups; ++i) {
    if (key.sealed[i].num_sequences == 0) continue;
    const int32_t first = kFirstGroupStamp + i * kNumGroupStamps;
    clock.Begin(&StageTimes::scan, first + kPrepareStamp);
    if (key.sealed[i].theta) clock.Begin(&StageTimes::select, first + kThetaStamp);
    clock.Begin(&StageTimes::select, first + kSelectStamp);
    clock.Begin(&StageTimes::attend, first + kAttendStamp);
    clock.Begin(&StageTimes::merge, first + kMergeStamp);
  }
  if (key.bounded.num_sequences > 0) clock.Begin(&StageTimes::attend, kBoundedStamp);
  clock.Begin(&StageTimes::merge, kReturnStamp);
  clock.End(kReturnedStamp);
  return times;
}

}  // namespace adaattn

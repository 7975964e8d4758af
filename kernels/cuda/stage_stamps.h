#ifndef ADAATTN_KERNELS_CUDA_STAGE_STAMPS_H_
#define ADAATTN_KERNELS_CUDA_STAGE_STAMPS_H_

// Where a step's time goes, as the device sees it. The first CTA of a launch notes the global timer
// once its predecessor has ended: a store, no event between launches, which would keep them from
// overlapping. A stage lasts until the next one's note.

#include <cstdint>

#include "kernels/attention.h"

namespace adaattn {

struct PlanKey;

inline constexpr int32_t kNumGroupStamps = 5;
// Of one progressive launch: its kernels.
enum GroupStamp : int32_t {
  kPrepareStamp = 0,
  kThetaStamp = 1,
  kSelectStamp = 2,
  kAttendStamp = 3,
  kMergeStamp = 4
};
// Of a step.
enum StepStamp : int32_t {
  kAppendStamp = 0,
  kAppendedStamp = 1,  // the end of appending, where exact decode begins
  kBoundedStamp = 2,
  kReturnStamp = 3,
  kReturnedStamp = 4,
  kFirstGroupStamp = 5  // kNumGroupStamps for each depth of storage
};
inline constexpr int32_t kNumStamps = kFirstGroupStamp + 3 * kNumGroupStamps;

// The stages of a step of that plan from its stamps [kNumStamps], nanoseconds. Exact decode and
// bounded steps count as attend, the copy of results to the host as merge.
StageTimes StagesFromStamps(const PlanKey& key, const uint64_t* stamps);

#if defined(__CUDACC__)
__device__ __forceinline__ uint64_t GlobalTime() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// Notes the time at stamps[index], by the grid's first thread.
__device__ __forceinline__ void NoteTime(uint64_t* stamps, int32_t index) {
  if ((threadIdx.x | blockIdx.x | blockIdx.y | blockIdx.z) == 0) stamps[index] = GlobalTime();
}
#endif

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_STAGE_STAMPS_H_

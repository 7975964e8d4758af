#ifndef ADAATTN_KERNELS_CUDA_STEP_H_
#define ADAATTN_KERNELS_CUDA_STEP_H_

// One step: its packed block on the host, its kernels on a stream.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "kernels/attention.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/scratch.h"

namespace adaattn {

// The schedules that a block holds since a step was packed to it, and the pages they were made for.
// The layers of a model take the same step one after another, so the next step to be packed there
// often has no other.
struct PackedSchedules {
  struct Exact {
    PageRun pages;
    int32_t q_len = 0;
  };
  struct Sealed {
    PageRun pages;
    int32_t scan_begin = 0;
    int32_t num_scan_runs = 0;
  };
  const CudaPlan* plan = nullptr;
  std::vector<Exact> exact;    // by sequence
  std::vector<Sealed> sealed;  // group after group
};

// Writes the block of `batch` to `block` and returns its bytes. Its header has neither report nor
// ticket. `schedules` is what earlier calls left for this block, which nobody wrote to since; a new
// one for a new block. Requires: `plan` has the batch's key; `block`, aligned to 16, has room for
// plan.Needs(batch).block.
int64_t PackStep(const CudaPlan& plan, const AttendBatch& batch, std::byte* block,
                 PackedSchedules* schedules);

// What the progressive launch of one group of sealed sequences gets: shapes from the plan, data
// from the block in `scratch`. Requires: the plan's key has sequences in `group`.
ProgressiveParams SealedParams(const CudaPlan& plan, const Scratch& scratch, std::byte* pool,
                               int32_t group);

// Likewise of the bounded launch. Requires: the plan's key has bounded sequences.
BoundedParams BoundedStepParams(const CudaPlan& plan, const Scratch& scratch,
                                const PageMemory& memory);

// Enqueues the kernels of every step of `plan` whose block is packed at `source`, in pinned memory:
// all that changes between steps is in the block. kUnimplemented for sealed sequences of a shape
// without a kernel.
absl::Status EnqueueStep(const CudaPlan& plan, const Scratch& scratch, const PageMemory& memory,
                         const std::byte* source, int32_t num_sms, cudaStream_t stream);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_STEP_H_

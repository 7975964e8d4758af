#ifndef ADAATTN_KERNELS_CUDA_STEP_BUFFERS_H_
#define ADAATTN_KERNELS_CUDA_STEP_BUFFERS_H_

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/attention.h"

namespace adaattn {

// StepBuffers in pinned memory, which the kernels at the two ends of a step reach into.
absl::StatusOr<std::unique_ptr<StepBuffers>> CreatePinnedStepBuffers(const StepLimits& limits);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_STEP_BUFFERS_H_

#ifndef ADAATTN_KERNELS_CUDA_APPEND_H_
#define ADAATTN_KERNELS_CUDA_APPEND_H_

// The two ends of a step. Both kernels reach into pinned host memory, of the batch and of the
// step's block, by themselves: a step needs one graph launch and nothing else.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/step_params.h"

namespace adaattn {

// OK when the kernels of this build run on the current device; else what the runtime says.
cudaError_t ProbeKernelImage();

// Copies the block, which starts at params.header in pinned host memory, to `block` and q to the
// device, writes k and v to their pages in the page type, flags sequences with NaN or infinity, and
// clears `num_decisions` decisions.
absl::Status LaunchAppend(const StepParams& params, std::byte* block, int32_t num_decisions,
                          int32_t num_sms, cudaStream_t stream);

// Copies out, lse, decisions and flags to the host, clears the flags and reports the step. Of
// predicted errors, which the kernels between the two leave as mean squares, it takes the root.
absl::Status LaunchReturn(const StepParams& params, int32_t num_sms, cudaStream_t stream);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_APPEND_H_

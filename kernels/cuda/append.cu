#include "kernels/cuda/append.cuh"
#include "kernels/cuda/append.h"
#include "kernels/cuda/status.h"

namespace adaattn {

cudaError_t ProbeKernelImage() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, AppendKernel);
}

absl::Status LaunchAppend(const StepParams& params, std::byte* block, int32_t num_decisions,
                          int32_t num_sms, cudaStream_t stream) {
  AppendKernel<<<2 * num_sms, kAppendThreads, 0, stream>>>(params, block, num_decisions);
  return FromCuda(cudaGetLastError(), "AppendKernel");
}

absl::Status LaunchReturn(const StepParams& params, int32_t num_sms, cudaStream_t stream) {
  ReturnKernel<<<2 * num_sms, kAppendThreads, 0, stream>>>(params);
  return FromCuda(cudaGetLastError(), "ReturnKernel");
}

}  // namespace adaattn

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/cuda/status.h"
#include "tests/backend/poison_shared.h"

namespace adaattn {
namespace {

__global__ void PoisonKernel(int words) {
  extern __shared__ volatile uint32_t shared_words[];
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) {
    shared_words[i] = 0xffffffffu;
  }
}

}  // namespace

absl::Status PoisonSharedMemory() {
  int device = 0, multiprocessors = 0, bytes = 0;
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaFuncSetAttribute(PoisonKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  // A multiprocessor has room for one such CTA.
  PoisonKernel<<<multiprocessors, 1024, bytes>>>(bytes / 4);
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaGetLastError());
  return FromCuda(cudaDeviceSynchronize(), "PoisonSharedMemory");
}

}  // namespace adaattn

#include "kernels/cuda/status.h"
#include "loadtest/l2_flush.h"

namespace adaattn {
namespace {

// `never`: what the sum is not, which the compiler does not know: it has to read.
__global__ void ReadKernel(uint4* from, int64_t count, uint32_t never) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  uint32_t sum = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint4 x = from[i];
    sum += x.x ^ x.y ^ x.z ^ x.w;
  }
  if (sum == never) from->x = sum;
}

}  // namespace

absl::Status L2Flush::Allocate(FlushKind kind) {
  kind_ = kind;
  ADAATTN_RETURN_IF_ERROR(buffer_.Allocate(kBytes));
  return FromCuda(cudaMemset(buffer_.data(), 0, kBytes), "cudaMemset");
}

absl::Status L2Flush::Run(cudaStream_t stream) const {
  if (kind_ == FlushKind::kWritten) {
    return FromCuda(cudaMemsetAsync(buffer_.data(), 0, kBytes, stream), "cudaMemsetAsync");
  }
  constexpr uint32_t kNoSum = 1;  // of zeros
  ReadKernel<<<1024, 512, 0, stream>>>(reinterpret_cast<uint4*>(buffer_.data()), kBytes / 16,
                                       kNoSum);
  return FromCuda(cudaGetLastError(), "ReadKernel");
}

}  // namespace adaattn

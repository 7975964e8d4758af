#include "kernels/cuda/progressive_launch.cuh"

namespace adaattn {
absl::Status RunProgressiveD128(const ProgressiveArgs& args, cudaStream_t stream) {
  return RunProgressiveHeadDim<128>(args, stream);
}
}  // namespace adaattn

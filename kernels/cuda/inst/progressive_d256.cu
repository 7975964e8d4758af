#include "kernels/cuda/progressive_launch.cuh"

namespace adaattn {
absl::Status RunProgressiveD256(const ProgressiveArgs& args, cudaStream_t stream) {
  return RunProgressiveHeadDim<256>(args, stream);
}
}  // namespace adaattn

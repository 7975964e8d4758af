#include "kernels/cuda/progressive_launch.cuh"

namespace adaattn {
absl::Status RunProgressiveD96(const ProgressiveArgs& args, cudaStream_t stream) {
  return RunProgressiveHeadDim<96>(args, stream);
}
}  // namespace adaattn

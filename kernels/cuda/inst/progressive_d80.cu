#include "kernels/cuda/progressive_launch.cuh"

namespace adaattn {
absl::Status RunProgressiveD80(const ProgressiveArgs& args, cudaStream_t stream) {
  return RunProgressiveHeadDim<80>(args, stream);
}
}  // namespace adaattn

#include "kernels/cuda/progressive_launch.cuh"

namespace adaattn {
absl::Status RunProgressiveD64(const ProgressiveArgs& args, cudaStream_t stream) {
  return RunProgressiveHeadDim<64>(args, stream);
}
}  // namespace adaattn

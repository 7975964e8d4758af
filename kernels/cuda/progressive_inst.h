#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_INST_H_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_INST_H_

// The compiled variants of a progressive step, one head_dim a file under inst/. Each enqueues every
// kernel of the step on `stream`.

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

namespace adaattn {

struct ProgressiveArgs;

absl::Status RunProgressiveD64(const ProgressiveArgs& args, cudaStream_t stream);
absl::Status RunProgressiveD80(const ProgressiveArgs& args, cudaStream_t stream);
absl::Status RunProgressiveD96(const ProgressiveArgs& args, cudaStream_t stream);
absl::Status RunProgressiveD128(const ProgressiveArgs& args, cudaStream_t stream);
absl::Status RunProgressiveD256(const ProgressiveArgs& args, cudaStream_t stream);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_INST_H_

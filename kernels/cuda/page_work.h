#ifndef ADAATTN_KERNELS_CUDA_PAGE_WORK_H_
#define ADAATTN_KERNELS_CUDA_PAGE_WORK_H_

// Page work that the host does on copies of pages and bases: off the hot path.

#include <cuda_runtime_api.h>

#include <cstddef>

#include "absl/status/status.h"
#include "kernels/attention.h"
#include "kernels/cuda/device_buffer.h"
#include "kernels/cuda/page_memory.h"

namespace adaattn {

// The pages and the stream in whose order copies run. `staging` is working memory, kept for the
// next call.
struct PageMover {
  PageMemory memory;
  cudaStream_t stream = nullptr;
  PinnedBuffer* staging = nullptr;
};

// As Backend's calls of these names; each waits for the stream.
absl::Status FitBasisOnHost(const FitBasisTask& task, const PageMover& mover);
absl::Status LoadBasisToDevice(const LoadBasisTask& task, const PageMover& mover);
absl::Status ReadTokensToHost(const ReadTask& task, const PageMover& mover);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PAGE_WORK_H_

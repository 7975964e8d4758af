// Stands in for kernels/cuda/backend.cc in a build without CUDA.

#include "absl/status/status.h"
#include "kernels/attention.h"

namespace adaattn {

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const BackendOptions& /*options*/) {
  return absl::UnimplementedError("this build has no CUDA backend (ADAATTN_CUDA=OFF)");
}

}  // namespace adaattn

// Stands in for estimator_runner_cuda.cc in a build without CUDA.

#include "absl/status/status.h"
#include "loadtest/estimator_runner.h"

namespace adaattn {

absl::StatusOr<std::unique_ptr<EstimatorRunner>> MakeDeviceRunner() {
  return absl::UnimplementedError("this build has no CUDA backend (ADAATTN_CUDA=OFF)");
}

}  // namespace adaattn

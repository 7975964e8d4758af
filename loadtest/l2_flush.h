#ifndef ADAATTN_LOADTEST_L2_FLUSH_H_
#define ADAATTN_LOADTEST_L2_FLUSH_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/device_buffer.h"

namespace adaattn {

// What L2 is full of when a timed run begins.
enum class FlushKind {
  kWritten,  // lines that it has yet to write back, while the run reads
  kRead      // lines that it may drop
};

// Empties L2 of what a run will read. Allocate first.
class L2Flush {
 public:
  absl::Status Allocate(FlushKind kind);
  absl::Status Run(cudaStream_t stream) const;

 private:
  static constexpr int64_t kBytes = int64_t{256} << 20;  // five times the L2 of an H100

  FlushKind kind_ = FlushKind::kWritten;
  DeviceBuffer buffer_;
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_L2_FLUSH_H_

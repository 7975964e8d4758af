#ifndef ADAATTN_LOADTEST_DEVICE_TIMER_H_
#define ADAATTN_LOADTEST_DEVICE_TIMER_H_

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/status.h"
#include "loadtest/l2_flush.h"

namespace adaattn {

// A pair of events that keep time, unlike those of stream.h.
class DeviceTimer {
 public:
  DeviceTimer() = default;
  DeviceTimer(const DeviceTimer&) = delete;
  DeviceTimer& operator=(const DeviceTimer&) = delete;
  ~DeviceTimer() {
    if (start_ != nullptr) (void)cudaEventDestroy(start_);
    if (stop_ != nullptr) (void)cudaEventDestroy(stop_);
  }
  absl::Status Create() {
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaEventCreate(&start_));
    return FromCuda(cudaEventCreate(&stop_), "cudaEventCreate");
  }
  absl::Status Start(cudaStream_t stream) {
    return FromCuda(cudaEventRecord(start_, stream), "cudaEventRecord");
  }
  // Waits. Microseconds of the stream since Start.
  absl::StatusOr<double> Stop(cudaStream_t stream) {
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaEventRecord(stop_, stream));
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(stop_));
    float milliseconds = 0;
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return milliseconds * 1e3;
  }

 private:
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
};

// Microseconds of what `enqueue(stream)` enqueues, of each of `runs` runs after three more,
// ascending. L2 is flushed before each.
template <class Enqueue>
absl::StatusOr<std::vector<double>> TimeFlushed(cudaStream_t stream, int runs, const L2Flush& flush,
                                                const Enqueue& enqueue) {
  constexpr int kWarmUps = 3;
  DeviceTimer timer;
  ADAATTN_RETURN_IF_ERROR(timer.Create());
  std::vector<double> times;
  for (int i = -kWarmUps; i < runs; ++i) {
    ADAATTN_RETURN_IF_ERROR(flush.Run(stream));
    ADAATTN_RETURN_IF_ERROR(timer.Start(stream));
    ADAATTN_RETURN_IF_ERROR(enqueue(stream));
    ADAATTN_ASSIGN_OR_RETURN(const double microseconds, timer.Stop(stream));
    if (i >= 0) times.push_back(microseconds);
  }
  std::sort(times.begin(), times.end());
  return times;
}

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_DEVICE_TIMER_H_

#ifndef ADAATTN_KERNELS_CUDA_SCRATCH_H_
#define ADAATTN_KERNELS_CUDA_SCRATCH_H_

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/device_buffer.h"
#include "kernels/cuda/plan.h"

namespace adaattn {

// Device memory that steps share, one after the other on one stream. Grows when a plan needs more,
// at least by half, and never per step: captured graphs know its addresses.
class Scratch {
 public:
  bool Covers(const ScratchNeeds& needs) const;
  // Waits for `stream` and moves what is too small; every older generation's graphs are void.
  // kResourceExhausted when the device has no more; a later call may succeed.
  absl::Status Grow(const ScratchNeeds& needs, cudaStream_t stream);

  // Changes with every address.
  int64_t generation() const { return generation_; }

  std::byte* block() const { return block_.data(); }
  std::byte* q() const { return q_.data(); }
  std::byte* out() const { return out_.data(); }
  float* lse() const { return reinterpret_cast<float*>(lse_.data()); }
  HeadDecision* decisions() const { return reinterpret_cast<HeadDecision*>(decisions_.data()); }
  uint64_t* stamps() const { return reinterpret_cast<uint64_t*>(stamps_.data()); }
  uint32_t* flags() const { return reinterpret_cast<uint32_t*>(flags_.data()); }
  uint32_t* arrivals() const { return reinterpret_cast<uint32_t*>(arrivals_.data()); }
  float* partial_out() const { return reinterpret_cast<float*>(partial_out_.data()); }
  float2* partial_state() const { return reinterpret_cast<float2*>(partial_state_.data()); }
  int32_t* counters() const { return reinterpret_cast<int32_t*>(counters_.data()); }
  int32_t* rotated() const { return reinterpret_cast<int32_t*>(rotated_.data()); }
  std::byte* workspace() const { return workspace_.data(); }

 private:
  // One buffer and its need.
  struct Part {
    DeviceBuffer Scratch::*buffer;
    int64_t ScratchNeeds::*need;
    bool zero;  // the kernels leave it zero and expect it so
  };
  static const Part kParts[];

  int64_t generation_ = 0;
  DeviceBuffer block_, q_, out_, lse_, decisions_, flags_, arrivals_, stamps_;
  DeviceBuffer partial_out_, partial_state_, counters_, rotated_, workspace_;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_SCRATCH_H_

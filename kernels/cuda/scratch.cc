#include "kernels/cuda/scratch.h"

#include <algorithm>

#include "kernels/cuda/status.h"

namespace adaattn {

const Scratch::Part Scratch::kParts[] = {
    {&Scratch::block_, &ScratchNeeds::block, false},
    {&Scratch::q_, &ScratchNeeds::q, false},
    {&Scratch::out_, &ScratchNeeds::out, false},
    {&Scratch::lse_, &ScratchNeeds::lse, false},
    {&Scratch::decisions_, &ScratchNeeds::decisions, false},
    {&Scratch::flags_, &ScratchNeeds::flags, true},
    {&Scratch::arrivals_, &ScratchNeeds::arrivals, true},
    {&Scratch::stamps_, &ScratchNeeds::stamps, true},
    {&Scratch::partial_out_, &ScratchNeeds::partial_out, false},
    {&Scratch::partial_state_, &ScratchNeeds::partial_state, false},
    {&Scratch::counters_, &ScratchNeeds::counters, true},
    {&Scratch::rotated_, &ScratchNeeds::rotated, true},
    {&Scratch::workspace_, &ScratchNeeds::workspace, false},
};

bool Scratch::Covers(const ScratchNeeds& needs) const {
  return std::all_of(std::begin(kParts), std::end(kParts), [&](const Part& part) {
    return (this->*part.buffer).bytes() >= needs.*part.need;
  });
}

absl::Status Scratch::Grow(const ScratchNeeds& needs, cudaStream_t stream) {
  if (Covers(needs)) return absl::OkStatus();
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
  ++generation_;
  for (const Part& part : kParts) {
    DeviceBuffer& buffer = this->*part.buffer;
    const int64_t need = needs.*part.need;
    if (buffer.bytes() >= need) continue;
    constexpr int64_t kSmallest = 64 * 1024;
    const int64_t bytes = std::max({need, buffer.bytes() + buffer.bytes() / 2, kSmallest});
    const absl::Status status = buffer.Allocate(bytes);
    if (!status.ok()) {
      return absl::Status(status.code(), absl::StrCat("scratch of the cuda backend, ", bytes,
                                                      " bytes: ", status.message()));
    }
    if (part.zero) {
      ADAATTN_RETURN_IF_CUDA_ERROR(
          cudaMemsetAsync(buffer.data(), 0, static_cast<size_t>(bytes), stream));
    }
  }
  return absl::OkStatus();
}

}  // namespace adaattn

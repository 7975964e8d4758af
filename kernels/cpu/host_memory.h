#ifndef ADAATTN_KERNELS_CPU_HOST_MEMORY_H_
#define ADAATTN_KERNELS_CPU_HOST_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/attention.h"

namespace adaattn {

// One anonymous mapping, zeroed by the kernel on first touch. Movable; unmapped on destruction.
class HostMemory {
 public:
  // kResourceExhausted, naming the size, when the address space or memory limit refuses it.
  static absl::StatusOr<HostMemory> Map(int64_t bytes);

  HostMemory() = default;
  HostMemory(HostMemory&& other) noexcept;
  HostMemory& operator=(HostMemory&& other) noexcept;
  ~HostMemory();

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

// StepBuffers in plain host memory, each tensor aligned to a cache line.
absl::StatusOr<std::unique_ptr<StepBuffers>> CreateHostStepBuffers(const StepLimits& limits);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_HOST_MEMORY_H_

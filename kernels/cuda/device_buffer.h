#ifndef ADAATTN_KERNELS_CUDA_DEVICE_BUFFER_H_
#define ADAATTN_KERNELS_CUDA_DEVICE_BUFFER_H_

// Owners of memory that the runtime hands out. Movable; destructors accept an unloading runtime.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "kernels/cuda/status.h"

namespace adaattn {

// Device memory.
struct DeviceMemory {
  static cudaError_t Allocate(void** data, size_t bytes) { return cudaMalloc(data, bytes); }
  static void Free(void* data) { (void)cudaFree(data); }
};
// Page-locked host memory, which the device reads and writes at the same address.
struct PinnedMemory {
  static cudaError_t Allocate(void** data, size_t bytes) {
    return cudaHostAlloc(data, bytes, cudaHostAllocMapped | cudaHostAllocPortable);
  }
  static void Free(void* data) { (void)cudaFreeHost(data); }
};

template <class Memory>
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) Memory::Free(data_);
  }

  // Replaces the memory by `bytes` new ones, whose contents are undefined. The old ones must be out
  // of use. On error the buffer is empty.
  absl::Status Allocate(int64_t bytes) {
    if (data_ != nullptr) Memory::Free(data_);
    bytes_ = 0;
    data_ = nullptr;
    void* data = nullptr;
    ADAATTN_RETURN_IF_CUDA_ERROR(Memory::Allocate(&data, static_cast<size_t>(bytes)));
    data_ = static_cast<std::byte*>(data);
    bytes_ = bytes;
    return absl::OkStatus();
  }

  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

using DeviceBuffer = Buffer<DeviceMemory>;
using PinnedBuffer = Buffer<PinnedMemory>;

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_DEVICE_BUFFER_H_

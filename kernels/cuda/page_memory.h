#ifndef ADAATTN_KERNELS_CUDA_PAGE_MEMORY_H_
#define ADAATTN_KERNELS_CUDA_PAGE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <limits>

#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"

namespace adaattn {

// Where pages lie: the pool in device memory and, behind it in the space of page ids, the exact
// tier in pinned host memory, which the device reads at the address that the host has for it. Bases
// and sealed pages always lie in the pool.
struct PageMemory {
  std::byte* pool = nullptr;
  std::byte* tier = nullptr;
  int64_t pool_bytes = std::numeric_limits<int64_t>::max();  // where the tier begins

  ADAATTN_HD std::byte* At(PageId page) const {
    const int64_t offset = PageOffset(page);
    return offset < pool_bytes ? pool + offset : tier + (offset - pool_bytes);
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PAGE_MEMORY_H_

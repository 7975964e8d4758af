#ifndef ADAATTN_KERNELS_CPU_ARENA_H_
#define ADAATTN_KERNELS_CPU_ARENA_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "hwy/aligned_allocator.h"

namespace adaattn {

// Working memory of one step: handed out in pieces, taken back all at once, kept for the next step.
// Not thread-safe.
class Arena {
 public:
  // `count` objects, uninitialised, aligned for any vector. Valid until Reset.
  template <class T>
  T* Get(int64_t count) {
    static_assert(std::is_trivially_destructible<T>::value, "nobody destroys them");
    const int64_t bytes =
        (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].bytes) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const int64_t size = std::max(bytes, kBlockBytes);
      blocks_.push_back({hwy::AllocateAligned<std::byte>(static_cast<size_t>(size)), size});
    }
    std::byte* at = blocks_[block_].data.get() + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(at);
  }

  // Likewise, all bytes zero.
  template <class T>
  T* GetZeroed(int64_t count) {
    T* at = Get<T>(count);
    std::fill_n(reinterpret_cast<std::byte*>(at), count * static_cast<int64_t>(sizeof(T)),
                std::byte{0});
    return at;
  }

  void Reset() {
    block_ = 0;
    used_ = 0;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kBlockBytes = int64_t{4} << 20;

  struct Block {
    hwy::AlignedFreeUniquePtr<std::byte[]> data;
    int64_t bytes = 0;
  };
  std::vector<Block> blocks_;
  size_t block_ = 0;
  int64_t used_ = 0;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_ARENA_H_

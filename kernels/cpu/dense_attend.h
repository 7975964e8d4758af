#ifndef ADAATTN_KERNELS_CPU_DENSE_ATTEND_H_
#define ADAATTN_KERNELS_CPU_DENSE_ATTEND_H_

// Exact attention of the q heads of one kv head over a run of dense pages.

#include <cstddef>
#include <cstdint>

#include "hwy/aligned_allocator.h"
#include "kernels/format/page_layout.h"
#include "kernels/shape.h"

namespace adaattn {

// Cache positions [begin, end) that a row sees.
struct KeyRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// The softmax state of some rows over some of the keys, without a global maximum:
//   p[t] = exp(s[t] - max);  sum = sum_t p[t];  moment = sum_t p[t] s[t];  acc = sum_t p[t] v[t]
// No key seen: max -inf, the rest 0.
struct PartialRows {
  float* max = nullptr;     // [rows]
  float* sum = nullptr;     // [rows]
  float* moment = nullptr;  // [rows]; null: not wanted
  float* acc = nullptr;     // [rows, head_dim]
};

// One split's work. Keys [begin, end) of the sequence lie in its dense pages.
struct DenseWork {
  const std::byte* pool = nullptr;
  const PageId* pages = nullptr;  // the sequence's table, indexed by cache position / 64
  int64_t key_offset = 0;         // of the kv head, from the start of a page
  int64_t value_offset = 0;
  DType type = DType::kBf16;
  int32_t head_dim = 0;
  int32_t rows = 0;
  int32_t rows_per_range = 1;  // row r sees ranges[r / rows_per_range]: the q heads of a group
  const KeyRange* ranges = nullptr;
  const float* q = nullptr;  // [rows, head_dim]
  float score_scale = 0;     // softmax scale times the key scale
  float softcap = 0;
  int64_t begin = 0;
  int64_t end = 0;
};

// Working memory of one thread, grown as needed.
class DenseScratch {
 public:
  // Returns q [rows, head_dim] followed by scores [rows, 64], aligned for vectors.
  float* Get(int64_t floats) {
    if (floats > size_) {
      data_ = hwy::AllocateAligned<float>(static_cast<size_t>(floats));
      size_ = floats;
    }
    return data_.get();
  }

 private:
  hwy::AlignedFreeUniquePtr<float[]> data_;
  int64_t size_ = 0;
};

// Overwrites `out`; returns the bytes of keys that it loaded, which are those of values too. For
// FP8 pages acc is 2^-8 of its value; see DenseValueFactor.
int64_t AttendDense(const DenseWork& work, DenseScratch* scratch, const PartialRows& out);

// What AttendDense's acc must be multiplied by, besides the page's own value scale.
inline float DenseValueFactor(DType type) { return type == DType::kF8E4m3 ? 256.0f : 1.0f; }

// The instruction set that the kernels run with here.
const char* CpuKernelTarget();

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_DENSE_ATTEND_H_

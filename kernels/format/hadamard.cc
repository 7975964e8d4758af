#include "kernels/format/hadamard.h"

#include <cmath>

namespace adaattn {
namespace {

template <typename T>
void RotateBlock(T* block, int32_t size) {
  for (int32_t half = 1; half < size; half *= 2) {
    for (int32_t start = 0; start < size; start += 2 * half) {
      for (int32_t i = start; i < start + half; ++i) {
        const T a = block[i], b = block[i + half];
        block[i] = a + b;
        block[i + half] = a - b;
      }
    }
  }
  const auto norm = static_cast<T>(1.0 / std::sqrt(static_cast<double>(size)));
  for (int32_t i = 0; i < size; ++i) block[i] *= norm;
}

template <typename T>
void Rotate(T* vector, int32_t head_dim) {
  const int32_t block = HadamardBlock(head_dim);
  RotateBlock(vector, block);
  if (block < head_dim) Rotate(vector + block, head_dim - block);
}

}  // namespace

void RotateHadamard(float* vector, int32_t head_dim) { Rotate(vector, head_dim); }
void RotateHadamard(double* vector, int32_t head_dim) { Rotate(vector, head_dim); }

}  // namespace adaattn

#include "kernels/format/hadamard.h"

#include <cmath>

namespace adaattn {
namespace {

// The butterflies of distance 1, 2 and 4 of eight neighbours: as loops they would be all overhead.
template <typename T>
void RotateEight(T* x) {
  const T a0 = x[0] + x[1], a1 = x[0] - x[1], a2 = x[2] + x[3], a3 = x[2] - x[3];
  const T a4 = x[4] + x[5], a5 = x[4] - x[5], a6 = x[6] + x[7], a7 = x[6] - x[7];
  const T b0 = a0 + a2, b1 = a1 + a3, b2 = a0 - a2, b3 = a1 - a3;
  const T b4 = a4 + a6, b5 = a5 + a7, b6 = a4 - a6, b7 = a5 - a7;
  x[0] = b0 + b4;
  x[1] = b1 + b5;
  x[2] = b2 + b6;
  x[3] = b3 + b7;
  x[4] = b0 - b4;
  x[5] = b1 - b5;
  x[6] = b2 - b6;
  x[7] = b3 - b7;
}

template <typename T>
void RotateBlock(T* block, int32_t size) {
  int32_t first = 1;
  if (size % 8 == 0) {
    for (int32_t start = 0; start < size; start += 8) RotateEight(block + start);
    first = 8;
  }
  for (int32_t half = first; half < size; half *= 2) {
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

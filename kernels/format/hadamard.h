#ifndef ADAATTN_KERNELS_FORMAT_HADAMARD_H_
#define ADAATTN_KERNELS_FORMAT_HADAMARD_H_

#include <cstdint>

namespace adaattn {

// Rotates one vector of head_dim channels in place by the orthonormal block Hadamard matrix: whole
// for powers of two, blocks of 64 + 16 for 80 and 64 + 32 for 96. Symmetric, hence its own inverse.
//
// Requires: head_dim is a sum of a multiple of 64 and at most one smaller power of two (80, 96), or
// a power of two. Arithmetic: float butterflies of distance 1, 2, 4, ... in this order, then one
// multiplication by the rounded 1 / sqrt(block).
void RotateHadamard(float* vector, int32_t head_dim);
// The same in double precision, for references.
void RotateHadamard(double* vector, int32_t head_dim);

// Channels of the first block of RotateHadamard: head_dim where that is a power of two, else 64.
constexpr int32_t HadamardBlock(int32_t head_dim) {
  return (head_dim & (head_dim - 1)) == 0 ? head_dim : 64;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_FORMAT_HADAMARD_H_

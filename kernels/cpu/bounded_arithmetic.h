#ifndef ADAATTN_KERNELS_CPU_BOUNDED_ARITHMETIC_H_
#define ADAATTN_KERNELS_CPU_BOUNDED_ARITHMETIC_H_

// How far the CPU kernels' own arithmetic can be off; worst cases, for bounds.

namespace adaattn {

// n products summed in FP32 are off by at most n times this times the sum of their magnitudes.
inline constexpr double kUnit = 0x1p-24;
// Products q r and p r are rounded to 16 bits of the largest of them: half a step each, and the
// arithmetic around it.
inline constexpr double kHalfStep = 0.51 / 32767;
// Nats: exp, the subtraction of the maximum, the rescaling and the sums of a page.
inline constexpr double kSoftmaxError = 2e-5;
// Of the cap.
inline constexpr double kSoftcapError = 1e-6;
// Hadamard rotations in FP32, when sealing and after attending, relative to a vector's norm.
inline constexpr double kFrameError = 1e-6;

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_BOUNDED_ARITHMETIC_H_

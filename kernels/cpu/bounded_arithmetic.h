#ifndef ADAATTN_KERNELS_CPU_BOUNDED_ARITHMETIC_H_
#define ADAATTN_KERNELS_CPU_BOUNDED_ARITHMETIC_H_

// How far the CPU kernels' own arithmetic can be off beyond policy/bound_terms.h; worst cases.

namespace adaattn {

// Products q r and p r are rounded to 16 bits of the largest of them: half a step each, and the
// arithmetic around it.
inline constexpr double kHalfStep = 0.51 / 32767;

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_BOUNDED_ARITHMETIC_H_

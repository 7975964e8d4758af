#ifndef ADAATTN_KERNELS_CPU_CONVERT_H_
#define ADAATTN_KERNELS_CPU_CONVERT_H_

// Element type conversions, vectorised. Rounding as in format/float_types.h, but values too large
// for the target saturate: a finite input stays finite. Arrays need no alignment.

#include <cstdint>

#include "kernels/format/float_types.h"

namespace adaattn {

// Widens `count` elements of `type`; false unless all of them lie within [-most, most]: by default,
// if any of them is NaN or infinite. count is a multiple of 16.
bool ToFloats(DType type, const void* in, int64_t count, float* out, float most = kFloatMax);

// Narrows `count` floats times `factor` to `type`. count is a multiple of 16.
void FromFloats(DType type, const float* in, float factor, int64_t count, void* out);

// acc[i] += factor * in[i]. count is a multiple of 16.
void AddScaled(const float* in, float factor, int64_t count, float* acc);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_CONVERT_H_

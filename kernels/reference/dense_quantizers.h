#ifndef ADAATTN_KERNELS_REFERENCE_DENSE_QUANTIZERS_H_
#define ADAATTN_KERNELS_REFERENCE_DENSE_QUANTIZERS_H_

#include <cstdint>

#include "absl/types/span.h"

namespace adaattn {

// The plain caches that people use today, for comparison: each function replaces values by what
// such a cache would give back. All take the tokens of one kv head, [n, head_dim].

// Values that share one scale: a token of one kv head, or all tokens of one kv head.
enum class ScaleSharing : uint8_t { kToken = 0, kHead = 1 };

// The scale with which e4m3 just holds the largest magnitude of `values`: max / 448; 1 for zeros.
float Fp8Scale(absl::Span<const float> values);

// value -> scale * e4m3(value / scale), saturating. scale 1 is the common practice; Fp8Scale per
// head the better one.
void RoundTripFp8(absl::Span<float> values, float scale);

// value -> scale * round(value / scale), symmetric, `bits` 8 or 4: levels -127..127 or -7..7, ties
// to even. The scale is max / levels, rounded up to FP16 as it would be stored.
void RoundTripInt(absl::Span<float> values, int32_t head_dim, int32_t bits, ScaleSharing sharing);

// Bytes that one token of one kv head takes, K and V together, at `bits` per value plus an FP16
// scale for K and one for V where tokens have their own.
constexpr int64_t DenseQuantizedTokenBytes(int32_t head_dim, int32_t bits, ScaleSharing sharing) {
  return 2 * (int64_t{head_dim} * bits / 8 + (sharing == ScaleSharing::kToken ? 2 : 0));
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_REFERENCE_DENSE_QUANTIZERS_H_

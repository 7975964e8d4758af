#include "kernels/reference/dense_quantizers.h"

#include <algorithm>
#include <cmath>

#include "kernels/format/float_types.h"

namespace adaattn {
namespace {

float MaxMagnitude(absl::Span<const float> values) {
  float largest = 0.0f;
  for (const float value : values) largest = std::max(largest, std::abs(value));
  return largest;
}

// The smallest FP16 number that is not below `value` (>= 0).
float RoundUpToFp16(float value) {
  Fp16 rounded = ToFp16(value);
  if (ToFloat(rounded) < value) ++rounded.bits;
  return ToFloat(rounded);
}

void RoundTripWithOneScale(absl::Span<float> values, int32_t bits) {
  const auto levels = static_cast<float>((1 << (bits - 1)) - 1);
  const float scale = RoundUpToFp16(MaxMagnitude(values) / levels);
  if (scale == 0.0f) return;
  for (float& value : values) {
    value = scale * std::clamp(std::nearbyint(value / scale), -levels, levels);
  }
}

}  // namespace

float Fp8Scale(absl::Span<const float> values) {
  const float largest = MaxMagnitude(values);
  return largest > 0.0f ? largest / kFp8E4m3Max : 1.0f;
}

void RoundTripFp8(absl::Span<float> values, float scale) {
  for (float& value : values) value = scale * ToFloat(ToFp8E4m3(value / scale));
}

void RoundTripInt(absl::Span<float> values, int32_t head_dim, int32_t bits, ScaleSharing sharing) {
  if (sharing == ScaleSharing::kHead) {
    RoundTripWithOneScale(values, bits);
    return;
  }
  const auto width = static_cast<size_t>(head_dim);
  for (size_t start = 0; start < values.size(); start += width) {
    RoundTripWithOneScale(values.subspan(start, width), bits);
  }
}

}  // namespace adaattn

#ifndef ADAATTN_KERNELS_FORMAT_NESTED_CODE_H_
#define ADAATTN_KERNELS_FORMAT_NESTED_CODE_H_

// The nested 8-bit code: every prefix of its bits is itself a quantiser of the same range.
//
//   code = clamp(floor((x / r + 1) * 128), 0, 255)
//   x_b  = (((code >> (8 - b)) + 0.5) / 2^(b-1) - 1) * r       |x - x_b| <= r / 2^b for |x| <= r
//
// r, the range, is the absolute maximum of the values that share it, rounded up to a quarter octave
// and stored as one byte. All of it is integer work or a single rounding, so that host and device
// produce the same bits (as long as neither divides approximately).

#include <cstdint>

#include "kernels/format/float_types.h"
#include "kernels/host_device.h"

namespace adaattn {

// Byte e stands for the range 2^((e - kRangeOffset) / 4): 2^-40 (9e-13) to 2^23.75 (1.4e7). The top
// leaves room for 256 channels of 65504 summed by the Hadamard transform.
inline constexpr int32_t kRangeOffset = 160;

namespace internal {
// Float mantissa bits of 2^(quarter / 4), quarter in [0, 3], rounded to nearest.
ADAATTN_HD constexpr uint32_t QuarterOctaveMantissa(int32_t quarter) {
  return quarter == 0 ? 0u : quarter == 1 ? 0x1837f0u : quarter == 2 ? 0x3504f3u : 0x5744fdu;
}
}  // namespace internal

// The range that scale byte `scale` stands for. Exact: no table, no library function.
ADAATTN_HD float RangeFromScale(uint8_t scale) {
  const int32_t quarters = static_cast<int32_t>(scale);  // the offset is whole octaves
  const uint32_t exponent = static_cast<uint32_t>(quarters / 4 - kRangeOffset / 4 + 127);
  return FloatFromBits((exponent << 23) | internal::QuarterOctaveMantissa(quarters % 4));
}

// The smallest scale byte whose range is >= `max_abs` (>= 0). Zero and anything below the smallest
// range give 0; anything above the largest range, infinity and NaN give 255.
ADAATTN_HD uint8_t ScaleFromMax(float max_abs) {
  const uint32_t bits = FloatBits(max_abs) & 0x7fffffffu;
  const uint32_t mantissa = bits & 0x7fffffu;
  int32_t quarters = (static_cast<int32_t>(bits >> 23) - 127) * 4 + kRangeOffset;
  for (int32_t quarter = 0; quarter < 4; ++quarter) {
    quarters += mantissa > internal::QuarterOctaveMantissa(quarter) ? 1 : 0;
  }
  return static_cast<uint8_t>(quarters < 0 ? 0 : quarters > 255 ? 255 : quarters);
}

// The code of `value` in `range`. Values outside clamp to the ends; NaN gives 0.
ADAATTN_HD uint8_t EncodeNested(float value, float range) {
  const float position = (value / range + 1.0f) * 128.0f;
  if (!(position > 0.0f)) return 0;
  return position < 255.0f ? static_cast<uint8_t>(position) : uint8_t{255};
}

// The value of the first `bits` bits of a code, `prefix` = code >> (8 - bits). bits is in [1, 8].
ADAATTN_HD float DecodeNested(uint32_t prefix, int32_t bits, float range) {
  const float step = 2.0f / static_cast<float>(1 << bits);
  return ((static_cast<float>(prefix) + 0.5f) * step - 1.0f) * range;
}

// Expected square of x - x_b over one cell of b bits, (r 2^(1-b))^2 / 12: values spread evenly
// inside a cell.
ADAATTN_HD constexpr float CodeVariance(float range, int32_t bits) {
  const float step = 2.0f / static_cast<float>(1 << bits) * range;
  return step * step / 12.0f;
}

// Expected square of a value that is not read at all and counts as 0. r^2 / 6 is half of an even
// spread over the range: maxima exceed the rest of their channel.
ADAATTN_HD constexpr float UnreadVariance(float range) { return range * range / 6.0f; }

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_FORMAT_NESTED_CODE_H_

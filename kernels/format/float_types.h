#ifndef ADAATTN_KERNELS_FORMAT_FLOAT_TYPES_H_
#define ADAATTN_KERNELS_FORMAT_FLOAT_TYPES_H_

// The narrow element types, converted bit by bit so that host and device agree exactly. Rounding is
// to nearest, ties to even; NaN stays NaN with its sign; subnormals are kept.

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/host_device.h"
#include "kernels/shape.h"

namespace adaattn {

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
// OCP e4m3 ("fn"): no infinity, largest 448, NaN is 0x7f and 0xff.
struct Fp8E4m3 {
  uint8_t bits;
};
inline constexpr float kFp8E4m3Max = 448.0f;
inline constexpr float kFp16Max = 65504.0f;
inline constexpr float kFloatMax = 0x1.fffffep127f;

// The largest magnitude of k and v that pages of `type` accept. FP8 has scales and saturates.
ADAATTN_HD constexpr float LargestStored(DType type) {
  return type == DType::kF16 ? kFp16Max : kFloatMax;
}

ADAATTN_HD uint32_t FloatBits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}
ADAATTN_HD float FloatFromBits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
ADAATTN_HD bool IsFiniteFloat(float value) {
  return (FloatBits(value) & 0x7f800000u) != 0x7f800000u;
}

namespace internal {
// `mantissa` >> `shift`, to nearest, ties to even. shift is in [1, 31].
ADAATTN_HD uint32_t RoundShift(uint32_t mantissa, int32_t shift) {
  const uint32_t half = 1u << (shift - 1);
  const uint32_t rest = mantissa & ((1u << shift) - 1);
  const uint32_t quotient = mantissa >> shift;
  return quotient + (rest > half || (rest == half && (quotient & 1u) != 0) ? 1u : 0u);
}
}  // namespace internal

ADAATTN_HD float ToFloat(Bf16 value) {
  return FloatFromBits(static_cast<uint32_t>(value.bits) << 16);
}

ADAATTN_HD Bf16 ToBf16(float value) {
  const uint32_t x = FloatBits(value);
  if ((x & 0x7fffffffu) > 0x7f800000u) return Bf16{static_cast<uint16_t>((x >> 16) | 0x40u)};
  return Bf16{static_cast<uint16_t>((x + 0x7fffu + ((x >> 16) & 1u)) >> 16)};
}

ADAATTN_HD float ToFloat(Fp16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return FloatFromBits(sign | FloatBits(magnitude));
  }
  if (exponent == 31) return FloatFromBits(sign | 0x7f800000u | (mantissa << 13));
  return FloatFromBits(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

// Values that round past 65504 become infinite.
ADAATTN_HD Fp16 ToFp16(float value) {
  const uint32_t bits = FloatBits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t x = bits & 0x7fffffffu;
  uint32_t out = 0;
  if (x > 0x7f800000u) {
    out = 0x7e00u;
  } else if (x >= 0x477ff000u) {  // 65520: halfway between the largest value and the next step
    out = 0x7c00u;
  } else if (x >= 0x38800000u) {  // 2^-14: normal
    out = (x + 0xfffu + ((x >> 13) & 1u) - 0x38000000u) >> 13;
  } else if (x > 0x33000000u) {  // above 2^-25, which ties to zero
    out = internal::RoundShift((x & 0x7fffffu) | 0x800000u, 126 - static_cast<int32_t>(x >> 23));
  }
  return Fp16{static_cast<uint16_t>(sign | out)};
}

ADAATTN_HD float ToFloat(Fp8E4m3 value) {
  const uint32_t sign = (value.bits & 0x80u) << 24;
  const uint32_t exponent = (value.bits >> 3) & 0xfu;
  const uint32_t mantissa = value.bits & 7u;
  if (exponent == 15 && mantissa == 7) return FloatFromBits(sign | 0x7fc00000u);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
    return FloatFromBits(sign | FloatBits(magnitude));
  }
  return FloatFromBits(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}

// Saturates: anything above 448, infinity too, becomes 448 with its sign.
ADAATTN_HD Fp8E4m3 ToFp8E4m3(float value) {
  const uint32_t bits = FloatBits(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t x = bits & 0x7fffffffu;
  uint32_t out = 0;
  if (x > 0x7f800000u) {
    out = 0x7fu;
  } else if (x >= 0x43e00000u) {  // 448
    out = 0x7eu;
  } else if (x >= 0x3c800000u) {  // 2^-6: normal
    out = (x + 0x7ffffu + ((x >> 20) & 1u) - 0x3c000000u) >> 20;
  } else if (x > 0x3a800000u) {  // above 2^-10, which ties to zero
    out = internal::RoundShift((x & 0x7fffffu) | 0x800000u, 141 - static_cast<int32_t>(x >> 23));
  }
  return Fp8E4m3{static_cast<uint8_t>(sign | out)};
}

// Element `index` of a little-endian array of `type` at `data`, which needs no alignment.
ADAATTN_HD float ReadElement(const void* data, DType type, int64_t index) {
  const char* at = static_cast<const char*>(data) + index * DTypeBytes(type);
  if (type == DType::kF32) {
    float value;
    memcpy(&value, at, sizeof(value));
    return value;
  }
  if (type == DType::kF8E4m3) return ToFloat(Fp8E4m3{static_cast<uint8_t>(*at)});
  uint16_t bits;
  memcpy(&bits, at, sizeof(bits));
  return type == DType::kF16 ? ToFloat(Fp16{bits}) : ToFloat(Bf16{bits});
}

// Stores `value` as element `index`; the counterpart of ReadElement.
ADAATTN_HD void WriteElement(void* data, DType type, int64_t index, float value) {
  char* at = static_cast<char*>(data) + index * DTypeBytes(type);
  if (type == DType::kF32) {
    memcpy(at, &value, sizeof(value));
  } else if (type == DType::kF8E4m3) {
    *at = static_cast<char>(ToFp8E4m3(value).bits);
  } else {
    const uint16_t bits = type == DType::kF16 ? ToFp16(value).bits : ToBf16(value).bits;
    memcpy(at, &bits, sizeof(bits));
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_FORMAT_FLOAT_TYPES_H_

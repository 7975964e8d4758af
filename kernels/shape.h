#ifndef ADAATTN_KERNELS_SHAPE_H_
#define ADAATTN_KERNELS_SHAPE_H_

#include <cstdint>
#include <string>

#include "kernels/host_device.h"

namespace adaattn {

// Tokens of one page. The format, the kernels and the wire contract all assume this number.
inline constexpr int32_t kPageTokens = 64;

// Element types of tensors in host memory and on the wire, little endian.
enum class DType : uint8_t { kF32 = 0, kF16 = 1, kBf16 = 2, kF8E4m3 = 3 };

// How a session keeps its pages. Dense formats store every token as it arrives. Progressive ones
// keep the newest pages dense, in BF16 (kProgressive) or FP16 (kProgressiveF16), and seal older
// ones into nested 8-bit codes (kernels/format), which do not show where they came from.
enum class PageFormat : uint8_t {
  kF32 = 0,
  kF16 = 1,
  kBf16 = 2,
  kF8E4m3 = 3,
  kProgressive = 4,
  kProgressiveF16 = 5,
};

ADAATTN_HD constexpr int32_t DTypeBytes(DType type) {
  return type == DType::kF32 ? 4 : type == DType::kF8E4m3 ? 1 : 2;
}

ADAATTN_HD constexpr bool IsProgressive(PageFormat format) {
  return format == PageFormat::kProgressive || format == PageFormat::kProgressiveF16;
}

// The element type in which `format` stores tokens that are not sealed.
ADAATTN_HD constexpr DType DenseDType(PageFormat format) {
  return format == PageFormat::kProgressive      ? DType::kBf16
         : format == PageFormat::kProgressiveF16 ? DType::kF16
                                                 : static_cast<DType>(format);
}

// The dense format of those tokens: what an exact tier is attended as.
ADAATTN_HD constexpr PageFormat DenseFormat(PageFormat format) {
  return static_cast<PageFormat>(DenseDType(format));
}

// The shape of one attention layer. group_size = num_q_heads / num_kv_heads, exact.
struct AttentionShape {
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;

  ADAATTN_HD constexpr int32_t group_size() const { return num_q_heads / num_kv_heads; }
  std::string DebugString() const;

  friend constexpr bool operator==(const AttentionShape& a, const AttentionShape& b) {
    return a.num_q_heads == b.num_q_heads && a.num_kv_heads == b.num_kv_heads &&
           a.head_dim == b.head_dim;
  }
};

// "fp32", "fp16", "bf16", "fp8_e4m3": the spelling used in flags, JSON and metrics.
const char* DTypeName(DType type);
// The same, and "progressive" (BF16 open pages), "progressive_fp16".
const char* PageFormatName(PageFormat format);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_SHAPE_H_

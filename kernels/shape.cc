#include "kernels/shape.h"

#include "absl/strings/str_cat.h"

namespace adaattn {

std::string AttentionShape::DebugString() const {
  return absl::StrCat("q_heads=", num_q_heads, " kv_heads=", num_kv_heads, " head_dim=", head_dim);
}

const char* DTypeName(DType type) {
  switch (type) {
    case DType::kF32:
      return "fp32";
    case DType::kF16:
      return "fp16";
    case DType::kBf16:
      return "bf16";
    case DType::kF8E4m3:
      return "fp8_e4m3";
  }
  return "unknown";
}

const char* PageFormatName(PageFormat format) {
  if (!IsProgressive(format)) return DTypeName(static_cast<DType>(format));
  return format == PageFormat::kProgressive ? "progressive" : "progressive_fp16";
}

}  // namespace adaattn

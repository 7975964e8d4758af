#include "kernels/cuda/kernel_table.h"

#include "kernels/cuda/decode_fp32.h"

namespace adaattn {
namespace {

constexpr DecodeKernel kDecodeKernels[] = {
    {DType::kF32, /*head_dim=*/64, &DecodeFp32D64},
    {DType::kF32, /*head_dim=*/80, &DecodeFp32D80},
    {DType::kF32, /*head_dim=*/96, &DecodeFp32D96},
    {DType::kF32, /*head_dim=*/128, &DecodeFp32D128},
    {DType::kF32, /*head_dim=*/256, &DecodeFp32D256},
    {DType::kF16, /*head_dim=*/64, &DecodeFp16D64},
    {DType::kF16, /*head_dim=*/80, &DecodeFp16D80},
    {DType::kF16, /*head_dim=*/96, &DecodeFp16D96},
    {DType::kF16, /*head_dim=*/128, &DecodeFp16D128},
    {DType::kF16, /*head_dim=*/256, &DecodeFp16D256},
    {DType::kBf16, /*head_dim=*/64, &DecodeBf16D64},
    {DType::kBf16, /*head_dim=*/80, &DecodeBf16D80},
    {DType::kBf16, /*head_dim=*/96, &DecodeBf16D96},
    {DType::kBf16, /*head_dim=*/128, &DecodeBf16D128},
    {DType::kBf16, /*head_dim=*/256, &DecodeBf16D256},
    {DType::kF8E4m3, /*head_dim=*/64, &DecodeFp8D64},
    {DType::kF8E4m3, /*head_dim=*/80, &DecodeFp8D80},
    {DType::kF8E4m3, /*head_dim=*/96, &DecodeFp8D96},
    {DType::kF8E4m3, /*head_dim=*/128, &DecodeFp8D128},
    {DType::kF8E4m3, /*head_dim=*/256, &DecodeFp8D256},
};

}  // namespace

absl::Span<const DecodeKernel> DecodeKernels() { return kDecodeKernels; }

const DecodeKernel* FindDecodeKernel(DType kv_type, int32_t head_dim) {
  for (const DecodeKernel& kernel : kDecodeKernels) {
    if (kernel.kv_type == kv_type && kernel.head_dim == head_dim) return &kernel;
  }
  return nullptr;
}

}  // namespace adaattn

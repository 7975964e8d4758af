#include "kernels/cuda/decode_exact.cuh"
#include "kernels/cuda/kernel_table.h"

namespace adaattn {
absl::Status DecodeBf16D128(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream) {
  return LaunchDecodeRows<__nv_bfloat16, 128>(p, row_tiles, stream);
}
}  // namespace adaattn

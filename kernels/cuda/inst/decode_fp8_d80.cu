#include "kernels/cuda/decode_exact.cuh"
#include "kernels/cuda/kernel_table.h"

namespace adaattn {
absl::Status DecodeFp8D80(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream) {
  return LaunchDecodeRows<__nv_fp8_e4m3, 80>(p, row_tiles, stream);
}
}  // namespace adaattn

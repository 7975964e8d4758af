#include "kernels/cuda/decode_exact.cuh"
#include "kernels/cuda/kernel_table.h"

namespace adaattn {
absl::Status DecodeFp16D96(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream) {
  return LaunchDecodeRows<__half, 96>(p, row_tiles, stream);
}
}  // namespace adaattn

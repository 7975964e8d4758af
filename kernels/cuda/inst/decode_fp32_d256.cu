#include "kernels/cuda/decode_fp32.cuh"
#include "kernels/cuda/decode_fp32.h"

namespace adaattn {
absl::Status DecodeFp32D256(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream) {
  return LaunchDecodeFp32Rows<256>(p, row_tiles, stream);
}
}  // namespace adaattn

#ifndef ADAATTN_KERNELS_CUDA_DECODE_FP32_H_
#define ADAATTN_KERNELS_CUDA_DECODE_FP32_H_

// The variants over FP32 pages, as kernel_table.h has the others.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/cuda/params.h"

namespace adaattn {

absl::Status DecodeFp32D64(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp32D80(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp32D96(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp32D128(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp32D256(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_DECODE_FP32_H_

#ifndef ADAATTN_KERNELS_CUDA_KERNEL_TABLE_H_
#define ADAATTN_KERNELS_CUDA_KERNEL_TABLE_H_

// The compiled variants: one function and one file under inst/ each. The table answers whether a
// shape is supported, and by what.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/cuda/params.h"
#include "kernels/shape.h"

namespace adaattn {

// Enqueues exact decode of p's items. `row_tiles` as from ChooseRowTiles.
using DecodeFunction = absl::Status (*)(const DecodeParams& p, int32_t row_tiles,
                                        cudaStream_t stream);

struct DecodeKernel {
  DType kv_type;
  int32_t head_dim;
  DecodeFunction run;
};

// In order of type, then head_dim.
absl::Span<const DecodeKernel> DecodeKernels();
// Null where there is none.
const DecodeKernel* FindDecodeKernel(DType kv_type, int32_t head_dim);

absl::Status DecodeBf16D64(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeBf16D80(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeBf16D96(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeBf16D128(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeBf16D256(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp16D64(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp16D80(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp16D96(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp16D128(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp16D256(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp8D64(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp8D80(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp8D96(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp8D128(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);
absl::Status DecodeFp8D256(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_KERNEL_TABLE_H_

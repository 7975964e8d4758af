#ifndef ADAATTN_KERNELS_CUDA_ELEMENT_CUH_
#define ADAATTN_KERNELS_CUDA_ELEMENT_CUH_

// Elements of tensors whose type is known at run time: a uniform branch, off the hot path.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/mma.cuh"
#include "kernels/shape.h"

namespace adaattn {

__device__ __forceinline__ float LoadElement(const void* data, DType type, int64_t index) {
  switch (type) {
    case DType::kF32:
      return static_cast<const float*>(data)[index];
    case DType::kF16:
      return __half2float(static_cast<const __half*>(data)[index]);
    default:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  }
}

// Four neighbours of kF32, kF16 or kBf16 as they lie in memory; index is a multiple of 4. Nothing
// waits for them before they are unpacked.
__device__ __forceinline__ uint4 LoadPackedFour(const void* data, DType type, int64_t index) {
  if (type == DType::kF32) {
    return *reinterpret_cast<const uint4*>(static_cast<const float*>(data) + index);
  }
  const uint2 x = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(data) + index);
  return make_uint4(x.x, x.y, 0, 0);
}

__device__ __forceinline__ void StorePackedFour(void* data, DType type, int64_t index, uint4 x) {
  if (type == DType::kF32) {
    *reinterpret_cast<uint4*>(static_cast<float*>(data) + index) = x;
  } else {
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + index) = make_uint2(x.x, x.y);
  }
}

__device__ __forceinline__ void UnpackFour(const uint4& x, DType type, float (&out)[4]) {
  if (type == DType::kF32) {
    out[0] = __uint_as_float(x.x), out[1] = __uint_as_float(x.y);
    out[2] = __uint_as_float(x.z), out[3] = __uint_as_float(x.w);
  } else if (type == DType::kF16) {
    const float2 low = __half22float2(*reinterpret_cast<const __half2*>(&x.x));
    const float2 high = __half22float2(*reinterpret_cast<const __half2*>(&x.y));
    out[0] = low.x, out[1] = low.y, out[2] = high.x, out[3] = high.y;
  } else {
    out[0] = __uint_as_float(x.x << 16), out[1] = __uint_as_float(x.x & 0xffff0000u);
    out[2] = __uint_as_float(x.y << 16), out[3] = __uint_as_float(x.y & 0xffff0000u);
  }
}

__device__ __forceinline__ void LoadFour(const void* data, DType type, int64_t index,
                                         float (&out)[4]) {
  UnpackFour(LoadPackedFour(data, type, index), type, out);
}

__device__ __forceinline__ void StoreFour(void* data, DType type, int64_t index, float4 x) {
  if (type == DType::kF32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + index) = x;
    return;
  }
  const bool half = type == DType::kF16;
  const uint2 packed =
      half ? make_uint2(PackPair<__half>(x.x, x.y), PackPair<__half>(x.z, x.w))
           : make_uint2(PackPair<__nv_bfloat16>(x.x, x.y), PackPair<__nv_bfloat16>(x.z, x.w));
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(data) + index) = packed;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_ELEMENT_CUH_

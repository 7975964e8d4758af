#ifndef ADAATTN_KERNELS_CUDA_MMA_CUH_
#define ADAATTN_KERNELS_CUDA_MMA_CUH_

// Tensor core and conversion instructions by name. Fragment coordinates are written (g, t) with
// g = lane / 4 and t = lane % 4.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace adaattn {

// m16n8k16, row x column, f32 sums. a: (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b: k =
// 2t and 2t + 8 of column g; c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1).
template <typename T>
__device__ __forceinline__ void Mma16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                           uint32_t b1);

template <>
__device__ __forceinline__ void Mma16x8x16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                          uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void Mma16x8x16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
      "{%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// To the nearest TF32, the higher magnitude of two.
__device__ __forceinline__ float RoundToTf32(float x) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(x));
  return __uint_as_float(out);
}

// m16n8k8, row x column, f32 sums of TF32 products. a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t +
// 4); b: k = t and t + 4 of column g; c as above.
__device__ __forceinline__ void MmaTf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// Transposes an 8x8 tile of 16-bit values held as (g, 2t), (g, 2t + 1).
__device__ __forceinline__ uint32_t Transpose8x8(uint32_t tile) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(tile));
  return out;
}

template <typename T>
__device__ __forceinline__ uint32_t PackPair(float low, float high);

template <>
__device__ __forceinline__ uint32_t PackPair<__nv_bfloat16>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

template <>
__device__ __forceinline__ uint32_t PackPair<__half>(float low, float high) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

template <typename T>
__device__ __forceinline__ float2 UnpackPair(uint32_t pair);

template <>
__device__ __forceinline__ float2 UnpackPair<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

template <>
__device__ __forceinline__ float2 UnpackPair<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

// A pair as T and what that lost, as T.
template <typename T>
__device__ __forceinline__ uint2 SplitPair(float low, float high) {
  const uint32_t pair = PackPair<T>(low, high);
  const float2 kept = UnpackPair<T>(pair);
  return make_uint2(pair, PackPair<T>(low - kept.x, high - kept.y));
}

// Four 8x8 tiles of 16-bit values in shared memory, whose row r of tile i the lane 8 i + r names,
// as (g, 2t), (g, 2t + 1); transposed: (2t, g), (2t + 1, g).
template <bool kTransposed>
__device__ __forceinline__ void LoadMatrices(uint32_t (&tile)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
                 : "r"(address)
                 : "memory");
  }
}

// Two e4m3 values to two halves, exactly; the lower byte becomes the lower half.
__device__ __forceinline__ uint32_t HalvesFromE4m3(uint32_t low_16_bits) {
  uint32_t out;
  asm("{\n .reg .b16 pair;\n cvt.u16.u32 pair, %1;\n cvt.rn.f16x2.e4m3x2 %0, pair;\n}"
      : "=r"(out)
      : "r"(low_16_bits));
  return out;
}

__device__ __forceinline__ float Exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_MMA_CUH_

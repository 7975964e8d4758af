#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_

// The arithmetic of attended pages: scores refined by the keys' finer planes, values multiplied
// from their planes. Operands lie in shared memory.

#include "kernels/cuda/progressive_scan.cuh"

namespace adaattn {

// Scores of a page refined by `planes` 2-bit planes of its keys: what to add to the packed scores,
// in their layout. x_6 - x_4 = (m - 1.5) / 32, x_8 - x_6 = (m' - 1.5) / 128. `scale`: units of
// query and ranges.
template <class Traits>
__device__ __forceinline__ void RefineScores(const std::byte* fine, const __half* ranges,
                                             const uint2* query, float scale, int planes, int tiles,
                                             int lane, uint32_t (&packed)[8]) {
  const uint32_t kOnes[4] = {kOneHalves, kOneHalves, 0x4c004c00u, 0x4c004c00u};  // 1, 1, 16, 16
  float sums[4][4] = {}, ones[4] = {};
#pragma unroll 1
  for (int k = 0; k < tiles; ++k) {
    const uint2 q = query[k * 32 + lane];
    const uint2 range = reinterpret_cast<const uint2*>(ranges)[k * 4 + lane % 4];
    uint32_t b0 = MultiplyHalves(q.x, range.x);
    uint32_t b1 = MultiplyHalves(MultiplyHalves(q.y, range.y), 0x2c002c00u);  // 1/16
    Mma16x8x16<__half>(ones, kOnes, b0, b1);
#pragma unroll 1
    for (int plane = 0; plane < planes; ++plane) {
      const uint2 words =
          reinterpret_cast<const uint2*>(fine + plane * Traits::kPlaneBytes)[k * 32 + lane];
      const uint32_t word[4] = {words.x, words.x >> 8, words.y, words.y >> 8};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t a[4] = {word[t] & 0x00030003u, word[t] & 0x000c000cu, word[t] & 0x00300030u,
                               word[t] & 0x00c000c0u};
        Mma16x8x16<__half>(sums[t], a, b0, b1);
      }
      b0 = MultiplyHalves(b0, 0x34003400u);  // 1/4
      b1 = MultiplyHalves(b1, 0x34003400u);
    }
  }
  const float offset = -scale * (planes == 2 ? 1.5f / 32 + 1.5f / 128 : 1.5f / 32);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // 2^24 / 32, and / 4 for rows 8..15.
      const float unit = scale * (half == 0 ? 524288.0f : 131072.0f);
      const float x = fmaf(sums[t][2 * half], unit, offset * ones[0]);
      const float y = fmaf(sums[t][2 * half + 1], unit, offset * ones[1]);
      const uint32_t delta = Transpose8x8(PackPair<__half>(x, y));
      packed[2 * t + half] = FmaHalves(kOneHalves, delta, packed[2 * t + half]);
    }
  }
}

// Adds one page's values to out[tile] (channels 16 tile + lane / 4 and + 8, columns 2 (lane % 4)
// and + 1), weighted by probability[i] (tokens of packed scores) times `weight` of the column.
// Token ranges are a 16th of themselves for tokens 8..15 of a tile, as their fields are 16 times
// larger.
template <class Traits>
__device__ __forceinline__ void AddValues(const std::byte* planes, const float* token_ranges,
                                          int bits, const float2 (&probability)[8],
                                          const float (&weight)[2], int lane,
                                          float (&out)[Traits::kTiles][4]) {
  const uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x4c004c00u, 0x4c004c00u};
  const float offset = 1.0f / static_cast<float>(1 << bits) - 1.0f;
#pragma unroll
  for (int group = 0; group < Traits::kValueGroups; ++group) {
    uint32_t b[4][2];
    float ones[4] = {};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 range = *reinterpret_cast<const float2*>(token_ranges + group * kPageTokens +
                                                              16 * t + 8 * half + lane % 4 * 2);
        b[t][half] = PackPair<__half>(probability[2 * t + half].x * range.x,
                                      probability[2 * t + half].y * range.y);
      }
      Mma16x8x16<__half>(ones, kOnes, b[t][0], b[t][1]);
    }
    float sums[Traits::kTilesPerGroup][4];
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] = 0;
    }
#pragma unroll 1
    for (int plane = 0; plane < bits / 2; ++plane) {
#pragma unroll
      for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
        const uint2 words = reinterpret_cast<const uint2*>(
            planes + plane * Traits::kPlaneBytes)[(group * Traits::kTilesPerGroup + i) * 32 + lane];
        const uint32_t word[4] = {words.x, words.x >> 8, words.y, words.y >> 8};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const uint32_t a[4] = {word[t] & 0x00030003u, word[t] & 0x000c000cu,
                                 word[t] & 0x00300030u, word[t] & 0x00c000c0u};
          Mma16x8x16<__half>(sums[i], a, b[t][0], b[t][1]);
        }
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        b[t][0] = MultiplyHalves(b[t][0], 0x34003400u);
        b[t][1] = MultiplyHalves(b[t][1], 0x34003400u);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float unit = e < 2 ? 8388608.0f : 2097152.0f;  // 2^24 / 2, and / 4 for channels + 8
        float& target = out[group * Traits::kTilesPerGroup + i][e];
        target = fmaf(weight[e % 2], fmaf(sums[i][e], unit, offset * ones[e % 2]), target);
      }
    }
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_

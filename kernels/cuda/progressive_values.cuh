#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_

// The arithmetic of an attended page in shared memory: its scores refined by the keys' finer
// planes, a group of its values multiplied from their planes.
//   x_b(code) r = (sum_i m_i 4^-i / 2 + 2^-b - 1) r         m_i: 2-bit plane i, most significant
//   first
// Values enter the MMA transposed: channels are its M, tokens its K, columns its N; 2-bit fields
// enter in place as FP16 subnormals, and the powers of 4 that their places add are taken out of B
// (fields of token + 8) and of the sums (channels + 8).

#include "kernels/cuda/progressive_scores.cuh"

namespace adaattn {

// What a quarter of a page's words, of tokens 16t..16t + 15, is as the A of an MMA: the fields of
// two planes as 4 high + low.
__device__ __forceinline__ void UnpackFields(uint32_t high, uint32_t low, uint32_t (&a)[4]) {
  const uint32_t shifted = high << 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t mask = 0x00030003u << 2 * i;
    a[i] = (shifted & mask << 2) | (low & mask);
  }
}

// The same of one plane, a quarter as large.
__device__ __forceinline__ void TakeFields(uint32_t word, uint32_t (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = word & 0x00030003u << 2 * i;
}

// What `planes` 2-bit planes of the page's keys add to the scores of tokens [16 begin, 16 (begin +
// kCount)), packed as scores are.
//   x_6 - x_4 = (m - 1.5) / 32, x_8 - x_6 = (m' - 1.5) / 128
// `ranges`: as SpreadKeyRanges left them; `scale`: units of query and ranges; `fine`: `tiles` tiles
// of each plane.
template <int kCount>
__device__ __forceinline__ void RefineScores(const std::byte* fine, const __half* ranges,
                                             const uint2* query, float scale, int planes, int tiles,
                                             int begin, int lane, uint32_t (&delta)[2 * kCount]) {
  const uint32_t kOnes[4] = {kOneHalves, kOneHalves, 0x4c004c00u, 0x4c004c00u};  // 1, 1, 16, 16
  float sums[kCount][4] = {}, ones[4] = {};
#pragma unroll 2
  for (int k = 0; k < tiles; ++k) {
    const uint2 q = query[k * 32 + lane];
    const uint2 range = reinterpret_cast<const uint2*>(ranges)[k * 4 + lane % 4];
    const uint32_t b0 = MultiplyHalves(q.x, range.x);
    const uint32_t b1 = MultiplyHalves(MultiplyHalves(q.y, range.y), 0x2c002c00u);  // 1/16
    Mma16x8x16<__half>(ones, kOnes, b0, b1);
    const uint2 high = reinterpret_cast<const uint2*>(fine)[k * 32 + lane];
    uint2 low = make_uint2(0, 0);
    if (planes == 2) {
      low = reinterpret_cast<const uint2*>(fine + tiles * kPlaneTileBytes)[k * 32 + lane];
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int t = begin + i;
      uint32_t a[4];
      UnpackFields((t < 2 ? high.x : high.y) >> t % 2 * 8, (t < 2 ? low.x : low.y) >> t % 2 * 8, a);
      Mma16x8x16<__half>(sums[i], a, b0, b1);
    }
  }
  const float offset = -scale * (planes == 2 ? 1.5f / 32 + 1.5f / 128 : 1.5f / 32);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // 2^24 / 128, and / 4 for rows 8..15.
      const float unit = scale * (half == 0 ? 131072.0f : 32768.0f);
      delta[2 * i + half] =
          Transpose8x8(PackPair<__half>(fmaf(sums[i][2 * half], unit, offset * ones[0]),
                                        fmaf(sums[i][2 * half + 1], unit, offset * ones[1])));
    }
  }
}

// The scale bytes of value group `group` of a page: element i those of tokens
// 16 (i / 2) + 8 (i % 2) + 2 (lane % 4) and + 1, in bytes 0 and 2. `scales`: [64, groups] of a
// head.
template <class Traits>
__device__ __forceinline__ void LoadTokenScales(const std::byte* scales, int group, int lane,
                                                uint32_t (&codes)[8]) {
  constexpr int kGroups = Traits::kValueGroups;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const std::byte* at = scales + (i * 8 + lane % 4 * 2) * kGroups;
    if constexpr (kGroups == 1) {
      codes[i] = __byte_perm(*reinterpret_cast<const uint16_t*>(at), 0, 0x4140u);
    } else if constexpr (kGroups == 2) {
      codes[i] = *reinterpret_cast<const uint32_t*>(at) >> 8 * group & 0x00ff00ffu;
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(at);
      codes[i] = __byte_perm(words.x >> 8 * group, words.y >> 8 * group, 0x7470u) & 0x00ff00ffu;
    }
  }
}

// What the tokens of a page weigh: probabilities times ranges as B fragments, relative to the
// largest range; fields of token + 8 are 16 times larger, their weights a 16th.
struct TokenWeights {
  uint32_t b[4][2];
  float probability;  // the lane's sum, relative to the page's largest
  float range;        // the largest
};
__device__ __forceinline__ TokenWeights WeighTokens(const float2 (&probability)[8],
                                                    const uint32_t (&codes)[8]) {
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) top = __vmaxu2(top, codes[i]);
  top = __reduce_max_sync(0xffffffffu, max(top & 0xffffu, top >> 16));
  // A byte under 0x4b000000 is 2^23 more than itself; the product and the sum below are exact.
  const float base = -2097152.0f - 0.25f * static_cast<float>(top);
  TokenWeights out;
  out.range = RangeOf(top);
  out.probability = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float low = __uint_as_float(__byte_perm(codes[i], 0x4b000000u, 0x7440u));
    const float high = __uint_as_float(__byte_perm(codes[i], 0x4b000000u, 0x7442u));
    const float shift = i % 2 == 0 ? base : base - 4.0f;
    out.b[i / 2][i % 2] = PackPair<__half>(probability[i].x * Exp2(fmaf(low, 0.25f, shift)),
                                           probability[i].y * Exp2(fmaf(high, 0.25f, shift)));
    out.probability += probability[i].x + probability[i].y;
  }
  return out;
}

// Adds the values of one group of a page to out[tile] (channels 16 tile + lane / 4 and + 8, columns
// 2 (lane % 4) and + 1), weighted by `tokens` times `weight` of the column. `planes`: the group's
// part of the first plane.
template <class Traits>
__device__ __forceinline__ void AddValues(const std::byte* planes, int num_planes,
                                          TokenWeights tokens, const float (&weight)[2], int lane,
                                          float (&out)[Traits::kTilesPerGroup][4]) {
  const uint32_t kOnes[4] = {kOneHalves, kOneHalves, 0x4c004c00u, 0x4c004c00u};
  float sums[Traits::kTilesPerGroup][4], ones[4] = {};
#pragma unroll
  for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i][e] = 0;
  }
#pragma unroll
  for (int t = 0; t < 4; ++t) Mma16x8x16<__half>(ones, kOnes, tokens.b[t][0], tokens.b[t][1]);
#pragma unroll 1
  for (int plane = 0; plane < num_planes; plane += 2) {  // two at a time
    const auto* words = reinterpret_cast<const uint2*>(planes + plane * Traits::kPlaneBytes) + lane;
    if (plane + 1 == num_planes) {  // alone, as most are: a quarter as large as in a pair
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        tokens.b[t][0] = MultiplyHalves(tokens.b[t][0], 0x44004400u);  // 4
        tokens.b[t][1] = MultiplyHalves(tokens.b[t][1], 0x44004400u);
      }
#pragma unroll
      for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
        const uint2 x = words[i * 32];
        const uint32_t high[4] = {x.x, x.x >> 8, x.y, x.y >> 8};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          uint32_t a[4];
          TakeFields(high[t], a);
          Mma16x8x16<__half>(sums[i], a, tokens.b[t][0], tokens.b[t][1]);
        }
      }
      break;
    }
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
      const uint2 x = words[i * 32], y = words[i * 32 + Traits::kPlaneBytes / 8];
      const uint32_t high[4] = {x.x, x.x >> 8, x.y, x.y >> 8};
      const uint32_t low[4] = {y.x, y.x >> 8, y.y, y.y >> 8};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        uint32_t a[4];
        UnpackFields(high[t], low[t], a);
        Mma16x8x16<__half>(sums[i], a, tokens.b[t][0], tokens.b[t][1]);
      }
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      tokens.b[t][0] = MultiplyHalves(tokens.b[t][0], 0x2c002c00u);  // 1/16
      tokens.b[t][1] = MultiplyHalves(tokens.b[t][1], 0x2c002c00u);
    }
  }
  const float offset = 1.0f / static_cast<float>(1 << 2 * num_planes) - 1.0f;
#pragma unroll
  for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float unit = e < 2 ? 2097152.0f : 524288.0f;  // 2^24 / 8, and / 4 for channels + 8
      out[i][e] = fmaf(weight[e % 2], fmaf(sums[i][e], unit, offset * ones[e % 2]), out[i][e]);
    }
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_

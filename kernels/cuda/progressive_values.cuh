#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_

// The arithmetic of an attended page in shared memory: its scores refined by the keys' finer
// planes, a group of its values multiplied from their planes.
//   x_b(code) r = (sum_i m_i 4^-i / 2 + 2^-b - 1) r         m_i: 2-bit plane i, most significant
//   first
// Values enter the MMA transposed: channels are its M, tokens its K, columns its N; fields enter in
// place as FP16 subnormals, and the powers of 4 that their places add are taken out of B (fields of
// token + 8) and of the sums (channels + 8).

#include "kernels/cuda/progressive_scores.cuh"

namespace adaattn {

// The bits of `low` where a byte has 0x33, those of `high` elsewhere. The compiler takes two
// instructions.
__device__ __forceinline__ uint32_t MixFields(uint32_t high, uint32_t low) {
  uint32_t mixed;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(mixed) : "r"(0x33333333u), "r"(low), "r"(high));
  return mixed;
}

// Words of two planes as nibbles, 4 high + low: of a byte's four fields 0 and 2, and 1 and 3.
struct PairedFields {
  uint32_t even, odd;
  __device__ __forceinline__ PairedFields(uint32_t high, uint32_t low)
      : even(MixFields(high << 2, low)), odd(MixFields(high, low >> 2)) {}

  // The A of an MMA, of tokens 16t..16t + 15, from the halves' bytes at bit `shift`: fields 0 and 1
  // are its rows g and g + 8, 2 and 3 the same of the second eight columns, 16 times larger.
  __device__ __forceinline__ void Take(int shift, uint32_t (&a)[4]) const {
    const uint32_t x = even >> shift, y = odd >> shift;
    a[0] = x & 0x000f000fu;
    a[1] = y & 0x000f000fu;
    a[2] = x & 0x00f000f0u;
    a[3] = y & 0x00f000f0u;
  }
};

// The same of one plane, without a shift of its own: a quarter as large, but rows g + 8 as they
// are.
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
  // Adds tile k; `add(word, i, shift, b0, b1)` score tile i, whose fields stand at bit `shift` of
  // the lane's first or second word.
  const auto multiply = [&](int k, const auto& add) {
    const uint2 q = query[k * 32 + lane];
    const uint2 range = reinterpret_cast<const uint2*>(ranges)[k * 4 + lane % 4];
    const uint32_t b0 = MultiplyHalves(q.x, range.x);
    const uint32_t b1 = MultiplyHalves(MultiplyHalves(q.y, range.y), 0x2c002c00u);  // 1/16
    Mma16x8x16<__half>(ones, kOnes, b0, b1);
    const auto* words = reinterpret_cast<const uint32_t*>(fine) + (k * 32 + lane) * 2 + begin / 2;
    if constexpr (kCount == 1) {
      add(words, 0, begin % 2 * 8, b0, b1);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) add(words + i / 2, i, i % 2 * 8, b0, b1);
    }
  };
  if (planes == 2) {
    const int low = tiles * kPlaneTileBytes / 4;
#pragma unroll 2
    for (int k = 0; k < tiles; ++k) {
      multiply(k, [&](const uint32_t* word, int i, int shift, uint32_t b0, uint32_t b1) {
        uint32_t a[4];
        PairedFields(word[0], word[low]).Take(shift, a);
        Mma16x8x16<__half>(sums[i], a, b0, b1);
      });
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < tiles; ++k) {
      multiply(k, [&](const uint32_t* word, int i, int shift, uint32_t b0, uint32_t b1) {
        uint32_t a[4];
        TakeFields(word[0] >> shift, a);
        Mma16x8x16<__half>(sums[i], a, b0, b1);
      });
    }
  }
  const float offset = -scale * (planes == 2 ? 1.5f / 32 + 1.5f / 128 : 1.5f / 32);
  // 2^24 / 128, of rows 0..7 and 8..15.
  const float unit[2] = {scale * (planes == 2 ? 131072.0f : 524288.0f), scale * 131072.0f};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      delta[2 * i + half] =
          Transpose8x8(PackPair<__half>(fmaf(sums[i][2 * half], unit[half], offset * ones[0]),
                                        fmaf(sums[i][2 * half + 1], unit[half], offset * ones[1])));
    }
  }
}

// Octets of tokens whose scores a lane has: all of a page's. Where columns are few, half of them:
// the MMA's columns 0..3 take the first 32 tokens, 4..7 the others of the same columns.
template <class Traits>
inline constexpr int kLaneOctets = Traits::kColumns == kTileColumns ? 8 : 4;
static_assert(2 * kFewColumns == kTileColumns, "two of the MMA's columns each");
template <class Traits>
__device__ __forceinline__ int FirstLaneOctet(int lane) {
  return kLaneOctets<Traits> == 8 ? 0 : lane / 16 * 4;
}
// The column that they are of.
template <class Traits>
__device__ __forceinline__ int ScoreColumn(int lane) {
  return lane / 4 % Traits::kColumns;
}

// The scale bytes of value group `group` of a page, from the lane's first octet on: element i those
// of tokens 2 (lane % 4) and + 1 of octet i, in bytes 0 and 2. `scales`: [64, groups] of a head.
template <class Traits>
__device__ __forceinline__ void LoadTokenScales(const std::byte* scales, int group, int lane,
                                                uint32_t (&codes)[kLaneOctets<Traits>]) {
  constexpr int kGroups = Traits::kValueGroups;
  const std::byte* first = scales + (FirstLaneOctet<Traits>(lane) * 8 + lane % 4 * 2) * kGroups;
#pragma unroll
  for (int i = 0; i < kLaneOctets<Traits>; ++i) {
    const std::byte* at = first + i * 8 * kGroups;
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
template <int kOctets>
__device__ __forceinline__ TokenWeights WeighTokens(const float2 (&probability)[kOctets],
                                                    const uint32_t (&codes)[kOctets], int lane) {
  uint32_t top = 0;
#pragma unroll
  for (int i = 0; i < kOctets; ++i) top = __vmaxu2(top, codes[i]);
  top = __reduce_max_sync(0xffffffffu, max(top & 0xffffu, top >> 16));
  // A byte under 0x4b000000 is 2^23 more than itself; the product and the sum below are exact.
  const float base = -2097152.0f - 0.25f * static_cast<float>(top);
  TokenWeights out;
  out.range = RangeOf(top);
  out.probability = 0;
  uint32_t own[kOctets];
#pragma unroll
  for (int i = 0; i < kOctets; ++i) {
    const float low = __uint_as_float(__byte_perm(codes[i], 0x4b000000u, 0x7440u));
    const float high = __uint_as_float(__byte_perm(codes[i], 0x4b000000u, 0x7442u));
    const float shift = i % 2 == 0 ? base : base - 4.0f;
    own[i] = PackPair<__half>(probability[i].x * Exp2(fmaf(low, 0.25f, shift)),
                              probability[i].y * Exp2(fmaf(high, 0.25f, shift)));
    out.probability += probability[i].x + probability[i].y;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // of the tokens that are another lane's, none
    out.b[i / 2][i % 2] = kOctets == 8 || i / 4 == lane / 16 ? own[i % kOctets] : 0u;
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
      for (int i = 0; i < Traits::kTilesPerGroup; ++i) {  // but for channels + 8
        sums[i][2] *= 4;
        sums[i][3] *= 4;
      }
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
      const PairedFields pairs[2] = {PairedFields(x.x, y.x), PairedFields(x.y, y.y)};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        uint32_t a[4];
        pairs[t / 2].Take(t % 2 * 8, a);
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
  // 2^24 / 8, of channels and channels + 8.
  const float unit[2] = {2097152.0f, num_planes % 2 == 0 ? 2097152.0f : 524288.0f};
#pragma unroll
  for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out[i][e] =
          fmaf(weight[e % 2], fmaf(sums[i][e], unit[e / 2], offset * ones[e % 2]), out[i][e]);
    }
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_

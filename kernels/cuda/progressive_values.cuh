#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_

// The arithmetic of attended pages: scores refined by the keys' finer planes, values multiplied
// from their planes, means of skipped pages. All operands lie in shared memory (AttendShared).

#include "kernels/cuda/progressive_scan.cuh"

namespace adaattn {

template <class Traits>
struct AttendShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kPlaneBytes = Traits::kTiles * kPlaneTileBytes;
  static constexpr int kScaleBytes = kPageTokens * Traits::kValueGroups;
  static constexpr int kSummaryBytes = static_cast<int>(sizeof(ValueSummary)) + kD;
  // Room for all that a page's values bring in (scales and planes), or for its keys' finer planes
  // and scales; pages whose keys and values fit together come in one go, several at a time.
  static constexpr int kBufferBytes = kScaleBytes + 4 * kPlaneBytes;
  struct Warp {
    alignas(16) std::byte pages[kBufferBytes];
    alignas(16) __half ranges[kD];  // of channels, spread for the MMA
    alignas(16) float token_ranges[kPageTokens * Traits::kValueGroups];
  };
  Warp warps[kAttendWarps];
  alignas(16) std::byte summaries[kMaxAttendChunk][kSummaryBytes];
  float lse[kTileColumns];  // L
  float lse_parts[kAttendThreads / kTileColumns][kTileColumns];
  uint32_t base[kMaxAttendChunk];  // page ids, by position in the chunk
  uint8_t key_bits[kMaxAttendChunk], key_chunks[kMaxAttendChunk], value_bits[kMaxAttendChunk];
  // What the means are weighted with, by page: rows 0..7 the share of a skipped page (else 0), rows
  // 8..15 w^2 var_s, of the tile's columns; then as halves relative to the row's largest.
  float weights[2 * kTileColumns][kMaxAttendChunk];
  alignas(16) __half scaled[2 * kTileColumns][kMaxAttendChunk + 8];
  float row_scale[2 * kTileColumns];
  float figures[kTileColumns][5];  // skipped mass, entropy, rest, mean squares, weight
  float warp_figures[kAttendWarps][kTileColumns][5];
  int list[kMaxAttendChunk];  // attended pages, in order
  int warp_count[kAttendWarps];
  int key_pages[kNumKeyDepths], value_pages[kNumValueDepths];
  float mass[kAttendWarps][kTileColumns];  // of attended pages, by warp
  // The warps' parts overlay their partial outputs [columns][D] once the pages are done with.
  static_assert(sizeof(Warp) >= kTileColumns * kD * sizeof(float), "partial outputs fit");
};

// How an attended page lies in a warp's buffer: values [scales, planes], keys [scales, fine
// planes].
template <class Traits>
struct AttendedPage {
  using Shared = AttendShared<Traits>;
  int value_bits, fine_planes;

  __device__ __forceinline__ AttendedPage(const Shared& shared, int local)
      : value_bits(shared.value_bits[local]), fine_planes((shared.key_bits[local] - 4) / 2) {}
  __device__ __forceinline__ int value_bytes() const {
    return Shared::kScaleBytes + value_bits / 2 * Shared::kPlaneBytes;
  }
  __device__ __forceinline__ int key_bytes() const {
    return fine_planes > 0 ? Traits::kHeadDim + fine_planes * Shared::kPlaneBytes : 0;
  }
};

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
      const uint2 words = reinterpret_cast<const uint2*>(
          fine + plane * AttendShared<Traits>::kPlaneBytes)[k * 32 + lane];
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
// and
// + 1), weighted by probability[i] (tokens of packed scores) times `weight` of the
// column.
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
        const float scale = half == 0 ? 1.0f : 0.0625f;
        b[t][half] = PackPair<__half>(probability[2 * t + half].x * range.x * scale,
                                      probability[2 * t + half].y * range.y * scale);
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
            planes +
            plane * AttendShared<Traits>::kPlaneBytes)[(group * Traits::kTilesPerGroup + i) * 32 +
                                                       lane];
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

// Four 8x8 tiles of 16-bit units, transposed: register i holds (2t, 2t + 1; g) of tile i, whose row
// r the lane 8 i + r names.
__device__ __forceinline__ void LoadTransposed(uint32_t (&tile)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(tile[0]), "=r"(tile[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// Bytes 0 and 2 of `bytes` ^ 0x80 (selector 0x4240) or 1 and 3 (0x4341) as halves, signed.
__device__ __forceinline__ uint32_t HalvesFromBytes(uint32_t bytes, uint32_t selector) {
  const uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, selector);  // 1152 more
  return FmaHalves(biased, kOneHalves, 0xe480e480u);                                // - 1152
}

// The CTA's sums: means of the skipped pages plus the warps' partial outputs, and the weighted
// mean.
//   sum[n][c] = sum_page weight[n][page] mean[page][c]: weights are the A of the MMA, rows of the
// means its B, two channels at a time (a transposed load pairs the bytes of two pages).
template <class Traits>
__device__ __forceinline__ void AddMeans(int pages, AttendShared<Traits>& shared, float* partial) {
  constexpr int kD = Traits::kHeadDim;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const float scale[2] = {shared.row_scale[g], shared.row_scale[kTileColumns + g]};
  for (int tile = warp; tile < Traits::kTiles; tile += kAttendWarps) {
    float even[4] = {}, odd[4] = {};
    for (int first = 0; first < pages; first += 16) {
      uint32_t a[4], bytes[2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = *reinterpret_cast<const uint32_t*>(
            &shared.scaled[g + i % 2 * 8][first + 2 * t + i / 2 * 8]);
      }
      LoadTransposed(bytes, shared.summaries[first + lane % 16] + sizeof(ValueSummary) + tile * 16);
      Mma16x8x16<__half>(even, a, HalvesFromBytes(bytes[0], 0x4240u),
                         HalvesFromBytes(bytes[1], 0x4240u));
      Mma16x8x16<__half>(odd, a, HalvesFromBytes(bytes[0], 0x4341u),
                         HalvesFromBytes(bytes[1], 0x4341u));
    }
    // Column j of an accumulator is channel 16 tile + 2 j (+ 1): the lane has four in a row.
    const int channel = tile * 16 + 4 * t;
    float4 sum =
        make_float4(even[0] * scale[0], odd[0] * scale[0], even[1] * scale[0], odd[1] * scale[0]);
#pragma unroll
    for (int i = 0; i < kAttendWarps; ++i) {
      const float4 more = *reinterpret_cast<const float4*>(
          reinterpret_cast<const float*>(&shared.warps[i]) + g * kD + channel);
      sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
    }
    float* target = partial + 2 * g * kD + channel;
    *reinterpret_cast<float4*>(target) = sum;
    *reinterpret_cast<float4*>(target + kD) =
        make_float4(even[2] * scale[1], odd[2] * scale[1], even[3] * scale[1], odd[3] * scale[1]);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_VALUES_CUH_

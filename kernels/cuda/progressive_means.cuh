#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_MEANS_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_MEANS_CUH_

// The weighted sums of a chunk's means, by MMAs over its pages:
//   sum[row][c] = sum_page weight[row][page] mean[page][c]
// Weights are the A of the MMA, in TF32, which needs no scale whatever their size; those that
// become part of the output, kSkipped, as two of it. Rows of the means are its B, bytes whose
// floats TF32 holds exactly.

#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

// Two 8x8 tiles of 16-bit units, transposed: register i holds (2t, 2t + 1; g) of tile i, whose row
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

// Behind the chunk's pages, in the chunk of the sink page: the sequence's first token, as if it
// were a page. The means are added kMeanStep pages at a time.
inline constexpr int kMeanStep = 8;
inline constexpr int kFirstToken = kChunkPages;
inline constexpr int kChunkRows = kChunkPages + kMeanStep;

// In shared memory.
template <class Traits>
struct ChunkMeans {
  static constexpr int kColumns = Traits::kColumns;
  static constexpr int kSummaryBytes = static_cast<int>(sizeof(ValueSummary)) + Traits::kHeadDim;
  // Two rows of weights lie side by side as rows g and g + 8 of an MMA: of each column both parts
  // of kSkipped, then of each column kWeightedMean and kAttended.
  static constexpr int kBlocks = 2 * kColumns / 8;
  alignas(16) std::byte summaries[kChunkRows][kSummaryBytes];
  alignas(16) float2 weights[kBlocks][kChunkRows / kMeanStep][8][kMeanStep];  // fragments of A

  __device__ __forceinline__ const ValueSummary& Summary(int row) const {
    return *reinterpret_cast<const ValueSummary*>(summaries[row]);
  }

  // The weights of the mean in `row`, for column n of the tile.
  __device__ __forceinline__ void SetWeights(int n, int row,
                                             const float (&weight)[kNumChunkVectors]) {
    constexpr int kOther = kColumns / 8, kBelow = kColumns % 8;  // where the second pair is
    const float high = RoundToTf32(weight[kSkipped]);
    weights[0][row / kMeanStep][n][row % kMeanStep] = make_float2(high, weight[kSkipped] - high);
    weights[kOther][row / kMeanStep][kBelow + n][row % kMeanStep] =
        make_float2(RoundToTf32(weight[kWeightedMean]), RoundToTf32(weight[kAttended]));
  }

  // No weight for the first token and the rows that fill its step. By 64 kBlocks threads.
  __device__ __forceinline__ void ClearFirstToken(int thread) {
    const int block = thread / 64, i = thread % 64;
    if (block < kBlocks) weights[block][kFirstToken / kMeanStep][i / 8][i % 8] = float2{};
  }
};

// The sums of 16 channels, by a warp.
template <class Traits>
struct MeanSums {
  static constexpr int kColumns = Traits::kColumns, kBlocks = ChunkMeans<Traits>::kBlocks;
  float even[kBlocks][4] = {}, odd[kBlocks][4] = {};

  // Adds kMeanStep rows from `first` on. `bytes`: of rows first + 2t and + 1, channels 2g and 2g +
  // 1, as a transposed load pairs them.
  __device__ __forceinline__ void Add(uint32_t bytes, int first, const ChunkMeans<Traits>& means) {
    const uint32_t biased = bytes ^ 0x80808080u;
    const auto mean = [biased](uint32_t selector) {  // a byte under 0x4b000000 is 2^23 more
      return __uint_as_float(__byte_perm(biased, 0x4b000000u, selector)) - 8388736.0f;
    };
    const float low[2] = {mean(0x7440u), mean(0x7442u)}, high[2] = {mean(0x7441u), mean(0x7443u)};
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      // Of rows g and g + 8; k = t and t + 4 are pages 2t and 2t + 1.
      const float4 x =
          reinterpret_cast<const float4*>(means.weights[i][first / kMeanStep])[threadIdx.x % 32];
      const float a[4] = {x.x, x.y, x.z, x.w};
      MmaTf32(even[i], a, low[0], low[1]);
      MmaTf32(odd[i], a, high[0], high[1]);
    }
  }

  // To target [kNumChunkVectors][D], at the 16 channels, of each of `columns` columns of the tile,
  // `stride` floats from one to the next. With `add` they are added to what is there.
  __device__ __forceinline__ void Store(int columns, int stride, float* target, bool add) const {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int n = (8 * i + g) % kColumns, pair = (8 * i + g) / kColumns;
      if (n >= columns) continue;
      // Column j of an accumulator is channel 2 j (+ 1): the lane has four in a row.
      const float4 upper = make_float4(even[i][0], odd[i][0], even[i][1], odd[i][1]);
      const float4 lower = make_float4(even[i][2], odd[i][2], even[i][3], odd[i][3]);
      float* rows = target + n * stride + 4 * t;
      const auto store = [rows, add](ChunkVector x, float4 sum) {
        auto* row = reinterpret_cast<float4*>(rows + x * Traits::kHeadDim);
        if (add) AddScaled(*row, 1, &sum);
        *row = sum;
      };
      if (pair == 0) {
        store(kSkipped, make_float4(upper.x + lower.x, upper.y + lower.y, upper.z + lower.z,
                                    upper.w + lower.w));
      } else {
        store(kWeightedMean, upper);
        store(kAttended, lower);
      }
    }
  }
};

// The sums over the chunk's first `pages` means and, with `sink`, the first token's value, for
// `columns` columns of the tile, as MeanSums::Store. By kWarps warps, `warp` of them.
template <class Traits, int kWarps>
__device__ __forceinline__ void AddMeans(const ChunkMeans<Traits>& means, int pages, bool sink,
                                         int columns, int warp, int stride, float* target,
                                         bool add = false) {
  const int lane = threadIdx.x % 32;
  for (int tile = warp; tile < Traits::kTiles; tile += kWarps) {
    MeanSums<Traits> sums;
    const auto load = [&](int row, uint32_t(&bytes)[4]) {
      LoadMatrices<true>(bytes, means.summaries[row] + sizeof(ValueSummary) + tile * 16);
    };
    uint32_t bytes[4];
#pragma unroll
    for (int first = 0; first < kChunkPages; first += 4 * kMeanStep) {
      if (first >= pages) break;
      load(first + lane, bytes);
#pragma unroll
      for (int i = 0; i < 4; ++i) sums.Add(bytes[i], first + i * kMeanStep, means);
    }
    if (sink) {
      load(kFirstToken + lane % kMeanStep, bytes);
      sums.Add(bytes[0], kFirstToken, means);
    }
    sums.Store(columns, stride, target + tile * 16, add);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_MEANS_CUH_

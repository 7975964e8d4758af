#ifndef ADAATTN_KERNELS_CUDA_SEAL_CUH_
#define ADAATTN_KERNELS_CUDA_SEAL_CUH_

// Sealing one dense page on the device, as format/seal.h states it, and decoding one again.
//   keys    x = (k - mu) K of the basis; a range per channel; 8-bit codes
//   values  x = H v; a range per token and group; 8-bit codes; mean, spread, radius
// One CTA per (page, kv head). Once in 64 tokens and off the step's critical path: plain FP32
// arithmetic, codes gathered from shared memory into the order of the MMA fragments.
// grid (num_tasks, num_kv_heads).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda/progressive_merge.cuh"
#include "kernels/format/float_types.h"
#include "kernels/format/nested_code.h"
#include "kernels/format/planes.h"

namespace adaattn {

inline constexpr int kSealThreads = 256;

template <class Traits>
struct SealShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kStride = kD + 1;  // columns and rows both without bank conflicts
  float rows[kPageTokens * kStride];      // tokens in the model's frame, then rotated
  uint8_t codes[kPageTokens * kD];
  float range[kPageTokens * Traits::kValueGroups > kD ? kPageTokens* Traits::kValueGroups : kD];
  float mean[kD];
  float token[kPageTokens];  // a figure per token
  float total[2];            // key energy beyond the leading half; as fitted
};

__device__ __forceinline__ float LoadDense(const std::byte* page, int index, DType type) {
  return type == DType::kF16
             ? __half2float(reinterpret_cast<const __half*>(page)[index])
             : __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(page)[index]);
}

// A token near FP16's largest value may be decoded beyond it.
__device__ __forceinline__ void StoreDense(std::byte* page, int index, DType type, float x) {
  if (type == DType::kF16) {
    reinterpret_cast<__half*>(page)[index] = __float2half_rn(fminf(fmaxf(x, -kFp16Max), kFp16Max));
  } else {
    reinterpret_cast<__nv_bfloat16*>(page)[index] = __float2bfloat16_rn(x);
  }
}

template <class Traits>
__device__ __forceinline__ void LoadRows(const std::byte* page, DType type,
                                         SealShared<Traits>& shared, const float* mean) {
  for (int i = threadIdx.x; i < kPageTokens * Traits::kHeadDim; i += kSealThreads) {
    const int token = i / Traits::kHeadDim, channel = i % Traits::kHeadDim;
    const float x = LoadDense(page, i, type);
    shared.rows[token * SealShared<Traits>::kStride + channel] =
        x - (mean == nullptr ? 0.0f : mean[channel]);
  }
  __syncthreads();
}

// rows [64, D] times `matrix` [D, D], in place: a thread owns a column of an eighth of the tokens.
template <class Traits>
__device__ __forceinline__ void RotateRows(SealShared<Traits>& shared, const float* matrix) {
  constexpr int kD = Traits::kHeadDim, kStride = SealShared<Traits>::kStride;
  constexpr int kTokensEach = 16;
  constexpr int kPieces = kPageTokens / kTokensEach * kD;
  float sums[(kPieces + kSealThreads - 1) / kSealThreads][kTokensEach] = {};
#pragma unroll
  for (int j = 0; j < (kPieces + kSealThreads - 1) / kSealThreads; ++j) {
    const int piece = threadIdx.x + j * kSealThreads;
    if (piece >= kPieces) break;
    const int column = piece % kD, first = piece / kD * kTokensEach;
    for (int i = 0; i < kD; ++i) {
      const float m = matrix[i * kD + column];
#pragma unroll
      for (int t = 0; t < kTokensEach; ++t) {
        sums[j][t] = fmaf(shared.rows[(first + t) * kStride + i], m, sums[j][t]);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < (kPieces + kSealThreads - 1) / kSealThreads; ++j) {
    const int piece = threadIdx.x + j * kSealThreads;
    if (piece >= kPieces) break;
    const int column = piece % kD, first = piece / kD * kTokensEach;
#pragma unroll
    for (int t = 0; t < kTokensEach; ++t) shared.rows[(first + t) * kStride + column] = sums[j][t];
  }
  __syncthreads();
}

// Every row through the block Hadamard transform, in place: a thread owns whole rows' butterflies.
template <class Traits>
__device__ __forceinline__ void HadamardRows(SealShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kStride = SealShared<Traits>::kStride;
  constexpr bool kWhole = (kD & (kD - 1)) == 0;
  for (int step = 1; step < kD; step *= 2) {
    for (int i = threadIdx.x; i < kPageTokens * kD / 2; i += kSealThreads) {
      const int token = i % kPageTokens, pair = i / kPageTokens;
      const int channel = pair / step * 2 * step + pair % step;
      const int block = kWhole ? kD : channel < 64 ? 64 : kD - 64;
      if (step >= block) continue;
      float* row = shared.rows + token * kStride;
      const float a = row[channel], b = row[channel + step];
      row[channel] = a + b;
      row[channel + step] = a - b;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < kPageTokens * kD; i += kSealThreads) {
    const int channel = i / kPageTokens;
    const float block = static_cast<float>(kWhole ? kD : channel < 64 ? 64 : kD - 64);
    shared.rows[i % kPageTokens * kStride + channel] *= 1.0f / sqrtf(block);
  }
  __syncthreads();
}

// Writes a section of 32-bit words; word(i) gives the i-th.
template <typename Word>
__device__ __forceinline__ void WriteWords(std::byte* section, int64_t bytes, Word word) {
  for (int i = threadIdx.x; i < bytes / 4; i += kSealThreads) {
    reinterpret_cast<uint32_t*>(section)[i] = word(i);
  }
}

// Element e of lane's A fragment: its row and column (format/planes.h, TileOrder::kMma).
__device__ __forceinline__ int FragmentRow(int lane, int e) { return lane / 4 + 8 * (e >> 1 & 1); }
__device__ __forceinline__ int FragmentColumn(int lane, int e) {
  return lane % 4 * 2 + (e & 1) + 8 * (e >> 2);
}

// Word `i` of a plane of 2-bit fields: two steps of 16 tokens of one lane. `rows_are_tokens`: keys.
template <class Traits>
__device__ __forceinline__ uint32_t PlaneWord(const uint8_t* codes, int i, int shift,
                                              bool rows_are_tokens) {
  const int tile = i / 64, lane = i % 64 / 2, half = i % 2;
  uint32_t word = 0;
#pragma unroll
  for (int parity = 0; parity < 2; ++parity) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int row = FragmentRow(lane, e), column = FragmentColumn(lane, e);
      const int token = 16 * (2 * half + parity) + (rows_are_tokens ? row : column);
      const int channel = 16 * tile + (rows_are_tokens ? column : row);
      const uint32_t field = codes[token * Traits::kHeadDim + channel] >> shift & 3u;
      word |= field << (8 * parity + e / 2 * 2 + 16 * (e % 2));
    }
  }
  return word;
}

template <class Traits>
__device__ void SealKeys(const SealParams& p, const PageLayout& layout, const std::byte* basis,
                         const BasisLayout& basis_layout, std::byte* page, int head, float* drift,
                         SealShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kStride = SealShared<Traits>::kStride;
  RotateRows<Traits>(shared, reinterpret_cast<const float*>(basis + basis_layout.key_basis));
  if (threadIdx.x < 2) shared.total[threadIdx.x] = 0;
  __syncthreads();
  const float* energy = reinterpret_cast<const float*>(basis + basis_layout.energy);
  for (int channel = threadIdx.x; channel < kD; channel += kSealThreads) {
    float high = 0, squares = 0;
    for (int t = 0; t < kPageTokens; ++t) {
      const float x = shared.rows[t * kStride + channel];
      high = fmaxf(high, fabsf(x));
      squares = fmaf(x, x, squares);
    }
    const uint8_t scale = ScaleFromMax(high);
    page[layout.key_scales.offset + head * layout.key_scales.bytes + channel] =
        static_cast<std::byte>(scale);
    shared.range[channel] = RangeFromScale(scale);
    if (channel >= kD / 2) {
      atomicAdd(&shared.total[0], squares / kPageTokens);
      atomicAdd(&shared.total[1], energy[channel]);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0 && drift != nullptr) {
    *drift = shared.total[1] > 0 ? shared.total[0] / shared.total[1] : 1.0f;
  }
  for (int i = threadIdx.x; i < kPageTokens * kD; i += kSealThreads) {
    const int channel = i % kD;
    shared.codes[i] = EncodeNested(shared.rows[i / kD * kStride + channel], shared.range[channel]);
  }
  __syncthreads();
  constexpr int kChunkTiles = ChunkChannels(kD) / kTileChannels;
  for (int chunk = 0; chunk < NumRankChunks(kD); ++chunk) {
    const PageLayout::Section& section = layout.key_base[chunk];
    WriteWords(page + section.offset + head * section.bytes, section.bytes, [&](int i) {
      const int tile = chunk * kChunkTiles + i / 128, lane = i % 128 / 4, step = i % 4;
      uint32_t word = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int token = 16 * step + FragmentRow(lane, e);
        const int channel = 16 * tile + FragmentColumn(lane, e);
        word |= static_cast<uint32_t>(shared.codes[token * kD + channel] >> 4)
                << (4 * (e / 2) + 16 * (e % 2));
      }
      return word;
    });
  }
  for (int plane = 0; plane < (p.stored_bits - 4) / 2; ++plane) {
    const PageLayout::Section& section = layout.key_fine[plane];
    WriteWords(page + section.offset + head * section.bytes, section.bytes,
               [&](int i) { return PlaneWord<Traits>(shared.codes, i, 2 - 2 * plane, true); });
  }
}

template <class Traits>
__device__ void SealValues(const SealParams& p, const PageLayout& layout,
                           const ValueFactors& factors, std::byte* page, int head,
                           SealShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kStride = SealShared<Traits>::kStride;
  constexpr int kGroups = Traits::kValueGroups, kWidth = kD / kGroups;
  HadamardRows<Traits>(shared);
  std::byte* scales = page + layout.value_scales.offset + head * layout.value_scales.bytes;
  for (int i = threadIdx.x; i < kPageTokens * kGroups; i += kSealThreads) {
    const int token = i / kGroups, group = i % kGroups;
    float high = 0;
    for (int c = 0; c < kWidth; ++c) {
      high = fmaxf(high, fabsf(shared.rows[token * kStride + group * kWidth + c]));
    }
    const uint8_t scale = ScaleFromMax(high);
    scales[i] = static_cast<std::byte>(scale);
    shared.range[i] = RangeFromScale(scale);
  }
  for (int channel = threadIdx.x; channel < kD; channel += kSealThreads) {
    float sum = 0;
    for (int t = 0; t < kPageTokens; ++t) sum += shared.rows[t * kStride + channel];
    shared.mean[channel] = sum / kPageTokens;
  }
  __syncthreads();
  float high = 0;
  for (int c = 0; c < kD; ++c) high = fmaxf(high, fabsf(shared.mean[c]));
  const float mean_scale = high / 127.0f;
  std::byte* summary = page + layout.value_summary.offset + head * layout.value_summary.bytes;
  __syncthreads();
  for (int c = threadIdx.x; c < kD; c += kSealThreads) {
    const float steps = mean_scale > 0 ? shared.mean[c] / mean_scale : 0.0f;
    const int rounded = max(-127, min(127, __float2int_rn(steps)));
    summary[sizeof(ValueSummary) + c] = static_cast<std::byte>(static_cast<int8_t>(rounded));
    shared.mean[c] = static_cast<float>(rounded) * mean_scale;
  }
  __syncthreads();
  if (threadIdx.x < kPageTokens) {
    float distance2 = 0;
    for (int c = 0; c < kD; ++c) {
      const float off = shared.rows[threadIdx.x * kStride + c] - shared.mean[c];
      distance2 = fmaf(off, off, distance2);
    }
    shared.token[threadIdx.x] = distance2;
  }
  for (int i = threadIdx.x; i < kPageTokens * kD; i += kSealThreads) {
    const int token = i / kD, channel = i % kD;
    shared.codes[i] = EncodeNested(shared.rows[token * kStride + channel],
                                   shared.range[token * kGroups + channel / kWidth]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0, largest = 0, range2 = 0;
    for (int t = 0; t < kPageTokens; ++t) {
      total += shared.token[t];
      largest = fmaxf(largest, shared.token[t]);
    }
    for (int i = 0; i < kPageTokens * kGroups; ++i) {
      range2 = fmaf(shared.range[i], shared.range[i], range2);
    }
    *reinterpret_cast<ValueSummary*>(summary) =
        ValueSummary{mean_scale, factors.spread * sqrtf(total / kPageTokens), sqrtf(largest),
                     factors.rounding * sqrtf(range2 / (kPageTokens * kGroups))};
  }
  for (int plane = 0; plane < p.stored_bits / 2; ++plane) {
    const PageLayout::Section& section = layout.value_plane[plane];
    WriteWords(page + section.offset + head * section.bytes, section.bytes,
               [&](int i) { return PlaneWord<Traits>(shared.codes, i, 6 - 2 * plane, false); });
  }
}

template <class Traits>
__global__ void __launch_bounds__(kSealThreads, 2)
    SealPageKernel(const __grid_constant__ SealParams p,
                   const __grid_constant__ PageLayout layout) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<SealShared<Traits>*>(shared_bytes);
  const int task = blockIdx.x, head = blockIdx.y;
  const std::byte* source = p.pool + static_cast<int64_t>(p.source[task]) * kPageAlignment;
  std::byte* target = p.pool + static_cast<int64_t>(p.target[task]) * kPageAlignment;
  const BasisLayout basis_layout = MakeBasisLayout(p.shape);
  const std::byte* basis = p.pool + static_cast<int64_t>(p.basis[task]) * kPageAlignment +
                           head * basis_layout.head_bytes;
  LoadRows<Traits>(source + DenseKeyOffset(head, Traits::kHeadDim, p.page_type), p.page_type,
                   shared, reinterpret_cast<const float*>(basis + basis_layout.mean));
  SealKeys<Traits>(p, layout, basis, basis_layout, target, head,
                   p.drift == nullptr ? nullptr : p.drift + task * p.shape.num_kv_heads + head,
                   shared);
  __syncthreads();
  LoadRows<Traits>(source + DenseValueOffset(p.shape, head, p.page_type), p.page_type, shared,
                   nullptr);
  SealValues<Traits>(p, layout,
                     *reinterpret_cast<const ValueFactors*>(basis + basis_layout.factors), target,
                     head, shared);
}

// The stored bits of a code at (token, channel): its value in units of the range.
template <class Traits>
__device__ __forceinline__ float DecodeStored(const std::byte* page, const PageLayout& layout,
                                              int head, int token, int channel, bool keys) {
  constexpr int kChunk = ChunkChannels(Traits::kHeadDim);
  const int in_tile = channel % kTileChannels, tile = channel / kTileChannels;
  uint32_t code = 0;
  auto field = [&](const PageLayout::Section& section, int tile_offset, BitPosition at,
                   uint32_t mask) {
    const std::byte* from = page + section.offset + head * section.bytes + tile_offset;
    return static_cast<uint32_t>(from[at.byte]) >> at.shift & mask;
  };
  if (keys) {
    const int chunk = channel / kChunk;
    code = field(layout.key_base[chunk], channel % kChunk / kTileChannels * kKeyTileBytes,
                 KeyNibblePosition(TileOrder::kMma, token, in_tile), 15u);
    for (int plane = 0; plane < (layout.stored_bits - 4) / 2; ++plane) {
      code = code << 2 | field(layout.key_fine[plane], tile * kPlaneTileBytes,
                               KeyFinePosition(TileOrder::kMma, token, in_tile), 3u);
    }
  } else {
    for (int plane = 0; plane < layout.stored_bits / 2; ++plane) {
      code = code << 2 | field(layout.value_plane[plane], tile * kPlaneTileBytes,
                               ValuePlanePosition(TileOrder::kMma, token, in_tile), 3u);
    }
  }
  return DecodeNested(code, layout.stored_bits, 1.0f);
}

template <class Traits>
__global__ void __launch_bounds__(kSealThreads, 2)
    ReopenPageKernel(const __grid_constant__ SealParams p,
                     const __grid_constant__ PageLayout layout) {
  constexpr int kD = Traits::kHeadDim, kStride = SealShared<Traits>::kStride;
  constexpr int kGroups = Traits::kValueGroups, kWidth = kD / kGroups;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<SealShared<Traits>*>(shared_bytes);
  const int task = blockIdx.x, head = blockIdx.y;
  const std::byte* source = p.pool + static_cast<int64_t>(p.source[task]) * kPageAlignment;
  std::byte* target = p.pool + static_cast<int64_t>(p.target[task]) * kPageAlignment;
  const BasisLayout basis_layout = MakeBasisLayout(p.shape);
  const std::byte* basis = p.pool + static_cast<int64_t>(p.basis[task]) * kPageAlignment +
                           head * basis_layout.head_bytes;
  const auto* key_scales = reinterpret_cast<const uint8_t*>(source + layout.key_scales.offset +
                                                            head * layout.key_scales.bytes);
  const auto* value_scales = reinterpret_cast<const uint8_t*>(source + layout.value_scales.offset +
                                                              head * layout.value_scales.bytes);
  for (int i = threadIdx.x; i < kPageTokens * kD; i += kSealThreads) {
    const int token = i / kD, channel = i % kD;
    shared.rows[token * kStride + channel] =
        DecodeStored<Traits>(source, layout, head, token, channel, true) *
        RangeFromScale(key_scales[channel]);
  }
  __syncthreads();
  // k = mu + x Q^T: a thread a channel, Q's row in registers would not fit: from the cache. Rounded
  // as RestoreKey rounds, so that a reopened page holds what was read from the sealed one.
  const auto* query_basis = reinterpret_cast<const __half*>(basis + basis_layout.query_basis);
  const float* mean = reinterpret_cast<const float*>(basis + basis_layout.mean);
  std::byte* keys = target + DenseKeyOffset(head, kD, p.page_type);
  for (int i = threadIdx.x; i < kPageTokens * kD; i += kSealThreads) {
    const int token = i % kPageTokens, channel = i / kPageTokens;
    float sum = mean[channel];
    for (int c = 0; c < kD; ++c) {
      const float basis_value = __half2float(query_basis[channel * kD + c]);
      sum = __fadd_rn(sum, __fmul_rn(shared.rows[token * kStride + c], basis_value));
    }
    StoreDense(keys, token * kD + channel, p.page_type, sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kPageTokens * kD; i += kSealThreads) {
    const int token = i / kD, channel = i % kD;
    shared.rows[token * kStride + channel] =
        DecodeStored<Traits>(source, layout, head, token, channel, false) *
        RangeFromScale(value_scales[token * kGroups + channel / kWidth]);
  }
  __syncthreads();
  HadamardRows<Traits>(shared);
  std::byte* values = target + DenseValueOffset(p.shape, head, p.page_type);
  for (int i = threadIdx.x; i < kPageTokens * kD; i += kSealThreads) {
    StoreDense(values, i, p.page_type, shared.rows[i / kD * kStride + i % kD]);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_SEAL_CUH_

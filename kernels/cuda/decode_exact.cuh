#ifndef ADAATTN_KERNELS_CUDA_DECODE_EXACT_CUH_
#define ADAATTN_KERNELS_CUDA_DECODE_EXACT_CUH_

// Decode attention over dense paged KV, split along kv_len.
//   s[t] = scale * dot(q, k[t]);  lse = ln sum_t exp(s[t]);  out = sum_t exp(s[t] - lse) * v[t]
// grid (num_ctas): persistent; a CTA works off its items (decode_schedule.h), each a run of pages
// of one (sequence, kv head, row block). The rows of a block are the q heads of the group times
// the rows of q, padded to a multiple of 8: S = K q^T and O^T = V^T P^T, tokens and channels as M.
// Every warp reads its own units of tokens through a ring of its own, keeps its own softmax state
// and meets the others only at the end of an item. The last CTA of a group joins its parts.

#include <math_constants.h>

#include "absl/status/status.h"
#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/decode_epilogue.cuh"
#include "kernels/cuda/decode_traits.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/params.h"
#include "kernels/cuda/status.h"

namespace adaattn {

// A warp's ring of slots. K and V of its units alternate; the copy engine fills slots in order.
template <class Traits>
struct WarpRing {
  uint32_t slots, barriers;  // shared addresses
  int32_t fill_slot = 0, use_slot = 0;
  uint32_t use_parity = 0;

  // The item being read.
  PageMemory memory;
  int64_t key_offset;     // of the kv head's K in a page
  int64_t value_offset;   // from K to V of a page
  const uint32_t* pages;  // the sequence's table
  int32_t begin, end;     // tokens
  int32_t first_unit;     // this warp's first, counted from token 0
  int32_t num_units;      // of this warp
  int32_t fill_index;     // next copy: unit fill_index / 2, V when odd
  uint32_t page_ids;      // of units 32 i + lane

  __device__ __forceinline__ int32_t UnitToken(int32_t unit) const {
    return (first_unit + unit * Traits::kWarps) * Traits::kUnitTokens;
  }

  // Starts the next copy, if there is one. All lanes call it, after all of them are done with the
  // slot's last contents.
  __device__ __forceinline__ void Fill(int32_t lane) {
    const int32_t unit = fill_index >> 1;
    if (unit >= num_units) return;
    if ((fill_index & 63) == 0) {
      const int32_t ahead = min(unit + lane, num_units - 1);
      page_ids = pages[UnitToken(ahead) / kPageTokens];
    }
    const uint32_t page = __shfl_sync(0xffffffffu, page_ids, unit & 31);
    if (lane == 0) {
      const int32_t token = UnitToken(unit);
      const int32_t first = max(token, begin), last = min(token + Traits::kUnitTokens, end);
      const std::byte* source = memory.At(PageId{page}) + key_offset +
                                (first % kPageTokens) * Traits::kRowBytes +
                                ((fill_index & 1) != 0 ? value_offset : 0);
      const uint32_t bytes = (last - first) * Traits::kRowBytes;
      const uint32_t barrier = barriers + 8 * fill_slot;
      ArriveExpectBytes(barrier, bytes);
      BulkCopy(slots + fill_slot * Traits::kSlotBytes + (first - token) * Traits::kRowBytes, source,
               bytes, barrier);
    }
    ++fill_index;
    fill_slot = fill_slot + 1 == Traits::kSlots ? 0 : fill_slot + 1;
  }

  __device__ __forceinline__ uint32_t WaitSlot() {
    WaitBarrier(barriers + 8 * use_slot, use_parity);
    return slots + use_slot * Traits::kSlotBytes;
  }

  // Gives the slot back and refills it.
  __device__ __forceinline__ void Release(int32_t lane) {
    use_parity ^= use_slot + 1 == Traits::kSlots;
    use_slot = use_slot + 1 == Traits::kSlots ? 0 : use_slot + 1;
    __syncwarp();
    Fill(lane);
  }
};

template <class Traits, bool kWithRest, int kWords>
__device__ __forceinline__ void ScoreBlock(uint32_t row, int step,
                                           const uint2 (&query)[Traits::kSteps][Traits::kRowTiles],
                                           const typename Traits::Smem& smem, int32_t lane,
                                           float (&s)[Traits::kRowTiles][4]) {
  using Operand = typename Traits::Operand;
  uint32_t x[kWords], y[kWords];
  LoadShared<kWords>(x, row);
  LoadShared<kWords>(y, row + 8 * Traits::kRowBytes);
  constexpr int kWordsPerStep = Traits::kIsFp8 ? 1 : 2;
#pragma unroll
  for (int i = 0; i < kWords / kWordsPerStep; ++i) {
    uint32_t a[4];
    if constexpr (Traits::kIsFp8) {
      a[0] = HalvesFromE4m3(x[i] & 0xffffu);
      a[1] = HalvesFromE4m3(y[i] & 0xffffu);
      a[2] = HalvesFromE4m3(x[i] >> 16);
      a[3] = HalvesFromE4m3(y[i] >> 16);
    } else {
      a[0] = x[2 * i], a[1] = y[2 * i], a[2] = x[2 * i + 1], a[3] = y[2 * i + 1];
    }
#pragma unroll
    for (int n = 0; n < Traits::kRowTiles; ++n) {
      const uint2 b =
          Traits::kQueryInRegisters ? query[step + i][n] : smem.query[step + i][n][lane];
      Mma16x8x16<Operand>(s[n], a, b.x, b.y);
      if constexpr (kWithRest) {
        const uint2 rest = smem.query_rest[step + i][n][lane];
        Mma16x8x16<Operand>(s[n], a, rest.x, rest.y);
      }
    }
  }
}

// s = K q^T of the unit in `slot`, unscaled; of the rounded q, and of what its rounding left.
template <class Traits, bool kWithRest>
__device__ __forceinline__ void ScoreUnit(uint32_t slot,
                                          const uint2 (&query)[Traits::kSteps][Traits::kRowTiles],
                                          const typename Traits::Smem& smem, int32_t lane,
                                          float (&s)[Traits::kTokenTiles][Traits::kRowTiles][4]) {
  constexpr int kBlocks = Traits::kRowBytes / 64, kRest = Traits::kRowBytes % 64 / 16;
  constexpr int kStepsPerBlock = Traits::kBlockChannels / 16;
#pragma unroll
  for (int m = 0; m < Traits::kTokenTiles; ++m) {
#pragma unroll
    for (int n = 0; n < Traits::kRowTiles; ++n) {
      s[m][n][0] = s[m][n][1] = s[m][n][2] = s[m][n][3] = 0;
    }
    const uint32_t row = slot + (m * 16 + lane / 4) * Traits::kRowBytes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      ScoreBlock<Traits, kWithRest, 4>(row + b * 64 + lane % 4 * 16, b * kStepsPerBlock, query,
                                       smem, lane, s[m]);
    }
    if constexpr (kRest > 0) {
      ScoreBlock<Traits, kWithRest, kRest>(row + kBlocks * 64 + lane % 4 * kRest * 4,
                                           kBlocks * kStepsPerBlock, query, smem, lane, s[m]);
    }
  }
}

// Brings the scores of the unit that starts at `token` to base 2 and masks what a row does not see.
template <class Traits>
__device__ __forceinline__ void ScaleUnit(int32_t token, int32_t lane,
                                          const RowState<Traits>& state,
                                          const typename Traits::Smem& smem,
                                          float (&s)[Traits::kTokenTiles][Traits::kRowTiles][4]) {
  const bool edge = token < state.inner_begin || token + Traits::kUnitTokens > state.inner_end;
#pragma unroll
  for (int n = 0; n < Traits::kRowTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4 * Traits::kTokenTiles; ++i) {
      s[i / 4][n][i % 4] *= state.scale[n][i % 2];
    }
    if (state.cap > 0) {
#pragma unroll
      for (int i = 0; i < 4 * Traits::kTokenTiles; ++i) {
        s[i / 4][n][i % 4] = state.cap * tanhf(s[i / 4][n][i % 4] / state.cap);
      }
    }
    if (edge) {
#pragma unroll
      for (int i = 0; i < 4 * Traits::kTokenTiles; ++i) {
        const KeyRange seen = smem.row_keys[n * 8 + lane % 4 * 2 + i % 2];
        const int32_t at = token + i / 4 * 16 + i / 2 % 2 * 8 + lane / 4;
        if (at < seen.begin || at >= seen.end) s[i / 4][n][i % 4] = kMasked;
      }
    }
  }
}

// Moves the state on to the scores of a unit and leaves exp2(s - max) in s.
template <class Traits>
__device__ __forceinline__ void SoftmaxUnit(RowState<Traits>& state,
                                            float (&s)[Traits::kTokenTiles][Traits::kRowTiles][4],
                                            float (&sums)[Traits::kRowTiles][Traits::kSteps][4]) {
  bool grew = false;
  float top[Traits::kRowTiles][2];
#pragma unroll
  for (int n = 0; n < Traits::kRowTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float most = kMasked;
#pragma unroll
      for (int m = 0; m < Traits::kTokenTiles; ++m) {
        most = fmaxf(most, fmaxf(s[m][n][c], s[m][n][2 + c]));
      }
      for (int offset = 4; offset < 32; offset *= 2) {
        most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, offset));
      }
      top[n][c] = fmaxf(state.max[n][c], most);
      grew |= top[n][c] > state.max[n][c];
    }
  }
  const bool rescale = __any_sync(0xffffffffu, grew);
#pragma unroll
  for (int n = 0; n < Traits::kRowTiles; ++n) {
    if (rescale) {
      const float low = Exp2(state.max[n][0] - top[n][0]);
      const float high = Exp2(state.max[n][1] - top[n][1]);
      state.sum[n][0] *= low, state.mean[n][0] *= low;
      state.sum[n][1] *= high, state.mean[n][1] *= high;
#pragma unroll
      for (int i = 0; i < Traits::kSteps; ++i) {
        sums[n][i][0] *= low, sums[n][i][2] *= low;
        sums[n][i][1] *= high, sums[n][i][3] *= high;
      }
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      state.max[n][c] = top[n][c];
      // A row that has seen no key yet must not turn its masked scores into ones.
      const float base = top[n][c] > 0.5f * kMasked ? top[n][c] : 0.0f;
#pragma unroll
      for (int m = 0; m < Traits::kTokenTiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float& x = s[m][n][2 * half + c];
          const float p = Exp2(x - base);
          state.sum[n][c] += p;
          state.mean[n][c] = fmaf(p, x, state.mean[n][c]);
          x = p;
        }
      }
    }
  }
}

// Adds V^T P^T of 16 tokens for the channels that one piece of kWidth bytes a lane covers.
// `row` is the lane's piece of the token 2t of these 16; its tokens are 2t + {0, 1, 8, 9}.
template <class Traits, int kWidth>
__device__ __forceinline__ void ValueBlock(uint32_t row, int tile,
                                           const uint32_t (&p)[Traits::kRowTiles][2],
                                           float (&sums)[Traits::kRowTiles][Traits::kSteps][4]) {
  using Operand = typename Traits::Operand;
  constexpr int kWords = kWidth < 4 ? 1 : kWidth / 4;
  uint32_t x[4][kWords];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t at = row + ((i & 1) + (i >> 1) * 8) * Traits::kRowBytes;
    if constexpr (kWidth == 2) {
      x[i][0] = LoadShared16(at);
    } else {
      LoadShared<kWords>(x[i], at);
    }
  }
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    constexpr int kTilesPerWord = !Traits::kIsFp8 || kWidth == 2 ? 1 : 2;
#pragma unroll
    for (int j = 0; j < kTilesPerWord; ++j) {
      uint32_t a[4];
      if constexpr (Traits::kIsFp8) {
        // Bytes of two tokens side by side first, so that one conversion makes a pair of tokens.
        const uint32_t select = j == 0 ? 0x5140 : 0x7362;
        const uint32_t low = __byte_perm(x[0][w], x[1][w], select);
        const uint32_t high = __byte_perm(x[2][w], x[3][w], select);
        a[0] = HalvesFromE4m3(low & 0xffffu);
        a[1] = HalvesFromE4m3(low >> 16);
        a[2] = HalvesFromE4m3(high & 0xffffu);
        a[3] = HalvesFromE4m3(high >> 16);
      } else {
        a[0] = __byte_perm(x[0][w], x[1][w], 0x5410);
        a[1] = __byte_perm(x[0][w], x[1][w], 0x7632);
        a[2] = __byte_perm(x[2][w], x[3][w], 0x5410);
        a[3] = __byte_perm(x[2][w], x[3][w], 0x7632);
      }
#pragma unroll
      for (int n = 0; n < Traits::kRowTiles; ++n) {
        Mma16x8x16<Operand>(sums[n][tile + w * kTilesPerWord + j], a, p[n][0], p[n][1]);
      }
    }
  }
}

// sums += V^T P^T of the unit in `slot`.
template <class Traits>
__device__ __forceinline__ void ValueUnit(
    uint32_t slot, int32_t lane, const float (&s)[Traits::kTokenTiles][Traits::kRowTiles][4],
    float (&sums)[Traits::kRowTiles][Traits::kSteps][4]) {
  using Operand = typename Traits::Operand;
  constexpr int kBlocks = Traits::kRowBytes / 128, kRest = Traits::kRowBytes % 128;
  constexpr int kTileBytes = 16 * static_cast<int>(sizeof(typename Traits::Kv));
  const uint32_t g = lane / 4;
#pragma unroll
  for (int m = 0; m < Traits::kTokenTiles; ++m) {
    uint32_t p[Traits::kRowTiles][2];
#pragma unroll
    for (int n = 0; n < Traits::kRowTiles; ++n) {
      p[n][0] = Transpose8x8(PackPair<Operand>(s[m][n][0], s[m][n][1]));
      p[n][1] = Transpose8x8(PackPair<Operand>(s[m][n][2], s[m][n][3]));
    }
    uint32_t row = slot + (m * 16 + lane % 4 * 2) * Traits::kRowBytes;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      ValueBlock<Traits, 16>(row + b * 128 + g * 16, b * 128 / kTileBytes, p, sums);
    }
    constexpr int kAfter16 = kBlocks * 128, kAfter8 = kAfter16 + (kRest & 64);
    constexpr int kAfter4 = kAfter8 + (kRest & 32);
    if constexpr ((kRest & 64) != 0) {
      ValueBlock<Traits, 8>(row + kAfter16 + g * 8, kAfter16 / kTileBytes, p, sums);
    }
    if constexpr ((kRest & 32) != 0) {
      ValueBlock<Traits, 4>(row + kAfter8 + g * 4, kAfter8 / kTileBytes, p, sums);
    }
    if constexpr ((kRest & 16) != 0) {
      ValueBlock<Traits, 2>(row + kAfter4 + g * 2, kAfter4 / kTileBytes, p, sums);
    }
  }
}

// Rows of V that this item does not own may hold anything, even NaN, which 0 would not mask.
template <class Traits>
__device__ __forceinline__ void ClearForeignRows(uint32_t slot, int32_t token, int32_t begin,
                                                 int32_t end, int32_t lane) {
  if (token >= begin && token + Traits::kUnitTokens <= end) return;
  const int32_t first = max(begin - token, 0) * Traits::kRowBytes;
  const int32_t last = min(end - token, Traits::kUnitTokens) * Traits::kRowBytes;
  for (int32_t at = lane * 16; at < Traits::kSlotBytes; at += 32 * 16) {
    if (at < first || at >= last) StoreSharedZero16(slot + at);
  }
  FenceAsyncShared();
  __syncwarp();
}

template <class Traits>
__device__ __forceinline__ void StartItem(const DecodeParams& p, const DecodeItem& item,
                                          const DeviceSequence& sequence, int32_t warp,
                                          int32_t lane, WarpRing<Traits>& ring) {
  const KeyRange range = AttendedKeys(sequence);
  ring.memory = p.memory;
  ring.key_offset = int64_t{item.kv_head} * kPageTokens * Traits::kRowBytes;
  ring.value_offset = int64_t{p.num_kv_heads} * kPageTokens * Traits::kRowBytes;
  ring.pages = p.page_table + sequence.page_table;
  ring.begin = max(item.page_begin * kPageTokens, range.begin);
  ring.end = min(item.page_end * kPageTokens, range.end);
  const int32_t first = ring.begin / Traits::kUnitTokens;
  const int32_t num_units =
      ring.end <= ring.begin ? 0
                             : (ring.end + Traits::kUnitTokens - 1) / Traits::kUnitTokens - first;
  ring.first_unit = first + warp;
  ring.num_units = (num_units - warp + Traits::kWarps - 1) / Traits::kWarps;
  ring.fill_index = 0;
  for (int i = 0; i < Traits::kSlots; ++i) ring.Fill(lane);
}

template <class Traits>
__device__ __forceinline__ void StartRows(const DecodeParams& p, const DecodeItem& item,
                                          const DeviceSequence& sequence, int32_t lane,
                                          const typename Traits::Smem& smem,
                                          RowState<Traits>& state) {
  const float key_scale =
      sequence.key_scales < 0 ? 1.0f : p.scales[sequence.key_scales + item.kv_head];
  state.cap = sequence.softcap * CUDART_L2E_F;
  // Rows are in order of position, so the first sees the earliest end and the last the latest
  // start.
  state.inner_begin = smem.row_keys[Traits::kRows - 1].begin;
  state.inner_end = smem.row_keys[0].end;
#pragma unroll
  for (int n = 0; n < Traits::kRowTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      state.max[n][c] = kMasked;
      state.sum[n][c] = state.mean[n][c] = 0;
      state.scale[n][c] = smem.row_scale[n * 8 + lane % 4 * 2 + c] * sequence.softmax_scale *
                          key_scale * CUDART_L2E_F;
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    DecodeExactKernel(const __grid_constant__ DecodeParams p) {
  extern __shared__ __align__(128) uint8_t raw[];
  auto& smem = *reinterpret_cast<typename Traits::Smem*>(raw);
  const int32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  WarpRing<Traits> ring;
  ring.slots = SharedAddress(smem.ring[warp]);
  ring.barriers = SharedAddress(smem.full[warp]);
  if (lane < Traits::kSlots) InitBarrier(ring.barriers + 8 * lane, 1);
  FenceBarrierInit();
  __syncwarp();

  const int32_t last_item = p.cta_items[blockIdx.x + 1];
  for (int32_t index = p.cta_items[blockIdx.x]; index < last_item; ++index) {
    const DecodeItem item = p.items[index];
    const DeviceSequence& sequence = p.sequences[item.sequence];
    StartItem<Traits>(p, item, sequence, warp, lane, ring);
    const bool with_rest = __syncthreads_or(StageQuery<Traits>(p, item, sequence, smem)) != 0;
    uint2 query[Traits::kSteps][Traits::kRowTiles];
    if constexpr (Traits::kQueryInRegisters) {
#pragma unroll
      for (int i = 0; i < Traits::kSteps; ++i) {
#pragma unroll
        for (int n = 0; n < Traits::kRowTiles; ++n) query[i][n] = smem.query[i][n][lane];
      }
    }
    RowState<Traits> state;
    StartRows<Traits>(p, item, sequence, lane, smem, state);
    float sums[Traits::kRowTiles][Traits::kSteps][4] = {};
    for (int32_t unit = 0; unit < ring.num_units; ++unit) {
      const int32_t token = ring.UnitToken(unit);
      float s[Traits::kTokenTiles][Traits::kRowTiles][4];
      if (with_rest) {
        ScoreUnit<Traits, true>(ring.WaitSlot(), query, smem, lane, s);
      } else {
        ScoreUnit<Traits, false>(ring.WaitSlot(), query, smem, lane, s);
      }
      ring.Release(lane);
      ScaleUnit<Traits>(token, lane, state, smem, s);
      SoftmaxUnit<Traits>(state, s, sums);
      const uint32_t slot = ring.WaitSlot();
      ClearForeignRows<Traits>(slot, token, ring.begin, ring.end, lane);
      ValueUnit<Traits>(slot, lane, s, sums);
      ring.Release(lane);
    }
    FinishItem<Traits>(p, item, sequence, max(ring.end - ring.begin, 0), state, sums, smem);
  }
}

template <class Traits>
absl::Status LaunchDecodeExact(const DecodeParams& p, cudaStream_t stream) {
  constexpr int kBytes = static_cast<int>(sizeof(typename Traits::Smem));
  static const cudaError_t configured = cudaFuncSetAttribute(
      DecodeExactKernel<Traits>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  ADAATTN_RETURN_IF_ERROR(FromCuda(configured, "cudaFuncSetAttribute(DecodeExactKernel)"));
  DecodeExactKernel<Traits><<<p.num_ctas, Traits::kThreads, kBytes, stream>>>(p);
  return FromCuda(cudaGetLastError(), "DecodeExactKernel");
}

// Picks the variant for `row_tiles` (1, 2 or 4; head_dim 256: 1 or 2).
template <typename Kv, int kHeadDim>
absl::Status LaunchDecodeRows(const DecodeParams& p, int32_t row_tiles, cudaStream_t stream) {
  if (row_tiles == 1) return LaunchDecodeExact<DecodeTraits<Kv, kHeadDim, 1>>(p, stream);
  if (row_tiles == 2) return LaunchDecodeExact<DecodeTraits<Kv, kHeadDim, 2>>(p, stream);
  if constexpr (kHeadDim <= 128) {
    if (row_tiles == 4) return LaunchDecodeExact<DecodeTraits<Kv, kHeadDim, 4>>(p, stream);
  }
  return absl::InternalError("DecodeExactKernel: no variant for these row tiles");
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_DECODE_EXACT_CUH_

#ifndef ADAATTN_KERNELS_CUDA_DECODE_TRAITS_CUH_
#define ADAATTN_KERNELS_CUDA_DECODE_TRAITS_CUH_

// Sizes of the exact decode kernel and the order in which lanes read channels.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/params.h"
#include "kernels/shape.h"

namespace adaattn {

// Floats that follow a row of a warp's sums in shared memory: max, sum, mean, padding.
inline constexpr int kRowStateFloats = 4;

// K and V as stored, head_dim, and how many blocks of 8 rows (q heads x q_len) a CTA carries.
template <typename KvT, int kHeadDimV, int kRowTilesV>
struct DecodeTraits {
  using Kv = KvT;
  // FP8 becomes FP16 on its way to the tensor cores: exact, and one instruction for two values.
  using Operand = std::conditional_t<std::is_same_v<KvT, __nv_bfloat16>, __nv_bfloat16, __half>;
  static constexpr bool kIsFp8 = sizeof(KvT) == 1;
  // FP16 has a narrow exponent: rows of q are scaled by a power of two to about 1.
  static constexpr bool kScaleRows = std::is_same_v<Operand, __half>;
  static constexpr int kHeadDim = kHeadDimV, kRowTiles = kRowTilesV, kRows = 8 * kRowTiles;
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kCtasPerSm = 2;
  static constexpr int kRowBytes = kHeadDim * static_cast<int>(sizeof(KvT));
  // A unit is what a warp reads at a time: one bulk copy of 4 to 8 KB for K and one for V.
  // Many rows take smaller units: the scores of a unit live in registers.
  static constexpr int kUnitTokens =
      kRowBytes >= 512 || kRowTiles >= 4 || kHeadDim * kRowTiles >= 512 ? 16
      : kRowBytes <= 64                                                 ? 64
                                                                        : 32;
  static constexpr int kTokenTiles = kUnitTokens / 16;
  static constexpr int kSlotBytes = kUnitTokens * kRowBytes;
  static constexpr int kSlots = 24 * 1024 / kSlotBytes < 12 ? 24 * 1024 / kSlotBytes : 12;
  static constexpr int kSteps = kHeadDim / 16;  // MMA steps over channels; also tiles of channels
  static constexpr bool kQueryInRegisters = kSteps * kRowTiles <= 16;
  static_assert(kHeadDim % 16 == 0 && kSlots >= 2 && kPageTokens % kUnitTokens == 0);

  struct Smem {
    alignas(128) uint8_t ring[kWarps][kSlots][kSlotBytes];
    // q in fragment order, rounded to Operand, and what that rounding left of it.
    uint2 query[kSteps][kRowTiles][32], query_rest[kSteps][kRowTiles][32];
    float row_scale[kRows];
    KeyRange row_keys[kRows];  // what each row sees; padding repeats the last row
    uint64_t full[kWarps][kSlots];
    int32_t is_last;
  };
  static_assert(sizeof(Smem) + 1024 <= 228 * 1024 / kCtasPerSm, "kCtasPerSm share shared memory");
  // Between items the ring holds the warps' sums, each row followed by its state.
  static constexpr int kSumStride = kHeadDim + kRowStateFloats;
  static_assert(kWarps * kRows * kSumStride * 4 <= kWarps * kSlots * kSlotBytes,
                "a group's partial sums fit the ring");
  static_assert(kRows * kMaxDecodeCtas * 4 <= kWarps * kSlots * kSlotBytes,
                "the weights of a group's parts fit the ring");

  // Which four neighbouring channels lane t holds as the k index of step `step`: lanes read K rows
  // in 16-byte pieces (a 64-byte block a step of four lanes; the rest of a row in smaller ones), so
  // that one load serves several steps. q uses the same order, which then cancels.
  static constexpr int kBlockChannels = 64 / static_cast<int>(sizeof(KvT));
  static __host__ __device__ constexpr int KeyChannel(int step, int t) {
    const int block = step * 16 / kBlockChannels;
    const int rest = kHeadDim - block * kBlockChannels;
    const int channels = (rest < kBlockChannels ? rest : kBlockChannels) / 4;
    return block * kBlockChannels + t * channels + (step - block * kBlockChannels / 16) * 4;
  }
  // The first of the two neighbouring channels that rows g and g + 8 of tile `tile` of the output
  // stand for. Lanes read V in pieces of 16, 8, 4 or 2 bytes, eight of them side by side.
  static __host__ __device__ constexpr int ValueChannel(int tile, int g) {
    int base = 0, width = 16;
    const int at = tile * 16;
    while (true) {
      const int channels = width / static_cast<int>(sizeof(KvT)) * 8;
      if (base + channels <= kHeadDim) {
        if (at < base + channels) return base + g * (channels / 8) + (at - base) / 16 * 2;
        base += channels;
      } else {
        width /= 2;
      }
    }
  }
};

// Softmax state of the columns 8 i + 2t and 8 i + 2t + 1. Scores are in base 2; kMasked stands for
// minus infinity so that 0 * score stays 0.
inline constexpr float kMasked = -1e30f;
template <class Traits>
struct RowState {
  float max[Traits::kRowTiles][2], sum[Traits::kRowTiles][2], mean[Traits::kRowTiles][2];
  float scale[Traits::kRowTiles][2];
  int32_t inner_begin, inner_end;  // keys that all rows see
  float cap;                       // base 2; 0 = none
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_DECODE_TRAITS_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_FIRST_TOKEN_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_FIRST_TOKEN_CUH_

// The value of a sequence's first token, which may stand for its page (policy/error_model.h).

#include "kernels/cuda/progressive_means.cuh"

namespace adaattn {

// A channel of the value of a page's first token: the bytes that hold its code. All loads are on
// their way at once.
template <class Traits>
struct FirstCode {
  uint32_t bytes[4] = {};

  __device__ __forceinline__ void Load(const PageLayout& layout, const std::byte* page, int head,
                                       int channel) {
    const uint32_t at = ValuePlanePosition(TileOrder::kMma, 0, channel % kTileChannels).byte +
                        channel / kTileChannels * kPlaneTileBytes + head * Traits::kPlaneBytes;
#pragma unroll
    for (int plane = 0; plane < 4; ++plane) {
      if (plane >= layout.stored_bits / 2) break;
      const auto begin = static_cast<uint32_t>(layout.value_plane[plane].offset);
      bytes[plane] = static_cast<uint32_t>(page[begin + at]);
    }
  }

  // At `bits`, at most those stored, in units of its range.
  __device__ __forceinline__ float Value(int bits, int channel) const {
    const int shift = ValuePlanePosition(TileOrder::kMma, 0, channel % kTileChannels).shift;
    uint32_t code = 0;
#pragma unroll
    for (int plane = 0; plane < 4; ++plane) {
      if (plane < bits / 2) code = code << 2 | (bytes[plane] >> shift & 3u);
    }
    return DecodeNested(code, bits, 1.0f);
  }
};

// The sequence's first token, which may stand for its page: a channel a thread, of which there are
// at least head_dim.
template <class Traits>
struct FirstToken {
  static constexpr int kD = Traits::kHeadDim, kGroups = Traits::kValueGroups;
  static_assert(kGroups <= 4, "the scales are a word");
  FirstCode<Traits> code;
  uint32_t scales = 0;  // a byte a group

  // Depends on no earlier kernel.
  __device__ __forceinline__ void Load(const ProgressiveArgs& p, uint32_t id, int head,
                                       int thread) {
    const std::byte* page = p.pool + static_cast<int64_t>(id) * kPageAlignment;
    scales = *reinterpret_cast<const uint32_t*>(page + p.layout.value_scales.offset +
                                                head * int64_t{Traits::kValueScaleBytes});
    if (thread < kD) code.Load(p.layout, page, head, thread);
  }

  // As the summary of a page, to the row of its own, of no weight yet. At the depth that a static
  // policy reads, else at the stored one.
  __device__ __forceinline__ void Store(const ProgressiveArgs& p, const DecisionParams& decision,
                                        int thread, ChunkMeans<Traits>& means) const {
    const int bits = decision.policy == Policy::kStatic
                         ? StaticDepth(decision, kD, p.stored_bits).value_bits
                         : p.stored_bits;
    float top = 0, squares = 0, own = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const float range = RangeOf(scales >> 8 * g & 0xffu);
      top = fmaxf(top, range);
      squares = fmaf(range, range, squares);
      if (thread / (kD / kGroups) == g) own = range;
    }
    std::byte* row = means.summaries[kFirstToken];
    if (thread < kD) {
      const float x = code.Value(bits, thread) * __fdividef(own * 127.0f, top);
      reinterpret_cast<int8_t*>(row + sizeof(ValueSummary))[thread] =
          static_cast<int8_t>(__float2int_rn(x));
    }
    if (thread == 0) {
      *reinterpret_cast<ValueSummary*>(row) =
          ValueSummary{top * (1.0f / 127), 0, 0, Sqrt(squares / kGroups)};
    }
    means.ClearFirstToken(thread);
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_FIRST_TOKEN_CUH_

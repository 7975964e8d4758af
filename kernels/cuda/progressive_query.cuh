#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_QUERY_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_QUERY_CUH_

// A tile of columns' queries as the A of MMAs, by a warp a column: what each holds goes in twice,
// rows 0..7 rounded to the type of the other operand, rows 8..15 what the rounding lost, so that
// products keep 16 bits (BF16) or 22 (FP16) of it.

#include <cuda_bf16.h>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

inline constexpr int kQueryThreads = 32 * kTileColumns;  // a warp a column

// Rows of head_dim 16-bit channels, kept so that ldmatrix finds eight of them on different banks:
// pieces of 16 bytes in an order of each row's own, or some room after each row.
template <class Traits, int kRows>
struct ChannelRows {
  static constexpr int kD = Traits::kHeadDim, kPieces = kD / 8;
  static constexpr bool kSwizzled = kD % 64 == 0;
  static constexpr int kStride = kSwizzled ? kD : kD + 8;
  // The CTA copies so many rows at once. A thread keeps to its piece, so that both of its addresses
  // grow by constants.
  static constexpr int kPassRows = kQueryThreads / kPieces;
  static_assert(!kSwizzled || kPassRows % 8 == 0, "the same order in each");
  alignas(16) uint16_t data[kRows * kStride];
  __device__ __forceinline__ uint16_t* At(int row, int channel) {
    const int at = kSwizzled ? (channel / 8 ^ row % 8) * 8 + channel % 8 : channel;
    return data + row * kStride + at;
  }
  __device__ __forceinline__ const uint16_t* At(int row, int channel) const {
    return const_cast<ChannelRows*>(this)->At(row, channel);
  }

  // The thread's first row and piece in a copy; -1: it has none.
  static __device__ __forceinline__ int ThreadRow() {
    const int row = static_cast<int>(threadIdx.x) / kPieces;
    return row < kPassRows ? row : -1;
  }
  static __device__ __forceinline__ int ThreadPiece() {
    return static_cast<int>(threadIdx.x) % kPieces;
  }

  // Channels 16 k + 8 `half` of a row, for any k: At(row, 16 k + 8 half) in one instruction.
  struct Tiles {
    const std::byte* rows;
    uint32_t start;
    __device__ __forceinline__ const void* operator[](int k) const {
      return rows + (kSwizzled ? start ^ 32u * k : start + 32u * k);
    }
  };
  __device__ __forceinline__ Tiles TilesOf(int row, int half) const {
    const auto* rows = reinterpret_cast<const std::byte*>(data);
    const auto* first = reinterpret_cast<const std::byte*>(At(row, 8 * half));
    return Tiles{rows, static_cast<uint32_t>(first - rows)};
  }
};

// One column's query, scaled: channels 4 (lane + 32 i)..+3 to (x, y, z, w) of element i.
template <class Traits>
struct QueryColumn {
  static constexpr int kWords = Traits::kHeadDim / 4;
  static constexpr int kEach = (kWords + 31) / 32;
  float x[kEach][4];

  __device__ __forceinline__ QueryColumn(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                         int head, int column, int lane) {
    const float scale = s.softmax_scale * kLog2E;
    const int64_t row =
        static_cast<int64_t>(s.q_begin + p.group.Row(column)) * p.shape.num_q_heads +
        head * p.group.size + p.group.Head(column);
    const bool exists = column < p.group.size * s.q_len;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = lane + 32 * i;
      x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0;
      if (exists && at < kWords) {
        LoadFour(p.q, p.in_type, row * Traits::kHeadDim + 4 * at, x[i]);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i][j] *= scale;
    }
  }

  // |q|, in every lane.
  __device__ __forceinline__ float Norm() const {
    float square = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) square = fmaf(x[i][j], x[i][j], square);
    }
    square = WarpSum(square);
    return square > 0 ? square * rsqrtf(square) : 0.0f;
  }

  // q.mu, the same in every lane. `mean` [head_dim] is in global memory.
  __device__ __forceinline__ float Dot(const float* mean, int lane) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = lane + 32 * i;
      if (at >= kWords) break;
      const float4 m = reinterpret_cast<const float4*>(mean)[at];
      sum = fmaf(x[i][0], m.x, fmaf(x[i][1], m.y, fmaf(x[i][2], m.z, fmaf(x[i][3], m.w, sum))));
    }
    return WarpSum(sum);
  }
};

// The column's query times `inverse` as rows `column` and `column` + 8.
template <typename T, class Traits>
__device__ __forceinline__ void StoreQuery(const QueryColumn<Traits>& q, float inverse, int column,
                                           int lane, ChannelRows<Traits, 2 * kTileColumns>* rows) {
#pragma unroll
  for (int i = 0; i < QueryColumn<Traits>::kEach; ++i) {
    const int at = lane + 32 * i;
    if (at >= QueryColumn<Traits>::kWords) break;
    const uint2 first = SplitPair<T>(q.x[i][0] * inverse, q.x[i][1] * inverse);
    const uint2 second = SplitPair<T>(q.x[i][2] * inverse, q.x[i][3] * inverse);
    *reinterpret_cast<uint2*>(rows->At(column, 4 * at)) = make_uint2(first.x, second.x);
    *reinterpret_cast<uint2*>(rows->At(kTileColumns + column, 4 * at)) =
        make_uint2(first.y, second.y);
  }
}

// A 16th of a power of two that no |q r| of the tile exceeds: above every column's norm, which the
// rotation keeps to the rounding of Q; 1 where all are 0. Stored halves go up to 16, so that the
// squares of small products do not vanish.
__device__ __forceinline__ float QueryUnit(const float* norms) {
  float high = 0;
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) high = fmaxf(high, norms[n]);
  high *= 1.01f;
  if (!(high > 0)) return 1.0f;
  return __uint_as_float((__float_as_uint(high) + 0x7fffffu) & 0x7f800000u) * 0.0625f;
}
__device__ __forceinline__ float InverseOfPower(float power_of_two) {
  return __uint_as_float(0x7f000000u - __float_as_uint(power_of_two));
}

// Tokens [begin, end) of the dense tail that some row sees.
struct TokenRange {
  int begin, end;
};
__device__ __forceinline__ TokenRange VisibleTail(const ProgressiveSequence& s) {
  TokenRange range;
  range.end = min(s.kv_len, s.q_start + s.q_len);
  range.begin = max(s.num_sealed * kPageTokens, s.window > 0 ? s.q_start - s.window + 1 : 0);
  range.begin = min(range.begin, range.end);
  return range;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_QUERY_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_TAIL_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_TAIL_CUH_

// Tail: the sequence's newest pages, BF16 or FP16, attended exactly; usually 64 to 128 tokens.
//   dense_lse = log2 sum_t exp2(s_t);  dense_out = sum_t exp2(s_t - dense_lse) v_t
// Part of prepare, beside the rotation of the queries. Softmax weights enter the MMA in two parts,
// as queries do.

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/progressive_query.cuh"

namespace adaattn {

inline constexpr int kTailTokens = kPageTokens;  // at once

template <class Traits>
struct TailShared {
  static constexpr int kTokens = kTailTokens;
  static constexpr int kEach = kTokens / 32;
  ChannelRows<Traits, kTokens> value;
  ChannelRows<Traits, 2 * kTileColumns> query;
  alignas(16) float score[kTileColumns][kTokens + 4];
  alignas(16) uint16_t weight[2 * kTileColumns][kTokens + 8];
  float rescale[kTileColumns];
  float sum[kTileColumns];
};

// A sequence's tail in the cache.
template <class Traits>
struct TailRows {
  static constexpr int kD = Traits::kHeadDim, kTokens = kTailTokens;
  using Rows = ChannelRows<Traits, kTokens>;
  const ProgressiveArgs& p;
  const ProgressiveSequence& s;
  TokenRange tail;
  int64_t keys, values;  // of the head, from the start of a page

  __device__ __forceinline__ TailRows(const ProgressiveArgs& args, const ProgressiveSequence& of,
                                      int head)
      : p(args),
        s(of),
        tail(VisibleTail(of)),
        keys(DenseKeyOffset(head, kD, args.page_type)),
        values(DenseValueOffset(args.shape, head, args.page_type)) {}

  __device__ __forceinline__ const std::byte* Page(int page) const {
    return p.pool + static_cast<int64_t>(p.table[s.table_begin + page]) * kPageAlignment;
  }
  __device__ __forceinline__ int Count(int begin) const { return min(kTokens, tail.end - begin); }

  // Starts to copy the keys, or the values, of kTokens tokens from `begin` on. Rows after the last
  // one, up to whole MMAs, become 0.
  __device__ __forceinline__ void FetchKeys(int begin, Rows* target) const {
    Fetch(keys, begin, target);
  }
  __device__ __forceinline__ void FetchValues(int begin, Rows* target) const {
    Fetch(values, begin, target);
  }
  __device__ __forceinline__ void Fetch(int64_t offset, int begin, Rows* target) const {
    const int rows = Count(begin), in_page = begin % kPageTokens;
    const int own = Rows::ThreadRow(), piece = Rows::ThreadPiece();
    if (rows > 0 && own >= 0) {
      const int page = begin / kPageTokens;
      const std::byte* first = Page(page) + offset;
      const std::byte* next = in_page + rows > kPageTokens ? Page(page + 1) + offset : first;
      next -= kPageTokens * kD * 2;  // so that both are indexed by tokens of the first page
      const int left = rows - own, whole = (rows + 15) / 16 * 16 - own;
      uint16_t* at = target->At(own, 8 * piece);
#pragma unroll
      for (int i = 0; i < kTokens; i += Rows::kPassRows) {
        if (i < left) {
          const int token = in_page + own + i;
          CopyAsync16(at + i * Rows::kStride,
                      (token < kPageTokens ? first : next) + (token * kD + 8 * piece) * 2);
        } else if (i < whole) {
          *reinterpret_cast<uint4*>(at + i * Rows::kStride) = make_uint4(0, 0, 0, 0);
        }
      }
    }
    CommitCopies();
  }

  // Has L2 fetch the values of all of it.
  __device__ __forceinline__ void PrefetchValues() const {
    const int first = tail.begin / kPageTokens, pages = CeilDiv(tail.end, kPageTokens) - first;
#pragma unroll 1  // a turn
    for (int i = threadIdx.x; tail.begin < tail.end && i < pages; i += kQueryThreads) {
      const int page = first + i;
      const int begin = max(tail.begin - page * kPageTokens, 0);
      const int rows = min(tail.end - page * kPageTokens, kPageTokens) - begin;
      PrefetchBulk(Page(page) + values + begin * kD * 2, static_cast<uint32_t>(rows * kD * 2));
    }
  }
};

// Attends the tail for one tile of columns.
template <typename T, class Traits>
struct TailAttender {
  using Shared = TailShared<Traits>;
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kWarpTiles = (Traits::kTiles + kTileColumns - 1) / kTileColumns;
  const SequenceView& s;
  Shared& shared;
  const ChannelRows<Traits, kTailTokens>& keys;
  const QueryGroup& group;
  int column_begin, columns, warp, lane;
  float max = -INFINITY, sum = 0, score_sum = 0;  // of column `warp`
  float out[kWarpTiles][2][4] = {};               // tiles of channels warp, warp + 8, ...

  // Scores of `tokens` fetched tokens from `begin` on; a warp 16 tokens. `unit`: of the queries.
  __device__ __forceinline__ void Score(int begin, int tokens, float unit) {
    const auto query = shared.query.TilesOf(lane % 16, lane / 16);
    for (int first = 16 * warp; first < tokens; first += 16 * kTileColumns) {
      const auto key = keys.TilesOf(first + lane / 16 * 8 + lane % 8, lane / 8 % 2);
      float sums[2][4] = {};
#pragma unroll 4
      for (int k = 0; k < Traits::kTiles; ++k) {
        uint32_t a[4], b[4];
        LoadMatrices<false>(a, query[k]);
        LoadMatrices<false>(b, key[k]);
        Mma16x8x16<T>(sums[0], a, b[0], b[1]);
        Mma16x8x16<T>(sums[1], a, b[2], b[3]);
      }
      const int column = lane / 4, row = group.Row(column_begin + column);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = first + i / 2 * 8 + lane % 4 * 2 + i % 2;
        const bool visible =
            column < columns && token < tokens && TokenVisible(s, begin + token, row);
        const float score = (sums[i / 2][i % 2] + sums[i / 2][i % 2 + 2]) * unit;
        shared.score[column][token] = visible ? SoftCap<Traits>(score, s.softcap) : -INFINITY;
      }
    }
  }

  // Scores of column `warp` to weights exp2(score - max); the column's state goes on.
  __device__ __forceinline__ void Weigh(int tokens) {
    float score[Shared::kEach], high = -INFINITY;
#pragma unroll
    for (int i = 0; i < Shared::kEach; ++i) {
      const int token = lane + 32 * i;
      score[i] = token < tokens ? shared.score[warp][token] : -INFINITY;
      high = fmaxf(high, score[i]);
    }
    const float next = fmaxf(max, WarpMax(high)), base = next == -INFINITY ? 0.0f : next;
    float weights = 0, scores = 0;
#pragma unroll
    for (int i = 0; i < Shared::kEach; ++i) {
      const float weight = Exp2(score[i] - base);
      const uint2 split = SplitPair<T>(weight, 0.0f);
      shared.weight[warp][lane + 32 * i] = static_cast<uint16_t>(split.x);
      shared.weight[kTileColumns + warp][lane + 32 * i] = static_cast<uint16_t>(split.y);
      weights += weight;
      scores += weight > 0 ? weight * score[i] : 0.0f;
    }
    const float rescale = Exp2(max - base);
    sum = fmaf(sum, rescale, WarpSum(weights));
    score_sum = fmaf(score_sum, rescale, WarpSum(scores));
    max = next;
    if (lane == 0) shared.rescale[warp] = rescale;
  }

  // Adds the fetched values, weighted.
  __device__ __forceinline__ void AddValues(int tokens) {
    const float rescale = shared.rescale[lane / 4];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 8; ++e) out[i][e / 4][e % 4] *= rescale;
      const int tile = warp + kTileColumns * i;
      if (tile >= Traits::kTiles) break;
      const uint16_t* value = shared.value.At(lane % 16, 16 * tile + lane / 16 * 8);
      for (int k = 0; 16 * k < tokens; ++k) {
        uint32_t a[4], b[4];
        LoadMatrices<false>(a, &shared.weight[lane % 16][16 * k + lane / 16 * 8]);
        LoadMatrices<true>(b, value + 16 * k * decltype(shared.value)::kStride);
        Mma16x8x16<T>(out[i][0], a, b[0], b[1]);
        Mma16x8x16<T>(out[i][1], a, b[2], b[3]);
      }
    }
  }

  // `first`: the tile's first column in the workspace.
  __device__ __forceinline__ void Store(const ProgressiveArgs& p, int64_t first) {
    const ProgressiveWorkspace& w = p.work;
    if (lane == 0) {
      shared.sum[warp] = sum;
      reinterpret_cast<float*>(p.workspace + w.dense_lse)[first + warp] =
          sum > 0 ? max + Log2(sum) : -INFINITY;
      reinterpret_cast<float*>(p.workspace + w.dense_score)[first + warp] =
          sum > 0 ? score_sum / sum : 0.0f;
    }
    __syncthreads();
    const float mass = shared.sum[lane / 4], inverse = mass > 0 ? 1.0f / mass : 0.0f;
    auto* row = reinterpret_cast<float*>(p.workspace + w.dense_out) + (first + lane / 4) * kD +
                lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int tile = warp + kTileColumns * i;
      if (tile >= Traits::kTiles) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float(&x)[4] = out[i][half];
        *reinterpret_cast<float2*>(row + 16 * tile + 8 * half) =
            make_float2((x[0] + x[2]) * inverse, (x[1] + x[3]) * inverse);
      }
    }
  }
};

// The tail, whose first keys, then values, are being fetched. `unit`: of the queries.
template <typename T, class Traits>
__device__ __forceinline__ void AttendTail(
    const ProgressiveArgs& p, const ProgressiveSequence& from, const QueryColumn<Traits>& q,
    const TailRows<Traits>& rows, int64_t head_index, int tile, float unit,
    ChannelRows<Traits, kTailTokens>& keys, TailShared<Traits>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SequenceView s(from);
  const int column_begin = tile * kTileColumns;
  StoreQuery<T>(q, InverseOfPower(unit), warp, lane, &shared.query);
  TailAttender<T, Traits> attender{
      s, shared, keys, p.group, column_begin, p.group.size * s.q_len - column_begin, warp, lane};
  for (int begin = rows.tail.begin; begin < rows.tail.end; begin += rows.kTokens) {
    const int tokens = rows.Count(begin);
    if (begin > rows.tail.begin) {
      rows.FetchKeys(begin, &keys);
      rows.FetchValues(begin, &shared.value);
    }
    WaitCopies<1>();
    __syncthreads();
    attender.Score(begin, tokens, unit);
    __syncthreads();
    attender.Weigh(tokens);
    WaitCopies<0>();
    __syncthreads();
    attender.AddValues(tokens);
    __syncthreads();
  }
  attender.Store(p, head_index * p.work.columns + column_begin);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_TAIL_CUH_

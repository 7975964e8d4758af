#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_PREPARE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_PREPARE_CUH_

// Prepare: what of a step needs no scores of sealed pages, by one CTA per (kv head, sequence, tile
// of columns).
//   rotate   queries to the rank frame of each basis of their sequence, scaled by softmax_scale
//            log2(e), as halves relative to a power of two, in the order of the scan's B fragments;
//            q.mu likewise:  qr[column][c] = scale sum_i q[column][i] Q[i][c]
//   tail     the sequence's newest pages, BF16 or FP16, attended exactly; usually 64 to 128 tokens:
//            dense_lse = log2 sum_t exp2(s_t);  dense_out = sum_t exp2(s_t - dense_lse) v_t
//   clear    the step's counters
// Columns are the M of every MMA: what each holds, a query or a softmax weight, goes in twice, rows
// 0..7 rounded to the pages' type, rows 8..15 what the rounding lost, so that products keep 16 bits
// (BF16) or 22 (FP16) of it.

#include <cuda_bf16.h>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

inline constexpr int kPrepareThreads = 256;
inline constexpr int kPrepareWarps = kPrepareThreads / 32;
static_assert(kPrepareWarps == kTileColumns, "a warp a column");

// Rows of head_dim 16-bit channels, kept so that ldmatrix finds eight of them on different banks:
// pieces of 16 bytes in an order of each row's own, or some room after each row.
template <class Traits, int kRows>
struct ChannelRows {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr bool kSwizzled = kD % 64 == 0;
  static constexpr int kStride = kSwizzled ? kD : kD + 8;
  alignas(16) uint16_t data[kRows * kStride];
  __device__ __forceinline__ uint16_t* At(int row, int channel) {
    const int at = kSwizzled ? (channel / 8 ^ row % 8) * 8 + channel % 8 : channel;
    return data + row * kStride + at;
  }
  __device__ __forceinline__ const uint16_t* At(int row, int channel) const {
    return const_cast<ChannelRows*>(this)->At(row, channel);
  }
};

// Little enough for four CTAs a multiprocessor: a step of many short sequences is mostly this.
template <class Traits>
struct PrepareShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kTokens = kPageTokens;  // of the tail at once
  static constexpr int kEach = kTokens / 32;
  ChannelRows<Traits, kTokens> key;
  ChannelRows<Traits, 2 * kTileColumns> query;
  union {
    ChannelRows<Traits, kD> basis;
    struct {  // once the queries are rotated
      ChannelRows<Traits, kTokens> value;
      alignas(16) float score[kTileColumns][kTokens + 4];
      alignas(16) uint16_t weight[2 * kTileColumns][kTokens + 8];
    };
  };
  float norm[kTileColumns];
  float rescale[kTileColumns];
  float sum[kTileColumns];
};

// One column's query, scaled: channels 4 (lane + 32 i)..+3 to (x, y, z, w) of element i.
template <class Traits>
struct QueryColumn {
  static constexpr int kWords = Traits::kHeadDim / 4;
  static constexpr int kEach = (kWords + 31) / 32;
  float x[kEach][4];

  __device__ __forceinline__ QueryColumn(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                         int head, int column, int lane) {
    const int group_size = p.shape.group_size();
    const float scale = s.softmax_scale * kLog2E;
    const int64_t row =
        static_cast<int64_t>(s.q_begin + column / group_size) * p.shape.num_q_heads +
        head * group_size + column % group_size;
    const bool exists = column < group_size * s.q_len;
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
                                           int lane, PrepareShared<Traits>& shared) {
#pragma unroll
  for (int i = 0; i < QueryColumn<Traits>::kEach; ++i) {
    const int at = lane + 32 * i;
    if (at >= QueryColumn<Traits>::kWords) break;
    const uint2 first = SplitPair<T>(q.x[i][0] * inverse, q.x[i][1] * inverse);
    const uint2 second = SplitPair<T>(q.x[i][2] * inverse, q.x[i][3] * inverse);
    *reinterpret_cast<uint2*>(shared.query.At(column, 4 * at)) = make_uint2(first.x, second.x);
    *reinterpret_cast<uint2*>(shared.query.At(kTileColumns + column, 4 * at)) =
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

// Whether a row sees a page that was sealed with basis `run`.
__device__ __forceinline__ bool BasisIsUsed(const ProgressiveSequence& s, int run,
                                            const PageRange& visible) {
  const int begin = run > 0 ? s.basis_end[run - 1] : 0;
  return max(begin, visible.begin) < min(s.basis_end[run], visible.end);
}

template <class Traits>
__device__ __forceinline__ void FetchBasis(const std::byte* query_basis,
                                           PrepareShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kPieces = kD / 8;
  for (int i = threadIdx.x; i < kD * kPieces; i += kPrepareThreads) {
    CopyAsync16(shared.basis.At(i / kPieces, i % kPieces * 8), query_basis + i * 16);
  }
}

// The tile's queries times Q, which both lie in shared memory, to `target` [tiles, 32].
template <class Traits>
__device__ __forceinline__ void Rotate(const PrepareShared<Traits>& shared, int warp, int lane,
                                       uint2* target) {
  for (int tile = warp; tile < Traits::kTiles; tile += kPrepareWarps) {
    float sums[2][4] = {};
#pragma unroll 4
    for (int k = 0; k < Traits::kTiles; ++k) {
      uint32_t a[4], b[4];
      LoadMatrices<false>(a, shared.query.At(lane % 16, 16 * k + lane / 16 * 8));
      LoadMatrices<true>(b, shared.basis.At(16 * k + lane % 16, 16 * tile + lane / 16 * 8));
      Mma16x8x16<__half>(sums[0], a, b[0], b[1]);
      Mma16x8x16<__half>(sums[1], a, b[2], b[3]);
    }
    // Columns g of channels 2t, 2t + 1 (and + 8): already where the scan's B fragments want them.
    target[tile * 32 + lane] =
        make_uint2(PackPair<__half>(sums[0][0] + sums[0][2], sums[0][1] + sums[0][3]),
                   PackPair<__half>(sums[1][0] + sums[1][2], sums[1][1] + sums[1][3]));
  }
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

// Starts the copies of rows of tokens [begin, end) of the cache, from `offset` of their pages on.
// Rows after them, up to whole MMAs, become 0.
template <class Traits>
__device__ __forceinline__ void FetchRows(
    const ProgressiveArgs& p, const ProgressiveSequence& s, int64_t offset, int begin, int end,
    ChannelRows<Traits, PrepareShared<Traits>::kTokens>* target) {
  constexpr int kD = Traits::kHeadDim, kPieces = kD / 8;
  const int rows = end - begin, whole = (rows + 15) / 16 * 16;
  for (int i = threadIdx.x; i < whole * kPieces; i += kPrepareThreads) {
    const int row = i / kPieces, at = i % kPieces * 8, token = begin + row;
    if (row >= rows) {
      *reinterpret_cast<uint4*>(target->At(row, at)) = make_uint4(0, 0, 0, 0);
      continue;
    }
    CopyAsync16(
        target->At(row, at),
        p.pool + offset +
            static_cast<int64_t>(p.table[s.table_begin + token / kPageTokens]) * kPageAlignment +
            (token % kPageTokens * kD + at) * 2);
  }
  CommitCopies();
}
template <class Traits>
__device__ __forceinline__ void FetchKeys(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                          int head, int begin, int end,
                                          PrepareShared<Traits>& shared) {
  FetchRows<Traits>(p, s, DenseKeyOffset(head, Traits::kHeadDim, p.page_type), begin, end,
                    &shared.key);
}
template <class Traits>
__device__ __forceinline__ void FetchValues(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                            int head, int begin, int end,
                                            PrepareShared<Traits>& shared) {
  FetchRows<Traits>(p, s, DenseValueOffset(p.shape, head, p.page_type), begin, end, &shared.value);
}

// Attends the tail for one tile of columns.
template <typename T, class Traits>
struct TailAttender {
  using Shared = PrepareShared<Traits>;
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kWarpTiles = (Traits::kTiles + kPrepareWarps - 1) / kPrepareWarps;
  const SequenceView& s;
  Shared& shared;
  int group_size, column_begin, columns, warp, lane;
  float max = -INFINITY, sum = 0, score_sum = 0;  // of column `warp`
  float out[kWarpTiles][2][4] = {};               // tiles of channels warp, warp + 8, ...

  // Scores of `tokens` fetched tokens from `begin` on; a warp 16 tokens. `unit`: of the queries.
  __device__ __forceinline__ void Score(int begin, int tokens, float unit) {
    for (int first = 16 * warp; first < tokens; first += 16 * kPrepareWarps) {
      float sums[2][4] = {};
#pragma unroll 4
      for (int k = 0; k < Traits::kTiles; ++k) {
        uint32_t a[4], b[4];
        LoadMatrices<false>(a, shared.query.At(lane % 16, 16 * k + lane / 16 * 8));
        LoadMatrices<false>(
            b, shared.key.At(first + lane / 16 * 8 + lane % 8, 16 * k + lane / 8 % 2 * 8));
        Mma16x8x16<T>(sums[0], a, b[0], b[1]);
        Mma16x8x16<T>(sums[1], a, b[2], b[3]);
      }
      const int column = lane / 4, row = (column_begin + column) / group_size;
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
#pragma unroll
    for (int i = 16; i > 0; i /= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, i));
    const float next = fmaxf(max, high), base = next == -INFINITY ? 0.0f : next;
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
      const int tile = warp + kPrepareWarps * i;
      if (tile >= Traits::kTiles) break;
      for (int k = 0; 16 * k < tokens; ++k) {
        uint32_t a[4], b[4];
        LoadMatrices<false>(a, &shared.weight[lane % 16][16 * k + lane / 16 * 8]);
        LoadMatrices<true>(b, shared.value.At(16 * k + lane % 16, 16 * tile + lane / 16 * 8));
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
      const int tile = warp + kPrepareWarps * i;
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

// The tail, whose first keys are being fetched.
template <typename T, class Traits>
__device__ __forceinline__ void AttendTail(const ProgressiveArgs& p,
                                           const ProgressiveSequence& from,
                                           const QueryColumn<Traits>& q, const TokenRange& tail,
                                           int head, int64_t first_column, int column_tile,
                                           float unit, PrepareShared<Traits>& shared) {
  constexpr int kTokens = PrepareShared<Traits>::kTokens;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SequenceView s(from);
  const int column_begin = column_tile * kTileColumns, group_size = p.shape.group_size();
  TailAttender<T, Traits> attender{
      s, shared, group_size, column_begin, group_size * s.q_len - column_begin, warp, lane};
  StoreQuery<T>(q, InverseOfPower(unit), warp, lane, shared);
  for (int begin = tail.begin; begin < tail.end; begin += kTokens) {
    const int tokens = min(kTokens, tail.end - begin);
    if (begin > tail.begin) FetchKeys<Traits>(p, from, head, begin, begin + tokens, shared);
    FetchValues<Traits>(p, from, head, begin, begin + tokens, shared);
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
  attender.Store(p, first_column);
}

// The head's decision as far as it is known: cleared, and what this kernel reads.
template <class Traits>
__device__ __forceinline__ void StartDecision(HeadDecision* decision, int bases, int tokens) {
  static_assert(sizeof(HeadDecision) % 4 == 0, "cleared by words");
  auto* words = reinterpret_cast<uint32_t*>(decision);
  for (int i = threadIdx.x; i < static_cast<int>(sizeof(HeadDecision) / 4); i += 32) words[i] = 0;
  __syncwarp();
  if (threadIdx.x != 0) return;
  decision->basis_bytes = bases * BasisReadBytes(Traits::kHeadDim);
  decision->dense_tokens = tokens;
  decision->key_bytes = decision->value_bytes = int64_t{tokens} * Traits::kHeadDim * 2;
}

// What its registers allow, too.
template <class Traits>
constexpr int PrepareCtasPerSm() {
  if (Traits::kHeadDim > 128) return 1;
  return Traits::kSoftCap || Traits::kHeadDim % 64 != 0 ? 3 : 4;
}

template <class Traits>
__global__ void __launch_bounds__(kPrepareThreads, PrepareCtasPerSm<Traits>())
    ProgressivePrepareKernel(const __grid_constant__ ProgressiveArgs p) {
  NoteTime(p.stamps, kPrepareStamp);
  constexpr int kTokens = PrepareShared<Traits>::kTokens;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<PrepareShared<Traits>*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const BasisLayout layout = MakeBasisLayout(p.shape);
  const int head = blockIdx.x, sequence = blockIdx.y, tile = blockIdx.z;
  const int tiles = w.columns / kTileColumns;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const PageRange visible = VisiblePages(s);
  const TokenRange tail = VisibleTail(s);
  const auto block = [&](int run) {
    return p.pool + static_cast<int64_t>(s.basis[run]) * kPageAlignment + head * layout.head_bytes;
  };
  const auto next_used = [&](int run) {
    while (run < s.num_bases && !BasisIsUsed(s, run, visible)) ++run;
    return run;
  };
  int run = next_used(0), bases = 0;
  if (run < s.num_bases) FetchBasis<Traits>(block(run) + layout.query_basis, shared);
  CommitCopies();
  const QueryColumn<Traits> q(p, s, head, tile * kTileColumns + warp, lane);
  FetchKeys<Traits>(p, s, head, tail.begin, min(tail.begin + kTokens, tail.end), shared);
  // The scan fetches as soon as it runs: its flood of reads must not stand before those above.
  LaunchDependents();
  const float norm = q.Norm();
  if (lane == 0) shared.norm[warp] = norm;
  __syncthreads();
  const float unit = QueryUnit(shared.norm);
  StoreQuery<__half>(q, InverseOfPower(unit), warp, lane, shared);
  for (; run < s.num_bases; ++bases) {
    const int64_t at = (head_index * kMaxDeviceBasisRuns + run) * tiles + tile;
    const float mean = q.Dot(reinterpret_cast<const float*>(block(run) + layout.mean), lane);
    if (lane == 0) {
      reinterpret_cast<float*>(p.workspace + w.query_mean)[at * kTileColumns + warp] = mean;
    }
    if (threadIdx.x == 0) reinterpret_cast<float*>(p.workspace + w.query_unit)[at] = unit;
    if (bases == 0) {
      WaitCopies<1>();
    } else {
      WaitCopies<0>();
    }
    __syncthreads();
    Rotate<Traits>(shared, warp, lane,
                   reinterpret_cast<uint2*>(p.workspace + w.query) + at * Traits::kTiles * 32);
    __syncthreads();
    run = next_used(run + 1);
    if (run < s.num_bases) {
      FetchBasis<Traits>(block(run) + layout.query_basis, shared);
      CommitCopies();
    }
  }
  const int64_t first_column = head_index * w.columns + tile * kTileColumns;
  if (p.page_type == DType::kF16) {
    AttendTail<__half>(p, s, q, tail, head, first_column, tile, unit, shared);
  } else {
    AttendTail<__nv_bfloat16>(p, s, q, tail, head, first_column, tile, unit, shared);
  }
  if (tile > 0 || threadIdx.x >= 32) return;
  if (threadIdx.x == 0) {
    reinterpret_cast<int32_t*>(p.workspace + w.merged)[head_index] = 0;
    if (head_index == 0) *reinterpret_cast<int32_t*>(p.workspace + w.taken) = 0;
  }
  StartDecision<Traits>(p.decisions + head_index, bases, tail.end - tail.begin);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_PREPARE_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_PREPARE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_PREPARE_CUH_

// Prepare: what of a step needs no scores of sealed pages, for each (kv head, sequence, tile of
// columns) by two CTAs, or by one where two were more than the device holds.
//   tail     progressive_tail.cuh
//   rotate   queries to the rank frame of each basis of their sequence, scaled by softmax_scale
//            log2(e), as halves relative to a power of two, in the order of the scan's B fragments;
//            q.mu likewise:  qr[column][c] = scale sum_i q[column][i] Q[i][c]
//   clear    the step's counters

#include "kernels/cuda/progressive_tail.cuh"

namespace adaattn {

template <class Traits>
struct RotateShared {
  ChannelRows<Traits, 2 * kTileColumns> query;
  ChannelRows<Traits, Traits::kHeadDim> basis;
};

// Whether a row sees a page that was sealed with basis `run`.
__device__ __forceinline__ bool BasisIsUsed(const ProgressiveSequence& s, int run,
                                            const PageRange& visible) {
  const int begin = run > 0 ? s.basis_end[run - 1] : 0;
  return max(begin, visible.begin) < min(s.basis_end[run], visible.end);
}

template <class Traits>
__device__ __forceinline__ void FetchBasis(const std::byte* query_basis,
                                           RotateShared<Traits>& shared) {
  using Rows = ChannelRows<Traits, Traits::kHeadDim>;
  const int first = Rows::ThreadRow();
  if (first < 0) return;
  uint16_t* target = shared.basis.At(first, 8 * Rows::ThreadPiece());
  const std::byte* source = query_basis + threadIdx.x * 16;
#pragma unroll
  for (int begin = 0; begin < Rows::kD; begin += Rows::kPassRows) {
    if (begin + Rows::kPassRows > Rows::kD && begin + first >= Rows::kD) break;
    CopyAsync16(target + begin * Rows::kStride, source + begin * Rows::kPieces * 16);
  }
}

// The tile's queries times Q, which both lie in shared memory, to `target` [tiles, 32].
template <class Traits>
__device__ __forceinline__ void Rotate(const RotateShared<Traits>& shared, int warp, int lane,
                                       uint2* target) {
  const auto query = shared.query.TilesOf(lane % 16, lane / 16);
  for (int tile = warp; tile < Traits::kTiles; tile += kTileColumns) {
    const uint16_t* basis = shared.basis.At(lane % 16, 16 * tile + lane / 16 * 8);
    float sums[2][4] = {};
#pragma unroll 4
    for (int k = 0; k < Traits::kTiles; ++k) {
      uint32_t a[4], b[4];
      LoadMatrices<false>(a, query[k]);
      LoadMatrices<true>(b, basis + 16 * k * decltype(shared.basis)::kStride);
      Mma16x8x16<__half>(sums[0], a, b[0], b[1]);
      Mma16x8x16<__half>(sums[1], a, b[2], b[3]);
    }
    // Columns g of channels 2t, 2t + 1 (and + 8): already where the scan's B fragments want them.
    target[tile * 32 + lane] =
        make_uint2(PackPair<__half>(sums[0][0] + sums[0][2], sums[0][1] + sums[0][3]),
                   PackPair<__half>(sums[1][0] + sums[1][2], sums[1][1] + sums[1][3]));
  }
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

// Rotates one tile of a head's queries; the first tile's CTA clears what counts the head's work.
template <class Traits>
struct QueryRotator {
  const ProgressiveArgs& p;
  const ProgressiveSequence& s;
  int head, tile;
  int64_t head_index;
  RotateShared<Traits>& shared;
  const PageRange visible;
  int run = 0;  // the basis at hand

  __device__ __forceinline__ const std::byte* Block() const {
    const BasisLayout layout = MakeBasisLayout(p.shape);
    return p.pool + static_cast<int64_t>(s.basis[run]) * kPageAlignment + head * layout.head_bytes;
  }
  // The next basis from `first` on that is used, if there is one, is on its way.
  __device__ __forceinline__ void Fetch(int first) {
    run = first;
    while (run < s.num_bases && !BasisIsUsed(s, run, visible)) ++run;
    if (run < s.num_bases) {
      FetchBasis<Traits>(Block() + MakeBasisLayout(p.shape).query_basis, shared);
    }
    CommitCopies();
  }

  __device__ __forceinline__ void Run(const QueryColumn<Traits>& q, float unit) {
    const ProgressiveWorkspace& w = p.work;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = w.columns / kTileColumns;
    StoreQuery<__half>(q, InverseOfPower(unit), warp, lane, &shared.query);
    int bases = 0;
    for (; run < s.num_bases; ++bases) {
      const int64_t at = (head_index * kMaxDeviceBasisRuns + run) * tiles + tile;
      const auto* mu = reinterpret_cast<const float*>(Block() + MakeBasisLayout(p.shape).mean);
      const float mean = q.Dot(mu, lane);
      if (lane == 0) {
        reinterpret_cast<float*>(p.workspace + w.query_mean)[at * kTileColumns + warp] = mean;
      }
      if (threadIdx.x == 0) reinterpret_cast<float*>(p.workspace + w.query_unit)[at] = unit;
      WaitCopies<0>();
      __syncthreads();
      Rotate<Traits>(shared, warp, lane,
                     reinterpret_cast<uint2*>(p.workspace + w.query) + at * Traits::kTiles * 32);
      __syncthreads();
      Fetch(run + 1);
    }
    if (tile > 0 || threadIdx.x >= 32) return;
    if (threadIdx.x == 0) {
      reinterpret_cast<int32_t*>(p.workspace + w.merged)[head_index] = 0;
      if (head_index == 0) *reinterpret_cast<int32_t*>(p.workspace + w.taken) = 0;
    }
    const TokenRange tail = VisibleTail(s);
    StartDecision<Traits>(p.decisions + head_index, bases, tail.end - tail.begin);
  }
};

template <class Traits>
struct PrepareShared {
  ChannelRows<Traits, kTailTokens> keys;  // of the tail, which may come while queries are rotated
  union {
    TailShared<Traits> tail;
    RotateShared<Traits> rotate;
  };
  float norm[kTileColumns];
};

// Little enough for four CTAs a multiprocessor: a step of many short sequences is mostly this.
template <class Traits>
constexpr unsigned PrepareCtasPerSm() {
  if (Traits::kHeadDim > 128) return 2;
  return Traits::kHeadDim == 128 ? 4 : 3;  // what fits into registers
}

// grid (num_kv_heads, num_sequences, tiles or 2 x tiles: the tails, which take longer, first)
template <class Traits>
__global__ void __launch_bounds__(kQueryThreads, PrepareCtasPerSm<Traits>())
    ProgressivePrepareKernel(const __grid_constant__ ProgressiveArgs p) {
  NoteTime(p.stamps, kPrepareStamp);
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<PrepareShared<Traits>*>(shared_bytes);
  const int head = blockIdx.x, sequence = blockIdx.y, lane = threadIdx.x % 32;
  const int tiles = p.work.columns / kTileColumns, part = blockIdx.z;
  const int tile = part < tiles ? part : part - tiles;
  const bool both = static_cast<int>(gridDim.z) == tiles;
  const bool rotates = both || part >= tiles;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  QueryRotator<Traits> rotator{p, s, head, tile, head_index, shared.rotate, VisiblePages(s)};
  const TailRows<Traits> rows(p, s, head);
  if (rotates) rotator.Fetch(0);
  if (both || !rotates) rows.FetchKeys(rows.tail.begin, &shared.keys);
  if (both) rows.PrefetchValues();
  if (!rotates) rows.FetchValues(rows.tail.begin, &shared.tail.value);
  const QueryColumn<Traits> q(p, s, head, tile * kTileColumns + threadIdx.x / 32, lane);
  // The scan fetches as soon as it runs: its flood of reads must not stand before those above.
  LaunchDependents();
  const float norm = q.Norm();
  if (lane == 0) shared.norm[threadIdx.x / 32] = norm;
  __syncthreads();
  const float unit = QueryUnit(shared.norm);
  if (rotates) {
    rotator.Run(q, unit);
    if (p.count_rotated) CountProgress(p.rotated);
    if (!both) return;
    __syncthreads();
    rows.FetchValues(rows.tail.begin, &shared.tail.value);
  }
  if (p.page_type == DType::kF16) {
    AttendTail<__half>(p, s, q, rows, head_index, tile, unit, shared.keys, shared.tail);
  } else {
    AttendTail<__nv_bfloat16>(p, s, q, rows, head_index, tile, unit, shared.keys, shared.tail);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_PREPARE_CUH_

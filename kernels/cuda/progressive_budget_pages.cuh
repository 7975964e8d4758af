#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_PAGES_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_PAGES_CUH_

// What a CTA that works on a budget has: its part of a head's pages, and shared memory.

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/budget_parts.h"
#include "kernels/cuda/progressive_chunk.cuh"
#include "kernels/cuda/row_cluster.cuh"
#include "kernels/policy/budget.h"

namespace adaattn {

// Of theta's kernel, in CTAs of kWarps warps. Masses have their soft cap.
template <int kHeadDimV, int kColumnsV, int kWarpsV>
struct ThetaTraits : ProgressiveTraits<kHeadDimV, false, kColumnsV> {
  static constexpr int kWarps = kWarpsV, kThreads = 32 * kWarps;
  static constexpr int kBlockPages = BudgetBlockPages(kHeadDimV, kWarps);
  static_assert(kWarps >= kColumnsV, "a warp a column");
  static_assert(kThreads >= kBlockPages && kThreads >= kHeadDimV,
                "a thread fetches a page and a channel of the first token");
};
static_assert(kNumBudgetThetas <= 32, "a lane a theta");

// The largest weight of a page as a half: small ones keep their digits.
inline constexpr float kBudgetUnit = 16384;

__device__ __forceinline__ PageRange PartOf(const PageRange& pages, const RowCluster& cluster) {
  const int part = BudgetPart(pages.end - pages.begin, cluster.ctas);
  const int begin = min(pages.begin + cluster.rank * part, pages.end);
  return PageRange{begin, min(begin + part, pages.end)};
}

// What one CTA's pages come to, by column: exp2 of masses relative to `high`.
template <class Traits>
struct BudgetPartial {
  alignas(16) float out[Traits::kColumns][Traits::kHeadDim + 16];  // sum of exp2(mass) * mean
  float high[Traits::kColumns];                                    // -inf: no page
  float mass[Traits::kColumns];
};

// A column once o is known.
struct alignas(16) BudgetColumn {
  float lse;             // L
  float norm;            // |o|
  float weight;          // 1 / (|o|^2 columns); 0 where o is 0
  float first_distance;  // |v_0 - o|^2
};

// A warp's pages on every rung of the ladder.
struct WarpTerms {
  ErrorTerms at[kWarpPages][kNumRungs];
  int below[kWarpPages];  // NumThetasBelow of the page's share
};

template <class Traits>
struct BudgetShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kSummaryBytes = SelectShared<Traits>::kSummaryBytes;
  static constexpr int kPages = Traits::kBlockPages;
  static constexpr int kOutputRows = 2 * Traits::kColumns;  // of a tile
  static constexpr int kOutputStride = kD + 16;
  union {
    // Column n's exp2(mass) * mean_scale in row n, what rounding it lost in row n + 8.
    alignas(16) __half weights[2 * kTileColumns][kPages + 8];
    WarpTerms terms[Traits::kWarps];
  };
  BudgetPartial<Traits> partial[2];               // of the tile and of the one before
  alignas(16) float dense[Traits::kColumns][kD];  // the dense tail's output
  BudgetColumn column[kMaxColumns];
  alignas(16) float high[Traits::kColumns][Traits::kWarps];  // of the warps' pages of a block
  alignas(16) float mass[Traits::kColumns][Traits::kWarps];
  TermFactors factors[3][kNumRungs];     // of whole pages, cut ones and the sink
  alignas(16) float first[kD];           // the value of token 0, at the stored depth
  float first_rms;                       // root mean square of its ranges
  float first_weight[Traits::kColumns];  // page 0's exp2(mass) where the token stands for it
  bool sees_first[kMaxColumns];          // the column sees that token
  float column_weight;                   // 1 / columns
  uint64_t fetched;                      // barrier of the block's summaries
  ErrorTerms warp_sums[Traits::kWarps][32];
  ErrorTerms cta_sums[kMaxBudgetCtas][32];  // of the cluster's, in its first CTA
  // Behind it: the columns' o / |o| as halves [tiles][kOutputRows][kOutputStride], column n's in
  // row 2 n, what rounding it lost in row 2 n + 1, four channels in the order 0, 2, 1, 3; summaries
  // [pages of a block][kSummaryBytes].
};

template <class Traits>
constexpr size_t BudgetSharedBytes(int32_t columns, int32_t pages) {
  using Shared = BudgetShared<Traits>;
  return sizeof(Shared) +
         size_t{2} * Shared::kOutputRows * Shared::kOutputStride * (columns / kTileColumns) +
         size_t{Shared::kSummaryBytes} * pages;
}

// Of one of a CTA's blocks of pages; `rows` may be 0.
struct PageBlock {
  int first, rows;
};

// A CTA's part of a head. The pages of a block lie with the warps 16 by 16; lane (g, t) of a warp
// has pages g and g + 8 of them and columns t and t + 4 of a tile.
template <class Traits>
struct BudgetPages {
  using Shared = BudgetShared<Traits>;
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kEach = Traits::kColumns / 4;
  static constexpr int kRounds = Shared::kPages / (Traits::kWarps * kWarpPages);
  const ProgressiveArgs& p;
  const SequenceView& s;
  const RowCluster& cluster;
  Shared& shared;
  const ProgressiveSequence& from;
  float target;  // relative error
  int head, columns, head_index;
  int lane, warp, g, t;
  PageRange pages;
  int blocks;
  const float4* head_stats;            // of page 0, from the lane's column on
  int held = -1;                       // the block whose summaries are in shared memory
  uint32_t parity = 0;                 // of `fetched`, once they are
  float unit = 0, inverse_unit = 0;    // kBudgetUnit are its largest mean_scale
  FirstToken<Traits> first;            // where the pages have the sink
  PageStats stats[kRounds][2][kEach];  // as last loaded

  __device__ __forceinline__ BudgetPages(const ProgressiveArgs& args, const SequenceView& view,
                                         const RowCluster& row, Shared& memory)
      : p(args),
        s(view),
        cluster(row),
        shared(memory),
        from(args.sequences[blockIdx.z]),
        target(from.decision.target_relative_error),
        head(static_cast<int>(blockIdx.y)),
        columns(args.group.size * view.q_len),
        head_index(static_cast<int>(blockIdx.z) * args.shape.num_kv_heads + head),
        lane(static_cast<int>(threadIdx.x % 32)),
        warp(static_cast<int>(threadIdx.x / 32)),
        g(lane / 4),
        t(lane % 4),
        pages(PartOf(VisiblePages(from), row)),
        blocks(max(CeilDiv(pages.end - pages.begin, Shared::kPages), 1)),
        head_stats(PageStatsOf(args, head_index, 0) + t) {}

  __device__ __forceinline__ int tiles() const {
    return Traits::kColumns < kTileColumns ? 1 : p.work.columns / kTileColumns;
  }
  __device__ __forceinline__ __half* Output(int tile) const {
    return reinterpret_cast<__half*>(&shared + 1) +
           tile * (Shared::kOutputRows * Shared::kOutputStride);
  }
  __device__ __forceinline__ std::byte* Summary(int local) const {
    return reinterpret_cast<std::byte*>(Output(tiles())) + local * Shared::kSummaryBytes;
  }
  __device__ __forceinline__ const ValueSummary& Facts(int local) const {
    return *reinterpret_cast<const ValueSummary*>(Summary(local));
  }

  __device__ __forceinline__ PageBlock Block(int i) const {
    const int first = pages.begin + i * Shared::kPages;
    return PageBlock{first, min(pages.end - first, Shared::kPages)};
  }
  // The first of the warp's 16 pages in a round, by position in the block.
  __device__ __forceinline__ int WarpBegin(int round) const {
    return (round * Traits::kWarps + warp) * kWarpPages;
  }
  __device__ __forceinline__ bool HasSink() const { return pages.begin == 0 && pages.end > 0; }

  // Starts the copies of the block's summaries, a thread a page.
  __device__ __forceinline__ void Fetch(const PageBlock& block) const {
    const int local = static_cast<int>(threadIdx.x);
    const uint32_t barrier = SharedAddress(&shared.fetched);
    if (local == 0) ArriveExpectBytes(barrier, block.rows * Shared::kSummaryBytes);
    if (local >= block.rows) return;
    const PageLayout::Section& section = p.layout.value_summary;
    const uint32_t id = p.table[from.table_begin + block.first + local];
    BulkCopy(
        SharedAddress(Summary(local)),
        p.pool + static_cast<int64_t>(id) * kPageAlignment + section.offset + head * section.bytes,
        Shared::kSummaryBytes, barrier);
  }

  // The unit of the block that is held, the same in every warp.
  __device__ __forceinline__ void FindUnit(const PageBlock& block) {
    uint32_t top = 0;  // none is below 0: they compare as their bits do
    for (int local = lane; local < block.rows; local += 32) {
      top = max(top, __float_as_uint(Facts(local).mean_scale));
    }
    const float scale = __uint_as_float(__reduce_max_sync(0xffffffffu, top));
    unit = scale * (1 / kBudgetUnit);
    // Where all means are as good as 0, |o|^2 would vanish as well.
    inverse_unit = scale > 1e-30f ? __fdividef(kBudgetUnit, scale) : 0.0f;
  }

  // Brings the block's summaries unless they are there; those of block 0, which comes first, are on
  // their way since Prepare.
  __device__ __forceinline__ void Hold(int i) {
    if (i == held) return;
    if (held >= 0) {
      FenceAsyncShared();
      __syncthreads();
      Fetch(Block(i));
      parity ^= 1;
    }
    held = i;
    WaitBarrier(SharedAddress(&shared.fetched), parity);
    FindUnit(Block(i));
  }

  // The first token's value, at the stored depth, and which columns see it.
  __device__ __forceinline__ void StoreFirstToken() const {
    constexpr int kGroups = Traits::kValueGroups;
    const int c = threadIdx.x;
    float squares = 0, range = 0;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      const float x = RangeOf(first.scales >> 8 * group & 0xffu);
      squares = fmaf(x, x, squares);
      if (c / (kD / kGroups) == group) range = x;
    }
    if (c < kD) shared.first[c] = first.code.Value(p.stored_bits, c) * range;
    for (int n = c; n < columns; n += Traits::kThreads) {
      shared.sees_first[n] = TokenVisible(s, 0, p.group.Row(n));
    }
    if (c == 0) shared.first_rms = sqrtf(squares / kGroups);
  }

  // Whether that token stands for page 0, whose figures of the column these are.
  __device__ __forceinline__ bool FirstTokenStands(int column, const PageStats& page) const {
    return column < columns &&
           FirstTokenStandsForPage(true, shared.sees_first[column], fabsf(page.concentration));
  }

  // What depends on no earlier kernel.
  __device__ __forceinline__ void Prepare() {
    if (threadIdx.x == 0) {
      InitBarrier(SharedAddress(&shared.fetched), 1);
      FenceBarrierInit();
      shared.column_weight = 1.0f / static_cast<float>(columns);
    }
    __syncthreads();
    Fetch(Block(0));
    if (HasSink()) first.Load(p, p.table[from.table_begin], head, threadIdx.x);
    if (threadIdx.x < 3 * kNumRungs) {
      const int kind = threadIdx.x / kNumRungs, rung = threadIdx.x % kNumRungs;
      shared.factors[kind][rung] = RungFactors(
          from.decision, rung, PageFacts{kind == 2, kind == 1, true}, kD, p.stored_bits);
    }
  }

  __device__ __forceinline__ void LoadRound(const PageBlock& block, int round, int tile) {
    const int last = max(pages.end - 1, 0);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int local = WarpBegin(round) + 8 * half + g;
      const float4* at = head_stats + min(block.first + local, last) * p.work.columns;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        // Without a branch; what no one has may be anything.
        const int column = tile * kTileColumns + 4 * j;
        const PageStats loaded = LoadStats(at, column);
        const bool any = local < block.rows && column + t < columns;
        stats[round][half][j] =
            PageStats{0, any ? loaded.lse : -INFINITY, any ? loaded.variance : 0.0f,
                      any ? loaded.concentration : 0.0f};
      }
    }
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_BUDGET_PAGES_CUH_

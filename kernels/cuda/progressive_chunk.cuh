#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_CHUNK_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_CHUNK_CUH_

// A chunk of a head's pages: what every page's share of the global LSE earns it (policy/ladder.h).
//   attended pages  a list
//   skipped pages   sum of share * mean
//   error terms     policy/error_model.h, with o left open
// By kSelectThreads threads, four a page, which then add the means by an MMA over pages. What needs
// no other page stands before a barrier, what does behind it: one for L, one for the sums. Sums
// keep an order of their own: they do not depend on timing.

#include "kernels/cuda/progressive_depths.cuh"
#include "kernels/cuda/progressive_first_token.cuh"
#include "kernels/cuda/progressive_lse.cuh"
#include "kernels/cuda/progressive_means.cuh"
#include "kernels/cuda/progressive_terms.cuh"

namespace adaattn {

inline constexpr int kSelectThreads = 4 * kChunkPages;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kChunkFigures = sizeof(ChunkState) / 4;

template <class Traits>
struct SelectShared {
  static constexpr int kColumns = Traits::kColumns;
  static constexpr int kSummaryBytes = ChunkMeans<Traits>::kSummaryBytes;
  static constexpr int kFigureRows = kChunkFigures * kColumns;
  static_assert(Traits::kHeadDim <= kSelectThreads, "a thread has a channel of the first token");
  ChunkMeans<Traits> means;
  // By page, rows of ChunkState * kColumns + column: 8 banks apart, for the four columns that a
  // warp stores.
  alignas(16) float figures[kFigureRows][kChunkPages + 8];
  float2 lse_parts[kColumns == kFewColumns ? 1 : kMaxColumns / kTileColumns][kSelectWarps]
                  [kColumns];
  float lse[kMaxColumns];  // L, where there is more than one tile
  DepthEntry depths[kNumPageDepths];
  int depth_pages[kNumPageDepths];
  float mean_squares[kChunkPages];  // |mean|^2
  int warp_list[kSelectWarps];      // of each warp's pages: cost * 65536 + how many are attended
};

// The pages of a chunk: every step-th one from the first on.
struct ChunkPages {
  int first, step, count;
  __device__ __forceinline__ int At(int i) const { return first + i * step; }
  __device__ __forceinline__ bool HasSink() const { return first == 0 && count > 0; }
};

// Works out all depths, by the last of kSelectThreads threads' warps; `thread` is one of them.
template <class Traits>
__device__ __forceinline__ void ListDepths(const ProgressiveArgs& p, const DecisionParams& decision,
                                           int thread, SelectShared<Traits>& shared) {
  const int index = thread - (kSelectThreads - 32);
  if (index < 0 || index >= kNumPageDepths) return;
  shared.depths[index] = EntryOf(DepthAt<Traits>(p, decision, index));
  shared.depth_pages[index] = 0;
}

// Starts the copy of a page's value summary, a quad its own. It depends on no earlier kernel.
template <class Traits>
__device__ __forceinline__ void FetchSummary(const ProgressiveArgs& p, uint32_t id, int head,
                                             int pages, int thread, SelectShared<Traits>& shared) {
  const int local = thread / 4, quarter = thread % 4;
  if (local < pages) {
    const PageLayout::Section& section = p.layout.value_summary;
    const std::byte* page = p.pool + static_cast<int64_t>(id) * kPageAlignment;
    const std::byte* source =
        page + section.offset + head * int64_t{SelectShared<Traits>::kSummaryBytes};
#pragma unroll
    for (int i = 0; i < SelectShared<Traits>::kSummaryBytes / 16; i += 4) {
      if (i + quarter >= SelectShared<Traits>::kSummaryBytes / 16) break;
      CopyAsync16(shared.means.summaries[local] + (i + quarter) * 16, source + (i + quarter) * 16);
    }
  }
  CommitCopies();
}

// Of a head, until attend has a page of it.
__device__ __forceinline__ void ClearSpan(const ProgressiveArgs& p, int head_index) {
  reinterpret_cast<int2*>(p.workspace + p.work.spans)[head_index] = make_int2(0, 0);
}

// Columns of the workspace, a constant where they are few.
template <class Traits>
__device__ __forceinline__ int WorkColumns(const ProgressiveArgs& p) {
  return Traits::kColumns == kFewColumns ? kTileColumns : p.work.columns;
}

// A quad decides a page. Indices of the workspace fit 32 bits in units of 16 bytes.
template <class Traits>
struct PageDecider {
  static constexpr int kColumns = Traits::kColumns, kEach = kColumns / 4;
  const ProgressiveArgs& p;
  const ProgressiveSequence& from;
  int head_index, column_begin, columns, page, local, quarter;
  uint32_t id;
  Visibility visibility;
  const float4* stats = nullptr;  // of the page
  bool sink = false;              // among the warp's pages
  bool first_seen[kEach] = {};    // it is the sink page, whose first token the column sees
  // Of the tile's columns quarter + 4 i.
  PageStats mine[kEach];
  ColumnTerms terms[kEach];
  ValueSummary summary;
  float mean2 = 0;  // |mean|^2
  DepthEntry depth;

  __device__ __forceinline__ bool visible() const { return visibility != Visibility::kNone; }
  __device__ __forceinline__ bool attended() const { return depth.factors.value > 0; }
  __device__ __forceinline__ int column(int i) const { return column_begin + quarter + 4 * i; }

  // What depends on no earlier kernel.
  __device__ __forceinline__ void Begin(const SequenceView& s) {
    const uint32_t at = (head_index * p.max_sealed + page) * WorkColumns<Traits>(p);
    stats = reinterpret_cast<const float4*>(p.workspace + p.work.stats) + at;
    WorkOut(stats);
    if (page > 0 || !visible()) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      first_seen[i] = column(i) < columns && TokenVisible(s, 0, p.group.Row(column(i)));
    }
  }

  __device__ __forceinline__ void Load() {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      mine[i] = PageStats{-INFINITY, -INFINITY, 0, 0};
      if (visible() && column(i) < columns) mine[i] = LoadStats(stats, column(i));
    }
  }

  // Measures the page's mean, whose summary the quad has copied, for whoever takes both.
  __device__ __forceinline__ void Measure(SelectShared<Traits>& shared) const {
    const float square = MeanSquare<Traits>(shared.means.summaries[local], quarter);
    if (quarter == 0) shared.mean_squares[local] = square;
  }
  __device__ __forceinline__ void Summarise(const SelectShared<Traits>& shared) {
    summary = ValueSummary{};
    if (!visible()) return;
    summary = shared.means.Summary(local);
    mean2 = shared.mean_squares[local];
  }

  // What the head has once: L, and no span yet. By the first quad of its first chunk.
  __device__ __forceinline__ void StoreHead(const float (&lse)[kEach]) const {
    float* target = reinterpret_cast<float*>(p.workspace + p.work.global_lse);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      target[head_index * WorkColumns<Traits>(p) + column(i)] = lse[i];
    }
    if (quarter == 0) ClearSpan(p, head_index);
  }

  // The largest share of the page over the columns of the other tiles; whether one opened it.
  __device__ __forceinline__ float LargestShareElsewhere(const float* lse, bool* opened) const {
    float share = 0;
    for (int n = quarter; visible() && n < columns; n += 4) {
      const PageStats other = LoadStats(stats, n);
      *opened |= signbit(other.concentration);
      share = fmaxf(share, TermsOf(other, lse[n]).share);
    }
    return share;
  }

  // From L of the thread's columns. `lse`: of all, where there are many.
  __device__ __forceinline__ void Decide(const float (&own_lse)[kEach], const float* lse,
                                         float theta, SelectShared<Traits>& shared) {
    float share = 0;
    bool opened = false;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      terms[i] = TermsOf(mine[i], own_lse[i]);
      share = fmaxf(share, terms[i].share);
      opened |= signbit(mine[i].concentration);
    }
    if (kColumns == kTileColumns && columns > kTileColumns) {
      share = fmaxf(share, LargestShareElsewhere(lse, &opened));
    }
    share = QuadMax(share);
    if (CoarseStage<Traits>(p, from.decision) == 0) {
      opened = true;
    } else {
      const uint32_t quads = __ballot_sync(0xffffffffu, opened);
      opened = (quads >> (threadIdx.x % 32 / 4 * 4) & 15u) != 0;
    }
    const bool cut = visibility == Visibility::kPart;
    const int index = page == 0 ? kSinkDepth
                      : !opened && !cut
                          ? kUnopenedDepth
                          : LadderValueBits(share, theta) / 2 + (cut ? kCutDepths : 0);
    depth = DepthEntry{};
    if (visible()) {
      depth = shared.depths[index];
      if (quarter == 0) atomicAdd(&shared.depth_pages[index], 1);
    }
  }

  // The page's weights and figures in each of the thread's columns. Where most of the sink page's
  // mass in a column lies on its first token, that token's value stands for the page's mean in the
  // column's error terms (policy/error_model.h). No mean becomes part of the output by it: every
  // depth of the sink page reads its values.
  __device__ __forceinline__ void Weigh(SelectShared<Traits>& shared) const {
    float first_mean2 = 0;
    if (sink) first_mean2 = MeanSquare<Traits>(shared.means.summaries[kFirstToken], quarter);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int n = quarter + 4 * i;
      const bool first =
          first_seen[i] && FirstTokenStandsForPage(true, true, fabsf(mine[i].concentration));
      const ValueSummary own = first ? shared.means.Summary(kFirstToken) : summary;
      const ColumnWeights x = WeighColumn<Traits>(mine[i], terms[i], own, depth.factors);
      const float share = x.share * own.mean_scale;
      const float weights[kNumChunkVectors] = {attended() ? 0.0f : share, x.weight * own.mean_scale,
                                               attended() ? share : 0.0f};
      shared.means.SetWeights(n, first ? kFirstToken : local, weights);
      if (first) shared.means.SetWeights(n, local, {0, 0, 0});
      // As ChunkState.
      const float figures[kChunkFigures] = {x.mass,   x.entropy,
                                            x.weight, x.weight * (first ? first_mean2 : mean2),
                                            x.rest,   x.amplitude};
#pragma unroll
      for (int j = 0; j < kChunkFigures; ++j) {
        shared.figures[j * kColumns + n][local] = figures[j];
      }
    }
  }

  // What the warp lists.
  __device__ __forceinline__ void SumList(SelectShared<Traits>& shared) const {
    const int list = AttendCost(UnpackPage(depth.packed)) << 16 | 1;
    const int sum = __reduce_add_sync(0xffffffffu, attended() && quarter == 0 ? list : 0);
    if (threadIdx.x % 32 == 0) shared.warp_list[threadIdx.x / 32] = sum;
  }

  // Stores the chunk's attended pages from `target` on, in order.
  __device__ __forceinline__ void List(const SequenceView& s, const SelectShared<Traits>& shared,
                                       uint4* target) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t quads = __ballot_sync(0xffffffffu, attended()) & 0x11111111u;
    if (quads == 0) return;
    const int part = lane < warp ? shared.warp_list[lane] : 0;
    const int before = __reduce_add_sync(0xffffffffu, part) & 0xffff;
    if (!attended() || quarter != 0) return;
    const uint32_t packed =
        depth.packed | PackPage(PackedPage{page, 0, 0, 0, BasisOfPage(s, page)});
    target[before + __popc(quads & ((1u << lane) - 1))] =
        make_uint4(id, packed, static_cast<uint32_t>(head_index),
                   static_cast<uint32_t>(columns) | blockIdx.y << 16);
  }
};

// What a chunk lists, from the parts of its warps. By a warp.
template <class Traits>
__device__ __forceinline__ ChunkList ListLength(const SelectShared<Traits>& shared) {
  const int lane = threadIdx.x % 32;
  const int part = lane < kSelectWarps ? shared.warp_list[lane] : 0;
  const int all = __reduce_add_sync(0xffffffffu, part);
  return ChunkList{all & 0xffff, all >> 16};
}

// The sums of the pages' figures to the states of the tile's columns, `stride` floats from one to
// the next; eight lanes each. With `add` they are added to what is there.
template <class Traits>
__device__ __forceinline__ void StoreStates(const SelectShared<Traits>& shared, int stride,
                                            float* states, bool add = false) {
  constexpr int kColumns = Traits::kColumns;
  // From the last warp on: the first has the list's sum.
  for (int row = (kSelectThreads - 1 - threadIdx.x) / 8; row < SelectShared<Traits>::kFigureRows;
       row += kSelectThreads / 8) {
    const auto* figures = reinterpret_cast<const float4*>(shared.figures[row]) + threadIdx.x % 8;
    const float4 x = figures[0], y = figures[8];
    static_assert(kChunkPages == 64, "eight pages a lane");
    float sum = ((x.x + x.y) + (x.z + x.w)) + ((y.x + y.y) + (y.z + y.w));
#pragma unroll
    for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 8 == 0) {
      float* state = states + row % kColumns * stride + row / kColumns;
      *state = add ? *state + sum : sum;
    }
  }
}

// Adds the chunk's counts of pages to the head's decision. By the threads of a warp.
template <class Traits>
__device__ __forceinline__ void CountPages(HeadDecision* decision,
                                           const SelectShared<Traits>& shared) {
  const int lane = threadIdx.x % 32;
  if (lane >= kNumPageDepths || shared.depth_pages[lane] == 0) return;
  const int pages = shared.depth_pages[lane];
  const PackedPage depth = UnpackPage(shared.depths[lane].packed);
  atomicAdd(
      &decision->key_pages[KeyDepthIndex(kScanBits + 2 * depth.fine_planes, depth.key_chunks)],
      pages);
  atomicAdd(&decision->value_pages[depth.value_planes], pages);
  AddBytes(&decision->value_bytes, int64_t{pages} * SelectShared<Traits>::kSummaryBytes);
}

// L of the thread's columns of a tile, from the warps' parts.
template <class Traits>
__device__ __forceinline__ void JoinLse(const SelectShared<Traits>& shared, int tile,
                                        float (&lse)[PageDecider<Traits>::kEach]) {
  constexpr int kColumns = Traits::kColumns;
  lse[0] = JoinMassParts<kSelectWarps, kColumns>(shared.lse_parts[tile][0]);
  if constexpr (kColumns == kTileColumns) {  // so far of column lane % 8
    const float other = __shfl_xor_sync(0xffffffffu, lse[0], 4);
    const bool upper = (threadIdx.x & 4) != 0;
    lse[1] = upper ? lse[0] : other;
    lse[0] = upper ? other : lse[0];
  }
}

// The same by a whole CTA, and where there is more than one tile that of all to shared.lse.
// `masses`: of the tile, on their way.
template <class Traits>
__device__ __forceinline__ void FindLse(const PageDecider<Traits>& decider, int sequence, int head,
                                        MassPart<kSelectWarps, Traits::kColumns>& masses,
                                        SelectShared<Traits>& shared,
                                        float (&lse)[PageDecider<Traits>::kEach]) {
  constexpr int kColumns = Traits::kColumns;
  const int warp = threadIdx.x / 32, tile = decider.column_begin / kTileColumns;
  const int tiles = WorkColumns<Traits>(decider.p) / kTileColumns;
  masses.Store(shared.lse_parts[tile][warp]);
  for (int i = 0; i < tiles; ++i) {
    if (i == tile) continue;
    MassPart<kSelectWarps, kColumns> other(decider.p, decider.from, sequence, head,
                                           i * kTileColumns, threadIdx.x);
    other.Load();
    other.Store(shared.lse_parts[i][warp]);
  }
  __syncthreads();
  JoinLse<Traits>(shared, tile, lse);
  if (tiles == 1) return;
  for (int i = warp; i < tiles; i += kSelectWarps) {
    const float sum = JoinMassParts<kSelectWarps, kColumns>(shared.lse_parts[i][0]);
    if (threadIdx.x % 32 < kColumns) shared.lse[i * kTileColumns + threadIdx.x % 32] = sum;
  }
  __syncthreads();
}

// Decides a chunk of a head's pages for one tile of columns, by kSelectThreads threads; `thread` is
// one of them. As many others may fetch for them (Fetch, TakeCopies).
template <class Traits>
struct ChunkSelector {
  SelectShared<Traits>& shared;
  const ChunkPages pages;
  const int thread;
  PageDecider<Traits> decider;
  FirstToken<Traits> first;
  uint32_t sink = 0;  // the sink page, where the chunk has it

  __device__ __forceinline__ ChunkSelector(const ProgressiveArgs& p,
                                           const ProgressiveSequence& from, const SequenceView& s,
                                           int sequence, int head, int column_begin,
                                           const ChunkPages& of, int of_threads,
                                           SelectShared<Traits>& room)
      : shared(room),
        pages(of),
        thread(of_threads),
        decider{p,
                from,
                sequence * p.shape.num_kv_heads + head,
                column_begin,
                p.group.size * s.q_len,
                of.At(of_threads / 4),
                of_threads / 4,
                of_threads % 4,
                0,
                Visibility::kNone} {
    const uint32_t* ids = p.table + from.table_begin;
    if (decider.local < pages.count) decider.id = ids[decider.page];
    if (pages.HasSink()) sink = ids[0];
    if (decider.local < pages.count) decider.visibility = PageVisibility(s, decider.page);
    decider.sink = pages.HasSink() && threadIdx.x < 32;
    decider.Begin(s);
  }

  // Starts to bring what depends on no earlier kernel.
  __device__ __forceinline__ void Fetch(int head) {
    FetchSummary<Traits>(decider.p, decider.id, head, pages.count, thread, shared);
    if (pages.HasSink()) first.Load(decider.p, sink, head, thread);
  }

  // Takes what Fetch started. All threads have to meet before Weigh.
  __device__ __forceinline__ void TakeCopies() {
    WaitCopies<0>();
    __syncwarp();
    decider.Measure(shared);
    if (pages.HasSink()) first.Store(decider.p, decider.from.decision, thread, shared.means);
  }
  __device__ __forceinline__ void Summarise() { decider.Summarise(shared); }

  // Leaves what is read of the pages in shared memory, where depths are. `lse`: of the thread's
  // columns; of all columns, where there are many, in shared.lse.
  __device__ __forceinline__ void Decide(const float (&lse)[PageDecider<Traits>::kEach],
                                         float theta) {
    decider.Decide(lse, shared.lse, theta, shared);
    decider.SumList(shared);
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_CHUNK_CUH_

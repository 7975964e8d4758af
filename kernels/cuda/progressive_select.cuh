#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_

// Select: what every page's share of the global LSE earns it (policy/ladder.h).
//   attended pages  a list for each chunk; what will be read of them is sent to L2 at once
//   skipped pages   sum of share * mean
//   error terms     policy/error_model.h, with o left open
// A CTA takes kChunkPages pages of one head, four threads a page, and then adds the means by an MMA
// over pages. Sums keep an order of their own in every CTA: they do not depend on timing.
// grid (chunks x column tiles, num_kv_heads, num_sequences); decisions come from all columns, so
// every tile makes the same, and the first one lists them.

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/progressive_lse.cuh"
#include "kernels/cuda/progressive_terms.cuh"

namespace adaattn {

inline constexpr int kSelectThreads = 4 * kChunkPages;
inline constexpr int kSelectWarps = kSelectThreads / 32;
inline constexpr int kWeightRows = kNumChunkVectors * kTileColumns;
inline constexpr int kChunkFigures = 6;
// Behind the chunk's pages, in the chunk of the sink page: the sequence's first token, as if it
// were a page. The means are added 16 pages at a time.
inline constexpr int kFirstToken = kChunkPages;
inline constexpr int kChunkRows = kChunkPages + 16;

template <class Traits>
struct SelectShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kSummaryBytes = static_cast<int>(sizeof(ValueSummary)) + kD;
  alignas(16) std::byte summaries[kChunkRows][kSummaryBytes];
  union {
    float2 lse_parts[kSelectWarps][kMaxColumns];
    // What the means are weighted with, by page; rows ChunkVector * 8 + column of the tile.
    float weights[kWeightRows][kFirstToken + 2];
  };
  // As halves relative to the row's largest; the last 8 rows make an MMA whole.
  alignas(16) __half scaled[kWeightRows + kTileColumns][kChunkRows + 8];
  float row_scale[kWeightRows];
  float lse[kMaxColumns];      // L
  uint32_t base[kChunkPages];  // page ids, by position in the chunk
  // mass, entropy, rest, mean squares, weight, amplitude
  float warp_figures[kSelectWarps][kTileColumns][kChunkFigures];
  ChunkList warp_list[kSelectWarps];  // of each warp's pages
  int key_pages[kNumKeyDepths], value_pages[kNumValueDepths];
};

// The depth of one page whose largest share over the columns is `share`.
template <class Traits>
__device__ __forceinline__ PageDepth DecidePage(const ProgressiveArgs& p,
                                                const DecisionParams& decision, float theta,
                                                float share, bool opened, int page,
                                                Visibility visibility) {
  constexpr int kD = Traits::kHeadDim;
  if (decision.policy == Policy::kFullDepth) return FullDepth(kD, p.stored_bits);
  if (decision.policy == Policy::kStatic) return StaticDepth(decision, kD, p.stored_bits);
  return LadderDepth(decision, theta, share,
                     PageFacts{page == 0, visibility == Visibility::kPart, opened}, kD,
                     p.stored_bits);
}

// Weights as halves relative to the largest of their row; rows are shared out among the warps.
// `sink`: they have one for the first token.
template <class Traits>
__device__ __forceinline__ void ScaleWeights(bool sink, SelectShared<Traits>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  static_assert(kChunkPages == 64, "two pages a lane");
#pragma unroll
  for (int row = warp; row < kWeightRows; row += kSelectWarps) {
    const float2 x = *reinterpret_cast<const float2*>(&shared.weights[row][2 * lane]);
    const float first = sink ? shared.weights[row][kFirstToken] : 0.0f;
    float high = fmaxf(fmaxf(x.x, x.y), first);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
    }
    const float inverse = high > 0 ? 1.0f / high : 0.0f;
    *reinterpret_cast<uint32_t*>(&shared.scaled[row][2 * lane]) =
        PackPair<__half>(x.x * inverse, x.y * inverse);
    if (sink && lane < (kChunkRows - kFirstToken) / 2) {
      *reinterpret_cast<uint32_t*>(&shared.scaled[row][kFirstToken + 2 * lane]) =
          lane == 0 ? PackPair<__half>(first * inverse, 0.0f) : 0;
    }
    if (lane == 0) shared.row_scale[row] = high;
  }
}

// The sequence's first token as the summary of a page, to the row of its own.
template <class Traits>
__device__ __forceinline__ void LoadFirstToken(const ProgressiveArgs& p, int head,
                                               SelectShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim, kGroups = Traits::kValueGroups;
  const std::byte* page = p.pool + static_cast<int64_t>(shared.base[0]) * kPageAlignment;
  const auto* scales = reinterpret_cast<const uint8_t*>(page + p.layout.value_scales.offset +
                                                        head * p.layout.value_scales.bytes);
  float top = 0, squares = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const float range = RangeOf(scales[g]);
    top = fmaxf(top, range);
    squares = fmaf(range, range, squares);
  }
  const float step = top / 127.0f;
  std::byte* row = shared.summaries[kFirstToken];
  for (int c = threadIdx.x; c < kD; c += kSelectThreads) {
    const float x =
        FirstValue<Traits>(p.layout, page, head, c) * RangeOf(scales[c / (kD / kGroups)]) / step;
    reinterpret_cast<int8_t*>(row + sizeof(ValueSummary))[c] =
        static_cast<int8_t>(__float2int_rn(x));
  }
  if (threadIdx.x == 0) {
    auto& summary = *reinterpret_cast<ValueSummary*>(row);
    summary.mean_scale = step;
    summary.spread = summary.radius = 0;
    summary.scale_rms = sqrtf(squares / kGroups);
  }
}

// Brings what will be read of an attended page to L2: a thread of the page's quad a part of it.
template <class Traits>
__device__ __forceinline__ void PrefetchPage(const ProgressiveArgs& p, uint32_t id, int head,
                                             const PageDepth& depth, int quarter) {
  const std::byte* page = p.pool + static_cast<int64_t>(id) * kPageAlignment;
  const auto bring = [page, head](const PageLayout::Section& section, int64_t bytes) {
    PrefetchBulk(page + section.offset + head * section.bytes, static_cast<uint32_t>(bytes));
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i == quarter && i < depth.value_bits / 2) {
      bring(p.layout.value_plane[i], p.layout.value_plane[i].bytes);
    }
  }
  const int fine = (depth.key.bits - kScanBits) / 2;
  const int64_t key_bytes =
      min(depth.key.chunks * Traits::kChunkTiles, Traits::kTiles) * kPlaneTileBytes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (quarter == 2 + i && i < fine) bring(p.layout.key_fine[i], key_bytes);
  }
  if (quarter == 0) bring(p.layout.value_scales, p.layout.value_scales.bytes);
  if (quarter == 1 && fine > 0) bring(p.layout.key_scales, p.layout.key_scales.bytes);
}

__device__ __forceinline__ ChunkList* ChunkListOf(const ProgressiveArgs& p, int64_t chunk_index) {
  return reinterpret_cast<ChunkList*>(p.workspace + p.work.extents) + chunk_index;
}

// A quad decides a page.
template <class Traits>
struct PageDecider {
  static constexpr int kEach = kTileColumns / 4;
  const ProgressiveArgs& p;
  const DecisionParams& decision;
  const SequenceView& s;
  int64_t head_index;
  int head, column_begin, columns, page, local, quarter;
  Visibility visibility;
  PageStats mine[kEach];  // of the tile's columns quarter + 4 i
  PageDepth depth;

  __device__ __forceinline__ bool visible() const { return visibility != Visibility::kNone; }
  __device__ __forceinline__ bool attended() const { return depth.value_bits > 0; }

  __device__ __forceinline__ void Load() {
    const float4* stats = PageStatsOf(p, head_index, page);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int n = column_begin + quarter + 4 * i;
      if (visible() && n < columns) mine[i] = LoadStats(stats, n);
    }
  }

  // The largest share of the page over all columns; whether one of them opened it.
  __device__ __forceinline__ float LargestShare(const float* lse, bool* opened) const {
    float share = 0;
    if (visible()) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int n = column_begin + quarter + 4 * i;
        if (n >= columns) continue;
        *opened |= signbit(mine[i].concentration);
        share = fmaxf(share, TermsOf(mine[i], lse[n]).share);
      }
      for (int n = quarter; columns > kTileColumns && n < columns; n += 4) {  // other tiles too
        const PageStats other = LoadStats(PageStatsOf(p, head_index, page), n);
        *opened |= signbit(other.concentration);
        share = fmaxf(share, TermsOf(other, lse[n]).share);
      }
    }
    const uint32_t quads = __ballot_sync(0xffffffffu, *opened);
    *opened = (quads >> (threadIdx.x % 32 / 4 * 4) & 15u) != 0;
    return QuadMax(share);
  }

  __device__ __forceinline__ void Decide(float theta, SelectShared<Traits>& shared) {
    bool opened = CoarseStage<Traits>(p, decision) == 0;
    const float share = LargestShare(shared.lse, &opened);
    if (!visible()) return;
    depth = DecidePage<Traits>(p, decision, theta, share, opened, page, visibility);
    if (attended()) PrefetchPage<Traits>(p, shared.base[local], head, depth, quarter);
    if (quarter != 0) return;
    atomicAdd(&shared.key_pages[KeyDepthIndex(depth.key.bits, depth.key.chunks)], 1);
    atomicAdd(&shared.value_pages[depth.value_bits / 2], 1);
  }

  // Where most of the sink page's mass in a column lies on its first token, that token's value
  // stands for the page's mean in the column's error terms (policy/error_model.h). No mean becomes
  // part of the output by it: every depth of the sink page reads its values.
  __device__ __forceinline__ bool FirstTokenStands(int column, const PageStats& stats) const {
    return page == 0 && TokenVisible(s, 0, column / p.shape.group_size()) &&
           FirstTokenStandsForPage(true, true, fabsf(stats.concentration));
  }

  // The weights of row n of the tile for row `at` of the summaries.
  __device__ __forceinline__ void StoreWeights(int n, int at, float share, float weight,
                                               SelectShared<Traits>& shared) const {
    shared.weights[kSkipped * kTileColumns + n][at] = attended() ? 0.0f : share;
    shared.weights[kWeightedMean * kTileColumns + n][at] = weight;
    shared.weights[kAttended * kTileColumns + n][at] = attended() ? share : 0.0f;
  }

  // The page's weights, and the warp's sums of figures.
  __device__ __forceinline__ void Weigh(SelectShared<Traits>& shared) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const std::byte* summary_bytes = shared.summaries[visible() ? local : 0];
    const float mean2 = MeanSquare<Traits>(summary_bytes, quarter);
    const auto mean = *reinterpret_cast<const ValueSummary*>(summary_bytes);
    float first_mean2 = 0;
    if (page < kChunkPages)
      first_mean2 = MeanSquare<Traits>(shared.summaries[kFirstToken], quarter);
    float figures[kEach][kChunkFigures];  // as warp_figures
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int n = quarter + 4 * i;
      const bool any = visible() && column_begin + n < columns;
      const bool first = any && FirstTokenStands(column_begin + n, mine[i]);
      ValueSummary summary = mean;
      if (first) summary = *reinterpret_cast<const ValueSummary*>(shared.summaries[kFirstToken]);
      ColumnWeights column;
      if (any) column = WeighColumn<Traits>(mine[i], summary, shared.lse[column_begin + n], depth);
      if (page == 0) StoreWeights(n, first ? local : kFirstToken, 0, 0, shared);
      StoreWeights(n, first ? kFirstToken : local, column.share * summary.mean_scale,
                   column.weight * summary.mean_scale, shared);
      figures[i][0] = column.mass;
      figures[i][1] = column.entropy;
      figures[i][2] = column.rest;
      figures[i][3] = column.weight * (first ? first_mean2 : mean2);
      figures[i][4] = column.weight;
      figures[i][5] = column.amplitude;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
#pragma unroll
      for (int j = 0; j < kChunkFigures; ++j) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          figures[i][j] += __shfl_xor_sync(0xffffffffu, figures[i][j], step);
        }
        if (lane / 4 == 0) shared.warp_figures[warp][quarter + 4 * i][j] = figures[i][j];
      }
    }
  }

  __device__ __forceinline__ PackedPage Packed() const {
    return PackedPage{page, depth.value_bits / 2, (depth.key.bits - kScanBits) / 2,
                      depth.key.chunks, BasisOfPage(s, page)};
  }

  // What the warp lists. `quads`: its attended pages, at the first bit of each quad.
  __device__ __forceinline__ void SumList(uint32_t quads, SelectShared<Traits>& shared) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int cost =
        attended() ? AttendCost((depth.value_bits + depth.key.bits - kScanBits) / 2) : 0;
    const int all = __reduce_add_sync(0xffffffffu, quarter == 0 ? cost : 0);
    if (lane == 0) shared.warp_list[warp] = ChunkList{__popc(quads), all};
  }

  // Lists the chunk's attended pages in order.
  __device__ __forceinline__ void List(int64_t chunk_index, const SelectShared<Traits>& shared,
                                       uint32_t quads) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
      ChunkList list{};
#pragma unroll 1
      for (int i = 0; i < kSelectWarps; ++i) {
        const ChunkList part = shared.warp_list[i];
        list.pages += part.pages;
        list.cost += part.cost;
      }
      *reinterpret_cast<int2*>(ChunkListOf(p, chunk_index)) = make_int2(list.pages, list.cost);
    }
    int before = 0;
#pragma unroll
    for (int i = 0; i < kSelectWarps; ++i) before += i < warp ? shared.warp_list[i].pages : 0;
    if (!attended() || quarter != 0) return;
    reinterpret_cast<uint4*>(
        p.workspace +
        p.work.lists)[chunk_index * kChunkPages + before + __popc(quads & ((1u << lane) - 1))] =
        make_uint4(shared.base[local], PackPage(Packed()), static_cast<uint32_t>(head_index),
                   static_cast<uint32_t>(columns));
  }
};

// The warps' figures to the chunk's states of the tile's columns.
template <class Traits>
__device__ __forceinline__ void StoreStates(const SelectShared<Traits>& shared,
                                            ChunkState* states) {
  if (threadIdx.x >= kTileColumns) return;
  float sums[kChunkFigures] = {};
  for (int i = 0; i < kSelectWarps; ++i) {
#pragma unroll
    for (int j = 0; j < kChunkFigures; ++j) sums[j] += shared.warp_figures[i][threadIdx.x][j];
  }
  states[threadIdx.x] = ChunkState{sums[0], sums[1], sums[4], sums[3], sums[2], sums[5]};
}

// Starts the copies of the chunk's value summaries, which depend on no earlier kernel.
template <class Traits>
__device__ __forceinline__ void FetchSummaries(const ProgressiveArgs& p,
                                               const ProgressiveSequence& from, int head, int begin,
                                               int pages, SelectShared<Traits>& shared) {
  if (threadIdx.x < pages) {
    shared.base[threadIdx.x] = p.table[from.table_begin + begin + threadIdx.x];
  }
  if (threadIdx.x < kNumKeyDepths) shared.key_pages[threadIdx.x] = 0;
  if (threadIdx.x < kNumValueDepths) shared.value_pages[threadIdx.x] = 0;
  __syncthreads();
  const PageLayout::Section& section = p.layout.value_summary;
  constexpr int kPieces = SelectShared<Traits>::kSummaryBytes / 16;
  for (int i = threadIdx.x; i < pages * kPieces; i += kSelectThreads) {
    CopyAsync16(shared.summaries[i / kPieces] + i % kPieces * 16,
                p.pool + static_cast<int64_t>(shared.base[i / kPieces]) * kPageAlignment +
                    section.offset + head * section.bytes + i % kPieces * 16);
  }
  CommitCopies();
}

// Two 8x8 tiles of 16-bit units, transposed: register i holds (2t, 2t + 1; g) of tile i, whose row
// r the lane 8 i + r names.
__device__ __forceinline__ void LoadTransposed(uint32_t (&tile)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(tile[0]), "=r"(tile[1])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row))));
}

// Bytes 0 and 2 of `bytes` ^ 0x80 (selector 0x4240) or 1 and 3 (0x4341) as halves, signed.
__device__ __forceinline__ uint32_t HalvesFromBytes(uint32_t bytes, uint32_t selector) {
  const uint32_t biased = __byte_perm(bytes ^ 0x80808080u, 0x64646464u, selector);  // 1152 more
  return FmaHalves(biased, kOneHalves, 0xe480e480u);                                // - 1152
}

// The weighted sums of the chunk's first `rows` means, for `columns` columns of the tile, to target
// [8][kNumChunkVectors][D].
//   sum[row][c] = sum_page weight[row][page] mean[page][c]: weights are the A of the MMA, rows of
// the means its B, two channels at a time (a transposed load pairs the bytes of two pages).
template <class Traits>
__device__ __forceinline__ void AddMeans(int rows, int columns, const SelectShared<Traits>& shared,
                                         float* target) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float scale[kNumChunkVectors];
#pragma unroll
  for (int i = 0; i < kNumChunkVectors; ++i) scale[i] = shared.row_scale[i * kTileColumns + g];
  for (int tile = warp; tile < Traits::kTiles; tile += kSelectWarps) {
    float even[2][4] = {}, odd[2][4] = {};
#pragma unroll 1
    for (int first = 0; first < rows; first += 16) {
      uint32_t bytes[2];
      LoadTransposed(bytes, shared.summaries[first + lane % 16] + sizeof(ValueSummary) + tile * 16);
      const uint32_t low[2] = {HalvesFromBytes(bytes[0], 0x4240u),
                               HalvesFromBytes(bytes[1], 0x4240u)};
      const uint32_t high[2] = {HalvesFromBytes(bytes[0], 0x4341u),
                                HalvesFromBytes(bytes[1], 0x4341u)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t a[4];
        LoadMatrices<false>(a, &shared.scaled[16 * half + lane % 16][first + lane / 16 * 8]);
        Mma16x8x16<__half>(even[half], a, low[0], low[1]);
        Mma16x8x16<__half>(odd[half], a, high[0], high[1]);
      }
    }
    if (g >= columns) continue;
    // Column j of an accumulator is channel 16 tile + 2 j (+ 1): the lane has four in a row.
    float* row = target + g * kNumChunkVectors * Traits::kHeadDim + tile * 16 + 4 * t;
#pragma unroll
    for (int i = 0; i < kNumChunkVectors; ++i) {
      const int e = i % 2 * 2;
      const float(&x)[4] = even[i / 2];
      const float(&y)[4] = odd[i / 2];
      *reinterpret_cast<float4*>(row + i * Traits::kHeadDim) =
          make_float4(x[e] * scale[i], y[e] * scale[i], x[e + 1] * scale[i], y[e + 1] * scale[i]);
    }
  }
}

// Adds the chunk's counts of pages to the head's decision.
template <class Traits>
__device__ __forceinline__ void CountPages(HeadDecision* decision,
                                           const SelectShared<Traits>& shared) {
  const int i = threadIdx.x;
  if (i < kNumKeyDepths && shared.key_pages[i] > 0) {
    atomicAdd(&decision->key_pages[i], shared.key_pages[i]);
  }
  if (i < kNumValueDepths && shared.value_pages[i] > 0) {
    atomicAdd(&decision->value_pages[i], shared.value_pages[i]);
    AddBytes(&decision->value_bytes,
             int64_t{shared.value_pages[i]} * SelectShared<Traits>::kSummaryBytes);
  }
}

template <class Traits>
__global__ void __launch_bounds__(kSelectThreads, 4)
    ProgressiveSelectKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<SelectShared<Traits>*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const int tiles = w.columns / kTileColumns;
  const int chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int head = blockIdx.y, sequence = blockIdx.z;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int64_t chunk_index = head_index * w.chunks + chunk;
  const int begin = chunk * kChunkPages, end = min(begin + kChunkPages, from.num_sealed);
  const int pages = max(end - begin, 0);
  FetchSummaries<Traits>(p, from, head, begin, pages, shared);
  if (begin == 0 && pages > 0) LoadFirstToken<Traits>(p, head, shared);
  const int column_begin = tile * kTileColumns, local = threadIdx.x / 4;
  PageDecider<Traits> decider{p,
                              from.decision,
                              s,
                              head_index,
                              head,
                              column_begin,
                              p.shape.group_size() * s.q_len,
                              begin + local,
                              local,
                              static_cast<int>(threadIdx.x) % 4};
  decider.visibility = local < pages ? PageVisibility(s, begin + local) : Visibility::kNone;
  WaitForDependencies();
  NoteTime(p.stamps, kSelectStamp);
  LaunchDependents();
  if (blockIdx.x == 0 && threadIdx.x == 0) {  // until attend has a page of the head
    reinterpret_cast<int2*>(p.workspace + w.spans)[head_index] = make_int2(0, 0);
  }
  if (pages == 0) {
    if (threadIdx.x == 0) *reinterpret_cast<int2*>(ChunkListOf(p, chunk_index)) = int2{};
    return;
  }
  decider.Load();
  GlobalLse<kSelectWarps>(p, from, head_index, shared.lse, shared.lse_parts);
  if (blockIdx.x == 0 && threadIdx.x < w.columns) {
    reinterpret_cast<float*>(p.workspace + w.global_lse)[head_index * w.columns + threadIdx.x] =
        shared.lse[threadIdx.x];
  }
  const float theta = ChoosesTheta(from.decision.policy)
                          ? reinterpret_cast<const float*>(p.workspace + w.theta)[head_index]
                          : from.decision.theta;
  decider.Decide(theta, shared);
  const uint32_t quads = __ballot_sync(0xffffffffu, decider.attended()) & 0x11111111u;
  decider.SumList(quads, shared);
  WaitCopies<0>();
  __syncthreads();
  if (tile == 0) decider.List(chunk_index, shared, quads);
  decider.Weigh(shared);
  __syncthreads();
  const int64_t slot = chunk_index * w.columns + column_begin;
  StoreStates<Traits>(shared, reinterpret_cast<ChunkState*>(p.workspace + w.state) + slot);
  ScaleWeights<Traits>(begin == 0, shared);
  __syncthreads();
  AddMeans<Traits>(begin == 0 ? kChunkRows : pages, decider.columns - column_begin, shared,
                   reinterpret_cast<float*>(p.workspace + w.vectors) +
                       slot * kNumChunkVectors * Traits::kHeadDim);
  if (tile == 0) CountPages<Traits>(p.decisions + head_index, shared);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_

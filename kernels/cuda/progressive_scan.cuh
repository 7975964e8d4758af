#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_

// Scan: the 4-bit score of every token of every sealed page, and each page's log mass.
//   s[t] = sum_c q_c r_c (n_tc - 7.5) / 8 + q.mu     n: nibbles; r: the page's channel ranges
//
// A CTA takes a run of a sequence's pages. One warp fetches: a page's nibbles of neighbouring heads
// are one long read, so bulk copies fill a ring of stages, each kScanWarps (page, kv head) pairs;
// the other warps take a pair each. Tokens are the M of the MMA, columns the N. Nibbles enter the
// MMA as FP16 subnormals (n 2^-24, or 16 n 2^-24 for the upper nibble, which only ever holds rows
// 8..15 of a tile), so that unpacking is one AND; products are exact and the sums FP32. The offset
// 7.5 is one more MMA, with ones; so are the page's sums. Queries and ranges are halves relative to
// their largest: nothing overflows, whatever the keys. grid: dense CTAs (progressive_dense.cuh),
// then runs x head groups x column tiles; further column tiles find the page in L2 and count no
// bytes.

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/progressive_common.cuh"
#include "kernels/cuda/progressive_dense.cuh"

namespace adaattn {

inline constexpr int kScanStages = 3;
inline constexpr int kScanThreads = (kScanWarps + 1) * 32;

template <class Traits>
struct ScanShared {
  // Of one (page, kv head); a page's heads lie side by side, chunk by chunk, then their scales.
  static constexpr int kPairBytes = Traits::kTiles * kKeyTileBytes + Traits::kHeadDim;
  alignas(16) std::byte stages[kScanStages][kScanWarps * kPairBytes];
  alignas(16) __half ranges[kScanWarps][Traits::kHeadDim];
  float lse[kScanWarps][kTileColumns];
  alignas(8) uint64_t full[kScanStages], empty[kScanStages];
};

inline constexpr uint32_t kOneHalves = 0x3c003c00u;  // 1, 1

// Sums over rank chunks [chunk_begin, chunk_end) of q r n: sums[t] is the accumulator of tokens
// 16t..16t+15 (rows 8..15 of it 16 times larger), ones[0] and ones[1] the sums of q r. squares:
// halves of (q r)^2 for the column lane / 4. `chunks`: shared addresses of the rank chunks' tiles.
template <class Traits>
__device__ __forceinline__ void MultiplyPage(
    const uint32_t (&chunks)[NumRankChunks(Traits::kHeadDim)], const __half* ranges,
    const uint2 (&query)[Traits::kTiles], int chunk_begin, int chunk_end, int lane,
    float (&sums)[4][4], float (&ones)[4], uint32_t* squares) {
  const uint32_t kOnes[4] = {kOneHalves, kOneHalves, kOneHalves, kOneHalves};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    ones[e] = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) sums[t][e] = 0;
  }
#pragma unroll
  for (int c = 0; c < NumRankChunks(Traits::kHeadDim); ++c) {
    if (c < chunk_begin || c >= chunk_end) continue;
#pragma unroll
    for (int k = c * Traits::kChunkTiles; k < (c + 1) * Traits::kChunkTiles; ++k) {
      if (k >= Traits::kTiles) break;
      const uint2 range = reinterpret_cast<const uint2*>(ranges)[k * 4 + lane % 4];
      const uint32_t b0 = MultiplyHalves(query[k].x, range.x);
      const uint32_t b1 = MultiplyHalves(query[k].y, range.y);
      *squares = FmaHalves(b0, b0, *squares);
      *squares = FmaHalves(b1, b1, *squares);
      uint32_t word[4];
      LoadShared(word, chunks[c] + (k - c * Traits::kChunkTiles) * kKeyTileBytes + lane * 16);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t upper = word[t] >> 8;
        const uint32_t a[4] = {word[t] & 0x000f000fu, word[t] & 0x00f000f0u, upper & 0x000f000fu,
                               upper & 0x00f000f0u};
        Mma16x8x16<__half>(sums[t], a, b0, b1);
      }
      Mma16x8x16<__half>(ones, kOnes, b0, b1);
    }
  }
}

// The sum of (q r)^2 over the chunks from chunk_begin on, as MultiplyPage's squares.
template <class Traits>
__device__ __forceinline__ uint32_t UnreadSquares(const __half* ranges,
                                                  const uint2 (&query)[Traits::kTiles],
                                                  int chunk_begin, int lane) {
  uint32_t squares = 0;
#pragma unroll
  for (int k = 0; k < Traits::kTiles; ++k) {
    if (k / Traits::kChunkTiles < chunk_begin) continue;
    const uint2 range = reinterpret_cast<const uint2*>(ranges)[k * 4 + lane % 4];
    const uint32_t b0 = MultiplyHalves(query[k].x, range.x);
    const uint32_t b1 = MultiplyHalves(query[k].y, range.y);
    squares = FmaHalves(b0, b0, squares);
    squares = FmaHalves(b1, b1, squares);
  }
  return squares;
}
__device__ __forceinline__ float SumHalves(uint32_t pair) {
  const float2 x = HalvesToFloats(pair);
  return x.x + x.y;
}

// Masks the tokens that a row does not see.
__device__ __forceinline__ void MaskPage(const SequenceView& s, int page, int group_size,
                                         int column, int lane, float (&sums)[4][4]) {
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = page * kPageTokens + 16 * t + lane / 4 + (e >= 2 ? 8 : 0);
      if (!TokenVisible(s, token, (column + e % 2) / group_size)) sums[t][e] = -INFINITY;
    }
  }
}

// Accumulators times `unit` (rows 0..7; a 16th of it for rows 8..15) plus `offset` of the column,
// as B fragments of halves minus the column's maximum, which goes to `high`: columns 2 (lane % 4),
// + 1.
__device__ __forceinline__ void PackScores(const float (&sums)[4][4], float unit,
                                           const float (&offset)[2], float (&high)[2],
                                           uint32_t (&packed)[8]) {
  const float units[2] = {unit, unit * 0.0625f};
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float low = fmaxf(fmaxf(sums[0][c], sums[1][c]), fmaxf(sums[2][c], sums[3][c]));
    const float up =
        fmaxf(fmaxf(sums[0][c + 2], sums[1][c + 2]), fmaxf(sums[2][c + 2], sums[3][c + 2]));
    high[c] = ColumnMax(fmaxf(low * units[0], up * units[1])) + offset[c];
  }
  const float shift[2] = {high[0] == -INFINITY ? 0.0f : offset[0] - high[0],
                          high[1] == -INFINITY ? 0.0f : offset[1] - high[1]};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      packed[2 * t + half] =
          Transpose8x8(PackPair<__half>(fmaf(sums[t][2 * half], units[half], shift[0]),
                                        fmaf(sums[t][2 * half + 1], units[half], shift[1])));
    }
  }
}

// Sums over the page of exp2(score - max) and of its square, for columns 2 (lane % 4) and + 1.
template <class Traits>
__device__ __forceinline__ void SumPage(const uint32_t (&packed)[8], const float (&high)[2],
                                        float cap, int lane, float (&sum)[4], float (&squares)[4]) {
  uint32_t weight[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) weight[i] = Exp2Halves(packed[i]);
  if constexpr (Traits::kSoftCap) {
    // Packed scores are of column lane / 4.
    const float even = __shfl_sync(0xffffffffu, high[0], lane / 8);
    const float odd = __shfl_sync(0xffffffffu, high[1], lane / 8);
    const float max = lane / 4 % 2 == 0 ? even : odd, top = SoftCap<Traits>(max, cap);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 y = HalvesToFloats(packed[i]);
      weight[i] = PackPair<__half>(Exp2(SoftCap<Traits>(y.x + max, cap) - top),
                                   Exp2(SoftCap<Traits>(y.y + max, cap) - top));
    }
  }
  const uint32_t kOnes[4] = {kOneHalves, kOneHalves, kOneHalves, kOneHalves};
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] = squares[e] = 0;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    Mma16x8x16<__half>(sum, kOnes, weight[2 * t], weight[2 * t + 1]);
    Mma16x8x16<__half>(squares, kOnes, MultiplyHalves(weight[2 * t], weight[2 * t]),
                       MultiplyHalves(weight[2 * t + 1], weight[2 * t + 1]));
  }
}

// Where a warp puts what it finds of its pages: the stats of the lane's two columns and the scores.
struct PageSinks {
  float4* stats;  // of page 0 of the head
  uint4* scores;
  bool has_scores;  // the lane's column exists
};
template <class Traits>
__device__ __forceinline__ PageSinks MakePageSinks(const ProgressiveArgs& p, const SequenceView& s,
                                                   int64_t head_index, int column_tile, int lane) {
  const ProgressiveWorkspace& w = p.work;
  const int64_t page = head_index * p.max_sealed;
  PageSinks sinks;
  sinks.stats = reinterpret_cast<float4*>(p.workspace + w.stats) + page * w.columns +
                column_tile * kTileColumns + lane % 4 * 2;
  sinks.scores = reinterpret_cast<uint4*>(p.workspace + w.scores) +
                 (page * (w.columns / kTileColumns) + column_tile) * 64 + lane;
  sinks.has_scores = column_tile * kTileColumns + lane / 4 < p.shape.group_size() * s.q_len;
  return sinks;
}

// Stores a page's statistics and packed scores; variance is of column lane / 4. Returns the lane's
// two columns' estimated log masses.
template <class Traits>
__device__ __forceinline__ float2 StorePage(const PageSinks& sinks, int columns, float cap,
                                            int page, int lane, const uint32_t (&packed)[8],
                                            const float (&high)[2], float variance, bool opened) {
  float sum[4], squares[4], mass[2];
  SumPage<Traits>(packed, high, cap, lane, sum, squares);
  float4 stats[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    PageStats page_stats;
    page_stats.max = high[c];
    page_stats.lse =
        high[c] == -INFINITY ? -INFINITY : SoftCap<Traits>(high[c], cap) + Log2(sum[c]);
    page_stats.variance = __shfl_sync(0xffffffffu, variance, lane % 4 * 8 + 4 * c);
    // A negative sum of squares says that the page was opened by the second stage.
    page_stats.squares = opened ? -squares[c] : squares[c];
    mass[c] = EstimatedLog2Mass(page_stats);
    stats[c] = make_float4(page_stats.max, page_stats.lse, page_stats.variance, page_stats.squares);
  }
  if (lane < 4) {
    float4* target = sinks.stats + page * columns;
    target[0] = stats[0];
    target[1] = stats[1];
  }
  if (sinks.has_scores) {
    uint4* target = sinks.scores + static_cast<int64_t>(page) * (columns * 8);
    target[0] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    target[32] = make_uint4(packed[4], packed[5], packed[6], packed[7]);
  }
  return make_float2(mass[0], mass[1]);
}

// The sum of page masses seen so far, for the lane's two columns.
struct RunningMass {
  float high[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  __device__ __forceinline__ void Add(float2 mass) {
    const float x[2] = {mass.x, mass.y};
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float next = fmaxf(high[c], x[c]), base = next == -INFINITY ? 0.0f : next;
      sum[c] = fmaf(sum[c], Exp2(high[c] - base), Exp2(x[c] - base));
      high[c] = next;
    }
  }
  __device__ __forceinline__ float2 Log2Sum() const {
    return make_float2(high[0] + Log2(sum[0]), high[1] + Log2(sum[1]));
  }
};

// How the warps of a CTA share a group of kv heads: several pages at a time where there are few.
struct HeadGroup {
  int begin, heads, pages;  // pages: at a time
  __device__ __forceinline__ HeadGroup(const ProgressiveArgs& p, int group)
      : begin(group * kScanWarps),
        heads(min(kScanWarps, p.shape.num_kv_heads - begin)),
        pages(kScanWarps / heads) {}
};

// Adds up the masses of each head over the warps that share it (columns 2 lane, + 1 by lanes 0..3)
// and stores them as those of run `run`.
template <class Traits>
__device__ __forceinline__ void StoreRunMass(const ProgressiveArgs& p, const HeadGroup& group,
                                             int run, int column_tile, float2 mass, int64_t masses,
                                             float (*parts)[kTileColumns]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp < kScanWarps && lane < 4) *reinterpret_cast<float2*>(&parts[warp][2 * lane]) = mass;
  __syncthreads();
  const int head = threadIdx.x / kTileColumns, column = threadIdx.x % kTileColumns;
  if (head >= group.heads) return;
  float total = -INFINITY;
  for (int i = 0; i < group.pages; ++i) {
    total = AddLog2(total, parts[head + i * group.heads][column]);
  }
  reinterpret_cast<float*>(p.workspace +
                           masses)[run * MassStride(p) + (group.begin + head) * p.work.columns +
                                   column_tile * kTileColumns + column] = total;
}

// What the fetching warp does: brings the first four bits of rank chunks [0, chunk_end) of the
// run's pages and their scales, stage after stage.
template <class Traits>
__device__ __forceinline__ void FetchRun(const ProgressiveArgs& p, const ProgressiveSequence& from,
                                         const SequenceView& s, const ScanRun& run,
                                         const HeadGroup& group, int chunk_end, int lane,
                                         ScanShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim;
  const int key_bytes = ChunkedRank(kD, chunk_end) * (kPageTokens / 2);
  uint32_t ids = 0;
  int stage = 0;
  for (int first = run.page_begin, i = 0; first < run.page_end; first += group.pages, ++i) {
    const int in_batch = (first - run.page_begin) % 32;
    if (in_batch == 0 && first + lane < run.page_end)
      ids = p.table[from.table_begin + first + lane];
    if (i >= kScanStages) {
      WaitBarrier(SharedAddress(&shared.empty[stage]), (i / kScanStages + 1) % 2);
    }
    const bool wanted = lane < group.pages && first + lane < run.page_end &&
                        PageVisibility(s, first + lane) != Visibility::kNone;
    const uint32_t pages = __ballot_sync(0xffffffffu, wanted);
    const uint32_t full = SharedAddress(&shared.full[stage]);
    if (lane == 0) ArriveExpectBytes(full, __popc(pages) * group.heads * (key_bytes + kD));
    __syncwarp();
    // A lane copies one rank chunk of a page, or the scales.
    for (int j = 0; j < group.pages; ++j) {
      const uint32_t id = __shfl_sync(0xffffffffu, ids, in_batch + j);
      if ((pages >> j & 1) == 0) continue;
      const bool scales = lane == chunk_end;
      const PageLayout::Section& section =
          scales ? p.layout.key_scales : p.layout.key_base[min(lane, chunk_end - 1)];
      const uint32_t target =
          SharedAddress(shared.stages[stage]) + j * group.heads * ScanShared<Traits>::kPairBytes +
          (scales ? Traits::kTiles : lane * Traits::kChunkTiles) * kKeyTileBytes * group.heads;
      const auto bytes = static_cast<uint32_t>(section.bytes);
      if (lane <= chunk_end) {
        BulkCopy(target,
                 p.pool + static_cast<int64_t>(id) * kPageAlignment + section.offset +
                     group.begin * bytes,
                 bytes * group.heads, full);
      }
    }
    stage = stage + 1 == kScanStages ? 0 : stage + 1;
  }
}

// A warp's (page, kv head) pairs of the run, one a stage.
template <class Traits>
struct PageScanner {
  const ProgressiveArgs& p;
  const ProgressiveSequence& from;
  const SequenceView& s;
  const ScanRun& run;
  const HeadGroup& group;
  ScanShared<Traits>& shared;
  int chunk_end, column_tile, lane, warp;
  RunningMass mass;

  // The scan of one page. Says when the stage's bytes are no longer needed.
  template <typename Release>
  __device__ __forceinline__ void Scan(int page, Visibility visibility, const std::byte* pair,
                                       int head_of_group, const uint2 (&query)[Traits::kTiles],
                                       float unit, const float (&mean)[2], const PageSinks& sinks,
                                       Release release) {
    constexpr int kChunks = NumRankChunks(Traits::kHeadDim);
    uint32_t chunks[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      constexpr int kWhole = Traits::kChunkTiles * kKeyTileBytes;
      constexpr int kLast = Traits::kTiles * kKeyTileBytes - (kChunks - 1) * kWhole;
      chunks[c] = SharedAddress(pair) + c * kWhole * group.heads +
                  (c + 1 < kChunks ? kWhole : kLast) * head_of_group;
    }
    __half* ranges = shared.ranges[warp];
    const float scale =
        unit * SpreadKeyRanges<Traits>(pair + Traits::kTiles * kKeyTileBytes * group.heads +
                                           Traits::kHeadDim * head_of_group,
                                       ranges, lane);
    __syncwarp();
    float sums[4][4], ones[4], high[2];
    uint32_t squares = 0, packed[8];
    MultiplyPage<Traits>(chunks, ranges, query, 0, chunk_end, lane, sums, ones, &squares);
    float variance = SumHalves(squares) * (1.0f / 768);  // (r / 8)^2 / 12 for what was read
    if (chunk_end < kChunks) {                           // r^2 / 6 for what was not
      variance += SumHalves(UnreadSquares<Traits>(ranges, query, chunk_end, lane)) * (1.0f / 6);
    }
    release();
    variance = QuadSum(variance) * (kLn2 * kLn2) * scale * scale;
    if (visibility == Visibility::kPart) {
      MaskPage(s, page, p.shape.group_size(), column_tile * kTileColumns + lane % 4 * 2, lane,
               sums);
    }
    const float offset[2] = {fmaf(-0.9375f * scale, ones[0], mean[0]),
                             fmaf(-0.9375f * scale, ones[1], mean[1])};
    PackScores(sums, 2097152.0f * scale, offset, high, packed);  // 2^24 / 8
    mass.Add(StorePage<Traits>(sinks, p.work.columns, s.softcap, page, lane, packed, high, variance,
                               false));
  }

  __device__ __forceinline__ void Run(int head_index) {
    const int head_of_group = warp % group.heads, place = warp / group.heads;
    const PageSinks sinks = MakePageSinks<Traits>(p, s, head_index, column_tile, lane);
    uint2 query[Traits::kTiles] = {};
    float unit = 0, mean[2] = {};
    int basis_end = 0, stage = 0, parity = 0;
    for (int first = run.page_begin; first < run.page_end; first += group.pages) {
      const int page = first + place;
      WaitBarrier(SharedAddress(&shared.full[stage]), parity);
      auto release = [&] {
        __syncwarp();
        if (lane == 0) Arrive(SharedAddress(&shared.empty[stage]));
      };
      Visibility visibility = Visibility::kNone;
      if (place < group.pages && page < run.page_end) visibility = PageVisibility(s, page);
      if (visibility == Visibility::kNone) {
        release();
      } else {
        if (page >= basis_end) {
          const int basis = BasisOfPage(SequenceView(from), page);  // read again: rarely needed
          basis_end = basis + 1 < from.num_bases ? from.basis_end[basis] : run.page_end;
          const QueryFragments<Traits> fragments(p, head_index, basis, column_tile);
#pragma unroll
          for (int k = 0; k < Traits::kTiles; ++k) query[k] = fragments.halves[k * 32 + lane];
          unit = fragments.unit;
          mean[0] = fragments.mean[lane % 4 * 2];
          mean[1] = fragments.mean[lane % 4 * 2 + 1];
        }
        const std::byte* pair =
            shared.stages[stage] + place * group.heads * ScanShared<Traits>::kPairBytes;
        Scan(page, visibility, pair, head_of_group, query, unit, mean, sinks, release);
      }
      if (++stage == kScanStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
};

template <class Traits>
__device__ __forceinline__ void ScanPages(const ProgressiveArgs& p, int run_index, int head_group,
                                          int column_tile) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<ScanShared<Traits>*>(shared_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const ScanRun run = p.scan_runs[run_index];
  if (run.sequence < 0) return;
  const ProgressiveSequence& from = p.sequences[run.sequence];
  const SequenceView s(from);
  const HeadGroup group(p, head_group);
  const int chunk_end = ScanChunks<Traits>(p, from.decision);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kScanStages; ++i) {
      InitBarrier(SharedAddress(&shared.full[i]), 1);
      InitBarrier(SharedAddress(&shared.empty[i]), kScanWarps);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  if (warp == kScanWarps) {
    FetchRun<Traits>(p, from, s, run, group, chunk_end, lane, shared);
    StoreRunMass<Traits>(p, group, run_index, column_tile, make_float2(0, 0), p.work.scan_lse,
                         shared.lse);
    return;
  }
  WaitForDependencies();
  LaunchDependents();
  const int head_index = run.sequence * p.shape.num_kv_heads + group.begin + warp % group.heads;
  PageScanner<Traits> scanner{p, from, s, run, group, shared, chunk_end, column_tile, lane, warp};
  scanner.Run(head_index);
  if (warp < group.heads && column_tile == 0) {  // for all warps of the head
    int pages = 0;
    for (int page = run.page_begin + lane; page < run.page_end; page += 32) {
      pages += PageVisibility(s, page) != Visibility::kNone ? 1 : 0;
    }
    pages = __reduce_add_sync(0xffffffffu, pages);
    if (lane == 0) {
      AddBytes(&p.decisions[head_index].key_bytes,
               pages * KeyReadBytes(Traits::kHeadDim, kScanBits, chunk_end));
    }
  }
  StoreRunMass<Traits>(p, group, run_index, column_tile, scanner.mass.Log2Sum(), p.work.scan_lse,
                       shared.lse);
}

template <class Traits>
__global__ void __launch_bounds__(kScanThreads,
                                  Traits::kSoftCap ? 1 : ScanCtasPerSm(Traits::kHeadDim))
    ProgressiveScanKernel(const __grid_constant__ ProgressiveArgs p) {
  const int tiles = p.work.columns / kTileColumns;
  const int dense_ctas = p.num_sequences * p.shape.num_kv_heads * tiles;
  int block = blockIdx.x;
  if (block < dense_ctas) {
    if (threadIdx.x >= kDenseThreads) return;
    const int tile = block % tiles, head_index = block / tiles;
    DenseTail<Traits>(p, head_index / p.shape.num_kv_heads, head_index % p.shape.num_kv_heads,
                      tile);
    return;
  }
  block -= dense_ctas;
  const int tile = block % tiles;
  block /= tiles;
  const int head_groups = CeilDiv(p.shape.num_kv_heads, kScanWarps);
  ScanPages<Traits>(p, block / head_groups, block % head_groups, tile);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_

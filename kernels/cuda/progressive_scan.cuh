#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_

// Scan: the 4-bit score of every token of every sealed page, and each page's log mass.
//   s[t] = sum_c q_c r_c (n_tc - 7.5) / 8 + q.mu     n: nibbles; r: the page's channel ranges
//
// A warp serves one kv head and takes pages of its CTA's chunk in turn; the warps of a CTA serve
// neighbouring heads, so that a page's nibbles of all heads are read as one run. Tokens are the M
// of the MMA, columns the N. Nibbles enter the MMA as FP16 subnormals (n 2^-24, or 16 n 2^-24 for
// the upper nibble, which only ever holds rows 8..15 of a tile), so that unpacking is one AND;
// products are exact and the sums FP32. The offset 7.5 is one more MMA, with ones; so are the
// page's sums. Queries and ranges are halves relative to their largest: nothing overflows, whatever
// the keys. grid: dense CTAs (progressive_dense.cuh), then sequences x chunks x head groups x
// column tiles; further column tiles find the page in L2 and count no bytes.

#include "kernels/cuda/progressive_common.cuh"
#include "kernels/cuda/progressive_dense.cuh"

namespace adaattn {

inline constexpr int kScanStages = 3;

template <class Traits>
struct ScanShared {
  static constexpr int kStageBytes = Traits::kTiles * kKeyTileBytes + Traits::kHeadDim;
  struct Warp {
    alignas(16) std::byte stages[kScanStages][kStageBytes];
    alignas(16) __half ranges[Traits::kHeadDim];
    float mass[kMaxScanItems][kTileColumns];  // estimated log mass of the warp's pages
  };
  Warp warps[kScanWarps];
  float lse[kScanWarps][kTileColumns];
};

inline constexpr uint32_t kOneHalves = 0x3c003c00u;  // 1, 1
inline constexpr uint32_t k256Halves = 0x5c005c00u;  // 256, 256

// Sums over rank chunks [chunk_begin, chunk_end) of q r n: sums[t] is the accumulator of tokens
// 16t..16t+15 (rows 8..15 of it 16 times larger), ones[0] and ones[1] the sums of q r. squares:
// halves of 256 (q r)^2 for the column lane / 4.
template <class Traits>
__device__ __forceinline__ void MultiplyPage(const std::byte* nibbles, const __half* ranges,
                                             const uint2 (&query)[Traits::kTiles], int chunk_begin,
                                             int chunk_end, int lane, float (&sums)[4][4],
                                             float (&ones)[4], uint32_t* squares) {
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
      *squares = FmaHalves(MultiplyHalves(b0, k256Halves), b0, *squares);
      *squares = FmaHalves(MultiplyHalves(b1, k256Halves), b1, *squares);
      const uint4 words = reinterpret_cast<const uint4*>(nibbles)[k * 32 + lane];
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
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
    squares = FmaHalves(MultiplyHalves(b0, k256Halves), b0, squares);
    squares = FmaHalves(MultiplyHalves(b1, k256Halves), b1, squares);
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

// The place of a warp among the pages of its CTA's chunk.
template <class Traits>
struct ScanWork {
  int head, first, stride, end;
  int64_t head_index;
  bool idle;

  __device__ __forceinline__ ScanWork(const ProgressiveArgs& p, const ProgressiveSequence& from,
                                      int sequence, int chunk, int head_begin) {
    const int warp = threadIdx.x / 32;
    const int heads = min(kScanWarps, p.shape.num_kv_heads - head_begin);
    head = head_begin + warp % heads;
    stride = kScanWarps / heads;  // warps that share a head
    idle = warp >= stride * heads;
    end = min((chunk + 1) * p.scan_chunk, from.num_sealed);
    first = chunk * p.scan_chunk + warp / heads;
    head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  }
};

// The log2 of the sum of a warp's `items` page masses, for column lane % 8.
template <class Traits>
__device__ __forceinline__ float WarpMass(const typename ScanShared<Traits>::Warp& mine, int items,
                                          int lane) {
  __syncwarp();
  float high = -INFINITY, sum = 0;
  for (int i = lane / 8; i < items; i += 4) high = fmaxf(high, mine.mass[i][lane % 8]);
  high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 8));
  high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 16));
  const float base = high == -INFINITY ? 0.0f : high;
  for (int i = lane / 8; i < items; i += 4) sum += Exp2(mine.mass[i][lane % 8] - base);
  sum += __shfl_xor_sync(0xffffffffu, sum, 8);
  sum += __shfl_xor_sync(0xffffffffu, sum, 16);
  return high == -INFINITY ? high : base + Log2(sum);
}

// Adds up the warps' masses (column lane % 8) of each head of the chunk.
template <class Traits>
__device__ __forceinline__ void StoreChunkMass(const ProgressiveArgs& p, int sequence, int chunk,
                                               int head_begin, int column_tile, float mass,
                                               int64_t target, ScanShared<Traits>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int heads = min(kScanWarps, p.shape.num_kv_heads - head_begin);
  if (lane < kTileColumns) shared.lse[warp][lane] = mass;
  __syncthreads();
  for (int i = threadIdx.x; i < heads * kTileColumns; i += blockDim.x) {
    const int local = i / kTileColumns, column = i % kTileColumns;
    float total = -INFINITY;
    for (int j = 0; j < kScanWarps / heads; ++j) {
      total = AddLog2(total, shared.lse[local + j * heads][column]);
    }
    const int64_t at = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head_begin + local;
    reinterpret_cast<float*>(p.workspace +
                             target)[(at * p.work.scan_chunks + chunk) * p.work.columns +
                                     column_tile * kTileColumns + column] = total;
  }
}

// Brings the keys' first four bits of rank chunks [chunk_begin, chunk_end) and their scales to a
// stage of shared memory. Offsets are from the start of a page, for this lane.
template <class Traits>
__device__ __forceinline__ void FetchKeys(const PageLayout& layout, const std::byte* page,
                                          std::byte* stage, int head, int chunk_begin,
                                          int chunk_end, int lane) {
#pragma unroll
  for (int c = 0; c < NumRankChunks(Traits::kHeadDim); ++c) {
    if (c < chunk_begin || c >= chunk_end) continue;
    const auto offset =
        static_cast<uint32_t>(layout.key_base[c].offset) +
        static_cast<uint32_t>(head) * static_cast<uint32_t>(layout.key_base[c].bytes);
#pragma unroll
    for (int i = 0; i < Traits::kChunkTiles; ++i) {
      const int k = c * Traits::kChunkTiles + i;
      if (k >= Traits::kTiles) break;
      CopyAsync16(stage + k * kKeyTileBytes + lane * 16,
                  page + offset + i * kKeyTileBytes + lane * 16);
    }
  }
  if (lane < Traits::kHeadDim / 16) {
    CopyAsync16(stage + Traits::kTiles * kKeyTileBytes + lane * 16,
                page + static_cast<uint32_t>(layout.key_scales.offset) +
                    static_cast<uint32_t>(head * Traits::kHeadDim) + lane * 16);
  }
}

template <class Traits>
__device__ void ScanChunk(const ProgressiveArgs& p, int sequence, int chunk, int head_begin,
                          int column_tile) {
  using Shared = ScanShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const int lane = threadIdx.x % 32;
  const ScanWork<Traits> work(p, from, sequence, chunk, head_begin);
  typename Shared::Warp& mine = shared.warps[threadIdx.x / 32];
  const int chunk_end = ScanChunks<Traits>(p, from.decision);

  // Lane i holds the id of the warp's i-th page.
  const int mine_at = work.first + lane * work.stride;
  const uint32_t ids = mine_at < work.end ? p.table[from.table_begin + mine_at] : 0;
  auto fetch = [&](int page, int item, int stage) {
    const uint32_t id = __shfl_sync(0xffffffffu, ids, item);
    if (page < work.end && PageVisibility(s, page) != Visibility::kNone) {
      FetchKeys<Traits>(p.layout, p.pool + static_cast<int64_t>(id) * kPageAlignment,
                        mine.stages[stage], work.head, 0, chunk_end, lane);
    }
    CommitCopies();
  };

  if (!work.idle) {
#pragma unroll
    for (int i = 0; i < kScanStages - 1; ++i) fetch(work.first + i * work.stride, i, i);
  }
  WaitForDependencies();
  int stage = 0, item = 0, basis_end = 0, pages_read = 0;
  uint2 query[Traits::kTiles];
  float unit = 0, mean[2] = {};
  const PageSinks sinks = MakePageSinks<Traits>(p, s, work.head_index, column_tile, lane);
  for (int page = work.first; !work.idle && page < work.end; page += work.stride) {
    constexpr int kAhead = kScanStages - 1;
    fetch(page + kAhead * work.stride, item + kAhead, (stage + kAhead) % kScanStages);
    WaitCopies<kAhead>();
    __syncwarp();
    const Visibility visibility = PageVisibility(s, page);
    if (visibility == Visibility::kNone) {  // no kernel looks at such a page's statistics
      if (lane < kTileColumns) mine.mass[item][lane] = -INFINITY;
      ++item;
      stage = (stage + 1) % kScanStages;
      continue;
    }
    if (page >= basis_end) {
      const int run = BasisOfPage(SequenceView(from), page);
      basis_end = run + 1 < from.num_bases ? from.basis_end[run] : work.end;
      const QueryFragments<Traits> fragments(p, work.head_index, run, column_tile);
#pragma unroll
      for (int k = 0; k < Traits::kTiles; ++k) query[k] = fragments.halves[k * 32 + lane];
      unit = fragments.unit;
      mean[0] = fragments.mean[lane % 4 * 2];
      mean[1] = fragments.mean[lane % 4 * 2 + 1];
    }
    const std::byte* data = mine.stages[stage];
    const float scale =
        unit * SpreadKeyRanges<Traits>(data + Traits::kTiles * kKeyTileBytes, mine.ranges, lane);
    __syncwarp();
    float sums[4][4], ones[4], high[2];
    uint32_t squares = 0, packed[8];
    MultiplyPage<Traits>(data, mine.ranges, query, 0, chunk_end, lane, sums, ones, &squares);
    float variance = SumHalves(squares) * (1.0f / 768);  // (r / 8)^2 / 12 for what was read
    if (chunk_end < NumRankChunks(Traits::kHeadDim)) {   // r^2 / 6 for what was not
      variance += SumHalves(UnreadSquares<Traits>(mine.ranges, query, chunk_end, lane)) / 6;
    }
    variance = QuadSum(variance) * (kLn2 * kLn2 / 256) * scale * scale;
    if (visibility == Visibility::kPart) {
      MaskPage(s, page, p.shape.group_size(), column_tile * kTileColumns + lane % 4 * 2, lane,
               sums);
    }
    const float offset[2] = {fmaf(-0.9375f * scale, ones[0], mean[0]),
                             fmaf(-0.9375f * scale, ones[1], mean[1])};
    PackScores(sums, 2097152.0f * scale, offset, high, packed);  // 2^24 / 8
    const float2 mass = StorePage<Traits>(sinks, p.work.columns, s.softcap, page, lane, packed,
                                          high, variance, false);
    if (lane < 4) *reinterpret_cast<float2*>(&mine.mass[item][2 * lane]) = mass;
    ++pages_read;
    ++item;
    stage = (stage + 1) % kScanStages;
    __syncwarp();
  }
  LaunchDependents();
  if (lane == 0 && pages_read > 0 && column_tile == 0) {
    AddBytes(&p.decisions[work.head_index].key_bytes,
             pages_read * (KeyReadBytes(Traits::kHeadDim, kScanBits, chunk_end)));
  }
  StoreChunkMass<Traits>(p, sequence, chunk, head_begin, column_tile,
                         WarpMass<Traits>(mine, item, lane), p.work.scan_lse, shared);
}

template <class Traits>
__global__ void __launch_bounds__(kScanWarps * 32, ScanCtasPerSm(Traits::kHeadDim))
    ProgressiveScanKernel(const __grid_constant__ ProgressiveArgs p) {
  const int tiles = p.work.columns / kTileColumns;
  const int dense_ctas = p.num_sequences * p.shape.num_kv_heads * tiles;
  int block = blockIdx.x;
  if (block < dense_ctas) {
    const int tile = block % tiles, head_index = block / tiles;
    DenseTail<Traits>(p, head_index / p.shape.num_kv_heads, head_index % p.shape.num_kv_heads,
                      tile);
    return;
  }
  block -= dense_ctas;
  const int tile = block % tiles;
  block /= tiles;
  const int head_groups = CeilDiv(p.shape.num_kv_heads, kScanWarps);
  const int head_begin = block % head_groups * kScanWarps;
  block /= head_groups;
  ScanChunk<Traits>(p, block / p.work.scan_chunks, block % p.work.scan_chunks, head_begin, tile);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_

// Scan: the 4-bit score of every token of every sealed page, and each page's log mass.
//   s[t] = sum_c q_c r_c (n_tc - 7.5) / 8 + q.mu     n: nibbles; r: the page's channel ranges
//
// A warp serves one kv head and takes pages of its CTA's chunk in turn; the warps of a CTA serve
// neighbouring heads, so that a page's nibbles of all heads are read as one run. Tokens are the M
// of the MMA, columns the N. Nibbles enter the MMA as FP16 subnormals (n 2^-24, or 16 n 2^-24 for
// the upper nibble, which only ever holds rows 8..15 of a tile), so that unpacking is one AND;
// products are exact and the sums FP32. The offset 7.5 is a ninth MMA with ones. grid: dense_ctas
// (progressive_dense.cuh), then num_sequences x scan_chunks x head groups.

#include "kernels/cuda/progressive_common.cuh"
#include "kernels/cuda/progressive_dense.cuh"

namespace adaattn {

inline constexpr int kScanWarps = 8;
inline constexpr int kScanStages = 3;

template <class Traits>
struct ScanShared {
  static constexpr int kStageBytes = Traits::kTiles * kKeyTileBytes + Traits::kHeadDim;
  struct Warp {
    alignas(16) std::byte stages[kScanStages][kStageBytes];
    alignas(16) float ranges[Traits::kHeadDim];
  };
  Warp warps[kScanWarps];
  float lse[kScanWarps][kTileColumns];
};

// Scores of one page from its keys' first four bits over tiles [tile_begin, tile_end): sums[t] is
// the accumulator of tokens 16t..16t+15 in log2 units; `variance` the column's sum of (q r)^2 over
// all channels read, for the column lane / 4.
template <class Traits>
__device__ __forceinline__ void ScorePage(const std::byte* nibbles, const float* ranges,
                                          const float4 (&query)[Traits::kTiles], int tile_begin,
                                          int tile_end, int lane, float (&sums)[4][4],
                                          float* variance, float* unread) {
  float ones[4] = {};
  const uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x3c003c00u, 0x3c003c00u};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[t][e] = 0;
  }
#pragma unroll
  for (int k = 0; k < Traits::kTiles; ++k) {
    const float4 range = reinterpret_cast<const float4*>(ranges)[k * 4 + lane % 4];
    const float x = query[k].x * range.x, y = query[k].y * range.y;
    const float z = query[k].z * range.z, w = query[k].w * range.w;
    const float squares = fmaf(x, x, fmaf(y, y, fmaf(z, z, w * w)));
    if (k < tile_begin) continue;
    if (k >= tile_end) {
      *unread += squares;
      continue;
    }
    *variance += squares;
    const uint32_t b0 = PackPair<__half>(x, y), b1 = PackPair<__half>(z, w);
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
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float unit = e < 2 ? 2097152.0f : 131072.0f;  // 2^24 / 8, and / 16 for rows 8..15
      sums[t][e] = fmaf(sums[t][e], unit, -0.9375f * ones[e % 2]);
    }
  }
}

// Masks, takes the page's maximum, and turns accumulators into B fragments of half2 minus that
// maximum. Returns the maximum of column lane / 4.
__device__ __forceinline__ float PackScores(const SequenceView& s, int page, bool all_visible,
                                            int group_size, int column_begin, int lane,
                                            float (&sums)[4][4], uint32_t (&packed)[8]) {
  const int column = column_begin + lane % 4 * 2;
  float high[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (!all_visible) {
        const int token = page * kPageTokens + 16 * t + lane / 4 + (e >= 2 ? 8 : 0);
        if (!TokenVisible(s, token, (column + e % 2) / group_size)) sums[t][e] = -INFINITY;
      }
      high[e % 2] = fmaxf(high[e % 2], sums[t][e]);
    }
  }
  high[0] = ColumnMax(high[0]);
  high[1] = ColumnMax(high[1]);
  const float base[2] = {high[0] == -INFINITY ? 0.0f : high[0],
                         high[1] == -INFINITY ? 0.0f : high[1]};
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    packed[2 * t] = Transpose8x8(PackPair<__half>(sums[t][0] - base[0], sums[t][1] - base[1]));
    packed[2 * t + 1] = Transpose8x8(PackPair<__half>(sums[t][2] - base[0], sums[t][3] - base[1]));
  }
  // Column c = lane / 4 stands in accumulators of lanes with lane % 4 == c / 2.
  const float even = __shfl_sync(0xffffffffu, high[0], lane / 8);
  const float odd = __shfl_sync(0xffffffffu, high[1], lane / 8);
  return lane / 4 % 2 == 0 ? even : odd;
}

// Log mass of column lane / 4 from its packed scores; every lane of the quad gets it.
__device__ __forceinline__ PageStats SumPage(const uint32_t (&packed)[8], float max, float cap) {
  PageStats stats{max, -INFINITY, 0, 0};
  const float top = SoftCap(max, cap);
  float sum = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 y = HalvesToFloats(packed[i]);
    const float a = cap == 0 ? Exp2(y.x) : Exp2(SoftCap(y.x + max, cap) - top);
    const float b = cap == 0 ? Exp2(y.y) : Exp2(SoftCap(y.y + max, cap) - top);
    sum += a + b;
    squares = fmaf(a, a, fmaf(b, b, squares));
  }
  sum = QuadSum(sum);
  stats.squares = QuadSum(squares);
  if (max != -INFINITY) stats.lse = top + Log2(sum);
  return stats;
}

template <class Traits>
__device__ void ScanChunk(const ProgressiveArgs& p, int sequence, int chunk, int head_begin) {
  using Shared = ScanShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const PageLayout& layout = p.layout;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int heads = min(kScanWarps, p.shape.num_kv_heads - head_begin);
  const int head = head_begin + warp % heads;
  const int stride = kScanWarps / heads;  // warps that share a head
  const bool idle = warp >= stride * heads;
  const int end = min((chunk + 1) * p.scan_chunk, from.num_sealed);
  const int first = chunk * p.scan_chunk + warp / heads;
  const int group_size = p.shape.group_size();
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  typename Shared::Warp& mine = shared.warps[warp];

  const int tile_end = ScanTiles<Traits>(from.decision);
  constexpr int kChunkTiles = ChunkChannels(Traits::kHeadDim) / kTileChannels;

  // Lane i holds the id of the warp's i-th page; one load for 32 pages.
  const uint32_t* table = p.table + from.table_begin;
  uint32_t ids = 0;
  auto load_ids = [&](int page) {
    ids = page + lane * stride < end ? table[page + lane * stride] : 0;
  };
  auto fetch = [&](int page, int stage) {
    const int item = (page - first) / stride;
    if (item % 32 == 0) load_ids(page);
    const uint32_t id = __shfl_sync(0xffffffffu, ids, item % 32);
    if (page < end && PageVisibility(s, page) != Visibility::kNone) {
      const std::byte* base = p.pool + static_cast<int64_t>(id) * kPageAlignment;
#pragma unroll
      for (int k = 0; k < Traits::kTiles; ++k) {
        if (k >= tile_end) break;
        const PageLayout::Section& section = layout.key_base[k / kChunkTiles];
        CopyAsync16(mine.stages[stage] + k * kKeyTileBytes + lane * 16,
                    base + section.offset + head * section.bytes + k % kChunkTiles * kKeyTileBytes +
                        lane * 16);
      }
      WarpCopyAsync(mine.stages[stage] + Traits::kTiles * kKeyTileBytes,
                    base + layout.key_scales.offset + head * layout.key_scales.bytes,
                    Traits::kHeadDim, lane);
    }
    CommitCopies();
  };

  if (!idle) {
#pragma unroll
    for (int i = 0; i < kScanStages - 1; ++i) fetch(first + i * stride, i);
  }
  WaitForDependencies();
  float lse = -INFINITY;  // of the chunk's pages, column lane / 4
  int pages_read = 0;
  int stage = 0;
  float4 query[Traits::kTiles];
  int basis = -1;
  float mean = 0, mean_next = 0;
  for (int page = first; !idle && page < end; page += stride) {
    fetch(page + (kScanStages - 1) * stride, (stage + kScanStages - 1) % kScanStages);
    WaitCopies<kScanStages - 1>();
    __syncwarp();
    const Visibility visibility = PageVisibility(s, page);
    PageStats stats{-INFINITY, -INFINITY, 0, 0};
    const int64_t page_index = head_index * p.max_sealed + page;
    if (visibility != Visibility::kNone) {
      if (const int run = BasisOfPage(s, page); run != basis) {
        basis = run;
        const int64_t at = head_index * kMaxDeviceBasisRuns + run;
        const float4* fragments = reinterpret_cast<const float4*>(p.workspace + w.query) +
                                  at * Traits::kTiles * 32 + lane;
#pragma unroll
        for (int k = 0; k < Traits::kTiles; ++k) query[k] = fragments[k * 32];
        const float2 means = reinterpret_cast<const float2*>(p.workspace + w.query_mean +
                                                             at * w.columns * 4)[lane % 4];
        mean = means.x;
        mean_next = means.y;
      }
      const std::byte* data = mine.stages[stage];
      SpreadKeyRanges<Traits>(data + Traits::kTiles * kKeyTileBytes, mine.ranges, lane);
      __syncwarp();
      float sums[4][4], variance = 0, unread = 0;
      ScorePage<Traits>(data, mine.ranges, query, 0, tile_end, lane, sums, &variance, &unread);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[t][e] += e % 2 == 0 ? mean : mean_next;
      }
      uint32_t packed[8];
      const float max =
          PackScores(s, page, visibility == Visibility::kAll, group_size, 0, lane, sums, packed);
      stats = SumPage(packed, max, s.softcap);
      // (r / 8)^2 / 12 for what was read, r^2 / 6 for what was not; nats.
      stats.variance = kLn2 * kLn2 * QuadSum(variance * (1.0f / 768) + unread * (1.0f / 6));
      if (lane / 4 < group_size * s.q_len) {
        uint4* scores = reinterpret_cast<uint4*>(p.workspace + w.scores) + page_index * 64 + lane;
        scores[0] = make_uint4(packed[0], packed[1], packed[2], packed[3]);
        scores[32] = make_uint4(packed[4], packed[5], packed[6], packed[7]);
      }
      lse = AddLog2(lse, EstimatedLog2Mass(stats));
      ++pages_read;
    }
    if (lane % 4 == 0) {
      reinterpret_cast<float4*>(p.workspace + w.stats)[page_index * w.columns + lane / 4] =
          make_float4(stats.max, stats.lse, stats.variance, stats.squares);
    }
    stage = (stage + 1) % kScanStages;
    __syncwarp();
  }
  LaunchDependents();
  if (lane % 4 == 0) shared.lse[warp][lane / 4] = lse;
  if (lane == 0 && pages_read > 0) {
    AddBytes(&p.decisions[head_index].key_bytes,
             pages_read * (Traits::kHeadDim + int64_t{tile_end} * kKeyTileBytes));
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * kTileColumns; i += blockDim.x) {
    const int local = i / kTileColumns, column = i % kTileColumns;
    float total = -INFINITY;
    for (int j = 0; j < stride; ++j) total = AddLog2(total, shared.lse[local + j * heads][column]);
    const int64_t at = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head_begin + local;
    reinterpret_cast<float*>(p.workspace +
                             w.scan_lse)[(at * w.scan_chunks + chunk) * w.columns + column] = total;
  }
}

template <class Traits>
__global__ void __launch_bounds__(kScanWarps * 32, 2)
    ProgressiveScanKernel(const __grid_constant__ ProgressiveArgs p) {
  const int dense_ctas = p.num_sequences * p.shape.num_kv_heads;
  int block = blockIdx.x;
  if (block < dense_ctas) {
    DenseTail<Traits>(p, block / p.shape.num_kv_heads, block % p.shape.num_kv_heads);
    return;
  }
  block -= dense_ctas;
  const int head_groups = CeilDiv(p.shape.num_kv_heads, kScanWarps);
  const int chunks = CeilDiv(p.max_sealed, p.scan_chunk);
  const int head_begin = block % head_groups * kScanWarps;
  block /= head_groups;
  ScanChunk<Traits>(p, block / chunks, block % chunks, head_begin);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_REFINE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_REFINE_CUH_

// Refine: the second stage of a two-stage scan. Pages that the coarse rank cannot rule out get the
// rest of their 4 bits:
//   open when  lse_page + z sqrt(var) - L > log theta  for any column; the sink and cut pages
//   always
// L is the global LSE of the coarse masses. What was scanned is kept: the rest of the rank adds to
// the packed scores. Sequences that scan in one stage pass through with their masses.
// A warp takes the pages that it scanned, decides eight at a time, then has what the opened ones
// need brought through a ring of its own. grid: runs x head groups. One tile of columns only: more
// would have to agree on what is open (RunProgressive scans those in one stage).

#include "kernels/cuda/progressive_scan.cuh"

namespace adaattn {

inline constexpr int kRefineStages = 3;
inline constexpr int kRefineList = 32;  // pages of a warp that are decided before any is read

template <class Traits>
struct RefineShared {
  struct Stage {
    alignas(16) std::byte scores[kPageTokens * kTileColumns * 2];
    alignas(16) float4 stats[kTileColumns];
    alignas(16) std::byte scales[Traits::kHeadDim];
    // The coarse rank is at least one chunk.
    alignas(16) std::byte keys[(Traits::kTiles - Traits::kChunkTiles) * kKeyTileBytes];
  };
  struct Warp {
    Stage stages[kRefineStages];
    alignas(16) __half ranges[Traits::kHeadDim];
    int list[kRefineList];  // opened pages
  };
  Warp warps[kScanWarps];
  float lse[kScanWarps * kTileColumns];
};

// The head's LSE of every column from the coarse masses, by one warp, to lse [8].
__device__ __forceinline__ void CoarseLse(const ProgressiveArgs& p, const ProgressiveSequence& from,
                                          int64_t head_index, int head, int lane, float* lse) {
  const float* runs = RunMasses(p, p.work.scan_lse, from.scan_begin, head) + lane % kTileColumns;
  const int64_t stride = MassStride(p);
  RunningMass<1> sum;
  const int entries = from.num_scan_runs * p.scan_places;
#pragma unroll 8
  for (int i = lane / kTileColumns; i < entries; i += 4) {
    sum.Add({runs[i * stride]});
  }
  float part[1];
  sum.Log2Sum(part);
  float total = part[0];
  total = AddLog2(total, __shfl_xor_sync(0xffffffffu, total, 8));
  total = AddLog2(total, __shfl_xor_sync(0xffffffffu, total, 16));
  if (lane < kTileColumns) {
    lse[lane] =
        AddLog2(total, reinterpret_cast<const float*>(
                           p.workspace + p.work.dense_lse)[head_index * p.work.columns + lane]);
  }
  __syncwarp();
}

// Adds the rest's scores to the packed ones and takes the new maximum: high, columns 2 (lane % 4)
// and + 1.
__device__ __forceinline__ void AddScores(const float (&sums)[4][4], float unit,
                                          const float (&offset)[2], float max, int lane,
                                          uint32_t (&packed)[8], float (&high)[2]) {
  const float units[2] = {unit, unit * 0.0625f};
  float top = -INFINITY;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t rest =
          Transpose8x8(PackPair<__half>(fmaf(sums[t][2 * half], units[half], offset[0]),
                                        fmaf(sums[t][2 * half + 1], units[half], offset[1])));
      uint32_t& word = packed[2 * t + half];
      word = FmaHalves(kOneHalves, rest, word);
      const float2 y = UnpackPair<__half>(word);
      top = fmaxf(top, fmaxf(y.x, y.y));
    }
  }
  top = QuadMax(top);
  const float shift = top == -INFINITY ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 y = UnpackPair<__half>(packed[i]);
    packed[i] = PackPair<__half>(y.x - shift, y.y - shift);
  }
  const float next = max == -INFINITY ? max : max + shift;  // of column lane / 4
  high[0] = __shfl_sync(0xffffffffu, next, lane % 4 * 8);
  high[1] = __shfl_sync(0xffffffffu, next, lane % 4 * 8 + 4);
}

// Reads on in the pages of one (run, kv head).
template <class Traits>
struct PageRefiner {
  using Shared = RefineShared<Traits>;
  using Stage = typename Shared::Stage;
  const ProgressiveArgs& p;
  const ProgressiveSequence& from;
  const SequenceView& s;
  typename Shared::Warp& mine;
  const PageSinks& sinks;
  int64_t head_index;
  int head, chunk_begin, columns, lane;
  RunningMass<2> mass;
  int pages_read = 0;

  __device__ __forceinline__ bool AlwaysOpens(int page) const {
    return page == 0 || PageVisibility(s, page) == Visibility::kPart;
  }

  // Eight pages from `page` on, `stride` apart, a quad each: the mask of those that open, at the
  // first bit of each quad. The others' masses are final.
  __device__ __forceinline__ uint32_t Decide(int page, int stride, int end, const float* lse) {
    page += lane / 4 * stride;
    const int n = lane % 4 * 2;
    const bool visible = page < end && PageVisibility(s, page) != Visibility::kNone;
    bool opens = false;
    float masses[2] = {-INFINITY, -INFINITY};
    if (visible) {
      const float4* at = PageStatsOf(p, head_index, page) + n;
      const float4 x[2] = {at[0], at[1]};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        masses[i] = EstimatedLog2Mass(PageStats{x[i].x, x[i].y, x[i].z, x[i].w});
        opens |= n + i < columns && OpensPage(x[i].y * kLn2, x[i].z, from.decision.coarse_z,
                                              lse[n + i] * kLn2, ThetaOf(p, from, head_index));
      }
      opens = chunk_begin > 0 && (opens || AlwaysOpens(page));
    }
    uint32_t quads = __ballot_sync(0xffffffffu, opens);
    quads |= quads >> 1;
    quads = (quads | quads >> 2) & 0x11111111u;
    if ((quads >> (lane & ~3) & 1) == 0) mass.Add(masses);
    return quads;
  }

  __device__ __forceinline__ void Fetch(int page, Stage& stage) const {
    const std::byte* base =
        p.pool + static_cast<int64_t>(p.table[from.table_begin + page]) * kPageAlignment;
    const int64_t index = head_index * p.max_sealed + page;
    const std::byte* scores = p.workspace + p.work.scores + index * (p.work.columns * 128);
    if (sinks.StoresScores()) {
      CopyAsync16(stage.scores + lane * 16, scores + lane * 16);
      CopyAsync16(stage.scores + 512 + lane * 16, scores + 512 + lane * 16);
    }
    if (lane < kTileColumns)
      CopyAsync16(&stage.stats[lane], PageStatsOf(p, head_index, page) + lane);
    if (lane < Traits::kHeadDim / 16) {
      CopyAsync16(stage.scales + lane * 16,
                  base + p.layout.key_scales.offset + head * Traits::kHeadDim + lane * 16);
    }
#pragma unroll
    for (int c = 1; c < NumRankChunks(Traits::kHeadDim); ++c) {
      if (c < chunk_begin) continue;
      const PageLayout::Section& section = p.layout.key_base[c];
      WarpCopyAsync(stage.keys + (c - chunk_begin) * Traits::kChunkTiles * kKeyTileBytes,
                    base + section.offset + head * section.bytes, static_cast<int>(section.bytes),
                    lane);
    }
  }

  // The rest of one opened page's rank.
  __device__ __forceinline__ void Refine(int page, const Stage& stage) {
    constexpr int kChunks = NumRankChunks(Traits::kHeadDim);
    const QueryFragments<Traits> fragments(p, head_index, BasisOfPage(s, page), 0);
    uint2 query[Traits::kTiles];
#pragma unroll
    for (int k = 0; k < Traits::kTiles; ++k) query[k] = fragments.halves[k * 32 + lane];
    const float scale = fragments.unit * SpreadKeyRanges<Traits>(stage.scales, mine.ranges, lane);
    __syncwarp();
    uint32_t chunks[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      chunks[c] =
          SharedAddress(stage.keys) + (c - chunk_begin) * Traits::kChunkTiles * kKeyTileBytes;
    }
    const LaneRanges ranges = MakeLaneRanges<Traits>(mine.ranges, nullptr, lane);
    PageProducts products;
    MultiplyPage<Traits>(chunks, ranges, query, chunk_begin, kChunks, lane, &products);
    float high[2], variances[2];
    uint32_t packed[8];
    UnreadSquares<Traits>(ranges, query, 0, lane, variances);
#pragma unroll
    for (int c = 0; c < 2; ++c) variances[c] *= (kLn2 * kLn2 / 768) * scale * scale;
    uint4 low = make_uint4(0, 0, 0, 0), up = low;
    float max = -INFINITY;
    if (sinks.StoresScores()) {
      low = reinterpret_cast<const uint4*>(stage.scores)[lane];
      up = reinterpret_cast<const uint4*>(stage.scores)[32 + lane];
      max = stage.stats[lane / 4].x;
    }
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, up.x, up.y, up.z, up.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) packed[i] = words[i];
    const float offset[2] = {-0.9375f * scale * products.own[2],
                             -0.9375f * scale * products.own[3]};
    AddScores(products.sums, 2097152.0f * scale, offset, max, lane, packed, high);
    float lse[2], concentration[2];
    SumPacked<Traits>(packed, high, s.softcap, lane, lse, concentration);
    const PageStats stats[2] = {{high[0], lse[0], variances[0], concentration[0]},
                                {high[1], lse[1], variances[1], concentration[1]}};
    StoreStats(p, sinks, page, stats, true);
    StoreScores(p, sinks, page, packed);
    if (lane < 4) mass.Add({EstimatedLog2Mass(stats[0]), EstimatedLog2Mass(stats[1])});  // once
    ++pages_read;
  }

  __device__ __forceinline__ void RefineList(int count) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kRefineStages - 1; ++i) {
      if (i < count) Fetch(mine.list[i], mine.stages[i]);
      CommitCopies();
    }
    int stage = 0, next = kRefineStages - 1;
    for (int i = 0; i < count; ++i) {
      if (i + kRefineStages - 1 < count) {
        Fetch(mine.list[i + kRefineStages - 1], mine.stages[next]);
      }
      CommitCopies();
      WaitCopies<kRefineStages - 1>();
      __syncwarp();
      Refine(mine.list[i], mine.stages[stage]);
      __syncwarp();
      stage = stage + 1 == kRefineStages ? 0 : stage + 1;
      next = next + 1 == kRefineStages ? 0 : next + 1;
    }
  }

  __device__ __forceinline__ void Run(const ScanRun& run, int place, int stride, const float* lse) {
    constexpr int kAtOnce = 8;
    for (int first = run.page_begin + place; first < run.page_end; first += kRefineList * stride) {
      int count = 0;
#pragma unroll
      for (int i = 0; i < kRefineList; i += kAtOnce) {
        const int page = first + i * stride;
        if (page >= run.page_end) continue;
        const uint32_t quads = Decide(page, stride, run.page_end, lse);
        if (lane % 4 == 0 && (quads >> lane & 1) != 0) {
          mine.list[count + __popc(quads & ((1u << lane) - 1))] = page + lane / 4 * stride;
        }
        count += __popc(quads);
      }
      RefineList(count);
    }
    // Each quad saw other pages.
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      float so_far[2];
      mass.Log2Sum(so_far);
      mass.Add({__shfl_xor_sync(0xffffffffu, so_far[0], step),
                __shfl_xor_sync(0xffffffffu, so_far[1], step)});
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(kScanWarps * 32, Traits::kHeadDim <= 128 ? 2 : 1)
    ProgressiveRefineKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<RefineShared<Traits>*>(shared_bytes);
  const int head_groups = CeilDiv(p.shape.num_kv_heads, kScanWarps);
  const int run_index = blockIdx.x / head_groups;
  const HeadGroup group(p, blockIdx.x % head_groups);
  const ScanRun run = p.scan_runs[run_index];
  if (run.sequence < 0) return;
  const ProgressiveSequence& from = p.sequences[run.sequence];
  const SequenceView s(from);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int place = warp / group.heads, head = group.begin + warp % group.heads;
  const int64_t first_head = static_cast<int64_t>(run.sequence) * p.shape.num_kv_heads;
  const int64_t head_index = first_head + head;
  WaitForDependencies();
  LaunchDependents();
  const PageSinks sinks = MakePageSinks<Traits>(p, p.group.size * s.q_len, head_index, 0, lane);
  PageRefiner<Traits> refiner{p,
                              from,
                              s,
                              shared.warps[warp],
                              sinks,
                              head_index,
                              head,
                              CoarseStage<Traits>(p, from.decision),
                              p.group.size * s.q_len,
                              lane};
  if (place >= group.pages) return;
  CoarseLse(p, from, head_index, head, lane, shared.lse + warp * kTileColumns);
  refiner.Run(run, place, group.pages, shared.lse + warp * kTileColumns);
  StoreRunMass(p, p.work.refined_lse, run_index, place, head, 0, refiner.mass);
  if (lane == 0 && refiner.pages_read > 0) {
    const int64_t whole =
        KeyReadBytes(Traits::kHeadDim, kScanBits, NumRankChunks(Traits::kHeadDim));
    const int64_t coarse = KeyReadBytes(Traits::kHeadDim, kScanBits, refiner.chunk_begin);
    AddBytes(&p.decisions[head_index].key_bytes, refiner.pages_read * (whole - coarse));
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_REFINE_CUH_

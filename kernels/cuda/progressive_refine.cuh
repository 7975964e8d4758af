#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_REFINE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_REFINE_CUH_

// Refine: the second stage of a two-stage scan. Pages that the coarse rank cannot rule out get the
// rest of their 4 bits:
//   open when  lse_page + z sqrt(var) - L > log theta  for any column; the sink and cut pages
//   always
// L is the global LSE of the coarse masses. What was scanned is kept: the rest of the rank adds to
// the packed scores. Sequences that scan in one stage pass through with their masses.
// grid: sequences x chunks x head groups; the same warps take the same pages as in the scan. One
// tile of columns only: more would have to agree on what is open (RunProgressive scans those in one
// stage).

#include "kernels/cuda/progressive_scan.cuh"

namespace adaattn {

// The head's LSE of column lane % 8 of a tile from the coarse masses; every warp on its own.
__device__ __forceinline__ float CoarseLse(const ProgressiveArgs& p, int64_t head_index, int column,
                                           int lane) {
  const ProgressiveWorkspace& w = p.work;
  const float* chunks = reinterpret_cast<const float*>(p.workspace + w.scan_lse) +
                        head_index * w.scan_chunks * w.columns;
  float lse = -INFINITY;
  for (int i = lane / 8; i < w.scan_chunks; i += 4) {
    lse = AddLog2(lse, chunks[i * w.columns + column]);
  }
  lse = AddLog2(lse, __shfl_xor_sync(0xffffffffu, lse, 8));
  lse = AddLog2(lse, __shfl_xor_sync(0xffffffffu, lse, 16));
  return AddLog2(lse, reinterpret_cast<const float*>(p.workspace +
                                                     w.dense_lse)[head_index * w.columns + column]);
}

// Whether any column opens the page; `lse` is of column lane % 8.
__device__ __forceinline__ bool OpensForAny(const float4* stats, float lse, int columns,
                                            const DecisionParams& decision, int lane) {
  bool opens = false;
  if (lane < columns) {
    const float4 x = stats[lane];
    opens = OpensPage(x.y * kLn2, x.z, decision.coarse_z, lse * kLn2, decision.theta);
  }
  return __any_sync(0xffffffffu, opens);
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
      const float2 y = HalvesToFloats(word);
      top = fmaxf(top, fmaxf(y.x, y.y));
    }
  }
  top = QuadMax(top);
  const float shift = top == -INFINITY ? 0.0f : top;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 y = HalvesToFloats(packed[i]);
    packed[i] = PackPair<__half>(y.x - shift, y.y - shift);
  }
  const float next = max == -INFINITY ? max : max + shift;  // of column lane / 4
  high[0] = __shfl_sync(0xffffffffu, next, lane % 4 * 8);
  high[1] = __shfl_sync(0xffffffffu, next, lane % 4 * 8 + 4);
}

template <class Traits>
__device__ __forceinline__ float2 RefinePage(const ProgressiveArgs& p, const SequenceView& s,
                                             const ScanWork<Traits>& work, const PageSinks& sinks,
                                             const std::byte* data, int page, int chunk_begin,
                                             int column_tile, int lane, __half* ranges) {
  const QueryFragments<Traits> fragments(p, work.head_index, BasisOfPage(s, page), column_tile);
  uint2 query[Traits::kTiles];
#pragma unroll
  for (int k = 0; k < Traits::kTiles; ++k) query[k] = fragments.halves[k * 32 + lane];
  const float scale =
      fragments.unit * SpreadKeyRanges<Traits>(data + Traits::kTiles * kKeyTileBytes, ranges, lane);
  __syncwarp();
  float sums[4][4], ones[4], high[2];
  uint32_t unused = 0, packed[8];
  MultiplyPage<Traits>(data, ranges, query, chunk_begin, NumRankChunks(Traits::kHeadDim), lane,
                       sums, ones, &unused);
  const float variance = QuadSum(SumHalves(UnreadSquares<Traits>(ranges, query, 0, lane))) *
                         (kLn2 * kLn2 / 256 / 768) * scale * scale;
  uint4 low = make_uint4(0, 0, 0, 0), up = low;
  float max = -INFINITY;
  if (sinks.has_scores) {
    const uint4* from = sinks.scores + static_cast<int64_t>(page) * (p.work.columns * 8);
    low = from[0];
    up = from[32];
    max = PageStatsOf(p, work.head_index, page)[column_tile * kTileColumns + lane / 4].x;
  }
  const uint32_t words[8] = {low.x, low.y, low.z, low.w, up.x, up.y, up.z, up.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) packed[i] = words[i];
  const float offset[2] = {-0.9375f * scale * ones[0], -0.9375f * scale * ones[1]};
  AddScores(sums, 2097152.0f * scale, offset, max, lane, packed, high);
  return StorePage<Traits>(sinks, p.work.columns, s.softcap, page, lane, packed, high, variance,
                           true);
}

template <class Traits>
__global__ void __launch_bounds__(kScanWarps * 32, ScanCtasPerSm(Traits::kHeadDim))
    ProgressiveRefineKernel(const __grid_constant__ ProgressiveArgs p) {
  using Shared = ScanShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int head_groups = CeilDiv(p.shape.num_kv_heads, kScanWarps);
  constexpr int column_tile = 0;
  int block = blockIdx.x;
  const int head_begin = block % head_groups * kScanWarps;
  block /= head_groups;
  const int chunk = block % p.work.scan_chunks, sequence = block / p.work.scan_chunks;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const int lane = threadIdx.x % 32;
  const ScanWork<Traits> work(p, from, sequence, chunk, head_begin);
  typename Shared::Warp& mine = shared.warps[threadIdx.x / 32];
  const int columns = p.shape.group_size() * s.q_len;
  const int chunk_begin = CoarseStage<Traits>(p, from.decision);
  const PageSinks sinks = MakePageSinks<Traits>(p, s, work.head_index, column_tile, lane);
  WaitForDependencies();
  LaunchDependents();
  const float lse = CoarseLse(p, work.head_index, lane % kTileColumns, lane);
  int item = 0;
  int64_t bytes = 0;
  for (int page = work.first; !work.idle && page < work.end; page += work.stride, ++item) {
    const Visibility visibility = PageVisibility(s, page);
    const float4* stats = PageStatsOf(p, work.head_index, page);
    float2 mass = make_float2(-INFINITY, -INFINITY);
    if (visibility != Visibility::kNone) {
      const bool opens = chunk_begin > 0 && (page == 0 || visibility == Visibility::kPart ||
                                             OpensForAny(stats, lse, columns, from.decision, lane));
      if (opens) {
        const std::byte* base =
            p.pool + static_cast<int64_t>(p.table[from.table_begin + page]) * kPageAlignment;
        FetchKeys<Traits>(p.layout, base, mine.stages[0], work.head, chunk_begin,
                          NumRankChunks(Traits::kHeadDim), lane);
        CommitCopies();
        WaitCopies<0>();
        __syncwarp();
        mass = RefinePage<Traits>(p, s, work, sinks, mine.stages[0], page, chunk_begin, column_tile,
                                  lane, mine.ranges);
        bytes += KeyReadBytes(Traits::kHeadDim, kScanBits, NumRankChunks(Traits::kHeadDim)) -
                 KeyReadBytes(Traits::kHeadDim, kScanBits, chunk_begin);
        __syncwarp();
      } else {
        const float4 a = stats[column_tile * kTileColumns + lane % 4 * 2];
        const float4 b = stats[column_tile * kTileColumns + lane % 4 * 2 + 1];
        mass = make_float2(EstimatedLog2Mass(PageStats{a.x, a.y, a.z, a.w}),
                           EstimatedLog2Mass(PageStats{b.x, b.y, b.z, b.w}));
      }
    }
    if (lane < 4) *reinterpret_cast<float2*>(&mine.mass[item][2 * lane]) = mass;
  }
  if (lane == 0 && bytes > 0) {
    AddBytes(&p.decisions[work.head_index].key_bytes, bytes);
  }
  StoreChunkMass<Traits>(p, sequence, chunk, head_begin, column_tile,
                         WarpMass<Traits>(mine, item, lane), p.work.refined_lse, shared);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_REFINE_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_

// Scan: the 4-bit score of every token of every sealed page, and each page's log mass.
//   s[t] = sum_c q_c r_c (n_tc - 7.5) / 8 + q.mu     n: nibbles; r: the page's channel ranges
//
// A CTA takes runs of a sequence's pages, the first by its number, the next from a counter, until
// none is left. One warp fetches: a page's nibbles of neighbouring heads are one long read, so bulk
// copies fill a ring of stages, each kScanWarps (page, kv head) pairs; the other warps take a pair
// each. Scores are written where the page may be read on: L is at least what the pages so
// far hold and, unless the scan is early, the dense tail, so most fail theta already. Items of work
// are runs x head groups x column tiles; further column tiles find the page in L2 and count no
// bytes. grid: as many CTAs as the device holds

#include "kernels/cuda/progressive_scores.cuh"
#include "kernels/policy/error_model.h"

namespace adaattn {

inline constexpr int kScanStages = 3;
inline constexpr int kScanThreads = (kScanWarps + 1) * 32;

// What a stage of the ring holds.
struct StageWork {
  int item;  // -1: nothing, and nothing follows
  int sequence;
  int first_page;
  uint32_t visible;  // bit i: page first_page + i is; bit 16 + i: in part
};

template <class Traits>
struct ScanShared {
  // Of one (page, kv head); a page's heads lie side by side, chunk by chunk, then their scales.
  static constexpr int kPairBytes = Traits::kTiles * kKeyTileBytes + Traits::kHeadDim;
  alignas(16) std::byte stages[kScanStages][kScanWarps * kPairBytes];
  alignas(16) __half ranges[kScanWarps][Traits::kHeadDim];
  // A quarter of the banks from where those of the same tile lie.
  alignas(16) __half before_zeros[16], zeros[Traits::kHeadDim];
  float mean[kScanWarps][kTileColumns];  // q.mu
  float unit[kScanWarps];                // of the query
  alignas(8) uint64_t full[kScanStages], empty[kScanStages];
  uint64_t rotated;  // queries are, where the scan is early
  uint64_t begun;    // the scanning warps leave the way to the copies
  StageWork work[kScanStages];
};

// How the warps of a CTA share a group of kv heads: several pages at a time where there are few.
struct HeadGroup {
  int begin, heads, pages;  // pages: at a time
  __device__ __forceinline__ HeadGroup(const ProgressiveArgs& p, int group)
      : begin(group * kScanWarps),
        heads(min(kScanWarps, p.shape.num_kv_heads - begin)),
        pages(p.scan_places) {}
};

// One item of work.
struct ScanItem {
  int run, group = 0, tile = 0;

  __device__ __forceinline__ ScanItem(const ProgressiveArgs& p, int item) : run(item) {
    const int tiles = p.work.columns / kTileColumns;
    const int groups = CeilDiv(p.shape.num_kv_heads, kScanWarps);
    if (tiles * groups == 1) return;
    const int4 parts = Divide(item, tiles, groups);
    run = parts.x;
    group = parts.y;
    tile = parts.z;
  }
  // By a call: divisions are long and rare, and would stand in several places.
  static __device__ __noinline__ int4 Divide(int item, int tiles, int groups) {
    return make_int4(item / tiles / groups, item / tiles % groups, item % tiles, 0);
  }
};

// Stores the mass that a warp found in its part of a run, of place `place`.
template <int kN>
__device__ __forceinline__ void StoreRunMass(const ProgressiveArgs& p, int64_t masses, int run,
                                             int place, int head, int column_tile,
                                             const RunningMass<kN>& mass) {
  const int lane = threadIdx.x % 32;
  if (lane >= 4) return;
  float sum[kN];
  mass.Log2Sum(sum);
  const int64_t entry = int64_t{run} * p.scan_places + place;
  float* target = reinterpret_cast<float*>(p.workspace + masses) + entry * MassStride(p) +
                  head * p.work.columns + column_tile * kTileColumns + kN * lane;
#pragma unroll
  for (int c = 0; c < kN; ++c) target[c] = sum[c];
}

// What the fetching warp does: brings the first four bits of the scanned rank chunks of its items'
// pages and their scales, stage after stage.
template <class Traits>
struct PageFetcher {
  const ProgressiveArgs& p;
  ScanShared<Traits>& shared;
  int lane;
  uint64_t policy = EvictFirstPolicy();
  bool begun = false;        // the first item
  int stage = 0, round = 0;  // round: turns of the ring
  int next_item = 0;
  ScanRun next_run;

  __device__ __forceinline__ void Advance() {
    if (++stage == kScanStages) {
      stage = 0;
      ++round;
    }
  }
  __device__ __forceinline__ void WaitForRoom() const {
    if (round > 0) WaitBarrier(SharedAddress(&shared.empty[stage]), (round + 1) % 2);
  }

  // Takes the item after this one, so that its run is here when it begins. `counter`: items that
  // have been taken beyond each CTA's first.
  __device__ __forceinline__ void TakeNext(int items, int32_t* counter) {
    int taken = 0;
    if (lane == 0) taken = atomicAdd(counter, 1);
    next_item = gridDim.x + __shfl_sync(0xffffffffu, taken, 0);
    next_run = next_item < items ? p.scan_runs[ScanItem(p, next_item).run] : ScanRun();
  }

  // Has L1 fetch the queries of a run before the warps that scan ask for them, one after another
  // and behind the pages in flight.
  __device__ __forceinline__ void BringQueries(const ScanRun& run, const ScanItem& at,
                                               const HeadGroup& group,
                                               const SequenceView& s) const {
    const int head = group.begin + lane % group.heads;
    const int64_t head_index = int64_t{run.sequence} * p.shape.num_kv_heads + head;
    const QueryFragments<Traits> query(p, head_index, BasisOfPage(s, run.page_begin), at.tile);
    constexpr int kLines = Traits::kTiles * 32 * static_cast<int>(sizeof(uint2)) / 128;
    for (int i = lane / group.heads; i < kLines; i += 32 / group.heads) {
      // Columns 4..7 are the second half of a tile.
      if (Traits::kColumns < kTileColumns && i % 2 != 0) continue;
      PrefetchL1(reinterpret_cast<const std::byte*>(query.halves) + i * 128);
    }
    if (lane >= group.heads) return;
    PrefetchL1(query.mean);
    PrefetchL1(reinterpret_cast<const float*>(p.workspace + p.work.dense_lse) +
               head_index * p.work.columns + at.tile * kTileColumns);
  }

  __device__ __forceinline__ void FetchRun(int item, const ScanItem& at, const ScanRun& run,
                                           int items, int32_t* counter) {
    constexpr int kD = Traits::kHeadDim;
    const ProgressiveSequence& from = p.sequences[run.sequence];
    const SequenceView s(from);
    const HeadGroup group(p, at.group);
    if (begun) BringQueries(run, at, group, s);
    const int chunk_end = ScanChunks<Traits>(p, from.decision);
    const int key_bytes = ChunkedRank(kD, chunk_end) * (kPageTokens / 2);
    // A lane copies one rank chunk of a page, or the scales.
    const bool scales = lane == chunk_end;
    const PageLayout::Section& section =
        scales ? p.layout.key_scales : p.layout.key_base[min(lane, chunk_end - 1)];
    const auto bytes = static_cast<uint32_t>(section.bytes);
    const int64_t offset = section.offset + group.begin * int64_t{bytes};
    const int place = (scales ? Traits::kTiles : lane * Traits::kChunkTiles) * kKeyTileBytes;
    uint32_t ids = 0;
    int pages = 0;
    for (int first = run.page_begin; first < run.page_end; first += group.pages) {
      const int in_batch = (first - run.page_begin) % 32;
      if (in_batch == 0 && first + lane < run.page_end) {
        ids = p.table[from.table_begin + first + lane];
      }
      Visibility visibility = Visibility::kNone;
      if (lane < group.pages && first + lane < run.page_end) {
        visibility = PageVisibility(s, first + lane);
      }
      const uint32_t seen = __ballot_sync(0xffffffffu, visibility != Visibility::kNone);
      const uint32_t cut = __ballot_sync(0xffffffffu, visibility == Visibility::kPart);
      pages += __popc(seen);
      WaitForRoom();
      const uint32_t full = SharedAddress(&shared.full[stage]);
      if (lane == 0) {
        shared.work[stage] = StageWork{item, run.sequence, first, seen | cut << 16};
        ArriveExpectBytes(full, __popc(seen) * group.heads * (key_bytes + kD));
      }
      __syncwarp();
      for (int j = 0; j < group.pages; ++j) {
        const uint32_t id = __shfl_sync(0xffffffffu, ids, in_batch + j);
        if ((seen >> j & 1) == 0) continue;
        if (lane <= chunk_end) {
          BulkCopy(SharedAddress(shared.stages[stage]) +
                       (j * ScanShared<Traits>::kPairBytes + place) * group.heads,
                   p.pool + static_cast<int64_t>(id) * kPageAlignment + offset, bytes * group.heads,
                   full, policy);
        }
        __syncwarp();
      }
      Advance();
      if (!begun) {
        // More at once would only stand in the way of what the kernel before still has to write and
        // of what the other warps load first.
        AwaitQueries();
        WaitBarrier(SharedAddress(&shared.begun), 0);
        begun = true;
      }
      // Once, with two left to bring: what a CTA takes sooner, one that gets there first cannot.
      if (next_item <= item && first + 2 * group.pages >= run.page_end) TakeNext(items, counter);
    }
    if (at.tile == 0 && lane < group.heads) {
      AddBytes(&p.decisions[run.sequence * p.shape.num_kv_heads + group.begin + lane].key_bytes,
               pages * KeyReadBytes(kD, kScanBits, chunk_end));
    }
  }

  // For the other warps, too, where the scan is early: one of a CTA looks.
  __device__ __forceinline__ void AwaitQueries() const {
    if (!p.count_rotated) {
      WaitForDependencies();
      return;
    }
    const int tiles = p.work.columns / kTileColumns;
    AwaitProgress(p.rotated, p.num_sequences * p.shape.num_kv_heads * tiles);
    if (p.early_scan && lane == 0) Arrive(SharedAddress(&shared.rotated));
  }

  __device__ __forceinline__ void Run(int items, int32_t* counter) {
    int item = blockIdx.x;
    ScanRun run = p.scan_runs[ScanItem(p, item).run];
    while (run.sequence >= 0) {  // empty ones come last
      FetchRun(item, ScanItem(p, item), run, items, counter);
      item = next_item;
      run = next_run;
    }
    WaitForRoom();
    if (lane == 0) {
      shared.work[stage].item = -1;
      ArriveExpectBytes(SharedAddress(&shared.full[stage]), 0);
    }
    if (p.count_rotated) WaitForDependencies();  // so that who waits for this kernel has the tails
  }
};

// What the other warps do: a (page, kv head) pair of every stage.
template <class Traits>
struct PageScanner {
  static constexpr int kN = kLaneColumns<Traits>;
  const ProgressiveArgs& p;
  ScanShared<Traits>& shared;
  int lane, warp, place, member;  // member: of the head group
  // Of the item.
  int item = -1, heads = 1, head_index = 0, chunk_end = NumRankChunks(Traits::kHeadDim);
  int basis_end = 0;
  int column = 0;  // the lane's first
  float softcap = 0;
  PageSinks sinks{};
  ScoreFilter<kN> filter;
  RunningMass<kN> mass;
  // Of the basis.
  uint2 query[kLaneTiles<Traits>] = {};

  __device__ __forceinline__ const ProgressiveSequence& Sequence() const {
    return p.sequences[head_index / p.shape.num_kv_heads];
  }

  // What of an item no earlier kernel wrote.
  __device__ __forceinline__ void Begin(int next, int sequence) {
    item = next;
    const ScanItem at(p, item);
    const HeadGroup group(p, at.group);
    const ProgressiveSequence& from = p.sequences[sequence];
    heads = group.heads;
    head_index = sequence * p.shape.num_kv_heads + group.begin + member;
    chunk_end = ScanChunks<Traits>(p, from.decision);
    softcap = from.softcap;
    column = at.tile * kTileColumns + lane % 4 * kN;
    sinks = MakePageSinks<Traits>(p, p.group.size * from.q_len, head_index, at.tile, lane);
    filter = ScoreFilter<kN>(from.decision, ThetaOf(p, from, head_index));
    mass = RunningMass<kN>();
    basis_end = 0;
  }

  // The rest.
  __device__ __forceinline__ void LoadFilter() {
    filter.Load(p, head_index, column, p.group.size * Sequence().q_len, !p.early_scan);
  }

  __device__ __forceinline__ void LoadQuery(int page, int sequence) {
    const ProgressiveSequence& from = p.sequences[sequence];
    const int basis = BasisOfPage(SequenceView(from), page);
    basis_end = basis + 1 < from.num_bases ? from.basis_end[basis] : from.num_sealed;
    const QueryFragments<Traits> fragments(p, head_index, basis, column / kTileColumns);
    const int first = FirstLaneTile<Traits>(lane);
    const uint2* halves = fragments.halves + MmaColumn<Traits>(lane) * 4 + lane % 4;
#pragma unroll
    for (int i = 0; i < kLaneTiles<Traits>; ++i) {
      const bool any = Traits::kTiles % 2 == 0 || first + i < Traits::kTiles;
      query[i] = any ? halves[(first + i) * 32] : uint2{};
    }
    if (lane == 0) shared.unit[warp] = fragments.unit;
    if (lane < kTileColumns) shared.mean[warp][lane] = fragments.mean[lane];
    __syncwarp();
  }

  // What an unread channel adds to the variance, r^2 / 6; under a static rank as much more as
  // ScoreVarianceAt will take off for finer planes, which leave such a channel unread.
  __device__ __forceinline__ float UnreadWeight() const {
    const DecisionParams& decision = Sequence().decision;
    if (decision.policy != Policy::kStatic) return 1.0f / 6;
    const PageDepth depth = StaticDepth(decision, Traits::kHeadDim, p.stored_bits);
    return 1.0f / 6 / ScoreVarianceAt(1.0f, depth.key.bits);
  }
  // A static rank is all that is attended, too: EstimatedLog2Mass is to find no more mass than
  // that.
  __device__ __forceinline__ void TakeOffCorrection(PageStats (&stats)[kN]) const {
    if (Sequence().decision.policy != Policy::kStatic) return;
#pragma unroll
    for (int c = 0; c < kN; ++c) stats[c].lse -= MassCorrection(stats[c].variance);
  }

  // One page; `release` says that the stage's bytes are no longer needed.
  template <typename Release>
  __device__ __forceinline__ void Scan(int page, bool cut, const std::byte* pair, Release release) {
    constexpr int kChunks = NumRankChunks(Traits::kHeadDim);
    uint32_t chunks[kChunks];
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      constexpr int kWhole = Traits::kChunkTiles * kKeyTileBytes;
      constexpr int kLast = Traits::kTiles * kKeyTileBytes - (kChunks - 1) * kWhole;
      chunks[c] =
          SharedAddress(pair) + c * kWhole * heads + (c + 1 < kChunks ? kWhole : kLast) * member;
    }
    __half* ranges = shared.ranges[warp];
    const float scale =
        shared.unit[warp] * SpreadKeyRanges<Traits>(pair + Traits::kTiles * kKeyTileBytes * heads +
                                                        Traits::kHeadDim * member,
                                                    ranges, lane);
    __syncwarp();
    const LaneRanges lane_ranges = MakeLaneRanges<Traits>(ranges, shared.zeros, lane);
    PageProducts products;
    MultiplyPage<Traits>(chunks, lane_ranges, query, 0, chunk_end, lane, &products);
    float(&sums)[4][4] = products.sums;
    float variances[kN], unread[kN] = {};
    ReadSquares<Traits>(products, lane, variances);
    if (chunk_end < kChunks) {
      UnreadSquares<Traits>(lane_ranges, query, chunk_end, lane, unread);
#pragma unroll
      for (int c = 0; c < kN; ++c) unread[c] *= UnreadWeight();
    }
    release();
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      // (r / 8)^2 / 12 for what was read
      variances[c] = fmaf(variances[c], 1.0f / 768, unread[c]) * (kLn2 * kLn2) * scale * scale;
    }
    if (cut) {
      MaskPage<kN>(SequenceView(Sequence()), Here(page), p.group, column, lane, sums);
    }
    ScoreUnits<kN> units{2097152.0f * scale, {}};  // 2^24 / 8
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      units.offset[c] =
          fmaf(-0.9375f * scale, products.own[2 + c], shared.mean[warp][lane % 4 * kN + c]);
    }
    float lse[kN], concentration[kN], page_mass[kN];
    SumScores<Traits>(sums, units, softcap, filter.bound, lse, concentration);
    PageStats stats[kN];
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      stats[c] = PageStats{-INFINITY, lse[c], variances[c], concentration[c]};
    }
    if (chunk_end < kChunks) TakeOffCorrection(stats);
#pragma unroll
    for (int c = 0; c < kN; ++c) page_mass[c] = EstimatedLog2Mass(stats[c]);
    float spread = 0;
    if (chunk_end < kChunks) spread = Sequence().decision.coarse_z * kLog2E;
    if (page == 0 || cut || filter.Wants(stats, page_mass, spread)) {
      float high[kN];
      uint32_t packed[4 * kN];
      LargestScores(sums, units, high);
      PackScores(sums, units, high, packed);
      StoreScores(p, sinks, page, packed);
#pragma unroll
      for (int c = 0; c < kN; ++c) stats[c].max = high[c];
    }
    StoreStats(p, sinks, page, stats, false);
    mass.Add(page_mass);
    mass.Log2Sum(page_mass);
    filter.Raise(page_mass);
  }

  // Stores the mass of the item's pages.
  __device__ __forceinline__ void End() const {
    const int head = head_index % p.shape.num_kv_heads;
    StoreRunMass(p, p.work.scan_lse, ScanItem(p, item).run, place, head, column / kTileColumns,
                 mass);
  }

  __device__ __forceinline__ void LetCopiesGoOn() const {
    __syncwarp();
    if (lane == 0) Arrive(SharedAddress(&shared.begun));
  }
  // The first item is the CTA's number: it is begun before its first page is here. While the tails
  // are attended, pages may come; otherwise what they would keep waiting is loaded first.
  __device__ __forceinline__ void BeginFirst() {
    const ScanRun run = p.scan_runs[ScanItem(p, blockIdx.x).run];
    const bool copies_first = p.count_rotated && !p.early_scan;
    if (copies_first) LetCopiesGoOn();
    if (run.sequence >= 0) Begin(static_cast<int>(blockIdx.x), run.sequence);
    if (!p.early_scan) WaitForDependencies();
    LaunchDependents();
    if (p.early_scan && run.sequence >= 0) WaitBarrier(SharedAddress(&shared.rotated), 0);
    if (run.sequence >= 0 && member < heads) {
      LoadFilter();
      if (run.page_begin + place < run.page_end) LoadQuery(run.page_begin + place, run.sequence);
    }
    if (!copies_first) LetCopiesGoOn();
  }

  // The first turn is a rehearsal, where prepare leaves room for it: it goes through a page of
  // whatever lies in shared memory, stores nothing, and so has the instructions here when prepare
  // ends. Behind the flood of reads that begins then each of them would take microseconds.
  __device__ __forceinline__ void Run() {
    sinks.stored = -4;
    int stage = -1;  // the rehearsal
    uint32_t parity = 0;
    for (;;) {
      StageWork work{-1, 0, 0, 0};
      if (stage >= 0) {
        WaitBarrier(SharedAddress(&shared.full[stage]), parity);
        work = shared.work[stage];
        if (work.item < 0) break;
        if (work.item != item) {
          if (member < heads) End();
          Begin(work.item, work.sequence);
          if (member < heads) LoadFilter();
        }
      }
      auto release = [&] {
        __syncwarp();
        if (lane == 0 && stage >= 0) Arrive(SharedAddress(&shared.empty[stage]));
      };
      const int page = work.first_page + place;
      const bool nothing =
          stage < 0 ? !p.rehearse_scan : (work.visible >> place & 1) == 0 || member >= heads;
      if (nothing) {
        release();
      } else {
        if (page >= basis_end && stage >= 0) LoadQuery(page, work.sequence);
        const std::byte* pair =
            shared.stages[stage < 0 ? kScanStages - 1 : stage] +  // nothing is copied there yet
            place * heads * ScanShared<Traits>::kPairBytes;
        Scan(page, (work.visible >> (16 + place) & 1) != 0, pair, release);
      }
      if (stage < 0) BeginFirst();
      if (++stage == kScanStages) {
        stage = 0;
        parity ^= 1;
      }
    }
    if (item >= 0 && member < heads) End();
  }
};

template <class Traits>
__global__ void __launch_bounds__(kScanThreads,
                                  Traits::kSoftCap ? 1 : ScanCtasPerSm(Traits::kHeadDim))
    ProgressiveScanKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<ScanShared<Traits>*>(shared_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kScanStages; ++i) {
      InitBarrier(SharedAddress(&shared.full[i]), 1);
      InitBarrier(SharedAddress(&shared.empty[i]), kScanWarps);
    }
    InitBarrier(SharedAddress(&shared.rotated), 1);
    InitBarrier(SharedAddress(&shared.begun), kScanWarps);
    FenceBarrierInit();
  }
  if (threadIdx.x < Traits::kHeadDim) shared.zeros[threadIdx.x] = __half();
  __syncthreads();
  if (warp == kScanWarps) {
    const int items = p.work.scan_runs * CeilDiv(p.shape.num_kv_heads, kScanWarps) *
                      (p.work.columns / kTileColumns);
    PageFetcher<Traits>{p, shared, lane}.Run(
        items, reinterpret_cast<int32_t*>(p.workspace + p.work.taken));
    return;
  }
  const int places = p.scan_places, members = kScanWarps / places;
  PageScanner<Traits>{p, shared, lane, warp, warp / members, warp % members}.Run();
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SCAN_CUH_

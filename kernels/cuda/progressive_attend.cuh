#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

// Attend: the values of the pages that select listed, and their keys' finer planes.
//   out = sum over attended tokens exp2(s - L) x_b(v)
// L is the estimated global LSE, the same for every page of a head, so partial results just add up.
// The chunks' lists, one behind the other, are cut into slices of equal length, one a CTA,
// whichever heads they are of: heads with much to read keep no others waiting. Bulk copies bring
// what is read of as many pages as there is room for; the warps of a slot take a page, each a group
// of its values, and keep their sums until the head changes. A slice's part of a head has a place
// of its own in the workspace, CTA + head: no two pairs share one, since both only grow along the
// lists. grid (as many CTAs as the device holds, column tiles)

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/progressive_slice.cuh"
#include "kernels/cuda/progressive_values.cuh"

namespace adaattn {

inline constexpr int kAttendThreads = kAttendWarps * 32;
inline constexpr int kBatchPages = 64;         // at most, in shared memory at a time
inline constexpr int kAttendRoom = 80 * 1024;  // bytes of them

// What of an attended page is brought to shared memory, in this order.
enum AttendPart : int {
  kStats = 0,      // of the tile's columns
  kScoresLow = 1,  // of columns that exist: 16 bytes of each of the column's four lanes
  kScoresHigh = 2,
  kValueScales = 3,
  kValuePlanes = 4,  // 4..7
  kKeyScales = 8,    // where finer key planes are read
  kKeyFine = 9,      // 9, 10
  kNumAttendParts = 11
};

// Where the parts of a page stand and how long they are.
template <class Traits>
struct AttendLayout {
  PackedPage page;
  int columns;  // of the tile

  __device__ __forceinline__ int key_tiles() const {
    return min(page.key_chunks * Traits::kChunkTiles, Traits::kTiles);
  }
  __device__ __forceinline__ int scores() const { return kTileColumns * 16; }
  __device__ __forceinline__ int score_bytes() const { return columns * 64; }  // half of them
  __device__ __forceinline__ int value_scales() const { return scores() + 2 * score_bytes(); }
  __device__ __forceinline__ int values() const {
    return value_scales() + Traits::kValueScaleBytes;
  }
  __device__ __forceinline__ int key_scales() const {
    return values() + page.value_planes * Traits::kPlaneBytes;
  }
  __device__ __forceinline__ int keys() const { return key_scales() + Traits::kHeadDim; }
  __device__ __forceinline__ int key_bytes() const {
    return page.fine_planes * key_tiles() * kPlaneTileBytes;
  }
  __device__ __forceinline__ int value_bytes() const {
    return Traits::kValueScaleBytes + page.value_planes * Traits::kPlaneBytes;
  }
  __device__ __forceinline__ int bytes() const {
    return page.fine_planes > 0 ? keys() + key_bytes() : key_scales();
  }
};

template <class Traits>
struct AttendShared {
  alignas(128) std::byte room[kAttendRoom];
  alignas(16) float4 sums[kAttendWarps][Traits::kTilesPerGroup][32];
  alignas(16) uint2 query[kMaxDeviceBasisRuns][Traits::kTiles * 32];  // of the head
  alignas(16) __half ranges[kAttendWarps][Traits::kHeadDim];          // spread for the MMA
  float unit[kMaxDeviceBasisRuns];
  float lse[kTileColumns];
  float mass[kAttendWarps][kTileColumns];
  SliceShared<kAttendThreads> slice;
  alignas(8) uint64_t barrier[kBatchPages];
  ListedPage page[kBatchPages];
  int place[kBatchPages];  // in the lists
  int offset[kBatchPages];
  int first_bytes;  // of the first 32 pages of the batch
  static_assert(3 * kTileColumns * 16 + 2 * 512 + Traits::kValueScaleBytes +
                        6 * Traits::kPlaneBytes + Traits::kHeadDim <=
                    kAttendRoom,
                "at least one page");
};

// The warps that share a slot meet.
template <int kWarps>
__device__ __forceinline__ void SyncSlot(int slot) {
  if constexpr (kWarps == 1) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(slot + 1), "n"(32 * kWarps) : "memory");
  }
}

template <class Traits>
struct PageAttender {
  static constexpr int kGroups = Traits::kValueGroups;
  static constexpr int kSlots = kAttendWarps / kGroups;  // pages at a time
  static constexpr int kCount = 4 / kGroups;             // score tiles that a warp refines
  static_assert(kAttendWarps % kGroups == 0, "the same warps for each group");
  const ProgressiveArgs& p;
  AttendShared<Traits>& shared;
  int tile, lane, warp;
  int head_index = -1, columns = 0;  // columns: of the tile
  float softcap = 0;
  float out[Traits::kTilesPerGroup][4] = {};
  float mass = 0;                      // of column lane / 4; of the first group's warps
  int key_bytes = 0, value_bytes = 0;  // likewise

  __device__ __forceinline__ int ColumnsOf(const ListedPage& page) const {
    return min(max(page.columns - tile * kTileColumns, 0), kTileColumns);
  }

  // Finds the slice's pages from `first` on, as many as there is room for. By the whole CTA.
  __device__ __forceinline__ int FindBatch(const SliceFinder<kAttendThreads>& finder, int first,
                                           int end) {
    static_assert(kBatchPages == 64, "two warps");
    end = min(end, first + kBatchPages);
    finder.Locate(first, end, shared.place);
    __syncthreads();
    int bytes = 0, before = 0;
    if (threadIdx.x < kBatchPages) {
      if (first + static_cast<int>(threadIdx.x) < end) {
        const uint4 x =
            reinterpret_cast<const uint4*>(p.workspace + p.work.lists)[shared.place[threadIdx.x]];
        const ListedPage page{x.x, x.y, static_cast<int>(x.z), static_cast<int>(x.w)};
        shared.page[threadIdx.x] = page;
        bytes = AttendLayout<Traits>{UnpackPage(page.packed), ColumnsOf(page)}.bytes();
      }
      before = WarpPrefix(bytes, lane);
      if (threadIdx.x == 31) shared.first_bytes = before;
    }
    __syncthreads();
    if (warp == 1) before += shared.first_bytes;
    const bool fits = bytes > 0 && before <= kAttendRoom;
    if (fits) {
      shared.offset[threadIdx.x] = before - bytes;
      ArriveExpectBytes(SharedAddress(&shared.barrier[threadIdx.x]), bytes);
    } else if (threadIdx.x < kBatchPages) {
      Arrive(SharedAddress(&shared.barrier[threadIdx.x]));  // all go on by a phase
    }
    return __syncthreads_count(fits);
  }

  // Starts the copies of the batch's pages.
  __device__ __forceinline__ void FetchBatch(int count) {
    for (int i = threadIdx.x; i < count * 16; i += kAttendThreads) {
      if (i % 16 < kNumAttendParts) FetchPart(i / 16, i % 16);
    }
  }

  __device__ __forceinline__ void FetchPart(int i, int part) {
    const ListedPage listed = shared.page[i];
    const AttendLayout<Traits> layout{UnpackPage(listed.packed), ColumnsOf(listed)};
    const int64_t index = int64_t{listed.head_index} * p.max_sealed + layout.page.page;
    const int head = listed.head_index % p.shape.num_kv_heads;
    const std::byte* page = p.pool + static_cast<int64_t>(listed.id) * kPageAlignment;
    const std::byte* from = nullptr;
    int target = 0, bytes = 0;
    if (part == kStats) {
      bytes = layout.scores();
      from = reinterpret_cast<const std::byte*>(
          PageStatsOf(p, listed.head_index, layout.page.page) + tile * kTileColumns);
    } else if (part <= kScoresHigh) {
      bytes = layout.score_bytes();
      target = layout.scores() + (part - kScoresLow) * bytes;
      from = p.workspace + p.work.scores +
             ((index * (p.work.columns / kTileColumns) + tile) * 2 + part - kScoresLow) * 512;
    } else if (part == kValueScales) {
      bytes = Traits::kValueScaleBytes;
      target = layout.value_scales();
      from = page + p.layout.value_scales.offset + head * bytes;
    } else if (part < kKeyScales) {
      const int plane = part - kValuePlanes;
      bytes = plane < layout.page.value_planes ? Traits::kPlaneBytes : 0;
      target = layout.values() + plane * Traits::kPlaneBytes;
      // The planes of one kind follow one another.
      from = page + p.layout.value_plane[0].offset +
             (int64_t{plane} * p.shape.num_kv_heads + head) * Traits::kPlaneBytes;
    } else if (part == kKeyScales) {
      bytes = layout.page.fine_planes > 0 ? Traits::kHeadDim : 0;
      target = layout.key_scales();
      from = page + p.layout.key_scales.offset + head * Traits::kHeadDim;
    } else {
      const int plane = part - kKeyFine;
      bytes = plane < layout.page.fine_planes ? layout.key_tiles() * kPlaneTileBytes : 0;
      target = layout.keys() + plane * bytes;
      from = page + p.layout.key_fine[0].offset +
             (int64_t{plane} * p.shape.num_kv_heads + head) * Traits::kPlaneBytes;
    }
    if (bytes == 0) return;
    BulkCopy(SharedAddress(shared.room + shared.offset[i] + target), from,
             static_cast<uint32_t>(bytes), SharedAddress(&shared.barrier[i]));
  }

  // Goes on with the pages of another head. By the whole CTA.
  __device__ __forceinline__ void Enter(const ListedPage& page) {
    const int next = page.head_index;
    head_index = next;
    columns = ColumnsOf(page);
    const ProgressiveSequence& s = p.sequences[next / p.shape.num_kv_heads];
    if constexpr (Traits::kSoftCap) softcap = s.softcap;
    constexpr int kPieces = Traits::kTiles * 32 / 2;
    for (int i = threadIdx.x; i < s.num_bases * kPieces; i += kAttendThreads) {
      const int run = i / kPieces, piece = i % kPieces;
      CopyAsync16(&shared.query[run][2 * piece],
                  QueryFragments<Traits>(p, next, run, tile).halves + 2 * piece);
    }
    CommitCopies();
    if (static_cast<int>(threadIdx.x) < s.num_bases) {
      shared.unit[threadIdx.x] = QueryFragments<Traits>(p, next, threadIdx.x, tile).unit;
    }
    if (threadIdx.x < kTileColumns) {
      shared.lse[threadIdx.x] = reinterpret_cast<const float*>(
          p.workspace +
          p.work.global_lse)[int64_t{next} * p.work.columns + tile * kTileColumns + threadIdx.x];
    }
    WaitCopies<0>();
    __syncthreads();
  }

  // Page i of the batch: the finer planes to its scores, in place.
  __device__ __forceinline__ void Refine(std::byte* data, const AttendLayout<Traits>& layout,
                                         int group) {
    const PackedPage& page = layout.page;
    const float top =
        SpreadKeyRanges<Traits>(data + layout.key_scales(), shared.ranges[warp], lane);
    __syncwarp();
    uint32_t delta[2 * kCount];
    RefineScores<kCount>(data + layout.keys(), shared.ranges[warp], shared.query[page.basis_run],
                         shared.unit[page.basis_run] * top, page.fine_planes, layout.key_tiles(),
                         group * kCount, lane, delta);
    if (lane / 4 < columns) {
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
        const int word = 2 * kCount * group + i;  // of the lane's eight
        auto* at = reinterpret_cast<uint32_t*>(data + layout.scores() +
                                               word / 4 * layout.score_bytes() + lane * 16) +
                   word % 4;
        *at = FmaHalves(kOneHalves, delta[i], *at);
      }
    }
    SyncSlot<kGroups>(warp / kGroups);
  }

  __device__ __forceinline__ void Attend(int i, uint32_t parity) {
    const int group = warp % kGroups;
    const AttendLayout<Traits> layout{UnpackPage(shared.page[i].packed), columns};
    std::byte* data = shared.room + shared.offset[i];
    WaitBarrier(SharedAddress(&shared.barrier[i]), parity);
    if (layout.page.fine_planes > 0) Refine(data, layout, group);
    uint32_t scores[8] = {}, codes[8];
    float max = -INFINITY;
    if (lane / 4 < columns) {
      const auto* at = reinterpret_cast<const uint4*>(data + layout.scores());
      const uint4 low = at[lane], high = at[layout.score_bytes() / 16 + lane];
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) scores[j] = words[j];
      max = reinterpret_cast<const PageStats*>(data)[lane / 4].max;
    }
    LoadTokenScales<Traits>(data + layout.value_scales(), group, lane, codes);
    float2 probability[8];
    const float base = SoftCap<Traits>(max, softcap);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 y = UnpackPair<__half>(scores[j]);
      if constexpr (Traits::kSoftCap) {
        if (softcap != 0) {
          y.x = SoftCap<Traits>(y.x + max, softcap) - base;
          y.y = SoftCap<Traits>(y.y + max, softcap) - base;
        }
      }
      probability[j] = max == -INFINITY ? make_float2(0, 0) : make_float2(Exp2(y.x), Exp2(y.y));
    }
    const TokenWeights tokens = WeighTokens(probability, codes);
    const float weight = max == -INFINITY ? 0.0f : Exp2(base - shared.lse[lane / 4]);
    if (group == 0) {
      mass = fmaf(QuadSum(tokens.probability), weight, mass);
      key_bytes += layout.key_bytes();
      value_bytes += layout.value_bytes();
    }
    const float scaled = weight * tokens.range;
    const float weights[2] = {__shfl_sync(0xffffffffu, scaled, lane % 4 * 8),
                              __shfl_sync(0xffffffffu, scaled, lane % 4 * 8 + 4)};
    AddValues<Traits>(data + layout.values() + group * Traits::kTilesPerGroup * kPlaneTileBytes,
                      layout.page.value_planes, tokens, weights, lane, out);
  }

  // The warps' sums to the slot's partial output; they start again from 0. By the whole CTA.
  __device__ __forceinline__ void Flush(int cta) {
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
      shared.sums[warp][i][lane] = make_float4(out[i][0], out[i][1], out[i][2], out[i][3]);
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] = 0;
    }
    if (lane % 4 == 0) shared.mass[warp][lane / 4] = mass;
    if (tile == 0 && lane == 0 && value_bytes > 0) {
      HeadDecision& decision = p.decisions[head_index];
      if (key_bytes > 0) AddBytes(&decision.key_bytes, key_bytes);
      AddBytes(&decision.value_bytes, value_bytes);
    }
    mass = 0;
    key_bytes = value_bytes = 0;
    __syncthreads();
    const int64_t first = (int64_t{cta} + head_index) * p.work.columns + tile * kTileColumns;
    auto* partial =
        reinterpret_cast<float*>(p.workspace + p.work.partial) + first * Traits::kHeadDim;
    // Neighbouring threads take neighbouring channels, as the sums' rows hold them.
    for (int at = threadIdx.x; at < Traits::kTiles * 32; at += kAttendThreads) {
      const int channels = at / 32, from = at % 8 * 4 + at / 8 % 4;  // channels: a tile of them
      const int group = channels / Traits::kTilesPerGroup, column = from % 4 * 2;
      if (column >= columns) continue;
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const float4 x = shared.sums[i * kGroups + group][channels % Traits::kTilesPerGroup][from];
        sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w;
      }
      float* row = partial + column * Traits::kHeadDim + channels * kTileChannels + from / 4;
      row[0] = sum[0];
      row[Traits::kHeadDim] = sum[1];
      row[8] = sum[2];
      row[Traits::kHeadDim + 8] = sum[3];
    }
    if (threadIdx.x < kTileColumns) {
      float total = 0;
#pragma unroll
      for (int i = 0; i < kAttendWarps; ++i) total += shared.mass[i][threadIdx.x];
      reinterpret_cast<float*>(p.workspace + p.work.mass)[first + threadIdx.x] = total;
    }
    __syncthreads();
  }
};

template <class Traits>
__global__ void __launch_bounds__(kAttendThreads, Traits::kSoftCap || Traits::kTilesPerGroup > 4
                                                      ? 1
                                                      : kAttendCtasPerSm)
    ProgressiveAttendKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<AttendShared<Traits>*>(shared_bytes);
  const int cta = blockIdx.x, tile = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < kBatchPages) {
    InitBarrier(SharedAddress(&shared.barrier[threadIdx.x]), 1);
    FenceBarrierInit();
  }
  WaitForDependencies();
  NoteTime(p.stamps, kAttendStamp);
  LaunchDependents();
  const SliceFinder<kAttendThreads> finder(p, shared.slice);
  const Slice slice = finder.SliceOf(cta);
  PageAttender<Traits> attender{p, shared, tile, lane, warp};
  uint32_t parity = 0;
  for (int first = slice.begin, count = 0; first < slice.end; first += count, parity ^= 1) {
    count = attender.FindBatch(finder, first, slice.end);
    attender.FetchBatch(count);
    for (int begin = 0, end = 0; begin < count; begin = end) {
      const int next = shared.page[begin].head_index;
      while (end < count && shared.page[end].head_index == next) ++end;
      if (next != attender.head_index) {
        if (attender.head_index >= 0) attender.Flush(cta);
        attender.Enter(shared.page[begin]);
      }
      for (int i = begin + warp / Traits::kValueGroups; i < end;
           i += PageAttender<Traits>::kSlots) {
        attender.Attend(i, parity);
      }
    }
    FenceAsyncShared();
    __syncthreads();
  }
  if (attender.head_index >= 0) attender.Flush(cta);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

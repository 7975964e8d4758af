#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SLICE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SLICE_CUH_

// The lists of attended pages that select left, chunk after chunk, as one: which slice of it a CTA
// of the attend kernel takes, and which part of that each of its slots. Slices and parts are equal
// by cost: a page belongs to the one in which the middle of it lies, where pages are as long as
// they cost.

#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

// What stands before something in the list.
struct ListPosition {
  int pages, cost;
};

template <int kThreads, int kSlots>
struct SliceShared {
  ListPosition before[kThreads + 1];  // each thread's chunks, then the end
  ListPosition warp_sum[kThreads / 32];
  // Where the parts begin and the last one ends.
  int boundary_chunk[kSlots + 1];     // -1: at the end of the list
  ListPosition boundary[kSlots + 1];  // of that chunk
  int index[kSlots + 1];
};

struct Slice {
  int begin, end;
};

// Made by the whole CTA.
template <int kThreads, int kSlots>
struct SliceFinder {
  const ProgressiveArgs& p;
  SliceShared<kThreads, kSlots>& shared;
  const ChunkList* lists;
  int chunks, each;  // each: chunks of a thread

  __device__ __forceinline__ SliceFinder(const ProgressiveArgs& args,
                                         SliceShared<kThreads, kSlots>& room)
      : p(args),
        shared(room),
        lists(reinterpret_cast<const ChunkList*>(p.workspace + p.work.extents)),
        chunks(p.num_sequences * p.shape.num_kv_heads * p.work.chunks),
        each((chunks + kThreads - 1) / kThreads) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x <= kSlots) shared.boundary_chunk[threadIdx.x] = -1;
    ListPosition mine{0, 0};
#pragma unroll 4
    for (int i = 0; i < each; ++i) {
      const ChunkList list = At(threadIdx.x * each + i);
      mine.pages += list.pages;
      mine.cost += list.cost;
    }
    const ListPosition sum{WarpPrefix(mine.pages, lane), WarpPrefix(mine.cost, lane)};
    if (lane == 31) shared.warp_sum[warp] = sum;
    __syncthreads();
    ListPosition base{0, 0}, all{0, 0};
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) {
      if (i == warp) base = all;
      all.pages += shared.warp_sum[i].pages;
      all.cost += shared.warp_sum[i].cost;
    }
    shared.before[threadIdx.x] =
        ListPosition{base.pages + sum.pages - mine.pages, base.cost + sum.cost - mine.cost};
    if (threadIdx.x == 0) shared.before[kThreads] = all;
    __syncthreads();
  }

  __device__ __forceinline__ ChunkList At(int chunk) const {
    if (chunk >= chunks) return ChunkList{};
    const int2 x = reinterpret_cast<const int2*>(lists)[chunk];
    return ChunkList{x.x, x.y};
  }
  __device__ __forceinline__ ListPosition total() const { return shared.before[kThreads]; }
  // What a slice costs: more than its share, whatever rounding (3e-7 of it) does, and no less than
  // any page, so that each slice but the last has pages.
  __device__ __forceinline__ int Cost() const {
    const float share = __fdividef(static_cast<float>(total().cost), p.work.attend_ctas);
    return max(__float2int_rd(share * (1 + 1e-6f)) + 1, int{kMaxAttendCost});
  }

  // Finds the pages of a CTA's slots. By the whole CTA: the thread that has a boundary's chunk
  // names it, a warp looks for the boundary in it.
  __device__ __forceinline__ void FindParts(int cta) const {
    const int cost = Cost(), begin = cta * cost;
    const auto target = [&](int slot) { return 2 * (begin + cost * slot / kSlots); };
    NameChunks(target);
    __syncthreads();
    for (int slot = threadIdx.x / 32; slot <= kSlots; slot += kThreads / 32) {
      const int chunk = shared.boundary_chunk[slot];
      const int index =
          chunk < 0 ? total().pages : FindPage(chunk, shared.boundary[slot], target(slot));
      if (threadIdx.x % 32 == 0) shared.index[slot] = index;
    }
    __syncthreads();
  }
  // The pages of a slot, and of the CTA.
  __device__ __forceinline__ Slice PartOf(int slot) const {
    return Slice{shared.index[slot], shared.index[slot + 1]};
  }
  __device__ __forceinline__ Slice All() const {
    return Slice{shared.index[0], shared.index[kSlots]};
  }

  // Names the chunks among the thread's own in which boundaries lie: the first whose last page ends
  // beyond.
  template <typename Target>
  __device__ __forceinline__ void NameChunks(Target target) const {
    const ListPosition first = shared.before[threadIdx.x];
    const int end = shared.before[threadIdx.x + 1].cost;
    if (2 * first.cost > target(kSlots) || 2 * end <= target(0)) return;
#pragma unroll 1
    for (int slot = 0; slot <= kSlots; ++slot) {
      const int wanted = target(slot);
      if (2 * first.cost > wanted || 2 * end <= wanted) continue;
      ListPosition at = first;
      int chunk = threadIdx.x * each;
      for (const int last = chunk + each - 1; chunk < last; ++chunk) {  // if none before
        const ChunkList list = At(chunk);
        if (wanted < 2 * (at.cost + list.cost)) break;
        at.pages += list.pages;
        at.cost += list.cost;
      }
      shared.boundary_chunk[slot] = chunk;
      shared.boundary[slot] = at;
    }
  }

  // The first page whose middle is not before `target`, both in halves of what pages cost, counted
  // over all lists; it is one of the chunk's, which begins at `at`, or the one behind them. By a
  // warp.
  __device__ __forceinline__ int FindPage(int chunk, const ListPosition& at, int target) const {
    static_assert(kChunkPages == 64, "two pages a lane");
    const int lane = threadIdx.x % 32, pages = At(chunk).pages;
    const auto* entries = reinterpret_cast<const uint4*>(p.workspace + p.work.lists) +
                          int64_t{chunk} * kChunkPages + 2 * lane;
    int cost[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const PackedPage page = UnpackPage(2 * lane + i < pages ? entries[i].y : 0);
      cost[i] = 2 * lane + i < pages ? AttendCost(page) : 0;
    }
    const int before = at.cost + WarpPrefix(cost[0] + cost[1], lane) - cost[0] - cost[1];
    const bool earlier[2] = {2 * before + cost[0] < target,
                             2 * (before + cost[0]) + cost[1] < target};
    return at.pages +
           __reduce_add_sync(0xffffffffu, (2 * lane < pages && earlier[0] ? 1 : 0) +
                                              (2 * lane + 1 < pages && earlier[1] ? 1 : 0));
  }

  // Where pages [begin, end) stand among the chunks' lists, to `place`: each thread says it of its
  // own chunks' pages.
  __device__ __forceinline__ void Locate(int begin, int end, int* place) const {
    int at = shared.before[threadIdx.x].pages;
    if (at >= end || shared.before[threadIdx.x + 1].pages <= begin) return;
    for (int i = 0; i < each; ++i) {
      const int chunk = threadIdx.x * each + i, count = At(chunk).pages;
      for (int page = max(at, begin); page < min(at + count, end); ++page) {
        place[page - begin] = chunk * kChunkPages + page - at;
      }
      at += count;
    }
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SLICE_CUH_

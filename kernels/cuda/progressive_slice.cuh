#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SLICE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SLICE_CUH_

// The lists of attended pages that select left, chunk after chunk, as one: which slice of it a CTA
// of the attend kernel takes. Slices are equal by cost: a page belongs to the slice in which what
// all pages before it cost ends.

#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

// What stands before something in the list.
struct ListPosition {
  int pages, cost;
};

template <int kThreads>
struct SliceShared {
  ListPosition before[kThreads + 1];  // each thread's chunks, then the end
  ListPosition warp_sum[kThreads / 32];
  int boundary_chunk[2];     // in which the slice begins, ends; -1: at the end of the list
  ListPosition boundary[2];  // of that chunk
  int index[2];
};

struct Slice {
  int begin, end;
};

// Made by the whole CTA.
template <int kThreads>
struct SliceFinder {
  static constexpr int kMaxPlanes = 6;
  const ProgressiveArgs& p;
  SliceShared<kThreads>& shared;
  const ChunkList* lists;
  int chunks, each;  // each: chunks of a thread

  __device__ __forceinline__ SliceFinder(const ProgressiveArgs& args, SliceShared<kThreads>& room)
      : p(args),
        shared(room),
        lists(reinterpret_cast<const ChunkList*>(p.workspace + p.work.extents)),
        chunks(p.num_sequences * p.shape.num_kv_heads * p.work.chunks),
        each((chunks + kThreads - 1) / kThreads) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
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
  // What a slice costs; no less than any page, so that each slice but the last has pages.
  __device__ __forceinline__ int Cost() const {
    return max(CeilDiv(total().cost, p.work.attend_ctas), AttendCost(kMaxPlanes));
  }

  // The pages of a CTA. By the whole CTA: the thread that has a boundary's chunk names it, a warp
  // looks for the boundary in it.
  __device__ __forceinline__ Slice SliceOf(int cta) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (threadIdx.x < 2) shared.boundary_chunk[threadIdx.x] = -1;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int target = (cta + i) * Cost();
      ListPosition at = shared.before[threadIdx.x];
      if (at.cost > target || shared.before[threadIdx.x + 1].cost <= target) continue;
      for (int j = 0; j < each; ++j) {
        const ChunkList list = At(threadIdx.x * each + j);
        if (target < at.cost + list.cost) {
          shared.boundary_chunk[i] = threadIdx.x * each + j;
          shared.boundary[i] = at;
          break;
        }
        at.pages += list.pages;
        at.cost += list.cost;
      }
    }
    __syncthreads();
    if (warp < 2) {
      const int chunk = shared.boundary_chunk[warp], target = (cta + warp) * Cost();
      int index = total().pages;
      if (chunk >= 0) {
        const int pages = At(chunk).pages;
        const auto* entries = reinterpret_cast<const uint4*>(p.workspace + p.work.lists) +
                              int64_t{chunk} * kChunkPages + 2 * lane;
        static_assert(kChunkPages == 64, "two pages a lane");
        int cost[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const PackedPage page = UnpackPage(2 * lane + i < pages ? entries[i].y : 0);
          cost[i] = 2 * lane + i < pages ? AttendCost(page.value_planes + page.fine_planes) : 0;
        }
        const int before =
            shared.boundary[warp].cost + WarpPrefix(cost[0] + cost[1], lane) - cost[0] - cost[1];
        const int earlier = (2 * lane < pages && before < target ? 1 : 0) +
                            (2 * lane + 1 < pages && before + cost[0] < target ? 1 : 0);
        index = shared.boundary[warp].pages + __reduce_add_sync(0xffffffffu, earlier);
      }
      if (lane == 0) shared.index[warp] = index;
    }
    __syncthreads();
    return Slice{shared.index[0], shared.index[1]};
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

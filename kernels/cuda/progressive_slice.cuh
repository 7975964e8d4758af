#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SLICE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SLICE_CUH_

// The lists of attended pages that select left, chunk after chunk, as one: which slice of it a CTA
// of the attend kernel takes, and which CTAs take pages of a head.

#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

template <int kThreads>
struct SliceShared {
  int before[kThreads + 1];  // pages before each thread's chunks, then all of them
  int warp_sum[kThreads / 32];
};

struct Slice {
  int begin, end;
};

// Made by the whole CTA.
template <int kThreads>
struct SliceFinder {
  const int32_t* counts;  // of the chunks
  const int* before;
  int chunks, each, slices, chunks_of_head;  // each: chunks of a thread

  __device__ __forceinline__ SliceFinder(const ProgressiveArgs& p, SliceShared<kThreads>& shared)
      : counts(reinterpret_cast<const int32_t*>(p.workspace + p.work.counts)),
        before(shared.before),
        chunks(p.num_sequences * p.shape.num_kv_heads * p.work.chunks),
        each((chunks + kThreads - 1) / kThreads),
        slices(p.work.attend_ctas),
        chunks_of_head(p.work.chunks) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first = threadIdx.x * each;
    int mine = 0;
#pragma unroll 4
    for (int i = 0; i < each; ++i) mine += first + i < chunks ? counts[first + i] : 0;
    const int sum = WarpPrefix(mine, lane);
    if (lane == 31) shared.warp_sum[warp] = sum;
    __syncthreads();
    int base = 0, all = 0;
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) {
      if (i == warp) base = all;
      all += shared.warp_sum[i];
    }
    shared.before[threadIdx.x] = base + sum - mine;
    if (threadIdx.x == 0) shared.before[kThreads] = all;
    __syncthreads();
  }

  __device__ __forceinline__ int total() const { return before[kThreads]; }
  __device__ __forceinline__ int Length() const { return max((total() + slices - 1) / slices, 1); }
  __device__ __forceinline__ Slice SliceOf(int cta) const {
    const int length = Length(), begin = min(cta * length, total());
    return Slice{begin, min(begin + length, total())};
  }

  // Pages of the list before chunk `chunk`.
  __device__ __forceinline__ int Before(int chunk) const {
    if (chunk >= chunks) return total();
    int sum = before[chunk / each];
    for (int i = chunk / each * each; i < chunk; ++i) sum += counts[i];
    return sum;
  }

  // Where entries [begin, end) of the list stand among the chunks' lists, to `place`: each thread
  // says it of its own chunks' pages.
  __device__ __forceinline__ void Locate(int begin, int end, int* place) const {
    int at = before[threadIdx.x];
    if (at >= end || before[threadIdx.x + 1] <= begin) return;
    for (int i = 0; i < each; ++i) {
      const int chunk = threadIdx.x * each + i;
      const int count = chunk < chunks ? counts[chunk] : 0;
      for (int page = max(at, begin); page < min(at + count, end); ++page) {
        place[page - begin] = chunk * kChunkPages + page - at;
      }
      at += count;
    }
  }

  // The CTAs that take pages of a head: [begin, end).
  __device__ __forceinline__ Slice CtasOf(int head_index) const {
    const int begin = Before(head_index * chunks_of_head);
    const int end = Before((head_index + 1) * chunks_of_head), length = Length();
    return begin < end ? Slice{begin / length, (end - 1) / length + 1} : Slice{0, 0};
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SLICE_CUH_

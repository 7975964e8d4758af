#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_

// Select: the chunks of all heads, a CTA each. Their lists go to attend.
// grid (chunks x column tiles, num_kv_heads, num_sequences); decisions come from all columns, so
// every tile makes the same, and the first one lists them.

#include "kernels/cuda/progressive_chunk.cuh"

namespace adaattn {

__device__ __forceinline__ ChunkList* ChunkListOf(const ProgressiveArgs& p, int chunk_index) {
  return reinterpret_cast<ChunkList*>(p.workspace + p.work.extents) + chunk_index;
}

template <class Traits>
__global__ void __launch_bounds__(kSelectThreads, 4)
    ProgressiveSelectKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<SelectShared<Traits>*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const int tiles = WorkColumns<Traits>(p) / kTileColumns;
  const int chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int head = blockIdx.y, sequence = blockIdx.z;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const int head_index = sequence * p.shape.num_kv_heads + head;
  const int chunk_index = head_index * w.chunks + chunk;
  const int begin = chunk * kChunkPages;
  const ChunkPages pages{begin, 1, min(kChunkPages, from.num_sealed - begin)};
  ChunkSelector<Traits> selector(p, from, s, sequence, head, tile * kTileColumns, pages,
                                 threadIdx.x, shared);
  PageDecider<Traits>& decider = selector.decider;
  selector.Fetch(head);
  MassPart<kSelectWarps, Traits::kColumns> masses(p, from, sequence, head, decider.column_begin,
                                                  threadIdx.x);
  WorkOut(masses.runs);
  WorkOut(masses.dense);
  const bool chosen = ChoosesTheta(from.decision.policy);
  float theta = ThetaOf(p, from, head_index);
  const auto wait = [&p] {
    WaitForDependencies();
    NoteTime(p.stamps, kSelectStamp);
    LaunchDependents();
  };
  // Where theta is chosen, the launch before is the one that does, and let this one begin only when
  // the scan had ended. So what the scan left is loaded meanwhile.
  if (!chosen || pages.count <= 0) wait();
  if (pages.count <= 0) {
    if (threadIdx.x > 0) return;
    *reinterpret_cast<int2*>(ChunkListOf(p, chunk_index)) = int2{};
    if (begin == 0) ClearSpan(p, head_index);
    return;
  }
  masses.Load();
  decider.Load();
  __syncwarp();  // loads first
  ListDepths<Traits>(p, from.decision, threadIdx.x, shared);
  selector.TakeCopies();
  __syncwarp();
  selector.Summarise();
  float lse[PageDecider<Traits>::kEach];
  FindLse<Traits>(decider, sequence, head, masses, shared, lse);
  if (chosen) {
    wait();
    theta = p.thetas[head_index];
  }
  if (decider.page == 0) decider.StoreHead(lse);
  selector.Decide(lse, theta);
  decider.Weigh(shared);
  __syncthreads();
  if (tile == 0) {
    if (threadIdx.x < 32) {
      const ChunkList list = ListLength<Traits>(shared);
      if (threadIdx.x == 0) {
        *reinterpret_cast<int2*>(ChunkListOf(p, chunk_index)) = make_int2(list.pages, list.cost);
      }
    }
    decider.List(s, shared,
                 reinterpret_cast<uint4*>(p.workspace + w.lists) + chunk_index * kChunkPages);
    if (threadIdx.x / 32 == 1) CountPages<Traits>(p.decisions + head_index, shared);
  }
  const uint32_t slot = chunk_index * WorkColumns<Traits>(p) + decider.column_begin;
  StoreStates<Traits>(shared, kChunkFigures,
                      reinterpret_cast<float*>(p.workspace + w.state) + slot * kChunkFigures);
  constexpr uint32_t kFloats = kNumChunkVectors * Traits::kHeadDim;
  AddMeans<Traits, kSelectWarps>(
      shared.means, pages.count, pages.HasSink(), decider.columns - decider.column_begin,
      threadIdx.x / 32, kFloats,
      reinterpret_cast<float*>(p.workspace + w.vectors) + uint64_t{slot} * kFloats);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_SELECT_CUH_

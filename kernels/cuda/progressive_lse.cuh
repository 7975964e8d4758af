#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_LSE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_LSE_CUH_

// The global LSE of a head, from the masses that the scan left: what shares are relative to.

#include "kernels/cuda/progressive_common.cuh"

namespace adaattn {

// Has a pointer to global memory worked out here: the compiler would put it off to its use, behind
// a wait.
template <typename T>
__device__ __forceinline__ void WorkOut(T*& pointer) {
  asm volatile("" : "+l"(pointer));
  __builtin_assume(__isGlobal(pointer));
}

// What one of kWarps warps adds to L of a tile's columns: a part of the masses of the sequence's
// runs and, in the first warp, that of its dense tail. `thread` is one of theirs; a lane takes
// column lane % kColumns. Loads start with Load(), from L2 as LoadStats; Store() waits for them.
template <int kWarps, int kColumns>
struct MassPart {
  static constexpr int kAtOnce = 4, kStep = 32 * kWarps / kColumns;
  const int thread;
  const std::byte* runs;  // of the lane's column
  const float* dense;     // likewise
  uint32_t stride;        // bytes
  int entries;
  float dense_mass = -INFINITY;
  float x[kAtOnce];

  __device__ __forceinline__ MassPart(const ProgressiveArgs& p, const ProgressiveSequence& from,
                                      int sequence, int head, int column_begin, int of_threads)
      : thread(of_threads), stride(static_cast<uint32_t>(MassStride(p)) * 4) {
    const ProgressiveWorkspace& w = p.work;
    const int heads = p.shape.num_kv_heads, column = column_begin + thread % kColumns;
    // Of many columns the kernels have no register to spare for it.
    const int places = kColumns == kFewColumns ? p.scan_places : ScanPlaces(heads);
    const uint32_t first = from.scan_begin * places * heads + head;
    entries = from.num_scan_runs * places;
    runs = p.workspace + (p.two_stage ? w.refined_lse : w.scan_lse) +
           int64_t{first * w.columns + column} * 4;
    dense = reinterpret_cast<const float*>(p.workspace + w.dense_lse) +
            (sequence * heads + head) * w.columns + column;
  }

  __device__ __forceinline__ void Load() {
    if (thread < kColumns) dense_mass = __ldcg(dense);
    LoadRuns(0);
  }
  __device__ __forceinline__ void LoadRuns(int begin) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int entry = begin + thread / kColumns + i * kStep;
      x[i] = -INFINITY;
      if (entry < entries) x[i] = __ldcg(reinterpret_cast<const float*>(runs + entry * stride));
    }
  }

  // The warp's part to parts [kColumns]: x and y of 2^x * y.
  __device__ __forceinline__ void Store(float2* parts) {
    float high = dense_mass, sum = dense_mass == -INFINITY ? 0.0f : 1.0f;
    for (int begin = 0;;) {
      float next = high;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) next = fmaxf(next, x[i]);
      const float base = next == -INFINITY ? 0.0f : next;
      sum *= Exp2(high - base);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) sum += Exp2(x[i] - base);
      high = next;
      begin += kAtOnce * kStep;
      if (begin >= entries) break;
      LoadRuns(begin);
    }
    float top = high;
#pragma unroll
    for (int step = kColumns; step < 32; step *= 2) {
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, step));
    }
    sum *= Exp2(high - (top == -INFINITY ? 0.0f : top));
#pragma unroll
    for (int step = kColumns; step < 32; step *= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, step);
    }
    if (threadIdx.x % 32 < kColumns) parts[threadIdx.x % 32] = make_float2(top, sum);
  }
};

// L of column lane % kColumns of a tile from the parts [kWarps][kColumns], in every lane.
template <int kWarps, int kColumns>
__device__ __forceinline__ float JoinMassParts(const float2* parts) {
  constexpr int kEach = kWarps * kColumns / 32;
  static_assert(kEach * 32 == kWarps * kColumns, "as many in each lane");
  float2 part[kEach];
  float high = -INFINITY;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    part[i] = parts[threadIdx.x % 32 + 32 * i];
    high = fmaxf(high, part[i].x);
  }
#pragma unroll
  for (int step = kColumns; step < 32; step *= 2) {
    high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
  }
  const float base = high == -INFINITY ? 0.0f : high;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum = fmaf(part[i].y, Exp2(part[i].x - base), sum);
#pragma unroll
  for (int step = kColumns; step < 32; step *= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, step);
  }
  return base + Log2(sum);
}

// The head's estimated LSE L of every column, from the masses of the sequence's runs and of its
// dense tail, to `lse` [columns]. By all of kWarps warps; `parts` is scratch.
template <int kWarps>
__device__ __forceinline__ void GlobalLse(const ProgressiveArgs& p, const ProgressiveSequence& from,
                                          int sequence, int head, float* lse,
                                          float2 (*parts)[kMaxColumns]) {
  constexpr int kTileParts = kWarps * kTileColumns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int tiles = p.work.columns / kTileColumns;
  for (int tile = 0; tile < tiles; ++tile) {
    MassPart<kWarps, kTileColumns> part(p, from, sequence, head, tile * kTileColumns, threadIdx.x);
    part.Load();
    part.Store(parts[0] + tile * kTileParts + warp * kTileColumns);
  }
  __syncthreads();
  for (int tile = warp; tile < tiles; tile += kWarps) {
    const float sum = JoinMassParts<kWarps, kTileColumns>(parts[0] + tile * kTileParts);
    if (lane < kTileColumns) lse[tile * kTileColumns + lane] = sum;
  }
  __syncthreads();
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_LSE_CUH_

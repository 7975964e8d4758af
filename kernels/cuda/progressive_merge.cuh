#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_

// Merge: a head's partial outputs and the means of its skipped pages, brought back from the
// Hadamard frame, and its dense tail -> out, lse, decision.
//   mass = sum of partial masses + exp2(dense_lse - L)
//   out  = (H^T (sum of partial outputs + sum of means) + exp2(dense_lse - L) dense_out) / mass
//   lse  = L + log2 mass
// All of it relative to the largest part, which is near 1 but where four bits misjudged L.
// Every sum has an order of its own: nothing depends on timing. A CTA takes a column, and the last
// one of a head sums up the decision; or a head, where there are many.
// grid (columns / columns of a CTA, num_kv_heads, num_sequences); block (threads, columns of a CTA)

#include "kernels/cuda/hadamard.cuh"
#include "kernels/cuda/progressive_attend.cuh"
#include "kernels/cuda/progressive_chunk.cuh"

namespace adaattn {

inline constexpr int kMergeMaxWarps = 16;

// What a warp summed up, then all of them; floats, so that it can be summed as such.
template <class Traits>
struct MergePart {
  static constexpr int kD = Traits::kHeadDim;
  // Means of skipped pages, weighted means, means of attended pages as part of the estimated o.
  alignas(16) float vectors[kNumChunkVectors][kD];
  alignas(16) float partial[kD];  // partial outputs
  ChunkState state;
  float mass;  // of the partial outputs
  float unused;
};

// What the column's partial results are relative to, beside L: the largest of their references,
// -inf without any. The same in every lane.
__device__ __forceinline__ float LargestReference(const float* references, int stride,
                                                  const Slice& slots, int lane) {
  float top = -INFINITY;
#pragma unroll 4
  for (int slot = slots.begin + lane; slot < slots.end; slot += 32) {
    top = fmaxf(top, references[int64_t{slot} * stride]);
  }
  return WarpMax(top);
}

// A warp's part of what select summed up: every `warps`-th chunk, a lane a few channels.
template <class Traits>
__device__ __forceinline__ void SumChunks(const ProgressiveArgs& p, int head_index, int column,
                                          int chunks, int lane, int warp, int warps,
                                          MergePart<Traits>* part) {
  constexpr int kWords = Traits::kHeadDim / 4, kEach = (kWords + 31) / 32;
  const ProgressiveWorkspace& w = p.work;
  const int64_t first = int64_t{head_index} * w.chunks * w.columns + column;
  const auto* vectors = reinterpret_cast<const float4*>(p.workspace + w.vectors) +
                        first * (kNumChunkVectors * kWords);
  const auto* states =
      reinterpret_cast<const float*>(p.workspace + w.state) + first * (sizeof(ChunkState) / 4);
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int at = lane + 32 * j;
    if (at >= kWords) break;
    float4 sums[kNumChunkVectors] = {};
#pragma unroll 4
    for (int chunk = warp; chunk < chunks; chunk += warps) {
      const float4* from = vectors + int64_t{chunk} * w.columns * (kNumChunkVectors * kWords) + at;
#pragma unroll
      for (int i = 0; i < kNumChunkVectors; ++i) AddScaled(from[i * kWords], 1, &sums[i]);
    }
    AddScaled(sums[kSkipped], 1, &sums[kAttended]);
#pragma unroll
    for (int i = 0; i < kNumChunkVectors; ++i) {
      reinterpret_cast<float4*>(part->vectors[i])[at] = sums[i];
    }
  }
  // Lane i sums figure i.
  constexpr int kFigures = sizeof(ChunkState) / 4;
  if (lane >= kFigures) return;
  float sum = 0;
#pragma unroll 4
  for (int chunk = warp; chunk < chunks; chunk += warps) {
    sum += states[int64_t{chunk} * w.columns * kFigures + lane];
  }
  reinterpret_cast<float*>(&part->state)[lane] = sum;
}

// A warp's part of what attend summed up: every `warps`-th slot from `warp` on. `reference`: what
// partial results are brought to.
template <class Traits>
__device__ __forceinline__ void SumSlots(const ProgressiveArgs& p, int64_t row, const Slice& slots,
                                         const float* references, float reference, int lane,
                                         int warp, int warps, MergePart<Traits>* part) {
  constexpr int kWords = Traits::kHeadDim / 4, kEach = (kWords + 31) / 32;
  constexpr int kAtOnce = kEach > 1 ? 3 : 4;  // loads on their way
  const ProgressiveWorkspace& w = p.work;
  const auto* partial = reinterpret_cast<const float4*>(p.workspace + w.partial) + row * kWords;
  const auto* masses = reinterpret_cast<const float*>(p.workspace + w.mass) + row;
  float4 sums[kEach] = {};
  float mass = 0;
  for (int first = slots.begin + warp; first < slots.end; first += 32 * warps) {
    const int slot = first + warps * lane;
    const float own = slot < slots.end ? references[int64_t{slot} * w.columns] : -INFINITY;
    const bool any = own != -INFINITY;
    const float factor = any ? Exp2(own - reference) : 0.0f;
    if (any) mass = fmaf(masses[int64_t{slot} * w.columns], factor, mass);
    for (uint32_t left = __ballot_sync(0xffffffffu, any); left != 0;) {
      float4 x[kAtOnce][kEach];
      float factors[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int next = left != 0 ? __ffs(static_cast<int>(left)) - 1 : -1;
        factors[i] = __shfl_sync(0xffffffffu, factor, max(next, 0));
        if (next < 0) factors[i] = 0;
        left &= left - 1;
#pragma unroll
        for (int j = 0; j < kEach; ++j) {
          x[i][j] = float4{};
          if (next >= 0 && lane + 32 * j < kWords) {
            x[i][j] = partial[int64_t{first + warps * next} * w.columns * kWords + lane + 32 * j];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) AddScaled(x[i][j], factors[i], &sums[j]);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    if (lane + 32 * j < kWords) reinterpret_cast<float4*>(part->partial)[lane + 32 * j] = sums[j];
  }
  mass = WarpSum(mass);
  if (lane == 0) {
    part->mass = mass;
    part->unused = 0;
  }
}

// The warps' parts of a column, in their order, to the first. By all of them, after a barrier.
template <class Traits>
__device__ __forceinline__ void SumMergeParts(MergePart<Traits>* parts, int warps) {
  constexpr int kFloats = sizeof(MergePart<Traits>) / sizeof(float);
  auto* first = reinterpret_cast<float*>(parts);
  for (int at = threadIdx.x; at < kFloats; at += 32 * warps) {
    float sum = first[at];
#pragma unroll 4
    for (int i = 1; i < warps; ++i) sum += first[i * kFloats + at];
    first[at] = sum;
  }
}

__device__ __forceinline__ void StoreElement(void* tensor, int64_t at, DType type, float value) {
  switch (type) {
    case DType::kF32:
      static_cast<float*>(tensor)[at] = value;
      return;
    case DType::kF16:
      static_cast<__half*>(tensor)[at] = __float2half_rn(value);
      return;
    default:
      static_cast<__nv_bfloat16*>(tensor)[at] = __float2bfloat16_rn(value);
      return;
  }
}

// The dense tail's part of a column.
template <class Traits>
struct DensePart {
  static constexpr int kEach = (Traits::kHeadDim + 31) / 32;
  float lse, score, out[1][kEach];  // channel lane + 32 j

  __device__ __forceinline__ DensePart(const ProgressiveArgs& p, int64_t column, int lane) {
    const auto at = [&p](int64_t of) { return reinterpret_cast<const float*>(p.workspace + of); };
    lse = at(p.work.dense_lse)[column];
    score = at(p.work.dense_score)[column];
    const float* row = at(p.work.dense_out) + column * Traits::kHeadDim;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      out[0][j] = lane + 32 * j < Traits::kHeadDim ? row[lane + 32 * j] : 0.0f;
    }
  }

  // To the Hadamard frame, in which page means are.
  __device__ __forceinline__ void Rotate(int lane) { RotateHadamard<Traits::kHeadDim>(out, lane); }
};

// A vector of a column in one warp's registers, as one row of RotateHadamard: channel lane + 32 j
// in element j.
template <class Traits>
struct ColumnVector {
  static constexpr int kEach = DensePart<Traits>::kEach;
  float x[1][kEach];

  __device__ __forceinline__ ColumnVector(const float* from, float factor, int lane) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int at = lane + 32 * j;
      x[0][j] = at < Traits::kHeadDim ? from[at] * factor : 0.0f;
    }
  }
  __device__ __forceinline__ void Add(const float* from, float factor, int lane) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int at = lane + 32 * j;
      if (at < Traits::kHeadDim) x[0][j] = fmaf(from[at], factor, x[0][j]);
    }
  }
};

// How skipped and attended pages' values come to one sum, relative to 2^top beside L.
struct SumScale {
  float top, skipped, attended;  // -inf and 0 where there is nothing

  // `reference`: of what was attended.
  __device__ __forceinline__ SumScale(float skipped_mass, float reference) {
    top = fmaxf(reference, skipped_mass > 0 ? Log2(skipped_mass) : -INFINITY);
    skipped = skipped_mass > 0 ? Exp2(-top) : 0.0f;
    attended = reference == -INFINITY ? 0.0f : Exp2(reference - top);
  }
};

// Stores out and lse of a column from `out`, the sum of the sealed pages' values, in the Hadamard
// frame, and its mass, both relative to 2^top beside L. By a warp.
template <class Traits>
__device__ __forceinline__ void StoreColumn(const ProgressiveArgs& p, int64_t row, float lse,
                                            const DensePart<Traits>& dense,
                                            ColumnVector<Traits>& out, float mass, float top,
                                            int lane) {
  constexpr int kD = Traits::kHeadDim;
  // The largest part is what the sums are relative to.
  float base = top;
  if (dense.lse != -INFINITY) base = fmaxf(base, dense.lse - lse);
  if (base == -INFINITY) base = 0;
  const float sealed = Exp2(top - base);
  const float tail = dense.lse == -INFINITY ? 0.0f : Exp2(dense.lse - lse - base);
  RotateHadamard<kD>(out.x, lane);
  const float sum = fmaf(mass, sealed, tail), inverse = sum > 0 ? 1.0f / sum : 0.0f;
#pragma unroll
  for (int j = 0; j < ColumnVector<Traits>::kEach; ++j) {
    if (lane + 32 * j >= kD) continue;
    StoreElement(p.out, row * kD + lane + 32 * j, p.out_type,
                 fmaf(tail, dense.out[0][j], sealed * out.x[0][j]) * inverse);
  }
  if (lane == 0) p.lse[row] = sum > 0 ? (lse + base + Log2(sum)) * kLn2 : -INFINITY;
}

// What a column adds to the head's decision, its predicted square relative error and its entropy,
// from the sum of all pages' weighted means, of their means as part of the estimated o, and of
// their figures. `dense`: in the Hadamard frame, as the means. By a warp.
template <class Traits>
__device__ __forceinline__ float2 ColumnFigures(float lse, const DensePart<Traits>& dense, int lane,
                                                const float* weighted, const float* means,
                                                const ChunkState& state) {
  const float dense_mass = dense.lse == -INFINITY ? 0.0f : Exp2(dense.lse - lse);
  const ColumnVector<Traits> mean(means, 1, lane), weights(weighted, 1, lane);
  float norm = 0, cross = 0;
#pragma unroll
  for (int j = 0; j < ColumnVector<Traits>::kEach; ++j) {
    const float estimate = fmaf(dense_mass, dense.out[0][j], mean.x[0][j]);
    norm = fmaf(estimate, estimate, norm);
    cross = fmaf(estimate, weights.x[0][j], cross);
  }
  norm = WarpSum(norm);
  cross = WarpSum(cross);
  ErrorTerms terms;
  terms.square = fmaxf(state.mean_squares - 2 * cross + norm * state.weight + state.rest, 0.0f);
  terms.amplitude = state.amplitude;
  // Every dense token is an item of its own: -sum p log p.
  const float dense_entropy = dense_mass > 0 ? kLn2 * dense_mass * (lse - dense.score) : 0.0f;
  return make_float2(RelativeErrorSquare(terms, norm), state.entropy + dense_entropy);
}

// Leaves the counter of rotated queries to the next step. By the kernel that ends a step.
__device__ __forceinline__ void ClearProgress(const ProgressiveArgs& p) {
  if ((threadIdx.x | blockIdx.x | blockIdx.y | blockIdx.z) == 0) *p.rotated = 0;
}

// Whether a head has pages that a theta judged, and which.
__device__ __forceinline__ bool HasTheta(const ProgressiveSequence& s) {
  const PageRange visible = VisiblePages(s);
  return UsesLadder(s.decision.policy) && visible.begin < visible.end;
}

// The head's decision from the figures of all of its columns, in their order: figures(i) of one.
template <typename Figures>
__device__ __forceinline__ void StoreFigures(HeadDecision& decision, int columns,
                                             const Figures& figures) {
  float error = 0, entropy = 0;
  for (int i = 0; i < columns; ++i) {
    const float2 x = figures(i);
    error += x.x;
    entropy += x.y;
  }
  // The mean square; the return kernel takes the root.
  decision.predicted_error = error / static_cast<float>(columns);
  decision.entropy = entropy / static_cast<float>(columns);
}

// Of an output column: its row of q heads in the results.
__device__ __forceinline__ int64_t OutputRow(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                             int head, int column) {
  return static_cast<int64_t>(s.q_begin + p.group.Row(column)) * p.shape.num_q_heads +
         head * p.group.size + p.group.Head(column);
}

// What a CTA takes: columns of a head, one or all, and how many warps each.
struct MergeShape {
  int columns, warps;
};
// Few columns are each summed by many warps, many by two at least, which end a column. Those of a
// head in one CTA need not count each other. `columns`: of a head.
inline MergeShape ShapeMerge(int columns, int heads, int num_sms) {
  const int all = columns * heads;
  if (all <= num_sms) return {1, kMergeMaxWarps};
  if (all <= 4 * num_sms) return {1, kMergeMaxWarps / 2};
  return {columns <= kFewColumns ? columns : 1, all <= 8 * num_sms ? 4 : 2};
}

template <class Traits>
__global__ void __launch_bounds__(32 * kMergeMaxWarps, Traits::kHeadDim > 128 ? 1 : 2)
    ProgressiveMergeKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  __shared__ float2 shared_figures[kFewColumns];
  const int column = blockIdx.x * blockDim.y + threadIdx.y;
  const int head = blockIdx.y, sequence = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  auto* parts = reinterpret_cast<MergePart<Traits>*>(shared_bytes) + threadIdx.y * warps;
  const ProgressiveWorkspace& w = p.work;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int columns = p.group.size * s.q_len;
  const int chunks = CeilDiv(s.num_sealed, kChunkPages);
  const int64_t row = OutputRow(p, s, head, column);
  const bool whole = gridDim.x == 1;  // all of the head's columns
  if (column >= columns && !whole) return;
  const int head_index = sequence * p.shape.num_kv_heads + head;
  const int64_t at = int64_t{head_index} * w.columns + column;
  WaitForDependencies();
  NoteTime(p.stamps, kMergeStamp);
  ClearProgress(p);
  DensePart<Traits> dense(p, at, lane);
  const float lse = reinterpret_cast<const float*>(p.workspace + w.global_lse)[at];
  const int2 span = reinterpret_cast<const int2*>(p.workspace + w.spans)[head_index];
  const Slice slots{span.x, span.y};
  const float* references = reinterpret_cast<const float*>(p.workspace + w.reference) + at;
  SumChunks<Traits>(p, head_index, column, chunks, lane, warp, warps, parts + warp);
  const float reference = LargestReference(references, w.columns, slots, lane);
  SumSlots<Traits>(p, at, slots, references, reference, lane, warp, warps, parts + warp);
  if (warp == 1) dense.Rotate(lane);
  __syncthreads();
  SumMergeParts(parts, warps);
  __syncthreads();
  const MergePart<Traits>& sums = parts[0];
  if (warp == 0 && column < columns) {
    const SumScale scale(sums.state.mass, reference);
    ColumnVector<Traits> out(sums.vectors[kSkipped], scale.skipped, lane);
    out.Add(sums.partial, scale.attended, lane);
    StoreColumn<Traits>(p, row, lse, dense, out,
                        fmaf(sums.state.mass, scale.skipped, sums.mass * scale.attended), scale.top,
                        lane);
  }
  auto* figures =
      whole ? shared_figures
            : reinterpret_cast<float2*>(p.workspace + w.figures) + int64_t{head_index} * w.columns;
  if (warp == 1) {
    const float2 own = ColumnFigures<Traits>(lse, dense, lane, sums.vectors[kWeightedMean],
                                             sums.vectors[kAttended], sums.state);
    if (lane == 0) figures[column] = own;
  }
  if (whole) {
    __syncthreads();
    if (threadIdx.x > 0 || threadIdx.y > 0) return;
  } else {
    if (warp != 1 || lane > 0) return;
    __threadfence();
    auto* done = reinterpret_cast<int32_t*>(p.workspace + w.merged) + head_index;
    if (atomicAdd(done, 1) != columns - 1) return;
    __threadfence();  // other CTAs wrote them
  }
  HeadDecision& decision = p.decisions[head_index];
  StoreFigures(decision, columns,
               [figures, whole](int i) { return whole ? figures[i] : __ldcg(&figures[i]); });
  if (HasTheta(s)) decision.theta = ThetaOf(p, s, head_index);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_

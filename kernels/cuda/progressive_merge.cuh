#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_

// Merge: a head's partial outputs and the means of its skipped pages, brought back from the
// Hadamard frame, and its dense tail -> out, lse, decision.
//   mass = sum of partial masses + exp2(dense_lse - L)
//   out  = (H^T (sum of partial outputs + sum of means) + exp2(dense_lse - L) dense_out) / mass
//   lse  = L + log2 mass
// Every sum has an order of its own: nothing depends on timing. A CTA takes two columns, the pair
// that a lane of the partial outputs holds; the last one of a head sums up the decision.
// grid (column pairs, num_kv_heads, num_sequences)

#include "kernels/cuda/progressive_attend.cuh"
#include "kernels/cuda/progressive_select.cuh"

namespace adaattn {

template <class Traits>
struct MergeTraits {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kSlotThreads = Traits::kTiles * 8;  // that read a pair of one partial output
  static constexpr int kParts = 512 / kSlotThreads;        // partial outputs at a time
  static constexpr int kThreads = kParts * kSlotThreads;
  static_assert(kThreads >= 2 * kD && kThreads % 32 == 0, "a thread for each channel of the pair");
};

template <class Traits>
struct MergeShared {
  using Merge = MergeTraits<Traits>;
  float4 parts[Merge::kParts][Merge::kSlotThreads];  // [tiles, 8]: rows g and g + 8, both columns
  float2 vector[2][Traits::kHeadDim];                // output, weighted mean
  SelectState sums[2];
  int num_slots;
  int unit_begin[1];  // [chunks], then the head's slots: dynamic
};

template <class Traits>
size_t MergeSharedBytes(const ProgressiveArgs& p) {
  return sizeof(MergeShared<Traits>) +
         static_cast<size_t>(p.work.chunks) * (1 + kSelectUnits) * sizeof(int);
}

// The slots of the head's units, in the order of their pages.
template <class Traits>
__device__ __forceinline__ void ListSlots(const ProgressiveArgs& p, int64_t head_index, int chunks,
                                          MergeShared<Traits>& shared) {
  const int64_t first = head_index * p.work.chunks;
  const int32_t* units =
      reinterpret_cast<const int32_t*>(p.workspace + p.work.num_units) + 1 + first;
  int* begin = shared.unit_begin;
  int* slots = shared.unit_begin + chunks;
  for (int i = threadIdx.x; i < chunks; i += MergeTraits<Traits>::kThreads) begin[i] = units[i];
  __syncthreads();
  if (threadIdx.x < 32) {
    int before = 0;
    for (int i = threadIdx.x; i < CeilDiv(chunks, 32) * 32; i += 32) {
      const int count = i < chunks ? begin[i] : 0;
      int sum = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (static_cast<int>(threadIdx.x) >= step) sum += other;
      }
      for (int j = 0; j < count; ++j) {
        slots[before + sum - count + j] = static_cast<int>(first + i) * kSelectUnits + j;
      }
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
    if (threadIdx.x == 0) shared.num_slots = before;
  }
  __syncthreads();
}

// Sums the pair's partial outputs into shared.parts, part i those of every kParts-th slot.
template <class Traits>
__device__ __forceinline__ void SumPartials(const ProgressiveArgs& p, int pair, const int* slots,
                                            MergeShared<Traits>& shared) {
  using Merge = MergeTraits<Traits>;
  const int part = threadIdx.x / Merge::kSlotThreads, at = threadIdx.x % Merge::kSlotThreads;
  const int tiles = p.work.columns / kTileColumns;
  const int lane = at % 8 * 4 + pair % 4;
  const auto* partial = reinterpret_cast<const float4*>(p.workspace + p.work.partial) +
                        (int64_t{pair / 4} * Traits::kTiles + at / 8) * 32 + lane;
  const int64_t stride = int64_t{tiles} * Traits::kTiles * 32;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int i = part; i < shared.num_slots; i += Merge::kParts) {
    const float4 x = partial[slots[i] * stride];
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  shared.parts[part][at] = sum;
}

// Block Hadamard transforms of what the CTA's threads hold, an element each of vectors that lie
// side by side in `scratch`, times the norm. 80 = 64 + 16, 96 = 64 + 32 (format/hadamard.h). By all
// threads; those that hold nothing pass active = false.
template <class Traits>
__device__ __forceinline__ float2 Hadamard(float2 x, float2* scratch, int channel, bool active) {
  constexpr int kD = Traits::kHeadDim;
  constexpr bool kWhole = (kD & (kD - 1)) == 0, kShuffles = kD % 32 == 0;
  const int block = kWhole ? kD : channel < 64 ? 64 : kD - 64;
  auto butterfly = [channel](float2 mine, float2 other, int step) {
    return (channel & step) == 0 ? make_float2(mine.x + other.x, mine.y + other.y)
                                 : make_float2(other.x - mine.x, other.y - mine.y);
  };
#pragma unroll
  for (int step = 1; step < kD; step *= 2) {
    if (kShuffles && step < 32) {
      const float2 other = make_float2(__shfl_xor_sync(0xffffffffu, x.x, step),
                                       __shfl_xor_sync(0xffffffffu, x.y, step));
      x = butterfly(x, other, step);
      continue;
    }
    __syncthreads();
    if (active) scratch[0] = x;
    __syncthreads();
    if (active && step < block) x = butterfly(x, scratch[(channel ^ step) - channel], step);
  }
  const float norm = rsqrtf(static_cast<float>(block));
  return make_float2(x.x * norm, x.y * norm);
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

// The sums beside a column's vectors, by a warp.
__device__ __forceinline__ SelectState SumStates(const ProgressiveArgs& p, int64_t head_index,
                                                 int chunks, int column, const int* slots,
                                                 int num_slots, int lane) {
  const auto* states = reinterpret_cast<const SelectState*>(p.workspace + p.work.state) +
                       head_index * p.work.chunks * p.work.columns + column;
  const auto* masses = reinterpret_cast<const float*>(p.workspace + p.work.mass) + column;
  SelectState sum{};
  for (int i = lane; i < chunks; i += 32) {
    const SelectState state = states[int64_t{i} * p.work.columns];
    sum.mass += state.mass;
    sum.entropy += state.entropy;
    sum.weight += state.weight;
    sum.mean_squares += state.mean_squares;
    sum.rest += state.rest;
    sum.amplitude += state.amplitude;
  }
  for (int i = lane; i < num_slots; i += 32) sum.mass += masses[int64_t{slots[i]} * p.work.columns];
  sum.mass = WarpSum(sum.mass);
  sum.entropy = WarpSum(sum.entropy);
  sum.weight = WarpSum(sum.weight);
  sum.mean_squares = WarpSum(sum.mean_squares);
  sum.rest = WarpSum(sum.rest);
  sum.amplitude = WarpSum(sum.amplitude);
  return sum;
}

// A column's two vectors before the transform: channel `channel` of column `n` of the pair.
template <class Traits>
__device__ __forceinline__ float2 SumVectors(const ProgressiveArgs& p, int64_t head_index,
                                             int chunks, int column, int n, int channel,
                                             const MergeShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim;
  const int row = channel % kTileChannels;
  const int at = channel / kTileChannels * 8 + row % 8, element = n + row / 8 * 2;
  float2 x = make_float2(0, 0);
#pragma unroll
  for (int i = 0; i < MergeTraits<Traits>::kParts; ++i) {
    x.x += reinterpret_cast<const float*>(&shared.parts[i][at])[element];
  }
  const float* means = reinterpret_cast<const float*>(p.workspace + p.work.means) +
                       (head_index * p.work.chunks * p.work.columns + column) * 2 * kD + channel;
#pragma unroll 8
  for (int i = 0; i < chunks; ++i) {
    const float* from = means + int64_t{i} * p.work.columns * 2 * kD;
    x.x += from[0];
    x.y += from[kD];
  }
  return x;
}

// The dense tokens' part of a column's entropy, nats: -sum p log p, each token by itself.
__device__ __forceinline__ float DenseEntropy(const ProgressiveArgs& p, int64_t column) {
  const auto value = [&p, column](int64_t of) {
    return reinterpret_cast<const float*>(p.workspace + of)[column];
  };
  const float lse = value(p.work.global_lse), dense_lse = value(p.work.dense_lse);
  if (dense_lse == -INFINITY) return 0;
  return kLn2 * Exp2(dense_lse - lse) * (lse - value(p.work.dense_score));
}

// The predicted square relative error and the entropy of a column, to `figures`; by a warp.
template <class Traits>
__device__ __forceinline__ void ColumnFigures(const float2* vector, const SelectState& sum,
                                              int lane, float2* figures) {
  float norm = 0, cross = 0;
  for (int c = lane; c < Traits::kHeadDim; c += 32) {
    const float2 x = vector[c];
    norm = fmaf(x.x, x.x, norm);
    cross = fmaf(x.x, x.y, cross);
  }
  norm = WarpSum(norm);
  cross = WarpSum(cross);
  ErrorTerms terms;
  terms.square = fmaxf(sum.mean_squares - 2 * cross + norm * sum.weight + sum.rest, 0.0f);
  terms.amplitude = sum.amplitude;
  if (lane == 0) *figures = make_float2(RelativeErrorSquare(terms, norm), sum.entropy);
}

// The head's decision from the figures of all of its columns, in their order.
__device__ __forceinline__ void StoreFigures(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                             int64_t head_index, int columns,
                                             const float2* figures) {
  float error = 0, entropy = 0;
  for (int i = 0; i < columns; ++i) {
    const float2 x = __ldcg(&figures[i]);  // other CTAs wrote them
    error += x.x;
    entropy += x.y;
  }
  HeadDecision& decision = p.decisions[head_index];
  // The mean square; the host takes the root.
  decision.predicted_error = error / static_cast<float>(columns);
  decision.entropy = entropy / static_cast<float>(columns);
  const PageRange visible = VisiblePages(s);
  if (UsesLadder(s.decision.policy) && visible.begin < visible.end) {
    decision.theta = s.decision.policy == Policy::kBudget
                         ? reinterpret_cast<const float*>(p.workspace + p.work.theta)[head_index]
                         : s.decision.theta;
  }
}

template <class Traits>
__global__ void __launch_bounds__(MergeTraits<Traits>::kThreads)
    ProgressiveMergeKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<MergeShared<Traits>*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const int pair = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const ProgressiveSequence& s = p.sequences[sequence];
  const int group_size = p.shape.group_size(), columns = group_size * s.q_len;
  const int chunks = CeilDiv(s.num_sealed, kSelectPages), q_begin = s.q_begin;
  const int here = min(columns - 2 * pair, 2);
  if (here <= 0) return;
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int64_t first = head_index * w.columns + 2 * pair;
  WaitForDependencies();
  ListSlots<Traits>(p, head_index, chunks, shared);
  const int* slots = shared.unit_begin + chunks;
  const int n = threadIdx.x / kD, channel = threadIdx.x % kD, column = 2 * pair + n;
  const bool active = n < here;
  float lse = 0, dense_lse = -INFINITY, dense_out = 0;
  if (active) {
    lse = reinterpret_cast<const float*>(p.workspace + w.global_lse)[first + n];
    dense_lse = reinterpret_cast<const float*>(p.workspace + w.dense_lse)[first + n];
    dense_out =
        reinterpret_cast<const float*>(p.workspace + w.dense_out)[(first + n) * kD + channel];
  }
  SumPartials<Traits>(p, pair, slots, shared);
  constexpr int kLastWarp = MergeTraits<Traits>::kThreads / 32 - 1;  // others read vectors first
  if (warp > kLastWarp - here) {
    const int at = kLastWarp - warp;
    const SelectState sum =
        SumStates(p, head_index, chunks, 2 * pair + at, slots, shared.num_slots, lane);
    if (lane == 0) {
      shared.sums[at] = sum;
      shared.sums[at].entropy += DenseEntropy(p, first + at);
    }
  }
  __syncthreads();
  float2 x = make_float2(0, 0);
  if (active) x = SumVectors<Traits>(p, head_index, chunks, column, n, channel, shared);
  x = Hadamard<Traits>(x, &shared.vector[active ? n : 0][channel], channel, active);
  __syncthreads();
  if (active) {
    const float dense_mass = dense_lse == -INFINITY ? 0.0f : Exp2(dense_lse - lse);
    const float mass = shared.sums[n].mass + dense_mass;
    const float out = mass > 0 ? (x.x + dense_mass * dense_out) / mass : 0.0f;
    const int64_t row = static_cast<int64_t>(q_begin + column / group_size) * p.shape.num_q_heads +
                        head * group_size + column % group_size;
    StoreElement(p.out, row * kD + channel, p.out_type, out);
    if (channel == 0) p.lse[row] = mass > 0 ? (lse + Log2(mass)) * kLn2 : -INFINITY;
    shared.vector[n][channel] = make_float2(out, x.y);
  }
  __syncthreads();
  auto* figures = reinterpret_cast<float2*>(p.workspace + w.figures) + head_index * w.columns;
  if (warp < here) {
    ColumnFigures<Traits>(shared.vector[warp], shared.sums[warp], lane, &figures[2 * pair + warp]);
    __threadfence();
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  const int pairs = CeilDiv(columns, 2);
  auto* done = reinterpret_cast<int32_t*>(p.workspace + w.merged) + head_index;
  if (atomicAdd(done, 1) == pairs - 1) {
    __threadfence();
    StoreFigures(p, s, head_index, columns, figures);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_MERGE_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_THETA_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_THETA_CUH_

// Theta of one (sequence, kv head) for the policies that choose it:
//   budget            from the predicted error (progressive_budget.cuh)
//   entropy, learned  from how the mass lies, as policy/theta.h states it: sums over every page's
//                     and the dense tail's share of each column
// Sums have an order of their own: theta does not depend on timing.
// grid (BudgetCtas, num_kv_heads, num_sequences), a cluster a head, whose CTAs have a part of its
// pages each; sequences of other policies leave at once.

#include <algorithm>

#include "kernels/cuda/progressive_budget.cuh"
#include "kernels/policy/theta.h"

namespace adaattn {

template <int kWarps>
struct MassShared {
  float lse[kMaxColumns];
  float2 lse_parts[kWarps][kMaxColumns];
  MassSums sums[kWarps][kTileColumns];
  MassSums cta_sums[kMaxBudgetCtas];  // of the cluster's, in its first CTA
};

// CTAs of the kernel that registers allow.
template <class Traits>
constexpr int ThetaCtasPerSm() {
  if (Traits::kWarps == kFewBudgetWarps) return 5;
  if (Traits::kColumns == kFewColumns) return Traits::kHeadDim <= 128 ? 3 : 2;
  return Traits::kHeadDim <= 128 ? 2 : 1;
}

// Bytes of shared memory of a CTA.
template <class Traits>
size_t ThetaSharedBytes(const ProgressiveArgs& p) {
  constexpr size_t kLeast = sizeof(MassShared<Traits::kWarps>);
  if (!p.budget) return kLeast;
  const int32_t pages = std::min(BudgetPart(p.max_sealed, BudgetCtas(p, ThetaCtasPerSm<Traits>())),
                                 Traits::kBlockPages);
  return std::max(kLeast, BudgetSharedBytes<Traits>(p.work.columns, pages));
}
// Of any CTA.
template <class Traits>
constexpr size_t MaxThetaSharedBytes() {
  constexpr size_t kBytes = BudgetSharedBytes<Traits>(
      Traits::kColumns == kTileColumns ? kMaxColumns : kTileColumns, Traits::kBlockPages);
  static_assert(kBytes <= size_t{227} << 10, "what a CTA may have");
  return kBytes;
}

__device__ __forceinline__ MassSums ShuffleMasses(const MassSums& sums, int step) {
  const auto other = [step](float x) { return __shfl_xor_sync(0xffffffffu, x, step); };
  return MassSums{other(sums.entropy), other(sums.sealed), other(sums.square),
                  other(sums.token_square), other(sums.variance)};
}

// The sums of one tile of columns over `pages`, lane n < 8 of each warp its part of column
// column_begin + n, to shared memory.
template <int kWarps>
__device__ __forceinline__ void SumPageMasses(const ProgressiveArgs& p, PageRange pages,
                                              int64_t head_index, int column_begin, int columns,
                                              MassShared<kWarps>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = column_begin + lane % kTileColumns;
  MassSums sums;
  if (column < columns) {
    const float lse = shared.lse[column];
    constexpr int kStep = 32 * kWarps / kTileColumns;
#pragma unroll 4
    for (int page = pages.begin + threadIdx.x / kTileColumns; page < pages.end; page += kStep) {
      const PageStats stats = LoadStats(PageStatsOf(p, head_index, page), column);
      const float share = TermsOf(stats, lse).share;
      if (share > 0) {
        AddPageMass(share, fabsf(stats.concentration), stats.variance, &sums);
      }
    }
  }
#pragma unroll
  for (int step = kTileColumns; step < 32; step *= 2) AddMasses(ShuffleMasses(sums, step), &sums);
  if (lane < kTileColumns) shared.sums[warp][lane] = sums;
}

// By all threads of a cluster; the first one's thread 0 stores theta.
template <int kWarps>
__device__ __forceinline__ void ThetaFromPageMasses(const ProgressiveArgs& p,
                                                    const ProgressiveSequence& from,
                                                    const RowCluster& cluster, int sequence,
                                                    int head, MassShared<kWarps>& shared) {
  cluster.Arrive();  // it has started
  GlobalLse<kWarps>(p, from, sequence, head, shared.lse, shared.lse_parts);
  const int64_t head_index = int64_t{sequence} * p.shape.num_kv_heads + head;
  const int columns = p.group.size * from.q_len;
  const PageRange visible = VisiblePages(from), pages = PartOf(visible, cluster);
  const auto* dense =
      reinterpret_cast<const float*>(p.workspace + p.work.dense_lse) + head_index * p.work.columns;
  MassSums total;  // of thread 0: all columns
  for (int column_begin = 0; column_begin < columns; column_begin += kTileColumns) {
    SumPageMasses(p, pages, head_index, column_begin, columns, shared);
    __syncthreads();
    if (threadIdx.x < 32) {
      const int lane = threadIdx.x, column = column_begin + lane;
      MassSums sums;
      if (lane < kTileColumns && column < columns) {
        for (int warp = 0; warp < kWarps; ++warp) AddMasses(shared.sums[warp][lane], &sums);
        if (cluster.rank == 0 && dense[column] != -INFINITY) {
          AddDenseMass(Exp2(dense[column] - shared.lse[column]), &sums);
        }
      }
#pragma unroll
      for (int step = 1; step < kTileColumns; step *= 2) {
        AddMasses(ShuffleMasses(sums, step), &sums);
      }
      AddMasses(sums, &total);
    }
    __syncthreads();
  }
  cluster.Wait();
  if (threadIdx.x == 0) cluster.At(&shared, 0)->cta_sums[cluster.rank] = total;
  cluster.Sync();
  if (cluster.rank != 0 || threadIdx.x != 0) return;
  MassSums sums;
  for (int i = 0; i < cluster.ctas; ++i) AddMasses(shared.cta_sums[i], &sums);
  p.thetas[head_index] = ThetaFromMasses(from.decision, sums, columns, visible.end - visible.begin);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, ThetaCtasPerSm<Traits>())
    ProgressiveThetaKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  const int head = blockIdx.y, sequence = blockIdx.z;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const RowCluster cluster;
  const bool budget = from.decision.policy == Policy::kBudget;
  BudgetPages<Traits> own(p, s, cluster, *reinterpret_cast<BudgetShared<Traits>*>(shared_bytes));
  if (budget) own.Prepare();
  WaitForDependencies();
  NoteTime(p.stamps, kThetaStamp);
  LaunchDependents();
  if (budget) {
    ThetaFromBudget(own);
  } else if (ChoosesTheta(from.decision.policy)) {
    ThetaFromPageMasses(p, from, cluster, sequence, head,
                        *reinterpret_cast<MassShared<Traits::kWarps>*>(shared_bytes));
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_THETA_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_DEPTHS_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_DEPTHS_CUH_

// The depths at which the pages of a step may be read, and what follows from each.

#include "kernels/cuda/progressive_terms.cuh"

namespace adaattn {

// Depths of the ladder by rung, the same for pages that a row sees in part, that of pages
// that were not opened, that of the sink page. Policies without a ladder have one depth for all.
enum DepthIndex : int {
  kCutDepths = kNumRungs,
  kUnopenedDepth = 2 * kNumRungs,
  kSinkDepth = 2 * kNumRungs + 1,
  kNumPageDepths = 2 * kNumRungs + 2
};
struct alignas(16) DepthEntry {
  uint32_t packed;  // what is read, as PackPage
  DepthFactors factors;
};

// The depth at an index. It depends on no scan.
template <class Traits>
__device__ __forceinline__ PageDepth DepthAt(const ProgressiveArgs& p,
                                             const DecisionParams& decision, int index) {
  constexpr int kD = Traits::kHeadDim;
  if (decision.policy == Policy::kFullDepth) return FullDepth(kD, p.stored_bits);
  if (decision.policy == Policy::kStatic) return StaticDepth(decision, kD, p.stored_bits);
  const PageFacts facts{index == kSinkDepth, index >= kCutDepths && index < kUnopenedDepth,
                        index != kUnopenedDepth};
  const int rung = index < kUnopenedDepth ? index % kNumRungs : 0;
  return RungDepth(decision, rung, facts, kD, p.stored_bits);
}

__device__ __forceinline__ DepthEntry EntryOf(const PageDepth& depth) {
  return DepthEntry{PackPage(PackedPage{0, depth.value_bits / 2, (depth.key.bits - kScanBits) / 2,
                                        depth.key.chunks, 0}),
                    FactorsAt(depth)};
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_DEPTHS_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_LAUNCH_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_LAUNCH_CUH_

// The launches of a progressive step for one head_dim; inst/progressive_d*.cu each hold one.

#include <algorithm>
#include <type_traits>

#include "absl/status/statusor.h"
#include "kernels/cuda/progressive_conclude.cuh"
#include "kernels/cuda/progressive_inst.h"
#include "kernels/cuda/progressive_merge.cuh"
#include "kernels/cuda/progressive_prepare.cuh"
#include "kernels/cuda/progressive_refine.cuh"
#include "kernels/cuda/progressive_select.cuh"
#include "kernels/cuda/progressive_theta.cuh"
#include "kernels/cuda/status.h"

namespace adaattn {

// Launches `kernel` so that its prologue may run before the kernel in front of it has ended, if
// `overlap` says so. Rows of the grid are clusters of `cluster` CTAs.
template <typename Kernel>
absl::Status LaunchProgressive(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes,
                               bool overlap, const ProgressiveArgs& args, cudaStream_t stream,
                               const char* name, unsigned cluster = 1) {
  cudaLaunchAttribute attributes[2] = {};
  unsigned num_attributes = 0;
  if (overlap) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[num_attributes++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = num_attributes;
  return FromCuda(cudaLaunchKernelEx(&config, kernel, args), name);
}

// All kernels of a step want the largest shared memory: a multiprocessor that has to change the
// size must run dry first.
template <typename Kernel>
absl::Status AllowShared(Kernel kernel, size_t bytes) {
  ADAATTN_RETURN_IF_ERROR(
      FromCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               "cudaFuncSetAttribute"));
  return FromCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)),
                  "cudaFuncSetAttribute");
}

template <class Traits>
absl::Status LaunchTheta(const ProgressiveArgs& p, cudaStream_t stream) {
  static const absl::Status allowed =
      AllowShared(ProgressiveThetaKernel<Traits>, MaxThetaSharedBytes<Traits>());
  ADAATTN_RETURN_IF_ERROR(allowed);
  const auto ctas = static_cast<unsigned>(BudgetCtas(p, ThetaCtasPerSm<Traits>()));
  return LaunchProgressive(ProgressiveThetaKernel<Traits>,
                           dim3(ctas, static_cast<unsigned>(p.shape.num_kv_heads),
                                static_cast<unsigned>(p.num_sequences)),
                           Traits::kThreads, ThetaSharedBytes<Traits>(p), true, p, stream, "theta",
                           ctas);
}
// `kColumns`: of a tile.
template <int kHeadDim, int kColumns>
absl::Status RunTheta(const ProgressiveArgs& p, cudaStream_t stream) {
  if constexpr (kHeadDim <= 128 && kColumns == kFewColumns) {
    if (FewBudgetWarpsDo(p)) {
      return LaunchTheta<ThetaTraits<kHeadDim, kColumns, kFewBudgetWarps>>(p, stream);
    }
  }
  return LaunchTheta<ThetaTraits<kHeadDim, kColumns, kBudgetWarps>>(p, stream);
}

// What the device holds of a kernel's clusters, at `threads` and `shared_bytes` a CTA.
template <typename Kernel>
absl::StatusOr<ConcludeClusters> CountClusters(Kernel kernel, int threads, size_t shared_bytes) {
  ConcludeClusters clusters{};
  for (int32_t ctas = kMinConcludeCtas; ctas <= kMaxConcludeCtas; ++ctas) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(ctas);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(ctas));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.attrs = &attribute;
    config.numAttrs = 1;
    ADAATTN_RETURN_IF_ERROR(
        FromCuda(cudaOccupancyMaxActiveClusters(&clusters[ctas], kernel, &config),
                 "cudaOccupancyMaxActiveClusters"));
  }
  return clusters;
}

// Ends the step with one launch, if its shapes are such. Returns whether it did.
template <class Traits>
absl::StatusOr<bool> LaunchConclude(const ProgressiveArgs& p, cudaStream_t stream) {
  constexpr auto kKernel = ProgressiveConcludeKernel<Traits>;
  constexpr int kThreads = ConcludeShared<Traits>::kThreads;
  constexpr size_t kShared = sizeof(ConcludeShared<Traits>);
  static const auto clusters = []() -> absl::StatusOr<ConcludeClusters> {
    ADAATTN_RETURN_IF_ERROR(AllowShared(kKernel, kShared));
    return CountClusters(kKernel, kThreads, kShared);
  }();
  ADAATTN_RETURN_IF_ERROR(clusters.status());
  const auto ctas = static_cast<unsigned>(ConcludeCtas(p, *clusters));
  if (ctas == 0) return false;
  ADAATTN_RETURN_IF_ERROR(LaunchProgressive(kKernel,
                                            dim3(ctas, static_cast<unsigned>(p.shape.num_kv_heads),
                                                 static_cast<unsigned>(p.num_sequences)),
                                            kThreads, kShared, true, p, stream, "conclude", ctas));
  return true;
}

// `TileTraits`: of the kernels that are leaner where columns are few.
template <class Traits, class TileTraits>
absl::Status RunStep(const ProgressiveArgs& p, cudaStream_t stream) {
  constexpr size_t kPrepareShared = sizeof(PrepareShared<Traits>);
  constexpr size_t kScanShared = sizeof(ScanShared<TileTraits>);
  constexpr size_t kRefineShared = sizeof(RefineShared<Traits>);
  constexpr size_t kSelectShared = sizeof(SelectShared<TileTraits>);
  constexpr size_t kAttendShared = sizeof(AttendShared<TileTraits>);
  constexpr size_t kMergePart = sizeof(MergePart<Traits>);
  static const absl::Status allowed = [] {
    ADAATTN_RETURN_IF_ERROR(AllowShared(ProgressivePrepareKernel<Traits>, kPrepareShared));
    ADAATTN_RETURN_IF_ERROR(AllowShared(ProgressiveScanKernel<TileTraits>, kScanShared));
    ADAATTN_RETURN_IF_ERROR(AllowShared(ProgressiveRefineKernel<Traits>, kRefineShared));
    ADAATTN_RETURN_IF_ERROR(AllowShared(ProgressiveSelectKernel<TileTraits>, kSelectShared));
    ADAATTN_RETURN_IF_ERROR(AllowShared(ProgressiveAttendKernel<TileTraits>, kAttendShared));
    return AllowShared(ProgressiveMergeKernel<Traits>, kMergeMaxWarps * kMergePart);
  }();
  ADAATTN_RETURN_IF_ERROR(allowed);
  const auto heads = static_cast<unsigned>(p.shape.num_kv_heads);
  const auto sequences = static_cast<unsigned>(p.num_sequences);
  const auto tiles = static_cast<unsigned>(p.work.columns / kTileColumns);
  const auto sms = static_cast<unsigned>(p.num_sms);
  const bool split = 2 * heads * sequences * tiles <= PrepareCtasPerSm<Traits>() * sms;
  static_assert(PrepareCtasPerSm<Traits>() >= 1, "split where the scan is early (PlanProgressive)");
  ProgressiveArgs first = p;
  first.count_rotated = split;
  first.rehearse_scan = 2 * heads * sequences * tiles <= sms;  // or it begins too late for that
  ADAATTN_RETURN_IF_ERROR(LaunchProgressive(
      ProgressivePrepareKernel<Traits>, dim3(heads, sequences, split ? 2 * tiles : tiles),
      kQueryThreads, kPrepareShared, false, first, stream, "prepare"));
  const auto head_groups = static_cast<unsigned>(CeilDiv(p.shape.num_kv_heads, kScanWarps));
  const unsigned runs = static_cast<unsigned>(p.work.scan_runs) * head_groups;
  // A run has pages, as many at once as there are places.
  const auto most_runs =
      sequences * static_cast<unsigned>(CeilDiv(p.max_sealed, ScanPlaces(p.shape.num_kv_heads)));
  const unsigned scan_ctas = std::min(static_cast<unsigned>(p.scan_ctas), most_runs) * head_groups;
  ADAATTN_RETURN_IF_ERROR(LaunchProgressive(ProgressiveScanKernel<TileTraits>,
                                            dim3(scan_ctas * tiles), kScanThreads, kScanShared,
                                            true, first, stream, "scan"));
  if (p.two_stage) {
    ADAATTN_RETURN_IF_ERROR(LaunchProgressive(ProgressiveRefineKernel<Traits>, dim3(runs),
                                              kScanWarps * 32, kRefineShared, true, p, stream,
                                              "refine"));
  }
  if (p.theta) {
    ADAATTN_RETURN_IF_ERROR((RunTheta<Traits::kHeadDim, TileTraits::kColumns>(p, stream)));
  }
  if constexpr (Concludes(Traits::kHeadDim, TileTraits::kColumns)) {
    if (p.shape.group_size() * p.max_q_len <= TileTraits::kColumns) {
      ADAATTN_ASSIGN_OR_RETURN(const bool done, LaunchConclude<TileTraits>(p, stream));
      if (done) return absl::OkStatus();
    }
  }
  ADAATTN_RETURN_IF_ERROR(
      LaunchProgressive(ProgressiveSelectKernel<TileTraits>,
                        dim3(static_cast<unsigned>(p.work.chunks) * tiles, heads, sequences),
                        kSelectThreads, kSelectShared, true, p, stream, "select"));
  const auto attend_ctas = static_cast<unsigned>(p.work.attend_ctas);
  ADAATTN_RETURN_IF_ERROR(LaunchProgressive(
      ProgressiveAttendKernel<TileTraits>, dim3(attend_ctas, tiles),
      AttendShared<TileTraits>::kThreads, kAttendShared, true, p, stream, "attend"));
  const int columns = p.shape.group_size() * p.max_q_len;
  const MergeShape merge = ShapeMerge(columns, static_cast<int>(heads * sequences), p.num_sms);
  const auto merge_columns = static_cast<unsigned>(merge.columns);
  const auto merge_warps = static_cast<unsigned>(merge.warps);
  return LaunchProgressive(ProgressiveMergeKernel<Traits>,
                           dim3(static_cast<unsigned>(columns) / merge_columns, heads, sequences),
                           dim3(32 * merge_warps, merge_columns),
                           merge_columns * merge_warps * kMergePart, true, p, stream, "merge");
}

template <int kHeadDim>
absl::Status RunProgressiveHeadDim(const ProgressiveArgs& args, cudaStream_t stream) {
  const bool few = args.shape.group_size() * args.max_q_len <= kFewColumns;
  const auto run = [&](auto soft_cap) {
    using Traits = ProgressiveTraits<kHeadDim, soft_cap()>;
    using FewTraits = ProgressiveTraits<kHeadDim, soft_cap(), kFewColumns>;
    return few ? RunStep<Traits, FewTraits>(args, stream) : RunStep<Traits, Traits>(args, stream);
  };
  return args.softcap ? run(std::true_type()) : run(std::false_type());
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_LAUNCH_CUH_

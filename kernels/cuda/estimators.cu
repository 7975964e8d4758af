#include "absl/strings/str_cat.h"
#include "kernels/cuda/estimator_entropy.h"
#include "kernels/cuda/estimator_gram.h"
#include "kernels/cuda/estimator_rank.h"
#include "kernels/cuda/estimators.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/warp.cuh"

namespace adaattn {
namespace {

// The threads of a CTA.
struct CtaTeam {
  static constexpr int32_t kLanes = 32;
  static constexpr int32_t num_threads = kEstimatorThreads;
  static constexpr int32_t num_warps = kEstimatorThreads / kLanes;
  int32_t thread, warp, lane;

  __device__ __forceinline__ void SyncCta() const { __syncthreads(); }
  __device__ __forceinline__ double Sum(double x) const { return WarpSum(x); }
  __device__ __forceinline__ double Max(double x) const {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const double other = __shfl_xor_sync(0xffffffffu, x, step);
      x = other > x ? other : x;
    }
    return x;
  }
};

__device__ __forceinline__ CtaTeam ThisTeam() {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  return CtaTeam{thread, thread / CtaTeam::kLanes, thread % CtaTeam::kLanes};
}

// grid (tiles, parts, matrices)
__global__ void __launch_bounds__(kEstimatorThreads)
    GramTileKernel(const __grid_constant__ RankParams p, const __grid_constant__ RankWorkspace w) {
  __shared__ GramShared shared;
  const CtaTeam team = ThisTeam();
  GramTile<CtaTeam>(p, w, static_cast<int32_t>(blockIdx.z), static_cast<int32_t>(blockIdx.y),
                    static_cast<int32_t>(blockIdx.x), team, shared)
      .Run();
}

// grid (CTAs that share a matrix, 1, matrices)
__global__ void __launch_bounds__(kEstimatorThreads)
    GramSumKernel(const __grid_constant__ RankParams p, const __grid_constant__ RankWorkspace w) {
  GramSum<CtaTeam>(p, w, static_cast<int32_t>(blockIdx.z))
      .Run(ThisTeam(), static_cast<int32_t>(blockIdx.x), static_cast<int32_t>(gridDim.x));
}

// grid (1, 1, matrices)
__global__ void __launch_bounds__(kEstimatorThreads)
    RankKernel(const __grid_constant__ RankParams p, const __grid_constant__ RankWorkspace w) {
  __shared__ RankShared shared;
  const CtaTeam team = ThisTeam();
  RankEstimator<CtaTeam>(p, w, static_cast<int32_t>(blockIdx.z), team, shared).Run();
}

// grid (probes, 1, matrices)
__global__ void __launch_bounds__(kEstimatorThreads)
    ProbeKernel(const __grid_constant__ RankParams p, const __grid_constant__ RankWorkspace w) {
  __shared__ RankShared shared;
  const CtaTeam team = ThisTeam();
  RankEstimator<CtaTeam>(p, w, static_cast<int32_t>(blockIdx.z), team, shared)
      .RunProbe(static_cast<int32_t>(blockIdx.x));
}

// A thread to a matrix.
__global__ void __launch_bounds__(kEstimatorThreads)
    FinishProbesKernel(const __grid_constant__ RankParams p,
                       const __grid_constant__ RankWorkspace w) {
  __shared__ RankShared shared;
  const CtaTeam team = ThisTeam();
  const auto matrix = static_cast<int32_t>(blockIdx.x * kEstimatorThreads + threadIdx.x);
  if (matrix >= p.x.count) return;
  RankEstimator<CtaTeam>(p, w, matrix, team, shared).FinishProbes();
}

// grid (rows)
__global__ void __launch_bounds__(kEstimatorThreads)
    EntropyKernel(const __grid_constant__ EntropyParams p) {
  __shared__ EntropyShared shared;
  const CtaTeam team = ThisTeam();
  EntropyRow<CtaTeam>(p, static_cast<int32_t>(blockIdx.x), team, shared).Run();
}

__global__ void __launch_bounds__(kEstimatorThreads)
    SumPagesKernel(const __grid_constant__ EntropyParams p, double* page_lse) {
  __shared__ EntropyShared shared;
  const CtaTeam team = ThisTeam();
  EntropyRow<CtaTeam>(p, static_cast<int32_t>(blockIdx.x), team, shared).SumPages(page_lse);
}

constexpr int32_t kMaxGridZ = 65535;

absl::Status InRange(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, " ", value, "; must be from ", low, " to ", high));
}

}  // namespace

absl::Status CheckRankParams(const RankParams& params) {
  const MatrixBatch& x = params.x;
  const RankOptions& options = params.options;
  if (x.type != DType::kF32 && x.type != DType::kF16 && x.type != DType::kBf16) {
    return absl::InvalidArgumentError(
        absl::StrCat("element type ", DTypeName(x.type), "; must be fp32, fp16 or bf16"));
  }
  ADAATTN_RETURN_IF_ERROR(InRange("dim", x.dim, 1, kMaxRankDim));
  ADAATTN_RETURN_IF_ERROR(InRange("rows", x.rows, 0, int64_t{1} << 40));
  ADAATTN_RETURN_IF_ERROR(InRange("count", x.count, 0, kMaxGridZ));
  switch (options.method) {
    case RankMethod::kRandomizedSvd:
      ADAATTN_RETURN_IF_ERROR(InRange("range", options.range, 1, kMaxRankRange));
      return InRange("power_steps", options.power_steps, 0, 64);
    case RankMethod::kHutchinson:
      ADAATTN_RETURN_IF_ERROR(InRange("probes", options.probes, 2, 4096));
      return InRange("steps", options.steps, 1, kMaxRankSteps);
    case RankMethod::kPower:
      return InRange("iterations", options.iterations, 1, 1 << 20);
    case RankMethod::kSpectrum:
      break;
  }
  return absl::OkStatus();
}

int64_t RankWorkspaceBytes(const RankParams& params) { return MakeRankWorkspace(params).bytes; }

absl::Status EstimateRanks(const RankParams& params, cudaStream_t stream) {
  ADAATTN_RETURN_IF_ERROR(CheckRankParams(params));
  if (params.x.count == 0) return absl::OkStatus();
  const RankWorkspace work = MakeRankWorkspace(params);
  const auto count = static_cast<unsigned>(params.x.count);
  GramTileKernel<<<dim3(static_cast<unsigned>(work.tiles), static_cast<unsigned>(work.num_parts),
                        count),
                   kEstimatorThreads, 0, stream>>>(params, work);
  ADAATTN_RETURN_IF_ERROR(FromCuda(cudaGetLastError(), "GramTileKernel"));
  const auto share = static_cast<unsigned>(params.x.dim + 15) / 16;  // 16 rows of it each
  GramSumKernel<<<dim3(share, 1, count), kEstimatorThreads, 0, stream>>>(params, work);
  ADAATTN_RETURN_IF_ERROR(FromCuda(cudaGetLastError(), "GramSumKernel"));
  if (params.options.method != RankMethod::kHutchinson) {
    RankKernel<<<dim3(1, 1, count), kEstimatorThreads, 0, stream>>>(params, work);
    return FromCuda(cudaGetLastError(), "RankKernel");
  }
  ProbeKernel<<<dim3(static_cast<unsigned>(params.options.probes), 1, count), kEstimatorThreads, 0,
                stream>>>(params, work);
  ADAATTN_RETURN_IF_ERROR(FromCuda(cudaGetLastError(), "ProbeKernel"));
  FinishProbesKernel<<<(count + kEstimatorThreads - 1) / kEstimatorThreads, kEstimatorThreads, 0,
                       stream>>>(params, work);
  return FromCuda(cudaGetLastError(), "FinishProbesKernel");
}

absl::Status EstimateEntropies(const EntropyParams& params, cudaStream_t stream) {
  if (params.method == EntropyMethod::kSampled) {
    ADAATTN_RETURN_IF_ERROR(InRange("num_draws", params.num_draws, 1, kMaxEntropyDraws));
  }
  if (params.num_rows == 0) return absl::OkStatus();
  EntropyKernel<<<static_cast<unsigned>(params.num_rows), kEstimatorThreads, 0, stream>>>(params);
  return FromCuda(cudaGetLastError(), "EntropyKernel");
}

absl::Status SumPages(const EntropyParams& params, double* page_lse, cudaStream_t stream) {
  if (params.num_rows == 0) return absl::OkStatus();
  SumPagesKernel<<<static_cast<unsigned>(params.num_rows), kEstimatorThreads, 0, stream>>>(
      params, page_lse);
  return FromCuda(cudaGetLastError(), "SumPagesKernel");
}

}  // namespace adaattn

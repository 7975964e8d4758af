#include <cuda_runtime_api.h>

#include <algorithm>

#include "kernels/cuda/device_buffer.h"
#include "kernels/cuda/estimators.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/stream.h"
#include "loadtest/device_timer.h"
#include "loadtest/estimator_runner.h"

namespace adaattn {
namespace {

constexpr int kRuns = 11;

class DeviceRunner : public EstimatorRunner {
 public:
  absl::Status Create() { return stream_.Create(); }

  absl::StatusOr<TimedEstimates<RankEstimate>> Ranks(const MatrixCases& cases,
                                                     const RankOptions& options,
                                                     uint64_t seed) override {
    RankParams params;
    params.x.type = DType::kF16;
    params.x.dim = cases.dim;
    params.x.rows = cases.rows;
    params.x.stride = cases.rows * cases.dim;
    params.x.count = cases.count();
    params.x.centred = true;
    params.options = options;
    params.seed = seed;
    ADAATTN_RETURN_IF_ERROR(CheckRankParams(params));
    DeviceBuffer values, workspace, out;
    ADAATTN_RETURN_IF_ERROR(Upload(cases.values, &values));
    ADAATTN_RETURN_IF_ERROR(workspace.Allocate(RankWorkspaceBytes(params)));
    ADAATTN_RETURN_IF_ERROR(
        out.Allocate(cases.count() * static_cast<int64_t>(sizeof(RankEstimate))));
    params.x.values = values.data();
    params.workspace = workspace.data();
    params.out = reinterpret_cast<RankEstimate*>(out.data());
    return Run<RankEstimate>(cases.count(), out, [&params](cudaStream_t stream) {
      return EstimateRanks(params, stream);
    });
  }

  absl::StatusOr<TimedEstimates<EntropyEstimate>> Entropies(const ScoreCases& cases,
                                                            EntropyMethod method, int32_t num_draws,
                                                            uint64_t seed) override {
    DeviceBuffer tokens, scores, page_lse, workspace, out;
    ADAATTN_RETURN_IF_ERROR(Upload(cases.tokens, &tokens));
    ADAATTN_RETURN_IF_ERROR(Upload(cases.scores, &scores));
    ADAATTN_RETURN_IF_ERROR(Upload(cases.page_lse, &page_lse));
    ADAATTN_RETURN_IF_ERROR(workspace.Allocate(page_lse.bytes()));
    ADAATTN_RETURN_IF_ERROR(
        out.Allocate(cases.count() * static_cast<int64_t>(sizeof(EntropyEstimate))));
    EntropyParams params;
    params.num_rows = cases.count();
    params.tokens = reinterpret_cast<const int32_t*>(tokens.data());
    params.scores = reinterpret_cast<const float*>(scores.data());
    params.page_lse = reinterpret_cast<const double*>(page_lse.data());
    params.score_stride = cases.stride;
    params.page_stride = cases.page_stride;
    params.method = method;
    params.num_draws = num_draws;
    params.seed = seed;
    params.workspace = reinterpret_cast<double*>(workspace.data());
    params.out = reinterpret_cast<EntropyEstimate*>(out.data());
    return Run<EntropyEstimate>(cases.count(), out, [&params](cudaStream_t stream) {
      return EstimateEntropies(params, stream);
    });
  }

 private:
  template <class T>
  absl::Status Upload(const std::vector<T>& from, DeviceBuffer* to) {
    const size_t bytes = from.size() * sizeof(T);
    ADAATTN_RETURN_IF_ERROR(to->Allocate(static_cast<int64_t>(bytes)));
    return FromCuda(
        cudaMemcpyAsync(to->data(), from.data(), bytes, cudaMemcpyHostToDevice, stream_.get()),
        "cudaMemcpyAsync");
  }

  // The median of kRuns after one more; then what the last one left in `out`.
  template <class Estimate, class Enqueue>
  absl::StatusOr<TimedEstimates<Estimate>> Run(int32_t count, const DeviceBuffer& out,
                                               const Enqueue& enqueue) {
    DeviceTimer timer;
    ADAATTN_RETURN_IF_ERROR(timer.Create());
    std::vector<double> times;
    for (int i = 0; i <= kRuns; ++i) {
      ADAATTN_RETURN_IF_ERROR(timer.Start(stream_.get()));
      ADAATTN_RETURN_IF_ERROR(enqueue(stream_.get()));
      ADAATTN_ASSIGN_OR_RETURN(const double microseconds, timer.Stop(stream_.get()));
      if (i > 0) times.push_back(microseconds);
    }
    std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
    TimedEstimates<Estimate> result;
    result.microseconds = times[kRuns / 2] / count;
    result.estimates.resize(static_cast<size_t>(count));
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpy(result.estimates.data(), out.data(),
                                            count * sizeof(Estimate), cudaMemcpyDeviceToHost));
    return result;
  }

  Stream stream_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<EstimatorRunner>> MakeDeviceRunner() {
  auto runner = std::make_unique<DeviceRunner>();
  ADAATTN_RETURN_IF_ERROR(runner->Create());
  return runner;
}

}  // namespace adaattn

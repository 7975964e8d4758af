#ifndef ADAATTN_LOADTEST_ESTIMATOR_RUNNER_H_
#define ADAATTN_LOADTEST_ESTIMATOR_RUNNER_H_

// Estimators of entropy and rank on many cases, timed: by the host one after the other, by a device
// as one batch. Both draw the same random numbers.

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/policy/entropy_estimators.h"
#include "kernels/policy/rank.h"

namespace adaattn {

// Matrices [rows, dim] of FP16, row-major, one after the other; estimated less their columns'
// means.
struct MatrixCases {
  int32_t dim = 0;
  int64_t rows = 0;
  std::vector<uint16_t> values;

  int32_t count() const { return static_cast<int32_t>(values.size() / (rows * dim)); }
};

// Matrix `index` as floats, its means taken out.
std::vector<float> CentredRows(const MatrixCases& cases, int32_t index);

// Rows of attention as the scan leaves them: their scores, and every page's log sum of
// exponentials.
struct ScoreCases {
  int64_t stride = 0;           // scores of a row
  int64_t page_stride = 0;      // pages of a row
  std::vector<int32_t> tokens;  // that each row sees
  std::vector<float> scores;
  std::vector<double> page_lse;

  int32_t count() const { return static_cast<int32_t>(tokens.size()); }
  absl::Span<const float> RowScores(int32_t row) const;
  absl::Span<const double> RowPages(int32_t row) const;
};

template <class Estimate>
struct TimedEstimates {
  std::vector<Estimate> estimates;  // of all cases
  double microseconds = 0;          // each, on average
};

class EstimatorRunner {
 public:
  virtual ~EstimatorRunner() = default;
  // Case i takes seed + i.
  virtual absl::StatusOr<TimedEstimates<RankEstimate>> Ranks(const MatrixCases& cases,
                                                             const RankOptions& options,
                                                             uint64_t seed) = 0;
  virtual absl::StatusOr<TimedEstimates<EntropyEstimate>> Entropies(const ScoreCases& cases,
                                                                    EntropyMethod method,
                                                                    int32_t num_draws,
                                                                    uint64_t seed) = 0;
};

std::unique_ptr<EstimatorRunner> MakeHostRunner();
// Times are medians of device events around the batch's launches. An error where there is no device
// or the build has no CUDA backend.
absl::StatusOr<std::unique_ptr<EstimatorRunner>> MakeDeviceRunner();

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_ESTIMATOR_RUNNER_H_

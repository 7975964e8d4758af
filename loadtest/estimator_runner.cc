#include "loadtest/estimator_runner.h"

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "kernels/format/float_types.h"

namespace adaattn {
namespace {

class HostRunner : public EstimatorRunner {
 public:
  absl::StatusOr<TimedEstimates<RankEstimate>> Ranks(const MatrixCases& cases,
                                                     const RankOptions& options,
                                                     uint64_t seed) override {
    TimedEstimates<RankEstimate> result;
    for (int32_t i = 0; i < cases.count(); ++i) {
      const std::vector<float> rows = CentredRows(cases, i);
      Time(cases.count(), &result, [&] {
        return EstimateRank({rows, cases.dim}, options, seed + static_cast<uint64_t>(i));
      });
    }
    return result;
  }

  absl::StatusOr<TimedEstimates<EntropyEstimate>> Entropies(const ScoreCases& cases,
                                                            EntropyMethod method, int32_t num_draws,
                                                            uint64_t seed) override {
    TimedEstimates<EntropyEstimate> result;
    for (int32_t i = 0; i < cases.count(); ++i) {
      Time(cases.count(), &result, [&] {
        return EstimateEntropy(cases.RowScores(i), cases.RowPages(i), method, num_draws,
                               seed + static_cast<uint64_t>(i));
      });
    }
    return result;
  }

 private:
  template <class Estimate, class Run>
  static void Time(int32_t count, TimedEstimates<Estimate>* result, const Run& run) {
    const absl::Time start = absl::Now();
    result->estimates.push_back(run());
    result->microseconds += absl::ToDoubleMicroseconds(absl::Now() - start) / count;
  }
};

}  // namespace

std::vector<float> CentredRows(const MatrixCases& cases, int32_t index) {
  std::vector<float> rows;
  const int64_t size = cases.rows * cases.dim;
  for (int64_t i = 0; i < size; ++i) {
    rows.push_back(ToFloat(Fp16{cases.values[index * size + i]}));
  }
  for (int32_t c = 0; c < cases.dim; ++c) {
    double mean = 0;
    for (int64_t i = 0; i < cases.rows; ++i) {
      mean += rows[i * cases.dim + c] / static_cast<double>(cases.rows);
    }
    for (int64_t i = 0; i < cases.rows; ++i) rows[i * cases.dim + c] -= static_cast<float>(mean);
  }
  return rows;
}

absl::Span<const float> ScoreCases::RowScores(int32_t row) const {
  return absl::MakeConstSpan(scores).subspan(row * stride, tokens[row]);
}

absl::Span<const double> ScoreCases::RowPages(int32_t row) const {
  const int64_t pages = (tokens[row] + kPageTokens - 1) / kPageTokens;
  return absl::MakeConstSpan(page_lse).subspan(row * page_stride, pages);
}

std::unique_ptr<EstimatorRunner> MakeHostRunner() { return std::make_unique<HostRunner>(); }

}  // namespace adaattn

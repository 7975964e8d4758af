#ifndef ADAATTN_KERNELS_REFERENCE_PROGRESSIVE_STEP_F64_H_
#define ADAATTN_KERNELS_REFERENCE_PROGRESSIVE_STEP_F64_H_

// Inside the progressive reference: one step in flight. Include progressive_f64.h instead.

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels/policy/error_model.h"
#include "kernels/policy/ladder.h"
#include "kernels/reference/attention_f64.h"
#include "kernels/reference/progressive_f64.h"

namespace adaattn::internal {

inline constexpr double kNoMass = -std::numeric_limits<double>::infinity();

inline double CappedScore(double score, double softcap) {
  return softcap > 0 ? softcap * std::tanh(score / softcap) : score;
}

// What one row of one q head learns of one page at one depth of K.
struct PageScan {
  double lse = kNoMass;      // log sum exp of the visible tokens' scores
  double concentration = 1;  // sum_j p_j^2 / share^2
  double variance = 0;       // var_s
};

// One step in flight. A "row" is one row of q of one q head, [q_len, group_size] flattened.
class StepRun {
 public:
  StepRun(const ProgressiveHeadF64& cache, const ProgressiveStepF64& step);
  ProgressiveResultF64 Take();

 private:
  struct Row {
    VisibleRange visible;
    std::vector<std::vector<double>> query;  // by basis, [head_dim] rotated
    std::vector<double> mean_score;          // by basis: q.mu
    std::vector<double> dense_scores;        // tokens of dense pages that it sees
    int64_t dense_begin = 0;                 // the first of them, counted from the first dense one
    std::vector<PageScan> scans;             // by page, at the depth that decides its log mass
    std::vector<double> log_mass;            // by page
    double lse = kNoMass;                    // of log_mass and dense_scores
    std::vector<double> estimate;            // o before attending, Hadamard frame
    double norm2 = 0;                        // |estimate|^2
  };

  void PrepareRow(int32_t row);
  void FindVisiblePages();
  std::vector<double> Scores(const Row& row, int32_t page, int32_t bits, int32_t rank) const;
  PageScan Scan(const Row& row, int32_t page, KeyDepth depth) const;
  bool Sees(const Row& row, int32_t page) const;
  // What stands for a page's values in estimates: its mean, or the sink's first token.
  struct StandIn {
    const float* value = nullptr;  // [head_dim], Hadamard frame
    float spread = 0;
    float scale_rms = 0;
  };
  StandIn StandInFor(const Row& row, int32_t page) const;
  void ScanAll(KeyDepth depth, bool correct);
  void FinishMasses();
  void Estimate(Row* row) const;
  void OpenPages(float theta);
  PageErrorInputs ErrorInputs(const Row& row, int32_t page) const;
  float ChooseBudget() const;
  float ChooseTheta() const;
  void Select();
  void SelectByScan();
  void Predict();
  void Attend(int32_t row);
  void Report();

  int32_t num_pages() const { return step_.num_sealed_pages; }
  const ProgressiveHeadF64::Page& page(int32_t index) const {
    return cache_.pages()[static_cast<size_t>(index)];
  }
  PageDepth& depth(int32_t index) { return result_.depths[static_cast<size_t>(index)]; }

  const ProgressiveHeadF64& cache_;
  const ProgressiveStepF64& step_;
  const int32_t d_;
  const int32_t stored_bits_;
  std::vector<Row> rows_;
  std::vector<bool> visible_;     // by page: some row sees some of it
  int32_t sink_value_bits_ = 8;   // at which the sink's values will be read
  std::vector<PageFacts> facts_;  // by page
  ProgressiveResultF64 result_;
};

}  // namespace adaattn::internal

#endif  // ADAATTN_KERNELS_REFERENCE_PROGRESSIVE_STEP_F64_H_

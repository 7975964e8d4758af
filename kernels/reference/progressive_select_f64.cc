#include <algorithm>
#include <cmath>

#include "kernels/format/hadamard.h"
#include "kernels/format/nested_code.h"
#include "kernels/policy/budget.h"
#include "kernels/policy/entropy.h"
#include "kernels/policy/theta.h"
#include "kernels/reference/progressive_step_f64.h"

// The first half of a step: scan, estimate, choose depths, predict the error.

namespace adaattn::internal {

using Page = ProgressiveHeadF64::Page;

// Scores of the tokens of `index` that the row sees, in token order.
std::vector<double> StepRun::Scores(const Row& row, int32_t index, int32_t bits,
                                    int32_t rank) const {
  const Page& held = page(index);
  const std::vector<float>& keys = held.keys[bits / 2 - 2];
  const std::vector<double>& query = row.query[held.basis];
  const int64_t first = int64_t{index} * kPageTokens;
  std::vector<double> scores;
  scores.reserve(kPageTokens);
  for (int64_t t = std::max(first, row.visible.begin);
       t < std::min(first + kPageTokens, row.visible.end); ++t) {
    const float* const key = keys.data() + (t - first) * d_;
    double dot = row.mean_score[held.basis];
    for (int32_t r = 0; r < rank; ++r) dot += query[static_cast<size_t>(r)] * key[r];
    scores.push_back(CappedScore(step_.softmax_scale * dot, step_.softcap));
  }
  return scores;
}

PageScan StepRun::Scan(const Row& row, int32_t index, KeyDepth depth) const {
  const int32_t rank = ChunkedRank(d_, depth.chunks);
  PageScan scan;
  std::vector<double> scores = Scores(row, index, depth.bits, rank);
  scan.lse = LogSumExp(scores);
  for (double& score : scores) score *= 2.0;
  scan.concentration = std::exp(LogSumExp(scores) - 2.0 * scan.lse);
  const std::vector<double>& query = row.query[page(index).basis];
  for (int32_t c = 0; c < d_; ++c) {
    const auto i = static_cast<size_t>(c);
    const double term = query[i] * RangeFromScale(page(index).key_scales[i]);
    const double unit = c < rank ? std::pow(4.0, 1 - depth.bits) / 12.0 : 1.0 / 6.0;
    scan.variance += term * term * unit;
  }
  scan.variance *= step_.softmax_scale * step_.softmax_scale;
  return scan;
}

// Scans every visible page at `depth`. correct: log masses as estimates, else as attended.
void StepRun::ScanAll(KeyDepth depth, bool correct) {
  for (Row& row : rows_) {
    row.scans.assign(static_cast<size_t>(num_pages()), PageScan{});
    row.log_mass.assign(static_cast<size_t>(num_pages()), kNoMass);
    for (int32_t p = 0; p < num_pages(); ++p) {
      if (!Sees(row, p)) continue;
      const PageScan scan = Scan(row, p, depth);
      row.scans[static_cast<size_t>(p)] = scan;
      row.log_mass[static_cast<size_t>(p)] =
          scan.lse + (correct ? 0.5 * std::min<double>(scan.variance, kMaxScoreVariance) : 0.0);
    }
  }
  FinishMasses();
}

void StepRun::FinishMasses() {
  for (Row& row : rows_) {
    std::vector<double> items = row.log_mass;
    items.insert(items.end(), row.dense_scores.begin(), row.dense_scores.end());
    row.lse = LogSumExp(items);
  }
}

StepRun::StandIn StepRun::StandInFor(const Row& row, int32_t index) const {
  const Page& held = page(index);
  const bool first = FirstTokenStandsForPage(
      facts_[static_cast<size_t>(index)].sink, row.visible.begin == 0,
      static_cast<float>(row.scans[static_cast<size_t>(index)].concentration));
  // A page's first token is the first row of its decoded values.
  if (first) return StandIn{held.values[sink_value_bits_ / 2].data(), 0, held.first_scale_rms};
  return StandIn{held.values[0].data(), held.summary.spread, held.summary.scale_rms};
}

// o before attending: every page's share of what stands for it, the dense tokens as they are.
void StepRun::Estimate(Row* row) const {
  std::vector<double> dense(static_cast<size_t>(d_), 0.0);
  for (size_t i = 0; i < row->dense_scores.size(); ++i) {
    const double p = std::exp(row->dense_scores[i] - row->lse);
    const float* const value =
        step_.dense_values + (row->dense_begin + static_cast<int64_t>(i)) * d_;
    for (int32_t c = 0; c < d_; ++c) dense[static_cast<size_t>(c)] += p * value[c];
  }
  RotateHadamard(dense.data(), d_);
  for (int32_t p = 0; p < num_pages(); ++p) {
    const double share = std::exp(row->log_mass[static_cast<size_t>(p)] - row->lse);
    if (!(share > 0.0)) continue;
    const float* const value = StandInFor(*row, p).value;
    for (int32_t c = 0; c < d_; ++c) dense[static_cast<size_t>(c)] += share * value[c];
  }
  row->norm2 = 0.0;
  for (const double value : dense) row->norm2 += value * value;
  row->estimate = std::move(dense);
}

PageErrorInputs StepRun::ErrorInputs(const Row& row, int32_t index) const {
  const PageScan& scan = row.scans[static_cast<size_t>(index)];
  const StandIn stand_in = StandInFor(row, index);
  double distance2 = 0.0;
  for (size_t c = 0; c < row.estimate.size(); ++c) {
    const double off = stand_in.value[c] - row.estimate[c];
    distance2 += off * off;
  }
  PageErrorInputs inputs;
  inputs.share = static_cast<float>(std::exp(row.log_mass[static_cast<size_t>(index)] - row.lse));
  inputs.concentration = static_cast<float>(scan.concentration);
  inputs.score_variance = static_cast<float>(scan.variance);
  inputs.mean_distance2 = static_cast<float>(distance2);
  inputs.spread = stand_in.spread;
  inputs.scale_rms = stand_in.scale_rms;
  return inputs;
}

float StepRun::ChooseBudget() const {
  std::vector<PageBudget> budgets;
  for (int32_t p = 0; p < num_pages(); ++p) {
    if (!visible_[static_cast<size_t>(p)]) continue;
    PageBudget budget;
    budget.facts = facts_[static_cast<size_t>(p)];
    for (const Row& row : rows_) {
      if (!Sees(row, p)) continue;
      const double weight =
          row.norm2 > 0 ? 1.0 / (row.norm2 * static_cast<double>(rows_.size())) : 0.0;
      const PageErrorInputs inputs = ErrorInputs(row, p);
      AddToBudget(inputs.share, ErrorParts(inputs, d_), static_cast<float>(weight), &budget);
    }
    budgets.push_back(budget);
  }
  return adaattn::ChooseTheta(step_.decision, budgets, d_, stored_bits_).theta;
}

float StepRun::ChooseTheta() const {
  const DecisionParams& params = step_.decision;
  if (params.policy == Policy::kBudget) return ChooseBudget();
  MassSums sums;
  for (const Row& row : rows_) {
    MassSums own;
    for (int32_t p = 0; p < num_pages(); ++p) {
      if (!Sees(row, p)) continue;
      const auto i = static_cast<size_t>(p);
      AddPageMass(static_cast<float>(std::exp(row.log_mass[i] - row.lse)),
                  static_cast<float>(row.scans[i].concentration),
                  static_cast<float>(row.scans[i].variance), &own);
    }
    if (row.lse > kNoMass) AddDenseMass(1.0f - own.sealed, &own);
    AddMasses(own, &sums);
  }
  return ThetaFromMasses(params, sums, static_cast<int32_t>(rows_.size()),
                         static_cast<int32_t>(std::count(visible_.begin(), visible_.end(), true)));
}

// Second stage: pages that the coarse scan cannot rule out are scanned in full.
void StepRun::OpenPages(float theta) {
  const KeyDepth full{kScanBits, static_cast<uint8_t>(NumRankChunks(d_))};
  for (int32_t p = 0; p < num_pages(); ++p) {
    PageFacts& facts = facts_[static_cast<size_t>(p)];
    facts.opened = facts.sink || facts.cut;
    for (const Row& row : rows_) {
      const PageScan& scan = row.scans[static_cast<size_t>(p)];
      const double upper = scan.lse + step_.decision.coarse_z * std::sqrt(scan.variance);
      facts.opened = facts.opened || upper - row.lse > std::log(double{theta});
    }
    if (!facts.opened) continue;
    for (Row& row : rows_) {
      if (!Sees(row, p)) continue;
      const PageScan scan = Scan(row, p, full);
      row.scans[static_cast<size_t>(p)] = scan;
      row.log_mass[static_cast<size_t>(p)] =
          scan.lse + 0.5 * std::min<double>(scan.variance, kMaxScoreVariance);
    }
  }
  FinishMasses();
}

void StepRun::SelectByScan() {
  const DecisionParams& params = step_.decision;
  const int32_t coarse = CoarseChunks(params, d_);
  const int32_t chunks = coarse > 0 ? coarse : NumRankChunks(d_);
  sink_value_bits_ = stored_bits_;
  ScanAll(KeyDepth{kScanBits, static_cast<uint8_t>(chunks)}, /*correct=*/true);
  if (coarse > 0) OpenPages(params.theta);
  for (Row& row : rows_) Estimate(&row);
  const float theta = ChooseTheta();
  result_.decision.theta = theta;
  for (int32_t p = 0; p < num_pages(); ++p) {
    if (!visible_[static_cast<size_t>(p)]) continue;
    double share = 0.0;
    for (const Row& row : rows_) {
      share = std::max(share, std::exp(row.log_mass[static_cast<size_t>(p)] - row.lse));
    }
    result_.shares[static_cast<size_t>(p)] = share;
    depth(p) = LadderDepth(params, theta, static_cast<float>(share), facts_[static_cast<size_t>(p)],
                           d_, stored_bits_);
    if (!facts_[static_cast<size_t>(p)].opened) continue;
    for (Row& row : rows_) {
      PageScan& scan = row.scans[static_cast<size_t>(p)];
      scan.variance = ScoreVarianceAt(static_cast<float>(scan.variance), depth(p).key.bits);
    }
  }
}

void StepRun::Select() {
  const DecisionParams& params = step_.decision;
  if (UsesLadder(params.policy)) {
    SelectByScan();
    return;
  }
  const PageDepth all = params.policy == Policy::kStatic ? StaticDepth(params, d_, stored_bits_)
                                                         : FullDepth(d_, stored_bits_);
  sink_value_bits_ = all.value_bits;
  ScanAll(all.key, /*correct=*/false);
  for (Row& row : rows_) Estimate(&row);
  for (int32_t p = 0; p < num_pages(); ++p) {
    if (!visible_[static_cast<size_t>(p)]) continue;
    depth(p) = all;
    for (const Row& row : rows_) {
      result_.shares[static_cast<size_t>(p)] =
          std::max(result_.shares[static_cast<size_t>(p)],
                   std::exp(row.log_mass[static_cast<size_t>(p)] - row.lse));
    }
  }
}

void StepRun::Predict() {
  double total = 0.0;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const Row& row = rows_[i];
    ErrorTerms terms;
    for (int32_t p = 0; p < num_pages(); ++p) {
      if (!Sees(row, p)) continue;
      AddTerms(TermsOf(ErrorParts(ErrorInputs(row, p), d_), 1.0f, depth(p).value_bits), &terms);
    }
    const double error2 = RelativeErrorSquare(terms, static_cast<float>(row.norm2));
    result_.predicted[i] = std::sqrt(error2);
    total += error2;
  }
  result_.decision.predicted_error =
      rows_.empty() ? 0.0f
                    : static_cast<float>(std::sqrt(total / static_cast<double>(rows_.size())));
}

}  // namespace adaattn::internal

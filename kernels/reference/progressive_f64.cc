#include "kernels/reference/progressive_f64.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/format/hadamard.h"
#include "kernels/format/nested_code.h"
#include "kernels/policy/budget.h"
#include "kernels/policy/entropy.h"
#include "kernels/policy/error_model.h"
#include "kernels/policy/ladder.h"
#include "kernels/reference/attention_f64.h"

namespace adaattn {
namespace {

constexpr double kNoMass = -std::numeric_limits<double>::infinity();

using Page = ProgressiveHeadF64::Page;

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
  void ScanAll(KeyDepth depth, bool correct);
  void FinishMasses();
  void Estimate(Row* row) const;
  void OpenPages(float theta);
  PageErrorInputs ErrorInputs(const Row& row, int32_t page) const;
  float ChooseBudget() const;
  void Select();
  void SelectByScan();
  void Predict();
  void Attend(int32_t row);
  void Report();

  int32_t num_pages() const { return step_.num_sealed_pages; }
  const Page& page(int32_t index) const { return cache_.pages()[static_cast<size_t>(index)]; }
  PageDepth& depth(int32_t index) { return result_.depths[static_cast<size_t>(index)]; }

  const ProgressiveHeadF64& cache_;
  const ProgressiveStepF64& step_;
  const int32_t d_;
  const int32_t stored_bits_;
  std::vector<Row> rows_;
  std::vector<bool> visible_;     // by page: some row sees some of it
  std::vector<PageFacts> facts_;  // by page
  ProgressiveResultF64 result_;
};

StepRun::StepRun(const ProgressiveHeadF64& cache, const ProgressiveStepF64& step)
    : cache_(cache),
      step_(step),
      d_(cache.head().head_dim),
      stored_bits_(cache.head().layout.stored_bits),
      rows_(static_cast<size_t>(step.q_len) * step.group_size) {
  const auto pages = static_cast<size_t>(step.num_sealed_pages);
  result_.out.assign(rows_.size() * d_, 0.0);
  result_.lse.assign(rows_.size(), kNoMass);
  result_.predicted.assign(rows_.size(), 0.0);
  result_.shares.assign(pages, 0.0);
  result_.depths.assign(pages, PageDepth{});
  for (size_t row = 0; row < rows_.size(); ++row) PrepareRow(static_cast<int32_t>(row));
  FindVisiblePages();
  Select();
  Predict();
  for (size_t row = 0; row < rows_.size(); ++row) Attend(static_cast<int32_t>(row));
  Report();
}

ProgressiveResultF64 StepRun::Take() { return std::move(result_); }

double Capped(double score, double softcap) {
  return softcap > 0 ? softcap * std::tanh(score / softcap) : score;
}

void StepRun::PrepareRow(int32_t index) {
  Row& row = rows_[static_cast<size_t>(index)];
  const float* const q = step_.q + int64_t{index} * d_;
  const int64_t sealed_tokens = int64_t{num_pages()} * kPageTokens;
  row.visible = VisibleTokens(step_.q_start + index / step_.group_size,
                              sealed_tokens + step_.num_dense_tokens, step_.window);
  for (const ProgressiveHeadF64::HeldBasis& basis : cache_.bases()) {
    std::vector<double> rotated(static_cast<size_t>(d_), 0.0);
    double mean_score = 0.0;
    for (int32_t c = 0; c < d_; ++c) {
      mean_score += q[c] * basis.mean[static_cast<size_t>(c)];
      for (int32_t r = 0; r < d_; ++r) {
        rotated[static_cast<size_t>(r)] += q[c] * basis.rotation[static_cast<size_t>(c) * d_ + r];
      }
    }
    row.query.push_back(std::move(rotated));
    row.mean_score.push_back(mean_score);
  }
  row.dense_begin = std::max(int64_t{0}, row.visible.begin - sealed_tokens);
  for (int64_t t = row.dense_begin; t < row.visible.end - sealed_tokens; ++t) {
    double dot = 0.0;
    for (int32_t c = 0; c < d_; ++c) dot += double{q[c]} * step_.dense_keys[t * d_ + c];
    row.dense_scores.push_back(Capped(step_.softmax_scale * dot, step_.softcap));
  }
}

bool StepRun::Sees(const Row& row, int32_t page) const {
  const int64_t first = int64_t{page} * kPageTokens;
  return std::max(first, row.visible.begin) < std::min(first + kPageTokens, row.visible.end);
}

void StepRun::FindVisiblePages() {
  visible_.assign(static_cast<size_t>(num_pages()), false);
  facts_.assign(static_cast<size_t>(num_pages()), PageFacts{});
  for (int32_t p = 0; p < num_pages(); ++p) {
    facts_[static_cast<size_t>(p)].sink = p == 0;
    const int64_t first = int64_t{p} * kPageTokens;
    for (const Row& row : rows_) {
      if (!Sees(row, p)) continue;
      visible_[static_cast<size_t>(p)] = true;
      if (row.visible.begin > first || row.visible.end < first + kPageTokens) {
        facts_[static_cast<size_t>(p)].cut = true;
      }
    }
  }
}

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
    scores.push_back(Capped(step_.softmax_scale * dot, step_.softcap));
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

// o before attending: every page's share of its mean, the dense tokens as they are.
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
    for (int32_t c = 0; c < d_; ++c) {
      dense[static_cast<size_t>(c)] += share * page(p).values[0][static_cast<size_t>(c)];
    }
  }
  row->norm2 = 0.0;
  for (const double value : dense) row->norm2 += value * value;
  row->estimate = std::move(dense);
}

PageErrorInputs StepRun::ErrorInputs(const Row& row, int32_t index) const {
  const PageScan& scan = row.scans[static_cast<size_t>(index)];
  double distance2 = 0.0;
  for (size_t c = 0; c < row.estimate.size(); ++c) {
    const double off = page(index).values[0][c] - row.estimate[c];
    distance2 += off * off;
  }
  PageErrorInputs inputs;
  inputs.share = static_cast<float>(std::exp(row.log_mass[static_cast<size_t>(index)] - row.lse));
  inputs.concentration = static_cast<float>(scan.concentration);
  inputs.score_variance = static_cast<float>(scan.variance);
  inputs.mean_distance2 = static_cast<float>(distance2);
  inputs.spread = page(index).summary.spread;
  inputs.scale_rms = page(index).summary.scale_rms;
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
      AddToBudget(step_.decision, ErrorInputs(row, p), static_cast<float>(weight), d_, stored_bits_,
                  &budget);
    }
    budgets.push_back(budget);
  }
  return ChooseTheta(step_.decision, budgets, d_, stored_bits_).theta;
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
  float theta = params.theta;
  ScanAll(KeyDepth{kScanBits, static_cast<uint8_t>(chunks)}, /*correct=*/true);
  if (coarse > 0) OpenPages(theta);
  for (Row& row : rows_) Estimate(&row);
  if (params.policy == Policy::kBudget) theta = ChooseBudget();
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
  if (params.policy == Policy::kThreshold || params.policy == Policy::kBudget) {
    SelectByScan();
    return;
  }
  const PageDepth all = params.policy == Policy::kStatic ? StaticDepth(params, d_, stored_bits_)
                                                         : FullDepth(d_, stored_bits_);
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
    double error2 = 0.0;
    for (int32_t p = 0; p < num_pages(); ++p) {
      if (Sees(row, p)) error2 += PredictedPageError(ErrorInputs(row, p), depth(p).value_bits, d_);
    }
    if (row.norm2 > 0) error2 /= row.norm2;
    if (!(row.norm2 > 0)) error2 = 0.0;
    result_.predicted[i] = std::sqrt(error2);
    total += error2;
  }
  result_.decision.predicted_error =
      rows_.empty() ? 0.0f
                    : static_cast<float>(std::sqrt(total / static_cast<double>(rows_.size())));
}

void StepRun::Attend(int32_t index) {
  const Row& row = rows_[static_cast<size_t>(index)];
  if (row.visible.begin >= row.visible.end) return;
  std::vector<double> logs = row.dense_scores;
  std::vector<std::vector<double>> scores(static_cast<size_t>(num_pages()));
  for (int32_t p = 0; p < num_pages(); ++p) {
    if (!Sees(row, p)) continue;
    std::vector<double>& mine = scores[static_cast<size_t>(p)];
    const PageDepth at = depth(p);
    mine = at.value_bits == 0 ? std::vector<double>{row.log_mass[static_cast<size_t>(p)]}
                              : Scores(row, p, at.key.bits, ChunkedRank(d_, at.key.chunks));
    logs.insert(logs.end(), mine.begin(), mine.end());
  }
  const double lse = LogSumExp(logs);
  double* const out = result_.out.data() + int64_t{index} * d_;
  for (int32_t p = 0; p < num_pages(); ++p) {
    const std::vector<double>& mine = scores[static_cast<size_t>(p)];
    const int64_t first = int64_t{p} * kPageTokens;
    const int64_t skip = std::max(first, row.visible.begin) - first;
    for (size_t i = 0; i < mine.size(); ++i) {
      const double weight = std::exp(mine[i] - lse);
      const float* const value =
          page(p).values[depth(p).value_bits / 2].data() + (skip + static_cast<int64_t>(i)) * d_;
      for (int32_t c = 0; c < d_; ++c) out[c] += weight * value[c];
    }
  }
  RotateHadamard(out, d_);
  for (size_t i = 0; i < row.dense_scores.size(); ++i) {
    const double weight = std::exp(row.dense_scores[i] - lse);
    const float* const value =
        step_.dense_values + (row.dense_begin + static_cast<int64_t>(i)) * d_;
    for (int32_t c = 0; c < d_; ++c) out[c] += weight * value[c];
  }
  result_.lse[static_cast<size_t>(index)] = lse;
}

void StepRun::Report() {
  HeadDecision& decision = result_.decision;
  size_t last_basis = cache_.bases().size();
  for (int32_t p = 0; p < num_pages(); ++p) {
    if (!visible_[static_cast<size_t>(p)]) continue;
    const PageDepth at = depth(p);
    ++decision.key_pages[KeyDepthIndex(at.key.bits, at.key.chunks)];
    ++decision.value_pages[at.value_bits / 2];
    if (page(p).basis != last_basis) decision.basis_bytes += BasisReadBytes(d_);
    last_basis = page(p).basis;
  }
  if (rows_.empty()) return;
  const int64_t sealed_tokens = int64_t{num_pages()} * kPageTokens;
  const int64_t dense_end = rows_.back().visible.end - sealed_tokens;
  decision.dense_tokens =
      static_cast<int32_t>(std::max(int64_t{0}, dense_end - rows_.front().dense_begin));
  double entropy = 0.0;
  for (const Row& row : rows_) {
    std::vector<double> items = row.log_mass;
    items.insert(items.end(), row.dense_scores.begin(), row.dense_scores.end());
    entropy += Entropy(items);
  }
  decision.entropy = static_cast<float>(entropy / static_cast<double>(rows_.size()));
  const ReadBytes bytes = RecountBytes(decision, d_, DType::kBf16);
  decision.key_bytes = bytes.key;
  decision.value_bytes = bytes.value;
}

}  // namespace

void ProgressiveHeadF64::AddPage(const BasisView& basis, const std::byte* page) {
  const int32_t d = head_.head_dim;
  const auto elements = static_cast<size_t>(kPageTokens) * d;
  size_t held = 0;
  while (held < bases_.size() && bases_[held].identity != basis.mean) ++held;
  if (held == bases_.size()) {
    HeldBasis copy;
    copy.identity = basis.mean;
    copy.mean.assign(basis.mean, basis.mean + d);
    for (int64_t i = 0; i < int64_t{d} * d; ++i) {
      copy.rotation.push_back(ToFloat(basis.query_basis[i]));
    }
    bases_.push_back(std::move(copy));
  }
  Page decoded;
  decoded.basis = held;
  for (int32_t bits = 4; bits <= head_.layout.stored_bits; bits += 2) {
    std::vector<float>& keys = decoded.keys[bits / 2 - 2];
    keys.resize(elements);
    DecodeRotatedKeys(head_, page, bits, head_.layout.num_chunks, keys.data());
  }
  for (int32_t bits = 0; bits <= head_.layout.stored_bits; bits += 2) {
    decoded.values[bits / 2].resize(elements);
    DecodeRotatedValues(head_, page, bits, decoded.values[bits / 2].data());
  }
  const uint8_t* const scales = KeyScales(head_, page);
  decoded.key_scales.assign(scales, scales + d);
  decoded.summary = ReadValueSummary(head_, page);
  pages_.push_back(std::move(decoded));
}

ProgressiveResultF64 ProgressiveHeadF64::Run(const ProgressiveStepF64& step) const {
  return StepRun(*this, step).Take();
}

}  // namespace adaattn

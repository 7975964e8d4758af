#include "loadtest/estimator_report.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "absl/time/clock.h"
#include "kernels/format/basis.h"
#include "kernels/format/float_types.h"
#include "kernels/policy/entropy.h"

namespace adaattn {
namespace {

constexpr uint64_t kSeedStep = 1000;  // between the seeds of runs: above the cases of any

// Cost, bias and spread of one estimator over many cases.
class Tally {
 public:
  // `low` and `high`: its interval.
  void Add(double exact, double estimate, double low, double high) {
    const double off = estimate - exact, slack = 1e-6 * exact;
    ++count_;
    exact_ += exact;
    sum_ += off;
    squares_ += off * off;
    covered_ += low <= exact + slack && exact <= high + slack ? 1 : 0;
  }
  // Of each case of a run.
  void AddTime(double microseconds, int64_t cases) {
    microseconds_ += microseconds * static_cast<double>(cases);
  }
  void Print(const char* name) const {
    const double mean = sum_ / count_;
    std::printf(
        "    %-34s %9.2f us  exact %8.3f  bias %+8.4f  spread %7.4f  in its interval %.2f\n", name,
        microseconds_ / count_, exact_ / count_, mean,
        std::sqrt(std::max(0.0, squares_ / count_ - mean * mean)), covered_ / count_);
  }

 private:
  double count_ = 0, microseconds_ = 0, exact_ = 0, sum_ = 0, squares_ = 0, covered_ = 0;
};

std::vector<float> Floats(const std::vector<uint16_t>& bits, int64_t begin, int64_t count) {
  std::vector<float> values;
  for (int64_t i = begin; i < begin + count; ++i) values.push_back(ToFloat(Fp16{bits[i]}));
  return values;
}

// Scores of the first q head of every kv head, over the tokens that each row sees.
ScoreCases ScoresOf(const Trace& trace) {
  ScoreCases cases;
  cases.stride = trace.num_tokens;
  cases.page_stride = (trace.num_tokens + kPageTokens - 1) / kPageTokens;
  const int64_t d = trace.shape.head_dim;
  for (int64_t head = 0; head < trace.shape.num_kv_heads; ++head) {
    const std::vector<float> keys =
        Floats(trace.k, head * trace.num_tokens * d, trace.num_tokens * d);
    for (int32_t row = 0; row < trace.num_rows; ++row) {
      const int64_t q_row = head * trace.shape.group_size() * trace.num_rows + row;
      const std::vector<float> q = Floats(trace.q, q_row * d, d);
      cases.tokens.push_back(trace.positions[row] + 1);
      for (int64_t t = 0; t < cases.stride; ++t) {
        float dot = 0;
        for (int64_t c = 0; c < d; ++c) dot += q[c] * keys[t * d + c];
        cases.scores.push_back(dot * static_cast<float>(trace.softmax_scale));
      }
      const absl::Span<const float> seen = cases.RowScores(cases.count() - 1);
      for (int64_t page = 0; page < cases.page_stride; ++page) {
        const int64_t begin = std::min<int64_t>(page * kPageTokens, cases.tokens.back());
        const absl::Span<const float> tokens = seen.subspan(begin, kPageTokens);
        cases.page_lse.push_back(LogSumExp(std::vector<double>(tokens.begin(), tokens.end())));
      }
    }
  }
  return cases;
}

absl::Status PrintEntropies(const Trace& trace, EstimatorRunner* runner) {
  const ScoreCases cases = ScoresOf(trace);
  std::vector<double> truth;
  truth.reserve(cases.tokens.size());
  for (int32_t i = 0; i < cases.count(); ++i) {
    truth.push_back(ExactAttentionEntropy(cases.RowScores(i)));
  }
  const auto print = [&](const char* name, EntropyMethod method, int32_t draws) {
    const auto run = runner->Entropies(cases, method, draws, 1);
    if (!run.ok()) return run.status();
    Tally tally;
    tally.AddTime(run->microseconds, cases.count());
    for (int32_t i = 0; i < cases.count(); ++i) {
      const EntropyEstimate& estimate = run->estimates[i];
      tally.Add(truth[i], estimate.entropy, estimate.low, estimate.high);
    }
    tally.Print(name);
    return absl::OkStatus();
  };
  std::printf("  entropy of a row, nats (%d rows)\n", cases.count());
  absl::Status status = print("exact, all scores", EntropyMethod::kExact, 0);
  status.Update(print("proxy, page shares", EntropyMethod::kProxy, 0));
  status.Update(print("sampled, 4 pages", EntropyMethod::kSampled, 4));
  status.Update(print("sampled, 16 pages", EntropyMethod::kSampled, 16));
  return status;
}

// What is exact about one matrix.
struct ExactRank {
  double effective = 0, stable = 0;
};

std::vector<ExactRank> ExactRanks(const MatrixCases& cases) {
  std::vector<ExactRank> ranks;
  for (int32_t i = 0; i < cases.count(); ++i) {
    const std::vector<float> rows = CentredRows(cases, i);
    const std::vector<double> energies = ExactSpectrum({rows, cases.dim});
    const double total = std::accumulate(energies.begin(), energies.end(), 0.0);
    ranks.push_back({RankOfSpectrum(energies), energies[0] > 0 ? total / energies[0] : 0});
  }
  return ranks;
}

// Every estimator on the cases, `runs` times with other seeds.
absl::Status PrintRankEstimators(const MatrixCases& cases, int32_t runs, EstimatorRunner* runner) {
  const std::vector<ExactRank> exact = ExactRanks(cases);
  RankOptions svd, probes, power;
  svd.method = RankMethod::kRandomizedSvd;
  svd.range = cases.dim / 4;
  svd.power_steps = 1;
  probes.method = RankMethod::kHutchinson;
  probes.probes = probes.steps = 16;
  power.method = RankMethod::kPower;
  power.iterations = 12;
  const auto print = [&](const char* name, const RankOptions& options) {
    Tally tally;
    for (int32_t i = 0; i < runs; ++i) {
      const auto run = runner->Ranks(cases, options, 1 + kSeedStep * static_cast<uint64_t>(i));
      if (!run.ok()) return run.status();
      tally.AddTime(run->microseconds, cases.count());
      for (int32_t j = 0; j < cases.count(); ++j) {
        const bool stable = options.method == RankMethod::kPower;
        const RankEstimate& estimate = run->estimates[j];
        tally.Add(stable ? exact[j].stable : exact[j].effective, estimate.rank, estimate.low,
                  estimate.high);
      }
    }
    tally.Print(name);
    return absl::OkStatus();
  };
  absl::Status status = print("spectrum, eigenvalues of X^T X", RankOptions());
  status.Update(print("randomized SVD, d/4, 1 power step", svd));
  status.Update(print("Hutchinson, 16 probes, 16 steps", probes));
  status.Update(print("power iteration, 12 (stable rank)", power));
  return status;
}

// A basis fitted on the first tokens stores its channels' energies: no further work at seal time.
void PrintBasisEnergies(const Trace& trace, const MatrixCases& heads) {
  constexpr int64_t kFitTokens = 1024;
  const int32_t dim = heads.dim;
  const std::vector<ExactRank> exact = ExactRanks(heads);
  Tally tally;
  for (int64_t head = 0; head < heads.count(); ++head) {
    const std::vector<float> rows = Floats(trace.k, head * trace.num_tokens * dim,
                                           std::min(kFitTokens, trace.num_tokens) * dim);
    const auto basis = FitBasis(dim, rows, {});
    if (!basis.ok()) continue;
    const std::vector<double> energy(basis->energy.begin(), basis->energy.end());
    const absl::Time start = absl::Now();
    const double rank = RankOfSpectrum(energy);
    tally.AddTime(absl::ToDoubleMicroseconds(absl::Now() - start), 1);
    tally.Add(exact[head].effective, rank, -HUGE_VAL, HUGE_VAL);
  }
  tally.Print("energies of the basis, on the host");
}

// The first `rows` tokens of each head.
MatrixCases Heads(const Trace& trace, const std::vector<uint16_t>& tensor, int64_t rows) {
  MatrixCases cases{trace.shape.head_dim, std::min(rows, trace.num_tokens), {}};
  for (int64_t head = 0; head < trace.shape.num_kv_heads; ++head) {
    const auto begin = tensor.begin() + head * trace.num_tokens * cases.dim;
    cases.values.insert(cases.values.end(), begin, begin + cases.rows * cases.dim);
  }
  return cases;
}

// Every eighth page of each head.
MatrixCases Pages(const Trace& trace, const std::vector<uint16_t>& tensor) {
  MatrixCases cases{trace.shape.head_dim, kPageTokens, {}};
  for (int64_t head = 0; head < trace.shape.num_kv_heads; ++head) {
    for (int64_t page = 0; page < trace.num_tokens / kPageTokens; page += 8) {
      const auto begin =
          tensor.begin() + (head * trace.num_tokens + page * kPageTokens) * cases.dim;
      cases.values.insert(cases.values.end(), begin, begin + cases.rows * cases.dim);
    }
  }
  return cases;
}

}  // namespace

absl::Status PrintEstimators(const Trace& trace, EstimatorRunner* runner) {
  absl::Status status = PrintEntropies(trace, runner);
  constexpr int64_t kTokens = 4096;
  const MatrixCases keys = Heads(trace, trace.k, kTokens);
  std::printf("  effective rank of a head's keys (%d heads, first %d tokens, mean removed)\n",
              keys.count(), static_cast<int>(keys.rows));
  status.Update(PrintRankEstimators(keys, /*runs=*/4, runner));
  PrintBasisEnergies(trace, keys);
  const MatrixCases key_pages = Pages(trace, trace.k);
  std::printf("  effective rank of a page's keys (%d pages)\n", key_pages.count());
  status.Update(PrintRankEstimators(key_pages, /*runs=*/1, runner));
  std::printf("  effective rank of a page's values\n");
  status.Update(PrintRankEstimators(Pages(trace, trace.v), /*runs=*/1, runner));
  return status;
}

}  // namespace adaattn

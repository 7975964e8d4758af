#include "kernels/policy/entropy_estimators.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "kernels/format/page_layout.h"
#include "kernels/policy/entropy.h"

namespace adaattn {
namespace {

constexpr double kNormalQuantile = 1.959964;  // of .975

absl::Span<const float> PageScores(absl::Span<const float> scores, size_t page) {
  return scores.subspan(page * kPageTokens, kPageTokens);
}

}  // namespace

double ExactAttentionEntropy(absl::Span<const float> scores) {
  return Entropy(std::vector<double>(scores.begin(), scores.end()));
}

double ProxyAttentionEntropy(absl::Span<const double> page_lse) { return Entropy(page_lse); }

EntropyEstimate SampledAttentionEntropy(absl::Span<const float> scores,
                                        absl::Span<const double> page_lse, int32_t num_draws,
                                        uint64_t seed) {
  EntropyEstimate estimate;
  const double total = LogSumExp(page_lse);
  if (!std::isfinite(total)) return estimate;
  std::vector<double> shares;
  shares.reserve(page_lse.size());
  for (const double lse : page_lse) shares.push_back(std::exp(lse - total));
  const double between = Entropy(page_lse);
  std::mt19937_64 random(seed);
  std::discrete_distribution<size_t> draw(shares.begin(), shares.end());
  std::vector<double> inside(page_lse.size(), -1);  // of the pages drawn so far
  double sum = 0, squares = 0;
  for (int32_t i = 0; i < num_draws; ++i) {
    const size_t page = draw(random);
    if (inside[page] < 0) {
      inside[page] = ExactAttentionEntropy(PageScores(scores, page));
      ++estimate.pages_read;
    }
    sum += inside[page];
    squares += inside[page] * inside[page];
  }
  const double mean = sum / num_draws;
  estimate.entropy = between + mean;
  const double most = std::log(static_cast<double>(kPageTokens));
  double half = most;  // one draw says nothing of its spread
  if (num_draws > 1) {
    const double variance = std::max(0.0, squares - sum * mean) / (num_draws - 1);
    half = kNormalQuantile * std::sqrt(variance / num_draws);
  }
  estimate.low = between + std::max(0.0, mean - half);
  estimate.high = between + std::min(most, mean + half);
  return estimate;
}

}  // namespace adaattn

#include "kernels/policy/entropy_estimators.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/format/page_layout.h"
#include "kernels/policy/entropy.h"

namespace adaattn {
namespace {

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
  double sum = 0;
  for (const double share : shares) sum += share;
  std::vector<double> known(page_lse.size(), -1);  // inside the pages drawn so far
  std::vector<double> inside;
  for (int32_t i = 0; i < num_draws; ++i) {
    const auto page = static_cast<size_t>(
        DrawPage(shares.data(), static_cast<int32_t>(shares.size()), sum, seed, i));
    if (known[page] < 0) {
      known[page] = ExactAttentionEntropy(PageScores(scores, page));
      ++estimate.pages_read;
    }
    inside.push_back(known[page]);
  }
  const int32_t pages_read = estimate.pages_read;
  estimate = EntropyOfDraws(Entropy(page_lse), inside.data(), num_draws);
  estimate.pages_read = pages_read;
  return estimate;
}

EntropyEstimate EstimateEntropy(absl::Span<const float> scores, absl::Span<const double> page_lse,
                                EntropyMethod method, int32_t num_draws, uint64_t seed) {
  if (method == EntropyMethod::kSampled) {
    return SampledAttentionEntropy(scores, page_lse, num_draws, seed);
  }
  const bool exact = method == EntropyMethod::kExact;
  EntropyEstimate estimate;
  estimate.entropy = exact ? ExactAttentionEntropy(scores) : ProxyAttentionEntropy(page_lse);
  estimate.low = estimate.high = estimate.entropy;
  estimate.pages_read = exact ? static_cast<int32_t>(page_lse.size()) : 0;
  if (!exact && LogSumExp(page_lse) > -HUGE_VAL) estimate.high += kMaxPageEntropy;
  return estimate;
}

}  // namespace adaattn

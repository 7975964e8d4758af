#ifndef ADAATTN_KERNELS_POLICY_THETA_H_
#define ADAATTN_KERNELS_POLICY_THETA_H_

// Theta of one (sequence, kv head) from how its softmax mass lies, for the policies that need no
// more than the page masses of the scan. (The budget needs values too: budget.h.)
//
//   threshold  theta as the caller says
//   entropy    theta * exp(-H), H the entropy in nats of the shares: exp(H) is the number of equal
//              pages that would look alike (its perplexity), so theta counts in shares of one of
//              them. A context repeated twice has half the shares and half the theta: decisions do
//              not depend on its length, as those of a fixed theta do.
//   learned    exp2(weights . features), fitted offline (python -m adaattn.fit_policy)
//
// The shares of one row and q head: one item per sealed page that the row sees, the dense tokens
// together as one more. A kv head's figures are means over its rows and q heads. Pure functions,
// host and device alike; sums of MassSums may be made in any order and joined by AddMasses.

#include <cmath>
#include <cstdint>

#include "kernels/host_device.h"
#include "kernels/policy/decision.h"

namespace adaattn {

// The range of theta that entropy and learned policies give: the budget's grid.
inline constexpr float kMinTheta = 1.0f / 65536;
inline constexpr float kMaxTheta = 0.25f;

// Sums over the items of one or many rows and q heads.
struct MassSums {
  float entropy = 0;       // nats
  float sealed = 0;        // share of sealed pages
  float square = 0;        // of the shares of sealed pages
  float token_square = 0;  // share^2 * concentration: of the shares of their tokens, about
  float variance = 0;      // share * var_s of the scan, at most kMaxScoreVariance
};

// One item's part of the entropy, from its share of the mass.
ADAATTN_HD float ShareEntropy(float share) { return share > 0.0f ? -share * logf(share) : 0.0f; }

// A sealed page as one row of one q head sees it.
ADAATTN_HD void AddPageMass(float share, float concentration, float score_variance,
                            MassSums* sums) {
  sums->entropy += ShareEntropy(share);
  sums->sealed += share;
  sums->square += share * share;
  sums->token_square += share * share * concentration;
  sums->variance += share * (score_variance < 4.0f ? score_variance : 4.0f);
}

// All dense tokens that the row sees.
ADAATTN_HD void AddDenseMass(float share, MassSums* sums) { sums->entropy += ShareEntropy(share); }

ADAATTN_HD constexpr void AddMasses(const MassSums& part, MassSums* sums) {
  sums->entropy += part.entropy;
  sums->sealed += part.sealed;
  sums->square += part.square;
  sums->token_square += part.token_square;
  sums->variance += part.variance;
}

// What the learned policy sees. Logarithms are of base 2 and floored at 2^-20; the names stand in
// policy files.
//   one            1
//   log_target     log2 of target_relative_error
//   entropy        nats
//   log_sealed     log2 of the share of the sealed pages
//   log_square     log2 of the sum of squares of the sealed pages' shares
//   log_token_square  likewise of their tokens
//   log_variance   log2 of the mean var_s, weighted by share
//   log_pages      log2 of the number of sealed pages that some row sees
inline constexpr const char* kThetaFeatureNames[kNumThetaFeatures] = {
    "one",        "log_target",       "entropy",      "log_sealed",
    "log_square", "log_token_square", "log_variance", "log_pages"};

ADAATTN_HD float FloorLog2(float value) { return value > 0x1p-20f ? log2f(value) : -20.0f; }

//   columns  rows times q heads, >= 1
//   out      [kNumThetaFeatures]
ADAATTN_HD void ThetaFeatures(const MassSums& sums, int32_t columns, int32_t num_pages,
                              float target_relative_error, float* out) {
  const float each = 1.0f / static_cast<float>(columns);
  out[0] = 1.0f;
  out[1] = FloorLog2(target_relative_error);
  out[2] = sums.entropy * each;
  out[3] = FloorLog2(sums.sealed * each);
  out[4] = FloorLog2(sums.square * each);
  out[5] = FloorLog2(sums.token_square * each);
  out[6] = FloorLog2(sums.variance * each);
  out[7] = FloorLog2(static_cast<float>(num_pages));
}

// NaN gives kMinTheta: the deepest read.
ADAATTN_HD constexpr float ClampTheta(float theta) {
  return theta > kMaxTheta ? kMaxTheta : theta > kMinTheta ? theta : kMinTheta;
}

// Theta of a head for kThreshold, kEntropy and kLearned.
ADAATTN_HD float ThetaFromMasses(const DecisionParams& params, const MassSums& sums,
                                 int32_t columns, int32_t num_pages) {
  if (params.policy == Policy::kEntropy) {
    return ClampTheta(params.theta * expf(-sums.entropy / static_cast<float>(columns)));
  }
  if (params.policy != Policy::kLearned) return params.theta;
  float features[kNumThetaFeatures];
  ThetaFeatures(sums, columns, num_pages, params.target_relative_error, features);
  float log_theta = 0;
  for (int32_t i = 0; i < kNumThetaFeatures; ++i) {
    log_theta += params.theta_model.weights[i] * features[i];
  }
  return ClampTheta(exp2f(log_theta));
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_THETA_H_

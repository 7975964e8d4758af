#include "server/model_profile.h"

namespace adaattn {

void ProfileAudits::Add(int32_t layer, absl::Span<const float> actual,
                        absl::Span<const float> predicted) {
  MutexLock lock(&mutex_);
  PredictionAudits* const heads = heads_.data() + int64_t{layer} * num_kv_heads_;
  for (int32_t head = 0; head < num_kv_heads_; ++head) {
    heads[head].Add(actual[head], predicted[head]);
  }
}

std::vector<PredictionAudits> ProfileAudits::Heads() const {
  MutexLock lock(&mutex_);
  return heads_;
}

int64_t ModelProfile::bytes() const {
  const size_t floats = basis_mean.size() + basis.size() + key_scales.size() + value_scales.size() +
                        error_factors.size();
  const size_t heads = static_cast<size_t>(num_layers) * static_cast<size_t>(shape.num_kv_heads);
  return static_cast<int64_t>(floats * sizeof(float) +
                              (audits == nullptr ? 0 : heads * sizeof(PredictionAudits)));
}

absl::Span<const float> ModelProfile::LayerErrorFactors(int32_t layer) const {
  if (error_factors.empty()) return {};
  const auto heads = static_cast<size_t>(shape.num_kv_heads);
  return absl::MakeConstSpan(error_factors).subspan(static_cast<size_t>(layer) * heads, heads);
}

}  // namespace adaattn

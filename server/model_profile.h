#ifndef ADAATTN_SERVER_MODEL_PROFILE_H_
#define ADAATTN_SERVER_MODEL_PROFILE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "kernels/mutex.h"
#include "kernels/policy/error_factor.h"
#include "kernels/policy/theta.h"
#include "kernels/shape.h"

namespace adaattn {

// What audits say of the predictions that a profile's sessions got. Threads: any.
class ProfileAudits {
 public:
  ProfileAudits(int32_t num_layers, int32_t num_kv_heads)
      : num_kv_heads_(num_kv_heads),
        heads_(static_cast<size_t>(num_layers) * static_cast<size_t>(num_kv_heads)) {}

  // One audited step of a layer: relative errors [num_kv_heads].
  void Add(int32_t layer, absl::Span<const float> actual, absl::Span<const float> predicted);
  // [num_layers, num_kv_heads].
  std::vector<PredictionAudits> Heads() const;

 private:
  const int32_t num_kv_heads_;
  mutable Mutex mutex_;
  std::vector<PredictionAudits> heads_ ABSL_GUARDED_BY(mutex_);
};

// What was found out about a model beforehand. Immutable once shared, but for its audits.
struct ModelProfile {
  std::string name;
  AttentionShape shape;
  int32_t num_layers = 0;
  std::vector<float> basis_mean;    // [num_layers, num_kv_heads, head_dim]; empty = none
  std::vector<float> basis;         // [num_layers, num_kv_heads, head_dim, head_dim]; empty = none
  std::vector<float> key_scales;    // [num_layers, num_kv_heads]; empty = none
  std::vector<float> value_scales;  // likewise
  std::optional<ThetaModel> theta_model;
  std::vector<float> error_factors;       // of predictions, [num_layers, num_kv_heads]; empty = 1
  std::shared_ptr<ProfileAudits> audits;  // of its sessions; null: none are kept

  // Of all arrays, and of the audits.
  int64_t bytes() const;
  // [num_kv_heads] of one layer, or empty.
  absl::Span<const float> LayerErrorFactors(int32_t layer) const;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_MODEL_PROFILE_H_

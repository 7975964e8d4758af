#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/policy_file.h"
#include "server/validation.h"

namespace adaattn {

absl::Status NoProfile(absl::string_view field, absl::string_view name) {
  return absl::NotFoundError(absl::StrCat(field, ": \"", name, "\" was not uploaded"));
}

namespace {

// What the profile that `request` extends has, into `profile`.
absl::Status TakeFormer(const v1::UploadProfileRequest& request, const Caller& caller,
                        const ProfileStore& profiles, ModelProfile* profile) {
  if (request.extends().empty()) return absl::OkStatus();
  const auto former = profiles.Get(caller.tenant, request.extends());
  if (former == nullptr) return NoProfile("extends", request.extends());
  if (!(former->shape == profile->shape) || former->num_layers != profile->num_layers) {
    return InvalidField("extends", request.extends(),
                        absl::StrCat("of this model's shape; that profile has ", former->num_layers,
                                     " layers of ", former->shape.DebugString()));
  }
  *profile = *former;
  profile->name = request.name();
  return absl::OkStatus();
}

absl::Status TakeBases(const v1::UploadProfileRequest& request, ModelProfile* profile) {
  if (!request.has_basis() && !request.has_basis_mean()) return absl::OkStatus();
  const int64_t layers = profile->num_layers, heads = profile->shape.num_kv_heads;
  const int64_t dim = profile->shape.head_dim;
  const int64_t mean_shape[] = {layers, heads, dim}, basis_shape[] = {layers, heads, dim, dim};
  const v1::Tensor &mean = request.basis_mean(), &basis = request.basis();
  absl::Status status = CheckTensor("basis_mean", mean, static_cast<int64_t>(mean.data().size()),
                                    mean_shape, /*allow_fp8=*/false);
  if (status.ok()) {
    status = CheckTensor("basis", basis, static_cast<int64_t>(basis.data().size()), basis_shape,
                         /*allow_fp8=*/false);
  }
  if (!status.ok()) return status;
  auto means = TensorFloats("basis_mean", mean), bases = TensorFloats("basis", basis);
  if (!means.ok()) return means.status();
  if (!bases.ok()) return bases.status();
  profile->basis_mean = *std::move(means);
  profile->basis = *std::move(bases);
  return absl::OkStatus();
}

// One factor a layer and kv head, within [least, most], or none: `target` stays.
absl::Status TakeFactors(absl::string_view field,
                         const google::protobuf::RepeatedField<float>& from,
                         const ModelProfile& profile, float least, float most,
                         std::vector<float>* target) {
  if (from.empty()) return absl::OkStatus();
  const int64_t count = int64_t{profile.num_layers} * profile.shape.num_kv_heads;
  if (from.size() != count) {
    return InvalidField(field, absl::StrCat(from.size(), " factors"),
                        absl::StrCat("none or ", count, ", one a layer and kv head"));
  }
  for (const float factor : from) {
    if (!std::isfinite(factor) || factor <= 0) {
      return InvalidField(field, absl::StrCat(factor), "finite and above 0");
    }
    if (factor < least || factor > most) {
      return InvalidField(field, absl::StrCat(factor), absl::StrCat("from ", least, " to ", most));
    }
  }
  target->assign(from.begin(), from.end());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<const ModelProfile>> ValidateProfile(
    const v1::UploadProfileRequest& request, const Caller& caller, const ProfileStore& profiles,
    const ValidationContext& context) {
  if (!IsValidRoutingKey(request.name())) {
    return InvalidField("name", absl::StrCat("\"", request.name(), "\""),
                        "1 to 64 characters of [A-Za-z0-9._-]");
  }
  absl::Status status = CheckModel(request.model(), "model", context);
  if (!status.ok()) return status;
  const v1::ModelShape& model = request.model();
  auto profile = std::make_shared<ModelProfile>();
  profile->name = request.name();
  profile->shape = {model.num_q_heads(), model.num_kv_heads(), model.head_dim()};
  profile->num_layers = model.num_layers();
  constexpr float kAny = std::numeric_limits<float>::max();
  status = TakeFormer(request, caller, profiles, profile.get());
  if (status.ok()) status = TakeBases(request, profile.get());
  if (status.ok()) {
    status =
        TakeFactors("key_scales", request.key_scales(), *profile, 0, kAny, &profile->key_scales);
  }
  if (status.ok()) {
    status = TakeFactors("value_scales", request.value_scales(), *profile, 0, kAny,
                         &profile->value_scales);
  }
  if (status.ok()) {
    status = TakeFactors("error_factors", request.error_factors(), *profile, 1 / kMostErrorFactor,
                         kMostErrorFactor, &profile->error_factors);
  }
  if (!status.ok()) return status;
  profile->audits = std::make_shared<ProfileAudits>(model.num_layers(), model.num_kv_heads());
  if (!request.policy_json().empty()) {
    absl::StatusOr<ThetaModel> theta_model = ParsePolicyFile(request.policy_json());
    if (!theta_model.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("policy_json: ", theta_model.status().message()));
    }
    profile->theta_model = *theta_model;
  }
  return profile;
}

}  // namespace adaattn

#include "server/policy_file.h"

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/policy/theta.h"

namespace adaattn {
namespace {

constexpr double kMaxWeight = 1e3;

absl::Status Wrong(absl::string_view key, absl::string_view holds, absl::string_view allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat("policy file: ", key, ": ", holds, " is not allowed; it must be ", allowed));
}

// At most some of it: a message is no place for a whole file.
std::string Shown(const nlohmann::json& value) { return value.dump().substr(0, 80); }

absl::Status CheckKey(const nlohmann::json& file, const char* key, const nlohmann::json& expected) {
  const auto found = file.find(key);
  if (found == file.end()) return Wrong(key, "nothing", expected.dump());
  if (*found != expected) return Wrong(key, Shown(*found), expected.dump());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ThetaModel> ParsePolicyFile(absl::string_view json) {
  if (json.size() > kMaxPolicyBytes) {
    return Wrong("size", absl::StrCat(json.size(), " bytes"),
                 absl::StrCat("at most ", kMaxPolicyBytes));
  }
  const nlohmann::json file = nlohmann::json::parse(json.begin(), json.end(), nullptr,
                                                    /*allow_exceptions=*/false);
  if (!file.is_object()) return Wrong("content", "no JSON object", "one");
  nlohmann::json features = nlohmann::json::array();
  for (const char* name : kThetaFeatureNames) features.push_back(name);
  for (const absl::Status& status :
       {CheckKey(file, "format", "adaattn-policy"), CheckKey(file, "version", kPolicyFileVersion),
        CheckKey(file, "features", features)}) {
    if (!status.ok()) return status;
  }
  const auto weights = file.find("weights");
  const std::string allowed =
      absl::StrCat(kNumThetaFeatures, " finite numbers of at most ", kMaxWeight, ", one a feature");
  if (weights == file.end()) return Wrong("weights", "nothing", allowed);
  if (!weights->is_array() || weights->size() != kNumThetaFeatures) {
    return Wrong("weights", Shown(*weights), allowed);
  }
  ThetaModel model;
  for (int32_t i = 0; i < kNumThetaFeatures; ++i) {
    const nlohmann::json& weight = (*weights)[static_cast<size_t>(i)];
    // A number too large for a double is read as infinity.
    if (!weight.is_number() || !(std::abs(weight.get<double>()) <= kMaxWeight)) {
      return Wrong(absl::StrCat("weights[", i, "]"), Shown(weight), allowed);
    }
    model.weights[i] = weight.get<float>();
  }
  return model;
}

absl::StatusOr<ThetaModel> LoadPolicyFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf())) {
    return absl::NotFoundError(absl::StrCat("policy file: cannot read \"", path, "\""));
  }
  absl::StatusOr<ThetaModel> model = ParsePolicyFile(text.str());
  if (model.ok()) return model;
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", model.status().message()));
}

}  // namespace adaattn

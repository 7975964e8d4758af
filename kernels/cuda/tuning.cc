#include "kernels/cuda/tuning.h"

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

using Json = nlohmann::json;

absl::Status Wrong(absl::string_view field, const Json& value, absl::string_view expected) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  constexpr size_t kMost = 60;
  if (text.size() > kMost) text = absl::StrCat(text.substr(0, kMost), "...");
  return absl::InvalidArgumentError(
      absl::StrCat("tuning: ", field, " is ", text, "; must be ", expected));
}

// Reads one JSON object field by field and refuses what is left over.
class Fields {
 public:
  Fields(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) status_ = Wrong(where_, object, "an object");
  }

  // The named field, or null and an error where it is missing.
  const Json* Find(const char* name) {
    if (!status_.ok()) return nullptr;
    const auto at = object_.find(name);
    if (at == object_.end()) {
      status_ = absl::InvalidArgumentError(absl::StrCat("tuning: ", where_, " lacks ", name));
      return nullptr;
    }
    ++num_read_;
    return &*at;
  }

  void Int(const char* name, int64_t least, int64_t most, int32_t* value) {
    const Json* found = Find(name);
    if (found == nullptr) return;
    if (!found->is_number_integer() || *found < least || *found > most) {
      status_ = Wrong(absl::StrCat(where_, ".", name), *found,
                      absl::StrCat("an integer from ", least, " to ", most));
      return;
    }
    *value = found->get<int32_t>();
  }

  // The same of a field that need not be there: files of earlier versions lack it.
  void OptionalInt(const char* name, int64_t least, int64_t most, int32_t* value) {
    if (status_.ok() && object_.contains(name)) Int(name, least, most, value);
  }

  // A length, or null for never.
  void Length(const char* name, int32_t* value) {
    const auto at = object_.find(name);
    if (status_.ok() && at != object_.end() && at->is_null()) {
      ++num_read_;
      *value = Crossover::kNeverFaster;
      return;
    }
    Int(name, 0, Crossover::kNeverFaster - 1, value);
  }

  absl::Status Finish() {
    if (status_.ok() && num_read_ != object_.size()) {
      status_ = Wrong(where_, object_, "without further fields");
    }
    return status_;
  }

  void Fail(absl::Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  std::string At(const char* name) const { return absl::StrCat(where_, ".", name); }

 private:
  const Json& object_;
  const std::string where_;
  size_t num_read_ = 0;
  absl::Status status_;
};

absl::Status ReadCrossovers(const Json& list, const std::string& where, CudaTuning* tuning) {
  if (!list.is_array()) return Wrong(where, list, "an array");
  int32_t least = 1;
  for (const Json& entry : list) {
    Crossover crossover;
    Fields fields(entry, absl::StrCat(where, "[", tuning->crossovers.size(), "]"));
    fields.Int("kv_heads", least, INT32_MAX - 1, &crossover.kv_heads);
    fields.Length("over_bf16", &crossover.over_bf16);
    fields.Length("over_fp8", &crossover.over_fp8);
    if (absl::Status status = fields.Finish(); !status.ok()) return status;
    least = crossover.kv_heads + 1;
    tuning->crossovers.push_back(crossover);
  }
  return absl::OkStatus();
}

absl::StatusOr<CudaTuning> ReadDevice(const Json& object, const std::string& where) {
  CudaTuning tuning;
  Fields fields(object, where);
  if (const Json* name = fields.Find("device"); name != nullptr) {
    if (name->is_string() && !name->get_ref<const std::string&>().empty()) {
      tuning.device = name->get<std::string>();
    } else {
      fields.Fail(Wrong(fields.At("device"), *name, "the name of a device"));
    }
  }
  fields.Int("exact_ctas_per_sm", 1, 8, &tuning.exact_ctas_per_sm);
  fields.Int("progressive_cta_percent", 25, 400, &tuning.progressive_cta_percent);
  fields.OptionalInt("conclude_pages", 0, 128, &tuning.conclude_pages);
  if (const Json* list = fields.Find("crossovers"); list != nullptr) {
    fields.Fail(ReadCrossovers(*list, fields.At("crossovers"), &tuning));
  }
  (void)fields.Find("provenance");
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  return tuning;
}

// All of it was taken with the default splits.
//   H100 SXM  Commits 411cf39 to f5005e1; only crossovers between whose sides something was timed.
//             8 kv heads: a whole step at 8k was slower than BF16's (49.0 us, 41.6), decode at 32k
//             faster than BF16 (51.4, 67.7), not than FP8 (44.4), which it passes at 128k (78.5,
//             129.7). 512: faster than BF16 at 2k (132, 202), slower than FP8 (116).
//   H200      `adaattn_bench tune` at commits 0cd50ec and 4e34bff, the 8k trace of tests/data at
//             its theta .004.
// Of the PCIe card nothing was measured: it seals at any length.
const std::vector<CudaTuning>& KnownDevices() {
  static const auto* const known = new std::vector<CudaTuning>{
      {"NVIDIA H100 80GB HBM3",
       2,
       100,
       32,
       {{8, 32768, 131072}, {512, 2048, Crossover::kNeverFaster}}},
      {"NVIDIA H100 PCIe", 2, 100, 32, {}},
      {"NVIDIA H200",
       2,
       100,
       32,
       {{8, 16384, 32768},
        {16, 8192, 16384},
        {32, 4096, 8192},
        {64, 2048, 4096},
        {128, 2048, 4096},
        {256, 1024, 4096},
        {512, 1024, 2048}}},
  };
  return *known;
}

Json LengthOrNull(int32_t length) {
  return length == Crossover::kNeverFaster ? Json() : Json(length);
}

}  // namespace

absl::StatusOr<std::vector<CudaTuning>> ParseTuning(absl::string_view text) {
  const Json root = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (root.is_discarded()) return absl::InvalidArgumentError("tuning: not JSON");
  int32_t version = 0;
  std::vector<CudaTuning> tunings;
  Fields fields(root, "file");
  fields.Int("version", kTuningVersion, kTuningVersion, &version);
  if (const Json* devices = fields.Find("devices"); devices != nullptr) {
    if (!devices->is_array()) fields.Fail(Wrong("devices", *devices, "an array"));
    for (size_t i = 0; devices->is_array() && i < devices->size(); ++i) {
      absl::StatusOr<CudaTuning> tuning =
          ReadDevice((*devices)[i], absl::StrCat("devices[", i, "]"));
      if (!tuning.ok()) return tuning.status();
      tunings.push_back(*std::move(tuning));
    }
  }
  if (absl::Status status = fields.Finish(); !status.ok()) return status;
  return tunings;
}

std::string FormatTuning(const CudaTuning& tuning, absl::string_view provenance) {
  Json crossovers = Json::array();
  for (const Crossover& crossover : tuning.crossovers) {
    crossovers.push_back({{"kv_heads", crossover.kv_heads},
                          {"over_bf16", LengthOrNull(crossover.over_bf16)},
                          {"over_fp8", LengthOrNull(crossover.over_fp8)}});
  }
  const Json device = {
      {"device", tuning.device},
      {"exact_ctas_per_sm", tuning.exact_ctas_per_sm},
      {"progressive_cta_percent", tuning.progressive_cta_percent},
      {"conclude_pages", tuning.conclude_pages},
      {"crossovers", crossovers},
      {"provenance", Json::parse(provenance.begin(), provenance.end(), nullptr, false)}};
  return Json{{"version", kTuningVersion}, {"devices", Json::array({device})}}.dump(2) + "\n";
}

CudaTuning BuiltInTuning(absl::string_view device) {
  for (const CudaTuning& known : KnownDevices()) {
    if (known.device == device) return known;
  }
  return CudaTuning();
}

absl::StatusOr<LoadedTuning> LoadTuning(const std::string& path, absl::string_view device) {
  if (!path.empty()) {
    std::ifstream file(path, std::ios::binary);
    if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
    const std::string text((std::istreambuf_iterator<char>(file)),
                           std::istreambuf_iterator<char>());
    const absl::StatusOr<std::vector<CudaTuning>> tunings = ParseTuning(text);
    if (!tunings.ok()) {
      return absl::Status(tunings.status().code(),
                          absl::StrCat(path, ": ", tunings.status().message()));
    }
    for (const CudaTuning& tuning : *tunings) {
      if (tuning.device == device) return LoadedTuning{tuning, path};
    }
  }
  CudaTuning tuning = BuiltInTuning(device);
  std::string source = tuning.device.empty() ? "built-in" : absl::StrCat("built-in, ", device);
  return LoadedTuning{std::move(tuning), std::move(source)};
}

std::vector<SealCrossover> SealCrossovers(const CudaTuning& tuning) {
  std::vector<SealCrossover> crossovers;
  for (const Crossover& crossover : tuning.crossovers) {
    const bool never = crossover.over_bf16 == Crossover::kNeverFaster;
    crossovers.push_back(
        {crossover.kv_heads, never ? SealCrossover::kNever : int64_t{crossover.over_bf16}});
  }
  return crossovers;
}

}  // namespace adaattn

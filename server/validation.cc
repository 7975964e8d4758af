#include "server/validation.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/policy_options.h"

namespace adaattn {
namespace {

absl::Status CheckFinite(absl::string_view field, double value, double low,
                         absl::string_view allowed) {
  if (std::isfinite(value) && value >= low) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(value), allowed);
}

std::string Sub(absl::string_view field, absl::string_view name) {
  return field.empty() ? std::string(name) : absl::StrCat(field, ".", name);
}

absl::Status CheckScales(absl::string_view field,
                         const google::protobuf::RepeatedField<float>& scales, int32_t count) {
  if (!scales.empty() && scales.size() != count) {
    return InvalidField(field, absl::StrCat(scales.size(), " factors"),
                        absl::StrCat("none or one for each of ", count, " heads"));
  }
  for (const float scale : scales) {
    if (!std::isfinite(scale) || scale <= 0) {
      return InvalidField(field, absl::StrCat(scale), "finite and above 0");
    }
  }
  return absl::OkStatus();
}

// The format's own fields: page_format, element_type, stored_bits, exact_tier, scales.
absl::Status FillFormat(const v1::OpenSessionRequest& request, const ValidationContext& context,
                        SessionConfig* config) {
  PageFormat fallback = PageFormat::kProgressive;
  for (int i = 0; i < 5; ++i) {
    const auto format = static_cast<PageFormat>(i);
    if (context.options->default_page_format == PageFormatName(format)) fallback = format;
  }
  if (!v1::PageFormat_IsValid(request.page_format())) {
    return InvalidField("page_format", absl::StrCat(request.page_format()), "a PageFormat");
  }
  config->format = PageFormatOf(request.page_format(), request.element_type(), fallback);
  const std::vector<PageFormat>& formats = context.backend->formats;
  if (std::find(formats.begin(), formats.end(), config->format) == formats.end()) {
    const std::string supported = absl::StrJoin(
        formats, ", ",
        [](std::string* out, PageFormat format) { out->append(PageFormatName(format)); });
    return absl::UnimplementedError(absl::StrCat("page_format: ", PageFormatName(config->format),
                                                 " is not supported; supported: ", supported));
  }
  const v1::DataType element_type = ToProto(DenseDType(config->format));
  if (request.element_type() != v1::DATA_TYPE_UNSPECIFIED &&
      request.element_type() != element_type) {
    return InvalidField("element_type", absl::StrCat(request.element_type()),
                        IsProgressive(config->format)
                            ? "unspecified (0), FP16 (2) or BF16 (3)"
                            : absl::StrCat("unspecified (0) or the format's own (", element_type,
                                           "), unless page_format is PROGRESSIVE"));
  }
  const bool progressive = IsProgressive(config->format);
  const int32_t bits = request.stored_bits();
  if (bits != 0 && bits != 4 && bits != 6 && bits != 8) {
    return InvalidField("stored_bits", absl::StrCat(bits), "0, 4, 6 or 8");
  }
  if (!progressive && bits != 0) {
    return InvalidField("stored_bits", absl::StrCat(bits), "0 unless page_format is PROGRESSIVE");
  }
  config->stored_bits = bits == 0 ? 8 : bits;
  if (!v1::ExactTier_IsValid(request.exact_tier()) ||
      (!progressive && request.exact_tier() != v1::EXACT_TIER_NONE)) {
    return InvalidField("exact_tier", absl::StrCat(request.exact_tier()),
                        "NONE; where page_format is PROGRESSIVE also BF16_PAGES or HOST_PAGES");
  }
  if (request.exact_tier() == v1::EXACT_TIER_HOST_PAGES && context.backend->exact_tier_bytes == 0) {
    return absl::UnimplementedError(
        "exact_tier: HOST_PAGES needs host memory that this server does not set aside "
        "(exact-tier-bytes); supported: NONE, BF16_PAGES");
  }
  config->exact_tier = static_cast<ExactTier>(request.exact_tier());
  const bool fp8 = config->format == PageFormat::kF8E4m3;
  for (const auto& [field, scales] : {std::make_pair("key_scales", &request.key_scales()),
                                      std::make_pair("value_scales", &request.value_scales())}) {
    if (!fp8 && !scales->empty()) {
      return InvalidField(field, absl::StrCat(scales->size(), " factors"),
                          "none unless page_format is FP8_E4M3");
    }
    absl::Status status = CheckScales(field, *scales, config->shape.num_kv_heads);
    if (!status.ok()) return status;
  }
  config->key_scales.assign(request.key_scales().begin(), request.key_scales().end());
  config->value_scales.assign(request.value_scales().begin(), request.value_scales().end());
  return absl::OkStatus();
}

absl::Status FillLayers(const v1::OpenSessionRequest& request, SessionConfig* config) {
  const int count = request.layers_size();
  if (count > 1 && count != config->num_layers) {
    return InvalidField("layers", absl::StrCat(count, " entries"),
                        absl::StrCat("0, 1 or one for each of ", config->num_layers, " layers"));
  }
  for (int i = 0; i < count; ++i) {
    const v1::LayerOptions& layer = request.layers(i);
    const std::string field = absl::StrCat("layers[", i, "].");
    absl::Status status = CheckRange<int64_t>(field + "window", layer.window(), 0, kMaxPosition);
    if (status.ok()) {
      status = CheckFinite(field + "softcap", layer.softcap(), 0, "finite and at least 0");
    }
    if (!status.ok()) return status;
    config->layers.push_back({layer.window(), layer.softcap()});
  }
  return absl::OkStatus();
}

absl::Status FillLimits(const v1::OpenSessionRequest& request, const ServerOptions& options,
                        SessionConfig* config) {
  absl::Status status = CheckRange<int64_t>("max_tokens", request.max_tokens(), 0, kMaxPosition);
  if (status.ok()) {
    status = CheckRange<int64_t>("start_position", request.start_position(), 0, kMaxPosition);
  }
  if (status.ok()) {
    status = CheckFinite("lease_seconds", request.lease_seconds(), 0, "finite and at least 0");
  }
  if (!status.ok()) return status;
  const int64_t limit = options.max_tokens_per_session;
  config->max_tokens = request.max_tokens() == 0 ? limit : std::min(limit, request.max_tokens());
  config->start_position = request.start_position();
  const absl::Duration lease =
      request.lease_seconds() == 0 ? options.default_lease : absl::Seconds(request.lease_seconds());
  config->lease = std::min(lease, options.max_lease);
  return absl::OkStatus();
}

absl::Status FillProfile(const std::string& name, const ProfileStore& profiles,
                         SessionConfig* config) {
  if (name.empty()) return absl::OkStatus();
  std::shared_ptr<const ModelProfile> profile = profiles.Get(config->tenant, name);
  if (profile == nullptr) return NoProfile("profile", name);
  if (!(profile->shape == config->shape) || profile->num_layers != config->num_layers) {
    return InvalidField("profile", name,
                        absl::StrCat("of this model's shape; the profile has ", profile->num_layers,
                                     " layers of ", profile->shape.DebugString()));
  }
  if (config->format == PageFormat::kF8E4m3) {
    if (config->key_scales.empty()) config->key_scales = profile->key_scales;
    if (config->value_scales.empty()) config->value_scales = profile->value_scales;
  }
  config->profile = std::move(profile);
  return absl::OkStatus();
}

absl::Status CheckTransports(const v1::OpenSessionRequest& request) {
  if (request.transports().empty()) return absl::OkStatus();
  for (const int transport : request.transports()) {
    if (transport == v1::TRANSPORT_GRPC_BYTES) return absl::OkStatus();
  }
  return absl::UnimplementedError("transports: supported: GRPC_BYTES");
}

absl::StatusOr<std::optional<AttendMode>> ConvertMode(v1::Mode mode, const std::string& field) {
  switch (mode) {
    case v1::MODE_UNSPECIFIED:
      return std::optional<AttendMode>();
    case v1::MODE_EXACT:
      return std::optional<AttendMode>(AttendMode::kExact);
    case v1::MODE_FULL_DEPTH:
      return std::optional<AttendMode>(AttendMode::kFullDepth);
    case v1::MODE_STATISTICAL:
      return std::optional<AttendMode>(AttendMode::kStatistical);
    case v1::MODE_STATIC:
      return std::optional<AttendMode>(AttendMode::kStatic);
    case v1::MODE_DETERMINISTIC:
      return std::optional<AttendMode>(AttendMode::kDeterministic);
    default:
      return InvalidField(field, absl::StrCat(mode), "a Mode");
  }
}

absl::Status CheckDeterministic(const v1::AttendOptions& options, absl::string_view field,
                                const BackendInfo& backend) {
  if (!backend.bounds_errors) {
    return absl::UnimplementedError(
        absl::StrCat(Sub(field, "mode"), ": DETERMINISTIC is not supported by the ", backend.name,
                     " backend; supported: EXACT, FULL_DEPTH, STATISTICAL, STATIC"));
  }
  if (options.max_relative_error() != 0) {
    return InvalidField(Sub(field, "max_relative_error"),
                        absl::StrCat(options.max_relative_error()),
                        "0 with DETERMINISTIC: pressure never raises its target");
  }
  return absl::OkStatus();
}

// A share of one: 0 leaves it unset, else (0, 1].
absl::Status TakeShare(const std::string& field, float value, std::optional<float>* target) {
  if (value == 0) return absl::OkStatus();
  if (!(value > 0 && value <= 1)) return InvalidField(field, absl::StrCat(value), "in (0, 1]");
  *target = value;
  return absl::OkStatus();
}

absl::Status TakeBits(const std::string& field, int32_t value, int32_t least,
                      std::optional<int32_t>* target) {
  if (value == 0) return absl::OkStatus();
  if (value < least || value > 8 || value % 2 != 0) {
    return InvalidField(field, absl::StrCat(value),
                        least == 4 ? "0, 4, 6 or 8" : "0, 2, 4, 6 or 8");
  }
  *target = value;
  return absl::OkStatus();
}

absl::Status TakeEnums(const v1::AttendOptions& options, absl::string_view field,
                       AttendOptions* out) {
  auto mode = ConvertMode(options.mode(), Sub(field, "mode"));
  if (!mode.ok()) return mode.status();
  out->mode = *mode;
  if (!v1::Policy_IsValid(options.policy())) {
    return InvalidField(Sub(field, "policy"), absl::StrCat(options.policy()), "a Policy");
  }
  if (options.policy() != v1::POLICY_UNSPECIFIED) out->policy = PolicyOf(options.policy());
  if (!v1::DecisionDetail_IsValid(options.detail())) {
    return InvalidField(Sub(field, "detail"), absl::StrCat(options.detail()), "a DecisionDetail");
  }
  if (options.detail() != v1::DECISION_DETAIL_UNSPECIFIED) {
    out->detail = static_cast<DecisionDetail>(options.detail() - 1);
  }
  return absl::OkStatus();
}

absl::Status TakeCoarseScan(const v1::AttendOptions& options, absl::string_view field,
                            AttendOptions* out) {
  if (options.has_coarse_rank()) {
    absl::Status status =
        CheckRange<int32_t>(Sub(field, "coarse_rank"), options.coarse_rank(), 0, 256);
    if (!status.ok()) return status;
    out->coarse_rank = options.coarse_rank();
  }
  if (options.has_coarse_z()) {
    absl::Status status =
        CheckFinite(Sub(field, "coarse_z"), options.coarse_z(), 0, "finite and at least 0");
    if (!status.ok()) return status;
    out->coarse_z = options.coarse_z();
  }
  return absl::OkStatus();
}

absl::Status TakeOverrides(const v1::AttendOptions& options, absl::string_view field,
                           AttendOptions* out) {
  if (options.has_window()) {
    absl::Status status =
        CheckRange<int64_t>(Sub(field, "window"), options.window(), 0, kMaxPosition);
    if (!status.ok()) return status;
    out->window = options.window();
  }
  if (options.has_softcap()) {
    absl::Status status =
        CheckFinite(Sub(field, "softcap"), options.softcap(), 0, "finite and at least 0");
    if (!status.ok()) return status;
    out->softcap = options.softcap();
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status InvalidField(absl::string_view field, absl::string_view value,
                          absl::string_view allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, " is not allowed; it must be ", allowed));
}

template <typename Number>
absl::Status CheckRange(absl::string_view field, Number value, Number low, Number high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidField(field, absl::StrCat(value), absl::StrCat("from ", low, " to ", high));
}
template absl::Status CheckRange(absl::string_view, int32_t, int32_t, int32_t);
template absl::Status CheckRange(absl::string_view, int64_t, int64_t, int64_t);

absl::StatusOr<AttendOptions> ValidateAttendOptions(const v1::AttendOptions& options,
                                                    absl::string_view field,
                                                    const ValidationContext& context) {
  AttendOptions out;
  for (const absl::Status& status :
       {TakeEnums(options, field, &out), CheckPolicyFields(options, field, *context.backend),
        TakeShare(Sub(field, "theta"), options.theta(), &out.theta),
        TakeShare(Sub(field, "target_relative_error"), options.target_relative_error(),
                  &out.target_relative_error),
        TakeShare(Sub(field, "max_relative_error"), options.max_relative_error(),
                  &out.max_relative_error),
        TakeBits(Sub(field, "floor_key_bits"), options.floor_key_bits(), 4, &out.floor_key_bits),
        TakeBits(Sub(field, "floor_value_bits"), options.floor_value_bits(), 2,
                 &out.floor_value_bits),
        TakeBits(Sub(field, "static_key_bits"), options.static_key_bits(), 4, &out.static_key_bits),
        TakeBits(Sub(field, "static_value_bits"), options.static_value_bits(), 2,
                 &out.static_value_bits),
        CheckRange<int32_t>(Sub(field, "static_rank"), options.static_rank(), 0, 256),
        TakeCoarseScan(options, field, &out), TakeOverrides(options, field, &out)}) {
    if (!status.ok()) return status;
  }
  if (options.static_rank() != 0) out.static_rank = options.static_rank();
  if (out.mode == AttendMode::kDeterministic) {
    absl::Status status = CheckDeterministic(options, field, *context.backend);
    if (!status.ok()) return status;
  }
  if (out.max_relative_error) {
    const float target = out.target_relative_error.value_or(*out.max_relative_error);
    if (*out.max_relative_error < target) {
      return InvalidField(Sub(field, "max_relative_error"), absl::StrCat(*out.max_relative_error),
                          absl::StrCat("0 or from target_relative_error (", target, ") to 1"));
    }
  }
  return out;
}

absl::Status CheckModel(const v1::ModelShape& model, absl::string_view field,
                        const ValidationContext& context) {
  absl::Status status =
      CheckRange<int32_t>(Sub(field, "num_layers"), model.num_layers(), 1, kMaxLayers);
  if (status.ok()) {
    status = CheckRange<int32_t>(Sub(field, "num_kv_heads"), model.num_kv_heads(), 1, kMaxKvHeads);
  }
  if (status.ok()) {
    status = CheckFinite(Sub(field, "softmax_scale"), model.softmax_scale(), 0,
                         "finite and at least 0 (0 = 1 / sqrt(head_dim))");
  }
  if (!status.ok()) return status;
  const int32_t q_heads = model.num_q_heads(), kv_heads = model.num_kv_heads();
  if (q_heads < 1 || q_heads % kv_heads != 0) {
    return InvalidField(Sub(field, "num_q_heads"), absl::StrCat(q_heads),
                        absl::StrCat("a multiple of num_kv_heads, ", kv_heads));
  }
  const int32_t most = context.backend->max_group_size;
  if (q_heads / kv_heads > most) {
    return absl::UnimplementedError(absl::StrCat(Sub(field, "num_q_heads"), ": ", q_heads, " is ",
                                                 q_heads / kv_heads,
                                                 " times num_kv_heads; supported: 1 to ", most));
  }
  const std::vector<int32_t>& dims = context.backend->head_dims;
  if (model.head_dim() < 1) {
    return InvalidField(Sub(field, "head_dim"), absl::StrCat(model.head_dim()),
                        absl::StrCat("one of ", absl::StrJoin(dims, ", ")));
  }
  if (std::find(dims.begin(), dims.end(), model.head_dim()) == dims.end()) {
    return absl::UnimplementedError(
        absl::StrCat(Sub(field, "head_dim"), ": ", model.head_dim(),
                     " is not supported; supported: ", absl::StrJoin(dims, ", ")));
  }
  return absl::OkStatus();
}

absl::StatusOr<SessionConfig> ValidateOpenSession(const v1::OpenSessionRequest& request,
                                                  const Caller& caller,
                                                  const ProfileStore& profiles,
                                                  const ValidationContext& context) {
  absl::Status status = CheckModel(request.model(), "model", context);
  if (!status.ok()) return status;
  const v1::ModelShape& model = request.model();
  SessionConfig config;
  config.tenant = caller.tenant;
  config.routing_key = caller.routing_key;
  config.shape = {model.num_q_heads(), model.num_kv_heads(), model.head_dim()};
  config.num_layers = model.num_layers();
  config.softmax_scale = model.softmax_scale() > 0
                             ? model.softmax_scale()
                             : 1 / std::sqrt(static_cast<float>(model.head_dim()));
  status = FillFormat(request, context, &config);
  if (status.ok()) status = FillLayers(request, &config);
  if (status.ok()) status = FillLimits(request, *context.options, &config);
  if (status.ok()) status = FillProfile(request.profile(), profiles, &config);
  if (status.ok()) status = CheckTransports(request);
  if (!status.ok()) return status;
  absl::StatusOr<AttendOptions> defaults =
      ValidateAttendOptions(request.default_options(), "default_options", context);
  if (!defaults.ok()) return defaults.status();
  if (defaults->window || defaults->softcap) {
    return InvalidField("default_options", "window or softcap", "set in `layers` instead");
  }
  config.default_options = *defaults;
  if (IsProgressive(config.format)) {
    FillServerDefaults(context, config.profile.get(), &config.default_options);
  }
  // Whether the defaults can be followed at all.
  const auto resolved = ResolveOptions(AttendOptions(), config.default_options, config.format,
                                       config.keeps_exact_pages(), config.shape.head_dim);
  if (!resolved.ok()) return resolved.status();
  return config;
}

}  // namespace adaattn

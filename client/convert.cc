#include "client/convert.h"

#include <utility>

namespace adaattn::client {
namespace {

template <typename Repeated, typename T>
void Assign(const std::vector<T>& values, Repeated* field) {
  field->Assign(values.begin(), values.end());
}

Decision FromProto(const v1::Decision& message) {
  Decision decision;
  decision.mean_key_bits = message.mean_key_bits();
  decision.mean_value_bits = message.mean_value_bits();
  decision.mean_rank = message.mean_rank();
  decision.pages_sealed = message.pages_sealed();
  decision.pages_skipped = message.pages_skipped();
  decision.theta = message.theta();
  decision.entropy = message.entropy();
  decision.predicted_error = message.predicted_error();
  decision.error_bound = message.error_bound();
  decision.lse_below = message.lse_below();
  decision.lse_above = message.lse_above();
  decision.exact_pages = message.exact_pages();
  decision.bytes_read = message.bytes_read();
  decision.bytes_bf16 = message.bytes_bf16();
  decision.basis_bytes = message.basis_bytes();
  decision.fallback = static_cast<Fallback>(message.fallback());
  decision.effective_target = message.effective_target();
  decision.heads.reserve(message.heads_size());
  for (const v1::HeadDecision& from : message.heads()) {
    HeadDecision head;
    head.kv_head = from.kv_head();
    for (const auto& count : from.key_pages()) {
      head.key_pages.push_back({count.bits(), count.rank(), count.pages()});
    }
    for (const auto& count : from.value_pages()) {
      head.value_pages.push_back({count.bits(), count.pages()});
    }
    head.dense_tokens = from.dense_tokens();
    head.theta = from.theta();
    head.entropy = from.entropy();
    head.predicted_error = from.predicted_error();
    head.key_bytes = from.key_bytes();
    head.value_bytes = from.value_bytes();
    head.error_bound = from.error_bound();
    head.lse_below = from.lse_below();
    head.lse_above = from.lse_above();
    head.exact_pages = from.exact_pages();
    decision.heads.push_back(std::move(head));
  }
  return decision;
}

StageTimes FromProto(const v1::StageTimes& times) {
  return {absl::Seconds(times.queue()),  absl::Seconds(times.copy_in()),
          absl::Seconds(times.append()), absl::Seconds(times.scan()),
          absl::Seconds(times.select()), absl::Seconds(times.attend()),
          absl::Seconds(times.merge()),  absl::Seconds(times.copy_out())};
}

ModelShape FromProto(const v1::ModelShape& message) {
  return {message.num_layers(), message.num_q_heads(), message.num_kv_heads(), message.head_dim(),
          message.softmax_scale()};
}

void ToProto(const SequenceInput& input, v1::SequenceInput* message) {
  message->set_session_id(input.session.session_id);
  message->set_epoch(input.session.epoch);
  message->set_position(input.position);
  message->set_step_id(input.step_id);
  message->set_append_len(input.append_len);
  message->set_q_len(input.q_len);
  if (input.q_position) message->set_q_position(*input.q_position);
}

}  // namespace

absl::Status FromCode(int code, const std::string& message) {
  // The codes of gRPC, google.rpc and absl share their numbers.
  return absl::Status(static_cast<absl::StatusCode>(code), message);
}

absl::Status FromGrpc(const grpc::Status& status) {
  return FromCode(status.error_code(), status.error_message());
}

void ToProto(const TensorView& view, v1::Tensor* tensor) {
  tensor->set_dtype(static_cast<v1::DataType>(view.dtype));
  tensor->mutable_shape()->Assign(view.shape.begin(), view.shape.end());
  tensor->set_data(view.data.data(), view.data.size());
  tensor->mutable_scales()->Assign(view.scales.begin(), view.scales.end());
}

void ToProto(const ModelShape& model, v1::ModelShape* message) {
  message->set_num_layers(model.num_layers);
  message->set_num_q_heads(model.num_q_heads);
  message->set_num_kv_heads(model.num_kv_heads);
  message->set_head_dim(model.head_dim);
  message->set_softmax_scale(model.softmax_scale);
}

void ToProto(const SessionRef& session, v1::SessionRef* message) {
  message->set_session_id(session.session_id);
  message->set_epoch(session.epoch);
}

void ToProto(const AttendOptions& options, v1::AttendOptions* message) {
  message->set_mode(static_cast<v1::Mode>(options.mode));
  message->set_policy(static_cast<v1::Policy>(options.policy));
  message->set_theta(options.theta);
  message->set_target_relative_error(options.target_relative_error);
  message->set_max_relative_error(options.max_relative_error);
  message->set_floor_key_bits(options.floor_key_bits);
  message->set_floor_value_bits(options.floor_value_bits);
  message->set_static_key_bits(options.static_key_bits);
  message->set_static_rank(options.static_rank);
  message->set_static_value_bits(options.static_value_bits);
  if (options.coarse_rank) message->set_coarse_rank(*options.coarse_rank);
  if (options.coarse_z) message->set_coarse_z(*options.coarse_z);
  message->set_detail(static_cast<v1::DecisionDetail>(options.detail));
  if (options.window) message->set_window(*options.window);
  if (options.softcap) message->set_softcap(*options.softcap);
}

void ToProto(const SessionOptions& options, v1::OpenSessionRequest* message) {
  ToProto(options.model, message->mutable_model());
  message->set_page_format(static_cast<v1::PageFormat>(options.page_format));
  message->set_element_type(static_cast<v1::DataType>(options.element_type));
  message->set_stored_bits(options.stored_bits);
  message->set_exact_tier(static_cast<v1::ExactTier>(options.exact_tier));
  for (const LayerOptions& layer : options.layers) {
    v1::LayerOptions* to = message->add_layers();
    to->set_window(layer.window);
    to->set_softcap(layer.softcap);
  }
  message->set_max_tokens(options.max_tokens);
  message->set_lease_seconds(absl::ToDoubleSeconds(options.lease));
  ToProto(options.default_options, message->mutable_default_options());
  Assign(options.key_scales, message->mutable_key_scales());
  Assign(options.value_scales, message->mutable_value_scales());
  message->set_profile(options.profile);
  message->set_start_position(options.start_position);
  message->add_transports(v1::TRANSPORT_GRPC_BYTES);
}

void ToProto(const AttendInput& input, v1::AttendRequest* message) {
  message->set_layer(input.layer);
  for (const SequenceInput& sequence : input.sequences) {
    ToProto(sequence, message->add_sequences());
  }
  if (!input.q.empty()) ToProto(input.q, message->mutable_q());
  if (!input.k.empty()) ToProto(input.k, message->mutable_k());
  if (!input.v.empty()) ToProto(input.v, message->mutable_v());
  if (input.options) ToProto(*input.options, message->mutable_options());
  message->set_output_dtype(static_cast<v1::DataType>(input.output_dtype));
}

void ToProto(const ExportRange& range, v1::ExportKvRequest* message) {
  message->set_first_layer(range.first_layer);
  message->set_num_layers(range.num_layers);
  message->set_begin(range.begin);
  message->set_end(range.end);
  message->set_dtype(static_cast<v1::DataType>(range.dtype));
}

void ToProto(const Profile& profile, v1::UploadProfileRequest* message) {
  message->set_name(profile.name);
  ToProto(profile.model, message->mutable_model());
  if (!profile.basis_mean.empty()) ToProto(profile.basis_mean, message->mutable_basis_mean());
  if (!profile.basis.empty()) ToProto(profile.basis, message->mutable_basis());
  Assign(profile.key_scales, message->mutable_key_scales());
  Assign(profile.value_scales, message->mutable_value_scales());
  message->set_policy_json(profile.policy_json);
  Assign(profile.error_factors, message->mutable_error_factors());
  message->set_extends(profile.extends);
}

Tensor FromProto(v1::Tensor* tensor) {
  return {static_cast<DType>(tensor->dtype()),
          Shape(tensor->shape().begin(), tensor->shape().end()),
          std::move(*tensor->mutable_data())};
}

AttendOutput FromProto(v1::AttendResponse* message) {
  AttendOutput output;
  output.sequences.reserve(message->sequences_size());
  for (const v1::SequenceReply& reply : message->sequences()) {
    SequenceOutcome outcome;
    outcome.status = FromCode(reply.code(), reply.message());
    outcome.kv_len = reply.kv_len();
    outcome.replayed = reply.replayed();
    if (reply.has_decision()) outcome.decision = FromProto(reply.decision());
    output.sequences.push_back(std::move(outcome));
  }
  if (message->has_o()) output.o = FromProto(message->mutable_o());
  if (message->has_lse()) output.lse = FromProto(message->mutable_lse());
  output.stage_times = FromProto(message->stage_times());
  output.retry_after = absl::Seconds(message->retry_after_seconds());
  return output;
}

ExportChunk FromProto(v1::ExportKvResponse* message) {
  return {message->layer(), message->position(), FromProto(message->mutable_k()),
          FromProto(message->mutable_v())};
}

SessionGrant FromProto(const v1::OpenSessionResponse& message) {
  return {message.max_tokens(), absl::Seconds(message.lease_seconds()),
          static_cast<PageFormat>(message.page_format()), message.max_message_bytes(),
          static_cast<DType>(message.element_type())};
}

SessionSummary FromProto(const v1::SessionSummary& message) {
  SessionSummary summary;
  summary.session = {message.session_id(), message.epoch()};
  summary.model = FromProto(message.model());
  summary.page_format = static_cast<PageFormat>(message.page_format());
  summary.kv_len = message.kv_len();
  summary.pages_dense = message.pages_dense();
  summary.pages_sealed = message.pages_sealed();
  summary.pages_exact = message.pages_exact();
  summary.bytes = message.bytes();
  summary.exact_tier_bytes = message.exact_tier_bytes();
  summary.age = absl::Seconds(message.age_seconds());
  summary.lease_left = absl::Seconds(message.lease_seconds());
  summary.basis_drift_ratio = message.basis_drift_ratio();
  summary.element_type = static_cast<DType>(message.element_type());
  return summary;
}

ProfileSummary FromProto(const v1::GetProfileResponse& message) {
  ProfileSummary summary;
  summary.model = FromProto(message.model());
  summary.bytes = message.bytes();
  summary.has_basis = message.has_basis();
  summary.has_policy = message.has_policy();
  summary.error_factors.assign(message.error_factors().begin(), message.error_factors().end());
  summary.audits.assign(message.audits().begin(), message.audits().end());
  summary.audited_error_factors.assign(message.audited_error_factors().begin(),
                                       message.audited_error_factors().end());
  return summary;
}

ServerInfo FromProto(const v1::GetServerInfoResponse& message) {
  ServerInfo info;
  info.version = message.version();
  info.build = message.build();
  info.instance = message.instance();
  info.backend = message.backend();
  info.device = message.device();
  info.kernels = message.kernels();
  info.tuning = message.tuning();
  info.head_dims.assign(message.head_dims().begin(), message.head_dims().end());
  for (int format : message.page_formats()) {
    info.page_formats.push_back(static_cast<PageFormat>(format));
  }
  for (int mode : message.modes()) info.modes.push_back(static_cast<Mode>(mode));
  for (int policy : message.policies()) info.policies.push_back(static_cast<Policy>(policy));
  info.max_group_size = message.max_group_size();
  info.max_q_len = message.max_q_len();
  info.pool_bytes = message.pool_bytes();
  info.pool_bytes_free = message.pool_bytes_free();
  info.exact_tier_bytes = message.exact_tier_bytes();
  info.exact_tier_bytes_free = message.exact_tier_bytes_free();
  info.max_message_bytes = message.max_message_bytes();
  info.max_tokens_per_session = message.max_tokens_per_session();
  info.max_sessions = message.max_sessions();
  info.default_lease = absl::Seconds(message.default_lease_seconds());
  info.default_page_format = static_cast<PageFormat>(message.default_page_format());
  info.unsupported.assign(message.unsupported().begin(), message.unsupported().end());
  return info;
}

Lease FromProto(const v1::KeepAliveResponse::Lease& message) {
  return {message.session_id(), FromCode(message.code(), message.message()),
          absl::Seconds(message.lease_seconds())};
}

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kUnspecified:
      return "default";
    case DType::kF32:
      return "fp32";
    case DType::kF16:
      return "fp16";
    case DType::kBf16:
      return "bf16";
    case DType::kF8E4m3:
      return "fp8_e4m3";
  }
  return "unknown";  // a server newer than this client
}

const char* PageFormatName(PageFormat format) {
  return format == PageFormat::kProgressive ? "progressive" : DTypeName(static_cast<DType>(format));
}

const char* ExactTierName(ExactTier tier) {
  switch (tier) {
    case ExactTier::kNone:
      return "none";
    case ExactTier::kBf16Pages:
      return "bf16_pages";
    case ExactTier::kHostPages:
      return "host_pages";
  }
  return "unknown";
}

const char* ModeName(Mode mode) {
  switch (mode) {
    case Mode::kDefault:
      return "default";
    case Mode::kExact:
      return "exact";
    case Mode::kFullDepth:
      return "full_depth";
    case Mode::kStatistical:
      return "statistical";
    case Mode::kDeterministic:
      return "deterministic";
    case Mode::kStatic:
      return "static";
  }
  return "unknown";
}

const char* PolicyName(Policy policy) {
  switch (policy) {
    case Policy::kDefault:
      return "default";
    case Policy::kThreshold:
      return "threshold";
    case Policy::kBudget:
      return "budget";
    case Policy::kEntropy:
      return "entropy";
    case Policy::kLearned:
      return "learned";
    case Policy::kFeedback:
      return "feedback";
  }
  return "unknown";
}

}  // namespace adaattn::client

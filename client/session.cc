#include "client/session.h"

#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "client/connection.h"
#include "client/convert.h"
#include "client/importer.h"

namespace adaattn::client {
namespace {

// How long the destructor may take to tell the server; the lease ends the session otherwise.
constexpr absl::Duration kCloseDeadline = absl::Seconds(1);

}  // namespace

Session::Session(std::shared_ptr<Connection> connection, SessionRef ref, SessionGrant grant,
                 std::string route_key, int64_t start_position, std::vector<LayerState> layers)
    : connection_(std::move(connection)),
      ref_(std::move(ref)),
      grant_(grant),
      route_key_(std::move(route_key)),
      start_position_(start_position),
      layers_(std::move(layers)) {}

Session::~Session() {
  absl::MutexLock lock(&mutex_);
  if (!open_) return;
  v1::CloseSessionRequest request;
  ToProto(ref_, request.mutable_session());
  v1::CloseSessionResponse response;
  grpc::ClientContext context;
  connection_->Prepare(&context, route_key_, kCloseDeadline);
  (void)connection_->NextStub()->CloseSession(&context, request, &response);
}

int64_t Session::length(int32_t layer) const {
  absl::MutexLock lock(&mutex_);
  return layers_.at(layer).length;
}

absl::Status Session::Import(const ImportInput& input) {
  int32_t num_layers = 0;
  std::vector<int64_t> lengths;
  {
    absl::MutexLock lock(&mutex_);
    num_layers = static_cast<int32_t>(layers_.size());
    for (const LayerState& layer : layers_) lengths.push_back(layer.length);
  }
  absl::StatusOr<ImportPlan> plan =
      PlanImport(input, ref_, start_position_, lengths, grant_.max_message_bytes);
  if (!plan.ok()) return plan.status();
  absl::StatusOr<std::vector<int64_t>> lengths_now =
      RunImport(connection_.get(), route_key_, *plan);
  if (!lengths_now.ok()) return lengths_now.status();
  if (lengths_now->size() != static_cast<size_t>(num_layers)) {
    return absl::InternalError(absl::StrCat("kv_len: the server answered for ", lengths_now->size(),
                                            " layers of ", num_layers));
  }
  absl::MutexLock lock(&mutex_);
  const int32_t end = plan->first_layer + plan->num_layers;
  for (int32_t layer = plan->first_layer; layer < end; ++layer) {
    layers_[layer].length = (*lengths_now)[layer];
  }
  return absl::OkStatus();
}

absl::StatusOr<AttendOutput> Session::Attend(const Step& step) {
  {
    absl::MutexLock lock(&mutex_);
    if (step.layer < 0 || step.layer >= static_cast<int32_t>(layers_.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat("layer ", step.layer, ": must be 0 to ", layers_.size() - 1));
    }
  }
  AttendInput input;
  input.layer = step.layer;
  input.sequences.push_back(NextStep(step.layer, step.append_len, step.q_len));
  input.sequences[0].q_position = step.q_position;
  input.q = step.q;
  input.k = step.k;
  input.v = step.v;
  input.options = step.options;
  input.output_dtype = step.output_dtype;
  v1::AttendRequest request;
  ToProto(input, &request);
  absl::StatusOr<AttendOutput> output = connection_->Attend(route_key_, request);
  if (!output.ok()) return output;
  if (output->sequences.size() != 1) {
    return absl::InternalError(
        absl::StrCat("the server answered for ", output->sequences.size(), " sequences of 1"));
  }
  StepAnswered(step.layer, output->sequences[0]);
  if (!output->sequences[0].status.ok()) return output->sequences[0].status;
  return output;
}

SequenceInput Session::NextStep(int32_t layer, int32_t append_len, int32_t q_len) const {
  absl::MutexLock lock(&mutex_);
  const LayerState& state = layers_.at(layer);
  SequenceInput input;
  input.session = ref_;
  input.position = start_position_ + state.length;
  input.step_id = state.steps + 1;
  input.append_len = append_len;
  input.q_len = q_len;
  return input;
}

void Session::StepAnswered(int32_t layer, const SequenceOutcome& outcome) {
  // A refused step keeps its number: asked again, it is the same step.
  if (!outcome.status.ok()) return;
  absl::MutexLock lock(&mutex_);
  LayerState& state = layers_.at(layer);
  state.length = outcome.kv_len;
  ++state.steps;
}

absl::StatusOr<TruncateResult> Session::Truncate(int64_t position) {
  v1::TruncateSessionRequest request;
  ToProto(ref_, request.mutable_session());
  request.set_position(position);
  v1::TruncateSessionResponse response;
  const absl::Status status = connection_->Call(&v1::Attention::Stub::TruncateSession, route_key_,
                                                RetryRule::kRepeatable, request, &response);
  if (!status.ok()) return status;
  absl::MutexLock lock(&mutex_);
  for (LayerState& layer : layers_) {
    layer.length = response.kv_len();
    ++layer.steps;  // the next step is another one, even at an old position
  }
  return TruncateResult{response.kv_len(), response.pages_reopened()};
}

absl::StatusOr<std::vector<std::unique_ptr<Session>>> Session::Fork(int32_t count) {
  v1::ForkSessionRequest request;
  ToProto(ref_, request.mutable_session());
  request.set_count(count);
  v1::ForkSessionResponse response;
  const absl::Status status = connection_->Call(&v1::Attention::Stub::ForkSession, route_key_,
                                                RetryRule::kCreates, request, &response);
  if (!status.ok()) return status;
  SessionGrant grant = grant_;
  grant.lease = absl::Seconds(response.lease_seconds());
  std::vector<std::unique_ptr<Session>> branches;
  absl::MutexLock lock(&mutex_);
  for (const v1::SessionRef& branch : response.sessions()) {
    branches.push_back(
        absl::WrapUnique(new Session(connection_, {branch.session_id(), branch.epoch()}, grant,
                                     route_key_, start_position_, layers_)));
  }
  return branches;
}

absl::Status Session::Export(const ExportRange& range,
                             const std::function<absl::Status(ExportChunk)>& sink) {
  v1::ExportKvRequest request;
  ToProto(range, &request);
  ToProto(ref_, request.mutable_session());
  grpc::ClientContext context;
  connection_->Prepare(&context, route_key_, connection_->options().import_deadline);
  auto reader = connection_->NextStub()->ExportKv(&context, request);
  v1::ExportKvResponse response;
  absl::Status sink_status;
  while (sink_status.ok() && reader->Read(&response)) sink_status = sink(FromProto(&response));
  if (!sink_status.ok()) context.TryCancel();
  const absl::Status status = FromGrpc(reader->Finish());
  return sink_status.ok() ? status : sink_status;
}

absl::StatusOr<absl::Duration> Session::KeepAlive() {
  v1::KeepAliveRequest request;
  ToProto(ref_, request.add_sessions());
  v1::KeepAliveResponse response;
  const absl::Status status = connection_->Call(&v1::Attention::Stub::KeepAlive, route_key_,
                                                RetryRule::kRepeatable, request, &response);
  if (!status.ok()) return status;
  if (response.leases_size() != 1) {
    return absl::InternalError(
        absl::StrCat("the server answered for ", response.leases_size(), " leases of 1"));
  }
  const Lease lease = FromProto(response.leases(0));
  if (!lease.status.ok()) return lease.status;
  return lease.left;
}

absl::Status Session::Close() {
  v1::CloseSessionRequest request;
  ToProto(ref_, request.mutable_session());
  v1::CloseSessionResponse response;
  absl::Status status = connection_->Call(&v1::Attention::Stub::CloseSession, route_key_,
                                          RetryRule::kRepeatable, request, &response);
  if (status.ok()) {
    absl::MutexLock lock(&mutex_);
    open_ = false;
  }
  return status;
}

SessionRef Session::Release() {
  absl::MutexLock lock(&mutex_);
  open_ = false;
  return ref_;
}

}  // namespace adaattn::client

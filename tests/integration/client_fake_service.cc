#include "tests/integration/client_fake_service.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace adaattn::client {
namespace {

float HalfToFloat(uint16_t half) {
  const int exponent = half >> 10 & 31;
  const int mantissa = half & 1023;
  const float magnitude = exponent == 0
                              ? std::ldexp(static_cast<float>(mantissa), -24)
                              : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

std::vector<float> Floats(const v1::Tensor& tensor) {
  const std::string& data = tensor.data();
  std::vector<float> values;
  if (tensor.dtype() == v1::DATA_TYPE_FP32) {
    values.resize(data.size() / sizeof(float));
    std::memcpy(values.data(), data.data(), data.size());
  } else {
    values.resize(data.size() / sizeof(uint16_t));
    for (size_t i = 0; i < values.size(); ++i) {
      uint16_t half = 0;
      std::memcpy(&half, data.data() + 2 * i, sizeof(half));
      values[i] = HalfToFloat(half);
    }
  }
  return values;
}

grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), std::string(status.message()));
}

}  // namespace

void FakeService::AddFault(const Fault& fault) {
  absl::MutexLock lock(&mutex_);
  faults_.push_back(fault);
}

int64_t FakeService::length(const std::string& session_id, int32_t layer) {
  absl::MutexLock lock(&mutex_);
  return sessions_.at(session_id).layers.at(layer).length;
}

size_t FakeService::num_sessions() {
  absl::MutexLock lock(&mutex_);
  return sessions_.size();
}

std::set<std::string> FakeService::routes() {
  absl::MutexLock lock(&mutex_);
  return routes_;
}

int32_t FakeService::num_attends() {
  absl::MutexLock lock(&mutex_);
  return num_attends_;
}

float FakeService::query_sample_first() {
  absl::MutexLock lock(&mutex_);
  return query_sample_first_;
}

bool FakeService::TakeFault(Fault* fault) {
  absl::MutexLock lock(&mutex_);
  if (faults_.empty() || faults_.front().after-- > 0) return false;
  *fault = faults_.front();
  faults_.pop_front();
  return true;
}

void FakeService::NoteRoute(const grpc::ServerContext& context) {
  absl::MutexLock lock(&mutex_);
  const auto found = context.client_metadata().find("adaattn-route");
  routes_.insert(found == context.client_metadata().end()
                     ? ""
                     : std::string(found->second.data(), found->second.size()));
}

absl::Status FakeService::Append(Session* session, int32_t layer, int64_t position,
                                 uint64_t step_id, bool is_import, int64_t tokens, const float* k,
                                 const float* v, bool* replayed) {
  Layer& state = session->layers.at(layer);
  const int64_t at = position - session->options.start_position();
  if (tokens > 0 && at + tokens == state.length && (is_import || step_id == state.last_step_id)) {
    *replayed = true;
    return absl::OkStatus();
  }
  if (at != state.length) {
    return absl::FailedPreconditionError(
        absl::StrCat("position ", position, ": the length is ", state.length));
  }
  const int64_t row = session->options.model().num_kv_heads() * session->options.model().head_dim();
  state.k.insert(state.k.end(), k, k + tokens * row);
  state.v.insert(state.v.end(), v, v + tokens * row);
  state.length += tokens;
  if (tokens > 0) state.last_step_id = step_id;
  return absl::OkStatus();
}

void FakeService::AttendRows(const Session& session, int32_t layer, int64_t q_start, int64_t rows,
                             const float* q, std::vector<float>* o, std::vector<float>* lse) {
  const v1::ModelShape& model = session.options.model();
  const Layer& state = session.layers.at(layer);
  const int64_t d = model.head_dim(), heads = model.num_q_heads(), kv_heads = model.num_kv_heads();
  const double scale = model.softmax_scale() > 0 ? model.softmax_scale() : 1 / std::sqrt(d);
  for (int64_t row = 0; row < rows * heads; ++row) {
    const int64_t head = row % heads * kv_heads / heads;
    const int64_t visible = std::max<int64_t>(0, std::min(state.length, q_start + row / heads + 1));
    std::vector<double> scores(visible), sum(d);
    double top = -std::numeric_limits<double>::infinity(), total = 0;
    for (int64_t t = 0; t < visible; ++t) {
      for (int64_t c = 0; c < d; ++c) {
        scores[t] += scale * q[row * d + c] * state.k[(t * kv_heads + head) * d + c];
      }
      top = std::max(top, scores[t]);
    }
    for (int64_t t = 0; t < visible; ++t) {
      const double weight = std::exp(scores[t] - top);
      total += weight;
      for (int64_t c = 0; c < d; ++c) {
        sum[c] += weight * state.v[(t * kv_heads + head) * d + c];
      }
    }
    for (int64_t c = 0; c < d; ++c)
      o->push_back(static_cast<float>(visible > 0 ? sum[c] / total : 0));
    lse->push_back(static_cast<float>(top + std::log(total)));
  }
}

void FakeService::Process(const v1::AttendRequest& request, v1::AttendResponse* response) {
  absl::MutexLock lock(&mutex_);
  response->set_request_id(request.request_id());
  const std::vector<float> q = Floats(request.q()), k = Floats(request.k()),
                           v = Floats(request.v());
  std::vector<float> o, lse;
  int64_t q_row = 0, kv_row = 0, q_heads = 0, head_dim = 0;
  for (const v1::SequenceInput& input : request.sequences()) {
    v1::SequenceReply* reply = response->add_sequences();
    const auto found = sessions_.find(input.session_id());
    if (found == sessions_.end()) {
      reply->set_code(grpc::StatusCode::NOT_FOUND);
      reply->set_message("unknown session");
      continue;
    }
    Session& session = found->second;
    const v1::ModelShape& model = session.options.model();
    q_heads = model.num_q_heads();
    head_dim = model.head_dim();
    const int64_t kv_elements = model.num_kv_heads() * head_dim;
    bool replayed = false;
    const absl::Status status = Append(&session, request.layer(), input.position(), input.step_id(),
                                       false, input.append_len(), k.data() + kv_row * kv_elements,
                                       v.data() + kv_row * kv_elements, &replayed);
    const int64_t length = session.layers.at(request.layer()).length;
    reply->set_code(static_cast<int>(status.code()));
    reply->set_message(std::string(status.message()));
    reply->set_kv_len(length);
    reply->set_replayed(replayed);
    if (status.ok() && input.q_len() > 0) {
      AttendRows(session, request.layer(), length - input.q_len(), input.q_len(),
                 q.data() + q_row * q_heads * head_dim, &o, &lse);
      v1::Decision* decision = reply->mutable_decision();
      decision->set_bytes_bf16(length * kv_elements * 4);
      decision->set_bytes_read(length * kv_elements * 8);  // FP32
      decision->set_mean_key_bits(32);
      decision->set_mean_value_bits(32);
      decision->set_mean_rank(static_cast<float>(head_dim));
    }
    q_row += input.q_len();
    kv_row += input.append_len();
  }
  if (!o.empty()) {
    const int64_t rows = static_cast<int64_t>(lse.size()) / q_heads;
    SetFloats(o, {rows, q_heads, head_dim}, response->mutable_o());
    SetFloats(lse, {rows, q_heads}, response->mutable_lse());
  }
  response->mutable_stage_times()->set_attend(1e-5);
}

grpc::Status FakeService::OpenSession(grpc::ServerContext* context,
                                      const v1::OpenSessionRequest* request,
                                      v1::OpenSessionResponse* response) {
  NoteRoute(*context);
  Fault fault;
  if (TakeFault(&fault)) return Fail(fault, context);
  absl::MutexLock lock(&mutex_);
  const std::string id = absl::StrCat("fake-", ++next_id_);
  Session& session = sessions_[id];
  session.options = *request;
  session.layers.resize(request->model().num_layers());
  response->set_session_id(id);
  response->set_epoch(7);
  response->set_max_tokens(request->max_tokens());
  response->set_lease_seconds(60);
  response->set_page_format(request->page_format());
  response->set_max_message_bytes(kMaxMessageBytes);
  return grpc::Status::OK;
}

grpc::Status FakeService::ImportKv(grpc::ServerContext* context,
                                   grpc::ServerReader<v1::ImportKvRequest>* reader,
                                   v1::ImportKvResponse* response) {
  NoteRoute(*context);
  std::string id;
  v1::ImportKvRequest chunk;
  while (reader->Read(&chunk)) {
    if (!chunk.session_id().empty()) id = chunk.session_id();
    if (chunk.ByteSizeLong() > kMaxMessageBytes) {
      return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "message too long");
    }
    Fault fault;
    const bool fails = TakeFault(&fault);
    if (fails && !fault.after_applying) return Fail(fault, context);
    absl::MutexLock lock(&mutex_);
    const auto found = sessions_.find(id);
    if (found == sessions_.end()) return NotFound();
    const std::vector<float> k = Floats(chunk.k()), v = Floats(chunk.v());
    const std::vector<float> sample = Floats(chunk.query_sample());
    if (!sample.empty()) query_sample_first_ = sample[0];
    bool replayed = false;
    const absl::Status status =
        Append(&found->second, chunk.first_layer(), chunk.position(), 0, true,
               chunk.has_k() ? chunk.k().shape(1) : 0, k.data(), v.data(), &replayed);
    if (!status.ok()) return ToGrpc(status);
    if (fails) return Fail(fault, context);
  }
  absl::MutexLock lock(&mutex_);
  const auto found = sessions_.find(id);
  if (found == sessions_.end()) return NotFound();
  for (const Layer& layer : found->second.layers) response->add_kv_len(layer.length);
  return grpc::Status::OK;
}

grpc::Status FakeService::Attend(grpc::ServerContext* context, const v1::AttendRequest* request,
                                 v1::AttendResponse* response) {
  NoteRoute(*context);
  Fault fault;
  const bool fails = TakeFault(&fault);
  {
    absl::MutexLock lock(&mutex_);
    ++num_attends_;
  }
  if (!fails || fault.after_applying) Process(*request, response);
  return fails ? Fail(fault, context) : grpc::Status::OK;
}

grpc::Status FakeService::AttendStream(
    grpc::ServerContext* context,
    grpc::ServerReaderWriter<v1::AttendResponse, v1::AttendRequest>* stream) {
  NoteRoute(*context);
  v1::AttendRequest request;
  while (stream->Read(&request)) {
    if (request.kv_follows()) {
      v1::AttendRequest rest;
      if (!stream->Read(&rest)) break;
      *request.mutable_k() = rest.k();
      *request.mutable_v() = rest.v();
    }
    Fault fault;
    const bool fails = TakeFault(&fault);
    {
      absl::MutexLock lock(&mutex_);
      ++num_attends_;
    }
    v1::AttendResponse response;
    if (!fails || fault.after_applying) Process(request, &response);
    if (fails && !fault.in_message) return Fail(fault, context);
    if (fails) {
      response.Clear();
      response.set_request_id(request.request_id());
      response.set_code(static_cast<int>(fault.code));
      response.set_message("told to fail");
      response.set_retry_after_seconds(fault.retry_after_ms * 1e-3);
    }
    stream->Write(response);
  }
  return grpc::Status::OK;
}

}  // namespace adaattn::client

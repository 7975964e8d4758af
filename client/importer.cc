#include "client/importer.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "client/connection.h"
#include "client/convert.h"

namespace adaattn::client {
namespace {

constexpr int64_t kChunkBytes = int64_t{4} << 20;
constexpr int64_t kMessageSlack = 4096;  // everything in a message but k and v

absl::Status CheckTensor(const char* name, const TensorView& view) {
  const int64_t elements =
      std::accumulate(view.shape.begin(), view.shape.end(), int64_t{1}, std::multiplies<>());
  const int64_t expected = elements * ElementBytes(view.dtype);
  if (expected == static_cast<int64_t>(view.data.size())) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", view.data.size(), " bytes, but [",
                                                 absl::StrJoin(view.shape, ", "), "] takes ",
                                                 expected));
}

TensorView Cut(const TensorView& view, int64_t offset, int64_t tokens, int64_t row_bytes) {
  TensorView cut;
  cut.dtype = view.dtype;
  const size_t rank = view.shape.size();
  cut.shape = {1, tokens, view.shape[rank - 2], view.shape[rank - 1]};
  cut.data = view.data.subspan(offset * row_bytes, tokens * row_bytes);
  cut.scales = view.scales;
  return cut;
}

// The message of chunk `index`; `opens`: the first of its stream.
v1::ImportKvRequest Message(const ImportPlan& plan, size_t index, bool opens) {
  v1::ImportKvRequest message;
  if (opens) {
    message.set_session_id(plan.session.session_id);
    message.set_epoch(plan.session.epoch);
    message.set_wait_sealed(plan.wait_sealed);
  }
  message.set_first_layer(plan.first_layer);
  message.set_num_layers(1);
  if (index < plan.chunks.size()) {
    const ImportChunk& chunk = plan.chunks[index];
    message.set_first_layer(chunk.layer);
    message.set_position(chunk.position);
    ToProto(chunk.k, message.mutable_k());
    ToProto(chunk.v, message.mutable_v());
  }
  if (index == 0) {
    if (!plan.query_sample.empty()) ToProto(plan.query_sample, message.mutable_query_sample());
    if (!plan.basis_mean.empty()) ToProto(plan.basis_mean, message.mutable_basis_mean());
    if (!plan.basis.empty()) ToProto(plan.basis, message.mutable_basis());
  }
  return message;
}

struct StreamResult {
  absl::Status status;
  absl::Duration hint;
  std::vector<int64_t> lengths;
};

// One stream with the messages [begin, end).
StreamResult SendChunks(Connection* connection, const std::string& route_key,
                        const ImportPlan& plan, size_t begin, size_t end) {
  grpc::ClientContext context;
  connection->Prepare(&context, route_key, connection->options().import_deadline);
  v1::ImportKvResponse response;
  auto writer = connection->NextStub()->ImportKv(&context, &response);
  for (size_t i = begin; i < end; ++i) {
    if (!writer->Write(Message(plan, i, i == begin))) break;  // Finish says why
  }
  writer->WritesDone();
  StreamResult result;
  result.status = FromGrpc(writer->Finish());
  result.hint = Connection::RetryHint(context);
  result.lengths.assign(response.kv_len().begin(), response.kv_len().end());
  return result;
}

}  // namespace

absl::StatusOr<ImportPlan> PlanImport(const ImportInput& input, const SessionRef& session,
                                      int64_t start_position, absl::Span<const int64_t> lengths,
                                      int64_t max_message_bytes) {
  ImportPlan plan;
  plan.session = session;
  plan.first_layer = input.first_layer;
  plan.query_sample = input.query_sample;
  plan.basis_mean = input.basis_mean;
  plan.basis = input.basis;
  plan.wait_sealed = input.wait_sealed;
  if (input.wait_sealed && input.k.empty() && input.v.empty()) return plan;
  const size_t rank = input.k.shape.size();
  if (input.k.shape != input.v.shape || (rank != 3 && rank != 4)) {
    return absl::InvalidArgumentError(
        "k and v: must have one shape, [num_layers, tokens, num_kv_heads, head_dim] or without "
        "the first");
  }
  if (absl::Status status = CheckTensor("k", input.k); !status.ok()) return status;
  if (absl::Status status = CheckTensor("v", input.v); !status.ok()) return status;
  plan.num_layers = rank == 4 ? static_cast<int32_t>(input.k.shape[0]) : 1;
  const int64_t tokens = input.k.shape[rank - 3];
  const int64_t row = input.k.shape[rank - 2] * input.k.shape[rank - 1];
  if (input.first_layer < 0 || plan.num_layers < 1 ||
      input.first_layer + plan.num_layers > static_cast<int64_t>(lengths.size())) {
    return absl::InvalidArgumentError(absl::StrCat("first_layer ", input.first_layer, " with ",
                                                   plan.num_layers, " layers: must be within 0 to ",
                                                   lengths.size() - 1));
  }
  const int64_t k_row_bytes = row * ElementBytes(input.k.dtype);
  const int64_t v_row_bytes = row * ElementBytes(input.v.dtype);
  int64_t budget = kChunkBytes;
  if (max_message_bytes > 0) {
    const int64_t extras = static_cast<int64_t>(
        input.query_sample.data.size() + input.basis_mean.data.size() + input.basis.data.size());
    budget = std::min(budget, max_message_bytes - kMessageSlack - extras);
  }
  const int64_t chunk_tokens =
      std::max<int64_t>(1, budget / std::max<int64_t>(1, k_row_bytes + v_row_bytes));
  for (int32_t layer = 0; layer < plan.num_layers; ++layer) {
    const int64_t base = start_position + lengths[input.first_layer + layer];
    for (int64_t begin = 0; begin < tokens; begin += chunk_tokens) {
      const int64_t count = std::min(chunk_tokens, tokens - begin);
      const int64_t offset = layer * tokens + begin;
      plan.chunks.push_back({input.first_layer + layer, base + begin,
                             Cut(input.k, offset, count, k_row_bytes),
                             Cut(input.v, offset, count, v_row_bytes)});
    }
  }
  return plan;
}

absl::StatusOr<std::vector<int64_t>> RunImport(Connection* connection, const std::string& route_key,
                                               const ImportPlan& plan) {
  const RetryOptions& retry_options = connection->options().retry;
  RetryState retry(retry_options, RetryRule::kRepeatable);
  const size_t end = std::max<size_t>(1, plan.chunks.size());
  size_t begin = 0;
  bool probing = false;  // one chunk a stream, until one is accepted
  bool lost = false;     // some chunks may have been applied already
  while (true) {
    const size_t until = probing ? begin + 1 : end;
    StreamResult result = SendChunks(connection, route_key, plan, begin, until);
    const bool refused = lost && result.status.code() == absl::StatusCode::kFailedPrecondition;
    if (result.status.ok()) {
      if (until == end) return std::move(result.lengths);
      retry.Reset();
      probing = false;
      begin = until;
    } else if (refused && !probing) {
      probing = true;  // a layer in this stream is longer already
    } else if (refused && until < end) {
      begin = until;  // this chunk is one that was applied
    } else {
      const auto wait = retry.Next(result.status, result.hint);
      if (!wait) return result.status;
      SleepBetween(retry_options, *wait);
      probing = lost = true;
    }
  }
}

}  // namespace adaattn::client

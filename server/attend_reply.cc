#include "server/attend_reply.h"

#include "adaattn/v1/attention.pb.h"
#include "server/validation.h"
#include "server/wire.h"

namespace adaattn {
namespace {

void FillHead(const HeadDecision& head, int32_t kv_head, int32_t head_dim, v1::HeadDecision* out) {
  out->set_kv_head(kv_head);
  for (int32_t i = 0; i < kNumKeyDepths; ++i) {
    if (head.key_pages[i] == 0) continue;
    v1::KeyPageCount* count = out->add_key_pages();
    count->set_bits(KeyDepthBits(i));
    count->set_rank(ChunkedRank(head_dim, KeyDepthChunks(i)));
    count->set_pages(head.key_pages[i]);
  }
  for (int32_t i = 0; i < kNumValueDepths; ++i) {
    if (head.value_pages[i] == 0) continue;
    v1::ValuePageCount* count = out->add_value_pages();
    count->set_bits(2 * i);
    count->set_pages(head.value_pages[i]);
  }
  out->set_dense_tokens(head.dense_tokens);
  out->set_theta(head.theta);
  out->set_entropy(head.entropy);
  out->set_predicted_error(head.predicted_error);
  out->set_error_bound(head.error_bound);
  out->set_lse_below(head.lse_below);
  out->set_lse_above(head.lse_above);
  out->set_exact_pages(head.exact_pages);
  out->set_key_bytes(head.key_bytes);
  out->set_value_bytes(head.value_bytes);
}

void FillDecision(const DecisionSummary& decision, v1::Decision* out) {
  out->set_mean_key_bits(static_cast<float>(decision.mean_key_bits));
  out->set_mean_value_bits(static_cast<float>(decision.mean_value_bits));
  out->set_mean_rank(static_cast<float>(decision.mean_rank));
  out->set_pages_sealed(decision.pages_sealed);
  out->set_pages_skipped(decision.pages_skipped);
  out->set_theta(static_cast<float>(decision.theta));
  out->set_entropy(static_cast<float>(decision.entropy));
  out->set_predicted_error(static_cast<float>(decision.predicted_error));
  out->set_error_bound(decision.error_bound);
  out->set_lse_below(decision.lse_below);
  out->set_lse_above(decision.lse_above);
  out->set_exact_pages(decision.exact_pages);
  out->set_bytes_read(decision.bytes_read);
  out->set_bytes_bf16(decision.bytes_bf16);
  out->set_basis_bytes(decision.basis_bytes);
  out->set_fallback(static_cast<v1::FallbackReason>(decision.fallback));
  out->set_effective_target(decision.effective_target);
}

void FillSequence(const AttentionTask& task, size_t index, v1::SequenceReply* out) {
  const SequenceOutcome& outcome = task.reply.sequences[index];
  out->set_code(static_cast<int32_t>(outcome.status.code()));
  out->set_message(std::string(outcome.status.message()));
  out->set_kv_len(outcome.kv_len);
  out->set_replayed(outcome.replayed);
  if (!outcome.attended || task.reply.detail == DecisionDetail::kNone) return;
  FillDecision(outcome.decision, out->mutable_decision());
  if (task.reply.detail != DecisionDetail::kPerHead) return;
  const int32_t heads = task.shape.num_kv_heads;
  for (int32_t head = 0; head < heads; ++head) {
    FillHead(task.reply.heads[index * static_cast<size_t>(heads) + static_cast<size_t>(head)], head,
             task.shape.head_dim, out->mutable_decision()->add_heads());
  }
}

void FillTimes(const TaskTimes& times, v1::StageTimes* out) {
  out->set_queue(absl::ToDoubleSeconds(times.queue));
  out->set_copy_in(absl::ToDoubleSeconds(times.copy_in));
  out->set_append(absl::ToDoubleSeconds(times.append));
  out->set_scan(absl::ToDoubleSeconds(times.scan));
  out->set_select(absl::ToDoubleSeconds(times.select));
  out->set_attend(absl::ToDoubleSeconds(times.attend));
  out->set_merge(absl::ToDoubleSeconds(times.merge));
  out->set_copy_out(absl::ToDoubleSeconds(times.copy_out));
}

}  // namespace

grpc::ByteBuffer MakeAttendReply(uint64_t request_id, const AttentionTask& task) {
  v1::AttendResponse header;
  header.set_request_id(request_id);
  for (size_t i = 0; i < task.reply.sequences.size(); ++i) {
    FillSequence(task, i, header.add_sequences());
  }
  FillTimes(task.reply.times, header.mutable_stage_times());
  header.set_retry_after_seconds(absl::ToDoubleSeconds(task.reply.retry_after));
  const std::shared_ptr<const ReplyBuffer>& buffer = task.reply.buffer;
  if (buffer == nullptr || buffer->out_bytes == 0) {
    return BuildAttendReply(header, nullptr, nullptr);
  }
  const int64_t rows = task.q_rows(), heads = task.shape.num_q_heads;
  const auto part = [&buffer](int64_t begin, int64_t size) {
    return ShareBytes(buffer,
                      absl::MakeConstSpan(buffer->bytes.get() + begin, static_cast<size_t>(size)));
  };
  const ReplyTensor o{
      ToProto(task.out_type), {rows, heads, task.shape.head_dim}, {part(0, buffer->out_bytes)}};
  const ReplyTensor lse{
      v1::DATA_TYPE_FP32, {rows, heads}, {part(buffer->out_bytes, buffer->lse_bytes)}};
  return BuildAttendReply(header, &o, &lse);
}

grpc::ByteBuffer MakeUnfoundReply(uint64_t request_id, const AttentionTask& task) {
  v1::AttendResponse header;
  header.set_request_id(request_id);
  for (const SequenceTask& sequence : task.sequences) {
    v1::SequenceReply* out = header.add_sequences();
    out->set_code(static_cast<int32_t>(sequence.status.code()));
    out->set_message(std::string(sequence.status.message()));
  }
  return BuildAttendReply(header, nullptr, nullptr);
}

grpc::ByteBuffer MakeErrorReply(uint64_t request_id, const absl::Status& status,
                                absl::Duration retry_after) {
  v1::AttendResponse header;
  header.set_request_id(request_id);
  header.set_code(static_cast<int32_t>(status.code()));
  header.set_message(std::string(status.message()));
  header.set_retry_after_seconds(absl::ToDoubleSeconds(retry_after));
  return BuildAttendReply(header, nullptr, nullptr);
}

}  // namespace adaattn

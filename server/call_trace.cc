#include "server/call_trace.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

bool Wanted(const ServiceContext& service, const TraceContext& context) {
  return service.tracer != nullptr && context.sampled;
}

Span MethodSpan(const ServiceContext& service, RpcMethod method, absl::Time start,
                const absl::Status& status) {
  Span span;
  span.name = absl::StrCat("adaattn.v1.Attention/", RpcMethodName(method));
  span.start = start;
  span.end = service.clock->Now();
  span.status = status;
  span.attributes = {{"rpc.system", "grpc"},
                     {"rpc.service", "adaattn.v1.Attention"},
                     {"rpc.method", RpcMethodName(method)},
                     {"rpc.grpc.status_code", static_cast<int64_t>(status.code())}};
  return span;
}

void AddDecisions(const AttentionReply& reply, Span* span) {
  int64_t read = 0, bf16 = 0, basis = 0, sealed = 0, skipped = 0, attended = 0, fallbacks = 0;
  double key_bits = 0, value_bits = 0, rank = 0, predicted = 0;
  for (const SequenceOutcome& sequence : reply.sequences) {
    if (!sequence.attended) continue;
    const DecisionSummary& decision = sequence.decision;
    ++attended;
    read += decision.bytes_read;
    bf16 += decision.bytes_bf16;
    basis += decision.basis_bytes;
    sealed += decision.pages_sealed;
    skipped += decision.pages_skipped;
    key_bits += decision.mean_key_bits;
    value_bits += decision.mean_value_bits;
    rank += decision.mean_rank;
    predicted = std::max(predicted, decision.predicted_error);
    fallbacks += decision.fallback != Fallback::kNone ? 1 : 0;
  }
  span->attributes.emplace_back("adaattn.sequences_attended", attended);
  if (attended == 0) return;
  const auto count = static_cast<double>(attended);
  for (auto& attribute : std::vector<std::pair<const char*, Span::Value>>{
           {"adaattn.bytes_read", read},
           {"adaattn.bytes_bf16", bf16},
           {"adaattn.basis_bytes", basis},
           {"adaattn.pages_sealed", sealed},
           {"adaattn.pages_skipped", skipped},
           {"adaattn.mean_key_bits", key_bits / count},
           {"adaattn.mean_value_bits", value_bits / count},
           {"adaattn.mean_rank", rank / count},
           {"adaattn.predicted_error_max", predicted},
           {"adaattn.fallbacks", fallbacks}}) {
    span->attributes.push_back(std::move(attribute));
  }
}

void AddStages(const AttentionTask& task, Span* span) {
  const TaskTimes& times = task.reply.times;
  const std::pair<Stage, absl::Duration> stages[] = {
      {Stage::kQueue, times.queue},   {Stage::kCopyIn, times.copy_in},
      {Stage::kAppend, times.append}, {Stage::kScan, times.scan},
      {Stage::kSelect, times.select}, {Stage::kAttend, times.attend},
      {Stage::kMerge, times.merge},   {Stage::kCopyOut, times.copy_out}};
  absl::Time at = task.enqueued;
  for (const auto& [stage, duration] : stages) {
    if (duration <= absl::ZeroDuration()) continue;
    Span child;
    child.name = StageName(stage);
    child.start = at;
    child.end = at += duration;
    span->children.push_back(std::move(child));
  }
}

}  // namespace

void TraceAttend(const ServiceContext& service, const TraceContext& context, RpcMethod method,
                 absl::Time start, const AttentionTask& task) {
  if (!Wanted(service, context)) return;
  Span span = MethodSpan(service, method, start, task.reply.status);
  span.attributes.emplace_back("adaattn.layer", int64_t{task.layer});
  span.attributes.emplace_back("adaattn.sequences", static_cast<int64_t>(task.sequences.size()));
  span.attributes.emplace_back("adaattn.q_rows", task.q_rows());
  span.attributes.emplace_back("adaattn.appended_rows", task.appended_rows());
  AddDecisions(task.reply, &span);
  AddStages(task, &span);
  service.exemplars->Add(method, span.end - start, context.trace_id, span.end);
  service.tracer->Record(context, std::move(span));
}

void TraceRefusal(const ServiceContext& service, const TraceContext& context, RpcMethod method,
                  absl::Time start, const absl::Status& status) {
  if (!Wanted(service, context)) return;
  service.tracer->Record(context, MethodSpan(service, method, start, status));
}

}  // namespace adaattn

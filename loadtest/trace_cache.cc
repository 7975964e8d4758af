#include "loadtest/trace_cache.h"

#include <algorithm>
#include <cstring>

#include "kernels/format/float_types.h"

namespace adaattn {
namespace {

constexpr int32_t kFitTokens = 1024;
constexpr int32_t kImportTokens = 1024;  // a step

int64_t NumPages(const Trace& trace) { return (trace.num_tokens + kPageTokens - 1) / kPageTokens; }

// [heads, tokens, d] of the trace to [tokens, heads, d] of a step.
void TransposeTokens(const std::vector<uint16_t>& from, const Trace& trace, int64_t begin,
                     int64_t end, std::byte* to) {
  const int64_t d = trace.shape.head_dim;
  for (int64_t t = begin; t < end; ++t) {
    for (int32_t head = 0; head < trace.shape.num_kv_heads; ++head) {
      std::memcpy(to, from.data() + (head * trace.num_tokens + t) * d, d * 2);
      to += d * 2;
    }
  }
}

}  // namespace

int64_t TraceCache::PoolBytes(const Trace& trace, PageFormat format, int32_t stored_bits) {
  int64_t page = DensePageBytes(trace.shape, DenseDType(format));
  int64_t bytes = 0;
  if (IsProgressive(format)) {
    page += MakePageLayout(trace.shape, stored_bits).page_bytes;
    bytes += MakeBasisLayout(trace.shape).block_bytes;
  }
  return bytes + NumPages(trace) * page;
}

TraceCache::TraceCache(Backend* backend, const Trace* trace, PageFormat format, int32_t stored_bits)
    : backend_(backend), trace_(trace), format_(format), stored_bits_(stored_bits) {
  int64_t offset = 0;
  const auto take = [&offset](int64_t bytes) {
    const PageId id{static_cast<uint32_t>(offset / kPageAlignment)};
    offset += bytes;
    return id;
  };
  const int64_t pages = NumPages(*trace);
  for (int64_t i = 0; i < pages; ++i) {
    dense_.push_back(take(DensePageBytes(trace->shape, DenseDType(format))));
  }
  if (!IsProgressive(format)) return;
  basis_ = take(MakeBasisLayout(trace->shape).block_bytes);
  for (int64_t i = 0; i < trace->num_tokens / kPageTokens; ++i) {
    sealed_.push_back(take(MakePageLayout(trace->shape, stored_bits).page_bytes));
  }
}

absl::StatusOr<std::unique_ptr<TraceCache>> TraceCache::Make(Backend* backend, const Trace* trace,
                                                             PageFormat format,
                                                             int32_t stored_bits) {
  std::unique_ptr<TraceCache> cache(new TraceCache(backend, trace, format, stored_bits));
  absl::Status status = cache->ImportTokens();
  if (status.ok() && IsProgressive(format)) status = cache->SealAll();
  if (!status.ok()) return status;
  for (size_t sealed = 0; sealed <= cache->sealed_.size(); ++sealed) {
    std::vector<PageId> table(cache->sealed_.begin(), cache->sealed_.begin() + sealed);
    table.insert(table.end(), cache->dense_.begin() + sealed, cache->dense_.end());
    cache->tables_.push_back(std::move(table));
    cache->runs_.push_back({static_cast<int32_t>(sealed), cache->basis_});
  }
  return cache;
}

absl::Status TraceCache::ImportTokens() {
  StepLimits limits;
  limits.max_sequences = 1;
  limits.max_kv_bytes =
      int64_t{kImportTokens} * trace_->shape.num_kv_heads * trace_->shape.head_dim * 2;
  limits.max_decisions = trace_->shape.num_kv_heads;
  limits.max_table_entries = static_cast<int64_t>(dense_.size());
  auto buffers = backend_->CreateStepBuffers(limits);
  if (!buffers.ok()) return buffers.status();
  for (int64_t begin = 0; begin < trace_->num_tokens; begin += kImportTokens) {
    const int64_t end = std::min<int64_t>(trace_->num_tokens, begin + kImportTokens);
    TransposeTokens(trace_->k, *trace_, begin, end, (*buffers)->k());
    TransposeTokens(trace_->v, *trace_, begin, end, (*buffers)->v());
    SequenceStep step;
    step.kv_len = begin;
    step.append_len = static_cast<int32_t>(end - begin);
    step.pages = dense_;
    AttendBatch batch;
    batch.shape = trace_->shape;
    batch.format = format_;
    batch.in_type = DType::kF16;
    batch.out_type = DType::kF32;
    batch.sequences = absl::MakeConstSpan(&step, 1);
    batch.buffers = buffers->get();
    const auto plan = backend_->PlanAttend(batch);
    if (!plan.ok()) return plan.status();
    const auto ticket = backend_->RunAttend(**plan, batch);
    if (!ticket.ok()) return ticket.status();
    absl::Status status = backend_->Wait(*ticket);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status TraceCache::SealAll() {
  const AttentionShape& shape = trace_->shape;
  FitBasisTask fit;
  fit.shape = shape;
  fit.pages = absl::MakeConstSpan(dense_).subspan(0, kFitTokens / kPageTokens);
  fit.page_type = DenseDType(format_);
  fit.target = basis_;
  std::vector<float> sample;
  for (int32_t row = 0; row < std::max(1, trace_->num_rows / 4); ++row) {
    for (int32_t head = 0; head < shape.num_q_heads; ++head) {
      const int64_t at = (int64_t{head} * trace_->num_rows + row) * shape.head_dim;
      for (int32_t c = 0; c < shape.head_dim; ++c) {
        sample.push_back(ToFloat(Fp16{trace_->q[at + c]}));
      }
    }
  }
  fit.query_sample = sample;
  fit.softmax_scale = static_cast<float>(trace_->softmax_scale);
  absl::Status status = backend_->FitBasis(fit);
  if (!status.ok()) return status;
  std::vector<SealTask> tasks;
  for (size_t page = 0; page < sealed_.size(); ++page) {
    tasks.push_back(
        {shape, dense_[page], sealed_[page], basis_, stored_bits_, DenseDType(format_)});
  }
  std::vector<SealResult> results(tasks.size());
  return backend_->SealPages(tasks, absl::MakeSpan(results));
}

SequenceStep TraceCache::Step(int32_t row, const DecisionParams& decision, int64_t kv_len) const {
  SequenceStep step;
  step.kv_len = kv_len >= 0 ? kv_len : trace_->positions[row] + 1;
  step.q_len = 1;
  step.q_start = step.kv_len - 1;
  if (IsProgressive(format_)) {
    step.num_sealed_pages =
        std::max<int32_t>(0, static_cast<int32_t>(step.kv_len / kPageTokens) - 1);
  }
  const auto pages = static_cast<size_t>((step.kv_len + kPageTokens - 1) / kPageTokens);
  step.pages = absl::MakeConstSpan(tables_[step.num_sealed_pages]).subspan(0, pages);
  if (step.num_sealed_pages > 0) step.bases = absl::MakeConstSpan(&runs_[step.num_sealed_pages], 1);
  step.stored_bits = stored_bits_;
  step.exact_pages = absl::MakeConstSpan(dense_).subspan(0, step.num_sealed_pages);
  step.softmax_scale = static_cast<float>(trace_->softmax_scale);
  step.decision = decision;
  return step;
}

absl::StatusOr<AttendBatch> TraceCache::Prepare(const std::vector<SequenceStep>& steps,
                                                const std::vector<int32_t>& rows) {
  const AttentionShape& shape = trace_->shape;
  const int64_t count = static_cast<int64_t>(steps.size());
  const int64_t d = shape.head_dim;
  StepLimits limits;
  limits.max_sequences = static_cast<int32_t>(count);
  limits.max_q_bytes = count * shape.num_q_heads * d * int64_t{sizeof(float)};
  limits.max_q_rows = count * shape.num_q_heads;
  limits.max_decisions = count * shape.num_kv_heads;
  limits.max_table_entries = count * static_cast<int64_t>(dense_.size());
  auto buffers = backend_->CreateStepBuffers(limits);
  if (!buffers.ok()) return buffers.status();
  buffers_ = *std::move(buffers);
  std::byte* q = buffers_->q();
  for (const int32_t row : rows) {
    for (int32_t head = 0; head < shape.num_q_heads; ++head) {
      std::memcpy(q, trace_->q.data() + (int64_t{head} * trace_->num_rows + row) * d, d * 2);
      q += d * 2;
    }
  }
  AttendBatch batch;
  batch.shape = shape;
  batch.format = format_;
  batch.in_type = DType::kF16;
  batch.out_type = DType::kF32;
  batch.sequences = steps;
  batch.buffers = buffers_.get();
  return batch;
}

absl::StatusOr<std::vector<TraceRowResult>> TraceCache::Attend(
    const std::vector<SequenceStep>& steps, const std::vector<int32_t>& rows) {
  const auto batch = Prepare(steps, rows);
  if (!batch.ok()) return batch.status();
  const auto plan = backend_->PlanAttend(*batch);
  if (!plan.ok()) return plan.status();
  const auto ticket = backend_->RunAttend(**plan, *batch);
  if (!ticket.ok()) return ticket.status();
  const absl::Status status = backend_->Wait(*ticket);
  if (!status.ok()) return status;
  const AttentionShape& shape = trace_->shape;
  const int64_t row_floats = int64_t{shape.num_q_heads} * shape.head_dim;
  std::vector<TraceRowResult> results(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    const float* out = reinterpret_cast<const float*>(buffers_->out()) + i * row_floats;
    results[i].out.assign(out, out + row_floats);
    const float* lse = buffers_->lse() + i * shape.num_q_heads;
    results[i].lse.assign(lse, lse + shape.num_q_heads);
    const HeadDecision* decisions = buffers_->decisions() + i * shape.num_kv_heads;
    results[i].decisions.assign(decisions, decisions + shape.num_kv_heads);
  }
  return results;
}

}  // namespace adaattn

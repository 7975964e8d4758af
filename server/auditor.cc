#include "server/auditor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/format/float_types.h"
#include "server/kv_cache.h"

namespace adaattn {
namespace {

constexpr size_t kMaxKept = 4;
constexpr int64_t kMaxElements = int64_t{1} << 18;  // of q
constexpr int64_t kMaxPages = int64_t{1} << 16;
constexpr int32_t kMaxKvHeads = 256;

}  // namespace

Auditor::Auditor(double share, Backend* backend, EngineObserver* observer)
    : share_(share), backend_(backend), observer_(observer) {}

bool Auditor::Samples() {
  due_ += share_;
  if (due_ < 1) return false;
  due_ -= 1;
  return true;
}

void Auditor::Keep(const AuditStep& step) {
  const SessionConfig& config = step.session->config();
  const auto pages = static_cast<int64_t>(step.session->layers()[step.layer].pages.size());
  const int64_t elements = int64_t{step.q_len} * config.shape.num_q_heads * config.shape.head_dim;
  if (kept_.size() >= kMaxKept || elements > kMaxElements || pages > kMaxPages) return;
  Kept& kept = kept_.emplace_back();
  kept.step = step;
  kept.q.assign(step.q.begin(), step.q.end());
  kept.out.assign(step.out.begin(), step.out.end());
  kept.heads.assign(step.heads.begin(), step.heads.end());
}

absl::Status Auditor::RunAll() {
  absl::Status status;
  for (const Kept& kept : kept_) {
    if (status.ok()) status = RunOne(kept);
  }
  kept_.clear();
  return status;
}

absl::Status Auditor::RunOne(const Kept& kept) {
  if (buffers_ == nullptr) {
    StepLimits limits;
    limits.max_sequences = 1;
    limits.max_q_bytes = kMaxElements * DTypeBytes(DType::kF32);
    limits.max_kv_bytes = kPageAlignment;
    limits.max_q_rows = kMaxElements / 64;
    limits.max_decisions = kMaxKvHeads;
    limits.max_table_entries = kMaxPages;
    absl::StatusOr<std::unique_ptr<StepBuffers>> buffers = backend_->CreateStepBuffers(limits);
    if (!buffers.ok()) return buffers.status();
    buffers_ = *std::move(buffers);
  }
  const AuditStep& step = kept.step;
  const SessionConfig& config = step.session->config();
  const LayerState& state = step.session->layers()[step.layer];
  std::vector<PageId> exact_table;
  SequenceStep sequence;
  sequence.kv_len = state.length;
  sequence.q_len = step.q_len;
  sequence.q_start = step.q_start;
  const bool exact = config.keeps_exact_pages();
  if (exact) {
    KvCache::FillExactTable(state, AppendReservation(), &exact_table);
    sequence.pages = exact_table;
  } else {
    sequence.pages = state.pages;
    sequence.num_sealed_pages = state.num_sealed;
    sequence.bases = KvCache::SealedRuns(state);
    sequence.stored_bits = config.stored_bits;
  }
  sequence.softmax_scale = config.softmax_scale;
  sequence.softcap = step.softcap;
  sequence.window = step.window;
  sequence.decision.policy = Policy::kFullDepth;
  AttendBatch batch;
  batch.shape = config.shape;
  batch.format = exact ? DenseFormat(config.format) : config.format;
  batch.in_type = step.in_type;
  batch.out_type = DType::kF32;
  batch.sequences = {&sequence, 1};
  batch.buffers = buffers_.get();
  std::memcpy(buffers_->q(), kept.q.data(), kept.q.size());
  absl::StatusOr<const AttendPlan*> plan = backend_->PlanAttend(batch);
  if (!plan.ok()) return plan.status();
  absl::StatusOr<StepTicket> ticket = backend_->RunAttend(**plan, batch);
  if (!ticket.ok()) return ticket.status();
  absl::Status status = backend_->Wait(*ticket);
  if (!status.ok()) return status;
  Compare(kept, reinterpret_cast<const float*>(buffers_->out()), exact);
  return absl::OkStatus();
}

void Auditor::Compare(const Kept& kept, const float* reference, bool exact) {
  const AttentionShape& shape = kept.step.session->config().shape;
  std::vector<double> difference(shape.num_kv_heads, 0), norm(shape.num_kv_heads, 0);
  int64_t index = 0;
  for (int32_t row = 0; row < kept.step.q_len; ++row) {
    for (int32_t q_head = 0; q_head < shape.num_q_heads; ++q_head) {
      const int32_t kv_head = q_head / shape.group_size();
      for (int32_t c = 0; c < shape.head_dim; ++c, ++index) {
        const double truth = reference[index];
        const double gap = ReadElement(kept.out.data(), kept.step.out_type, index) - truth;
        difference[kv_head] += gap * gap;
        norm[kv_head] += truth * truth;
      }
    }
  }
  std::vector<float> actual(shape.num_kv_heads), said(shape.num_kv_heads);
  for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
    actual[head] =
        norm[head] == 0 ? 0 : static_cast<float>(std::sqrt(difference[head] / norm[head]));
    said[head] =
        kept.step.deterministic ? kept.heads[head].error_bound : kept.heads[head].predicted_error;
  }
  AuditReport report;
  report.exact_reference = exact;
  report.actual = actual;
  (kept.step.deterministic ? report.bounds : report.predicted) = said;
  observer_->OnAudit(report);
  const ModelProfile* profile = kept.step.session->config().profile.get();
  if (!kept.step.budget || profile == nullptr || profile->audits == nullptr) return;
  for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
    if (kept.heads[head].theta == 0) said[head] = 0;  // full depth: no theta met the target
  }
  profile->audits->Add(kept.step.layer, actual, said);
}

}  // namespace adaattn

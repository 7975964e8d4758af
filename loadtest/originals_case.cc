#include "loadtest/originals_case.h"

#include "absl/strings/str_cat.h"
#include "loadtest/row_judge.h"

namespace adaattn {
namespace {

constexpr PageFormat kFormat = PageFormat::kProgressiveF16;  // traces are FP16
constexpr int64_t kLeastTokens = 1024;                       // that a basis is fitted on

}  // namespace

const char* OriginalsName(Originals originals) {
  switch (originals) {
    case Originals::kNone:
      return "none";
    case Originals::kPool:
      return "pool";
    case Originals::kTier:
      return "tier";
  }
  return "unknown";
}

absl::StatusOr<std::unique_ptr<OriginalsCase>> OriginalsCase::Create(const CreateBackendFn& create,
                                                                     const Trace* trace,
                                                                     int32_t stored_bits,
                                                                     int32_t max_sequences) {
  if (trace->num_tokens < kLeastTokens) {
    return absl::InvalidArgumentError(absl::StrCat("a trace of ", trace->num_tokens,
                                                   " tokens; must have at least ", kLeastTokens));
  }
  BackendOptions options;
  options.pool_bytes = (1 + max_sequences) * TraceCache::PoolBytes(*trace, kFormat, stored_bits);
  options.exact_tier_bytes =
      max_sequences * TraceCache::PoolBytes(*trace, DenseFormat(kFormat), stored_bits);
  auto backend = create(options);
  if (!backend.ok()) return backend.status();
  std::unique_ptr<OriginalsCase> made(new OriginalsCase(trace, *std::move(backend), max_sequences));
  auto cache = TraceCache::Make(made->backend_.get(), trace, kFormat, stored_bits);
  if (!cache.ok()) return cache.status();
  made->cache_ = *std::move(cache);
  return made;
}

absl::Status OriginalsCase::Fill(int32_t num_sequences, int32_t kv_len) {
  if (num_sequences < 1 || num_sequences > max_sequences_ || kv_len < 2 * kPageTokens ||
      kv_len > trace_->num_tokens) {
    return absl::InvalidArgumentError(absl::StrCat(
        num_sequences, " sequences of ", kv_len, " tokens; at most ", max_sequences_, " of ",
        2 * kPageTokens, " to ", trace_->num_tokens, " tokens, which the trace has"));
  }
  kv_len_ = kv_len;
  sequences_.assign(num_sequences, Sequence());
  // Behind what the cache holds.
  int64_t pool_end = TraceCache::PoolBytes(*trace_, kFormat, cache_->stored_bits());
  int64_t tier_end = backend_->info().pool_bytes;
  for (int32_t i = 0; i < num_sequences; ++i) {
    Sequence* sequence = &sequences_[i];
    sequence->row = SourceRow(*trace_, shape(), kv_len, i, 0).row;
    absl::Status status = CopySequence(cache_->Step(sequence->row, DecisionParams(), kv_len),
                                       &pool_end, &tier_end, sequence);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status OriginalsCase::CopySequence(const SequenceStep& source, int64_t* pool_end,
                                         int64_t* tier_end, Sequence* sequence) {
  const int64_t dense_bytes = DensePageBytes(shape(), DenseDType(kFormat));
  const int64_t sealed_bytes = MakePageLayout(shape(), source.stored_bits).page_bytes;
  absl::Status status;
  for (size_t i = 0; i < source.pages.size(); ++i) {
    const bool sealed = i < source.exact_pages.size();
    const PageId dense = sealed ? source.exact_pages[i] : source.pages[i];
    status.Update(CopyPage(dense, dense_bytes, pool_end, &sequence->pool));
    status.Update(CopyPage(dense, dense_bytes, tier_end, &sequence->tier));
    if (sealed) {
      status.Update(CopyPage(source.pages[i], sealed_bytes, pool_end, &sequence->pages));
    } else {
      sequence->pages.push_back(sequence->pool.back());
    }
  }
  return status;
}

absl::Status OriginalsCase::CopyPage(PageId source, int64_t bytes, int64_t* end,
                                     std::vector<PageId>* pages) {
  pages->push_back(PageId{static_cast<uint32_t>(*end / kPageAlignment)});
  *end += bytes;
  return backend_->CopyPage(source, pages->back(), bytes);
}

std::vector<SequenceStep> OriginalsCase::Steps(const DecisionParams& decision) const {
  std::vector<SequenceStep> steps;
  for (const Sequence& sequence : sequences_) {
    steps.push_back(cache_->Step(sequence.row, decision, kv_len_));
    steps.back().pages = sequence.pages;
    steps.back().exact_pages = {};
  }
  return steps;
}

absl::StatusOr<OriginalsStep> OriginalsCase::Bounded(Originals originals, float target) {
  DecisionParams decision;
  decision.policy = Policy::kBudget;
  decision.target_relative_error = target;
  decision.bounded = true;
  std::vector<SequenceStep> steps = Steps(decision);
  for (size_t i = 0; i < steps.size() && originals != Originals::kNone; ++i) {
    const Sequence& sequence = sequences_[i];
    const auto& pages = originals == Originals::kPool ? sequence.pool : sequence.tier;
    steps[i].exact_pages = absl::MakeConstSpan(pages).subspan(0, steps[i].num_sealed_pages);
  }
  return Prepare(std::move(steps), kFormat);
}

absl::StatusOr<OriginalsStep> OriginalsCase::Exact(Originals originals) {
  std::vector<SequenceStep> steps = Steps(DecisionParams());
  for (size_t i = 0; i < steps.size(); ++i) {
    const Sequence& sequence = sequences_[i];
    steps[i].pages = originals == Originals::kPool ? sequence.pool : sequence.tier;
    steps[i].num_sealed_pages = 0;
    steps[i].bases = {};
  }
  return Prepare(std::move(steps), DenseFormat(kFormat));
}

absl::StatusOr<OriginalsStep> OriginalsCase::Prepare(std::vector<SequenceStep> sequences,
                                                     PageFormat format) {
  OriginalsStep step;
  step.sequences = std::move(sequences);
  std::vector<int32_t> rows;
  for (const Sequence& sequence : sequences_) rows.push_back(sequence.row);
  const auto batch = cache_->Prepare(step.sequences, rows);
  if (!batch.ok()) return batch.status();
  step.batch = *batch;
  step.batch.format = format;
  return step;
}

absl::Status OriginalsCase::Run(const OriginalsStep& step) {
  const auto plan = backend_->PlanAttend(step.batch);
  if (!plan.ok()) return plan.status();
  const auto ticket = backend_->RunAttend(**plan, step.batch);
  if (!ticket.ok()) return ticket.status();
  return backend_->Wait(*ticket);
}

}  // namespace adaattn

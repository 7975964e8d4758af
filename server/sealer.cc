#include "server/sealer.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace adaattn {
namespace {

// Weight of a new page in a layer's running mean of drift: about the last 8 pages count.
constexpr float kDriftWeight = 0.125f;
// Of a new step in the running mean of their kv heads: about the last 16 count.
constexpr double kStepWeight = 1.0 / 16;

bool HasProfileBasis(const SessionConfig& config) {
  return config.profile != nullptr && !config.profile->basis.empty();
}

}  // namespace

int32_t Sealer::Due(const Session& session, int32_t layer) const {
  const SessionConfig& config = session.config();
  if (!IsProgressive(config.format) || session.closed()) return 0;
  const LayerState& state = session.layers()[layer];
  const auto full = static_cast<int32_t>(state.length / kPageTokens);
  const int32_t due = full - 1 - state.num_sealed;  // The successor must be full, too.
  const int32_t fit_pages = options_.fit_tokens / kPageTokens;
  if (due <= 0) return 0;
  if (state.bases.empty() && !HasProfileBasis(config) && full < fit_pages) return 0;
  if (state.refit_wanted && due < fit_pages) return 0;
  return due;
}

bool Sealer::KnowsShort() const {
  return options_.min_tokens > 0 ||
         (options_.min_tokens < 0 && !cache_->backend()->info().seal_crossovers.empty());
}

bool Sealer::IsShort(const Session& session, int32_t layer) const {
  const LayerState& state = session.layers()[layer];
  if (!KnowsShort() || state.num_sealed > 0 || state.seal_asked) return false;
  if (options_.min_tokens > 0) return state.length < options_.min_tokens;
  const double kv_heads = std::max<double>(step_kv_heads_, session.config().shape.num_kv_heads);
  return state.length < TokensToSeal(cache_->backend()->info().seal_crossovers, kv_heads);
}

bool Sealer::Owes(const Session& session) const {
  for (int32_t layer = 0; layer < session.config().num_layers; ++layer) {
    if (Due(session, layer) > 0) return true;
  }
  return false;
}

void Sealer::Account(int32_t due, LayerState* state) {
  backlog_pages_ += due - state->seal_backlog;
  state->seal_backlog = due;
}

void Sealer::Enqueue(const std::shared_ptr<Session>& session, int32_t layer, int32_t due) {
  LayerState& state = session->layers()[layer];
  if (state.seal_backlog == 0) queue_.push_back({session, layer});
  Account(due, &state);
}

void Sealer::Notice(const std::shared_ptr<Session>& session, int32_t layer) {
  const int32_t due = Due(*session, layer);
  const LayerState& state = session->layers()[layer];
  if (due == state.seal_backlog || due == 0) return;
  if (state.seal_backlog == 0 && IsShort(*session, layer)) return;
  Enqueue(session, layer, due);
}

void Sealer::NoticeStep(int64_t kv_heads) {
  const auto heads = static_cast<double>(kv_heads);
  step_kv_heads_ += step_kv_heads_ == 0 ? heads : kStepWeight * (heads - step_kv_heads_);
}

void Sealer::Ask(const std::shared_ptr<Session>& session) {
  for (int32_t layer = 0; layer < session->config().num_layers; ++layer) {
    session->layers()[layer].seal_asked = true;
    Notice(session, layer);
  }
}

bool Sealer::QueueAll() {
  if (!KnowsShort()) return false;
  for (const std::shared_ptr<Session>& session : table_->All()) {
    for (int32_t layer = 0; layer < session->config().num_layers; ++layer) {
      const int32_t due = Due(*session, layer);
      if (due > 0) Enqueue(session, layer, due);
    }
  }
  return !queue_.empty();
}

absl::StatusOr<SealReport> Sealer::RunSlice() {
  SealReport report;
  while (!queue_.empty()) {
    const Entry entry = queue_.front();
    LayerState& state = entry.session->layers()[entry.layer];
    const int32_t due = Due(*entry.session, entry.layer);
    Account(due, &state);
    if (due == 0) {
      queue_.pop_front();
      continue;
    }
    const bool fits = state.bases.empty() || state.refit_wanted;
    absl::Status status = fits ? FitBasis(entry.session.get(), entry.layer)
                               : SealSome(entry.session.get(), entry.layer, due, &report);
    if (absl::IsResourceExhausted(status)) {
      report.pages_deferred = due;
      report.deferred_why = std::string(status.message());
      // Others may find room in the runs of their own size classes.
      std::rotate(queue_.begin(), queue_.begin() + 1, queue_.end());
      return report;
    }
    if (!status.ok()) return status;
    if (fits) report.bases_fitted = 1;
    return report;
  }
  return report;
}

absl::Status Sealer::FitBasis(Session* session, int32_t layer) {
  const SessionConfig& config = session->config();
  LayerState& state = session->layers()[layer];
  if (state.bases.empty() && HasProfileBasis(config)) {
    const auto mean_size = static_cast<size_t>(config.shape.num_kv_heads) * config.shape.head_dim;
    const size_t basis_size = mean_size * config.shape.head_dim;
    const ModelProfile& profile = *config.profile;
    return cache_->LoadBasis(
        session, layer,
        absl::MakeConstSpan(profile.basis_mean).subspan(layer * mean_size, mean_size),
        absl::MakeConstSpan(profile.basis).subspan(layer * basis_size, basis_size));
  }
  absl::StatusOr<PageLease> lease = cache_->ReserveBasis(*session);
  if (!lease.ok()) return lease.status();
  FitBasisTask task;
  task.shape = config.shape;
  task.pages =
      absl::MakeConstSpan(state.pages).subspan(state.num_sealed, options_.fit_tokens / kPageTokens);
  task.page_type = DenseDType(config.format);
  task.query_sample = state.queries.rows();
  task.softmax_scale = config.softmax_scale;
  task.softcap = config.layer(layer).softcap;
  task.error_factors = config.error_factors(layer);
  task.target = lease->pages().front();
  absl::Status status = cache_->backend()->FitBasis(task);
  if (status.ok()) cache_->CommitBasis(*std::move(lease), &state);
  return status;
}

// The sealed pages, then what the exact tier is to hold of them: all or none.
absl::StatusOr<PageLease> Sealer::ReservePages(const Session& session, int32_t count) {
  PageRequest request;
  request.bytes = session.sealed_page_bytes();
  request.state = PageState::kSealed;
  request.tenant = session.tenant_id();
  request.count = count;
  request.may_use_reserve = true;
  std::vector<PageRequest> requests = {request};
  if (session.config().exact_tier == ExactTier::kHost) {
    request.bytes = session.dense_page_bytes();
    request.state = PageState::kExact;
    requests.push_back(request);
  }
  return cache_->allocator()->Reserve(requests);
}

absl::Status Sealer::SealSome(Session* session, int32_t layer, int32_t due, SealReport* report) {
  const SessionConfig& config = session->config();
  LayerState& state = session->layers()[layer];
  int32_t count = std::min(due, options_.pages_per_slice);
  absl::StatusOr<PageLease> lease = ReservePages(*session, count);
  if (!lease.ok() && count > 1) {
    count = 1;  // One page in the place of another may fit where a slice does not.
    lease = ReservePages(*session, count);
  }
  if (!lease.ok()) return lease.status();
  absl::Status status = cache_->ZeroPages(*lease);
  if (!status.ok()) return status;
  std::vector<SealTask> tasks(count);
  std::vector<SealResult> results(count);
  for (int32_t i = 0; i < count; ++i) {
    tasks[i].shape = config.shape;
    tasks[i].source = state.pages[state.num_sealed + i];
    tasks[i].target = lease->pages()[i];
    if (config.exact_tier == ExactTier::kHost) tasks[i].exact_copy = lease->pages()[count + i];
    tasks[i].basis = state.bases.back().basis;
    tasks[i].stored_bits = config.stored_bits;
    tasks[i].page_type = DenseDType(config.format);
  }
  status = cache_->backend()->SealPages(tasks, absl::MakeSpan(results));
  if (!status.ok()) return status;
  const std::vector<PageId> sealed = lease->Take();
  for (int32_t i = 0; i < count; ++i) {
    PageId& page = state.pages[state.num_sealed + i];
    if (config.keeps_exact_pages()) {
      const bool copied = config.exact_tier == ExactTier::kHost;
      state.exact_pages.push_back(copied ? sealed[count + i] : page);
    }
    if (config.exact_tier != ExactTier::kPool) cache_->allocator()->Release(page);
    page = sealed[i];
    const float drift = results[i].drift_ratio;
    state.drift_ratio = state.drift_ratio == 0
                            ? drift
                            : state.drift_ratio + kDriftWeight * (drift - state.drift_ratio);
    report->drift_ratio = std::max(report->drift_ratio, drift);
  }
  state.num_sealed += count;
  state.bases.back().num_pages += count;
  report->pages_sealed = count;
  state.refit_wanted = options_.refit_drift_ratio > 0 &&
                       state.drift_ratio > options_.refit_drift_ratio &&
                       state.bases.size() < kMaxBasisRuns;
  Account(Due(*session, layer), &state);
  return absl::OkStatus();
}

}  // namespace adaattn

#include "server/kv_cache.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

int32_t PagesFor(int64_t tokens) {
  return static_cast<int32_t>((tokens + kPageTokens - 1) / kPageTokens);
}

PageId BasisOf(const LayerState& state, int32_t page) {
  int32_t end = 0;
  for (const BasisRun& run : state.bases) {
    end += run.num_pages;
    if (page < end) return run.basis;
  }
  return kNoPage;
}

// Shrinks the runs to `num_sealed` pages. The newest basis stays, pages or not: the next page is
// sealed with it.
void ShrinkRuns(int32_t num_sealed, LayerState* state, PageAllocator* allocator) {
  std::vector<BasisRun> kept;
  int32_t begin = 0;
  for (size_t i = 0; i < state->bases.size(); ++i) {
    BasisRun run = state->bases[i];
    const int32_t pages = run.num_pages;
    run.num_pages = std::clamp(num_sealed - begin, 0, pages);
    begin += pages;
    if (run.num_pages > 0 || i + 1 == state->bases.size()) {
      kept.push_back(run);
    } else {
      allocator->Release(run.basis);
    }
  }
  state->bases = std::move(kept);
}

void ReleaseAll(std::vector<PageId>* pages, size_t keep, PageAllocator* allocator) {
  for (size_t i = keep; i < pages->size(); ++i) allocator->Release((*pages)[i]);
  pages->resize(std::min(keep, pages->size()));
}

// Cuts the layer to `length` tokens. `reopened`: the page that takes the place of a sealed one
// which `length` lies inside of; kNoPage where there is none, or the original is in the pool.
void CutLayer(int64_t length, PageId reopened, LayerState* state, PageAllocator* allocator) {
  const int32_t keep = PagesFor(length);
  ReleaseAll(&state->pages, keep, allocator);
  const int32_t num_sealed =
      std::min(state->num_sealed, static_cast<int32_t>(length / kPageTokens));
  if (keep > num_sealed && keep <= state->num_sealed) {
    allocator->Release(state->pages.back());
    if (reopened == kNoPage) {
      reopened = state->exact_pages[keep - 1];
      allocator->AddRef(reopened);
    }
    state->pages.back() = reopened;
  }
  ReleaseAll(&state->exact_pages, num_sealed, allocator);
  ShrinkRuns(num_sealed, state, allocator);
  state->num_sealed = num_sealed;
  state->length = length;
  if (length < state->last_position + state->last_append_len) state->last_append_len = 0;
}

}  // namespace

absl::Status KvCache::ZeroPages(const PageLease& lease) {
  for (const auto& [page, bytes] : lease.pages_to_zero()) {
    absl::Status status = backend_->ZeroPage(page, bytes);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<AppendReservation> KvCache::ReserveAppend(const Session& session, int32_t layer,
                                                         int32_t append_len) {
  const LayerState& state = session.layers()[layer];
  AppendReservation reservation;
  const int32_t more =
      PagesFor(state.length + append_len) - static_cast<int32_t>(state.pages.size());
  const bool writes_open_page = append_len > 0 && state.length % kPageTokens != 0;
  reservation.copies_open_page = writes_open_page && allocator_->ref_count(state.pages.back()) > 1;
  PageRequest request;
  request.count = more + (reservation.copies_open_page ? 1 : 0);
  if (request.count == 0) return reservation;
  request.bytes = session.dense_page_bytes();
  request.state = PageState::kDense;
  request.tenant = session.tenant_id();
  absl::StatusOr<PageLease> lease = allocator_->Reserve({&request, 1});
  if (!lease.ok()) return lease.status();
  absl::Status status = ZeroPages(*lease);
  if (status.ok() && reservation.copies_open_page) {
    status = backend_->CopyPage(state.pages.back(), lease->pages()[0], request.bytes);
  }
  if (!status.ok()) return status;
  reservation.lease = *std::move(lease);
  return reservation;
}

void KvCache::FillTable(const LayerState& state, const AppendReservation& reservation,
                        std::vector<PageId>* table) {
  table->insert(table->end(), state.pages.begin(), state.pages.end());
  if (reservation.copies_open_page) table->pop_back();
  const absl::Span<const PageId> pages = reservation.lease.pages();
  table->insert(table->end(), pages.begin(), pages.end());
}

void KvCache::FillExactTable(const LayerState& state, const AppendReservation& reservation,
                             std::vector<PageId>* table) {
  const auto begin = static_cast<int64_t>(table->size());
  FillTable(state, reservation, table);
  std::copy(state.exact_pages.begin(), state.exact_pages.end(), table->begin() + begin);
}

void KvCache::CommitAppend(Session* session, int32_t layer, int32_t append_len,
                           AppendReservation reservation) {
  LayerState& state = session->layers()[layer];
  if (reservation.copies_open_page) {
    allocator_->Release(state.pages.back());
    state.pages.pop_back();
  }
  if (!reservation.lease.pages().empty()) {
    const std::vector<PageId> pages = reservation.lease.Take();
    state.pages.insert(state.pages.end(), pages.begin(), pages.end());
  }
  state.length += append_len;
}

std::vector<KvCache::Reopening> KvCache::Reopenings(const Session& session, int64_t length) const {
  std::vector<Reopening> reopenings;
  const auto open_page = static_cast<int32_t>(length / kPageTokens);
  const ExactTier tier = session.config().exact_tier;
  if (length % kPageTokens == 0 || tier == ExactTier::kPool) return reopenings;
  for (int32_t layer = 0; layer < session.config().num_layers; ++layer) {
    const LayerState& state = session.layers()[layer];
    if (open_page >= state.num_sealed) continue;
    Reopening& reopening = reopenings.emplace_back();
    reopening.layer = layer;
    if (tier == ExactTier::kHost) reopening.original = state.exact_pages[open_page];
    ReopenTask& task = reopening.task;
    task.shape = session.config().shape;
    task.source = state.pages[open_page];
    task.basis = BasisOf(state, open_page);
    task.stored_bits = session.config().stored_bits;
    task.page_type = DenseDType(session.config().format);
  }
  return reopenings;
}

absl::Status KvCache::Reopen(const Session& session, std::vector<Reopening>* reopenings) {
  if (reopenings->empty()) return absl::OkStatus();
  PageRequest request;
  request.bytes = session.dense_page_bytes();
  request.tenant = session.tenant_id();
  request.count = static_cast<int32_t>(reopenings->size());
  absl::StatusOr<PageLease> lease = allocator_->Reserve({&request, 1});
  if (!lease.ok()) return lease.status();
  absl::Status status = ZeroPages(*lease);
  std::vector<ReopenTask> tasks;
  for (size_t i = 0; i < reopenings->size() && status.ok(); ++i) {
    Reopening& reopening = (*reopenings)[i];
    reopening.task.target = lease->pages()[i];
    if (reopening.original == kNoPage) {
      tasks.push_back(reopening.task);
    } else {
      status = backend_->CopyPage(reopening.original, reopening.task.target, request.bytes);
    }
  }
  if (status.ok() && !tasks.empty()) status = backend_->ReopenPages(tasks);
  if (status.ok()) lease->Take();  // From here on the tables hold the references.
  return status;
}

absl::StatusOr<int32_t> KvCache::Truncate(Session* session, int64_t length) {
  std::vector<Reopening> reopenings = Reopenings(*session, length);
  absl::Status status = Reopen(*session, &reopenings);
  if (!status.ok()) return status;
  std::vector<PageId> reopened(session->layers().size(), kNoPage);
  int32_t decoded = 0;
  for (const Reopening& reopening : reopenings) {
    reopened[reopening.layer] = reopening.task.target;
    decoded += reopening.original == kNoPage ? 1 : 0;
  }
  for (int32_t layer = 0; layer < session->config().num_layers; ++layer) {
    LayerState& state = session->layers()[layer];
    if (state.length > length) CutLayer(length, reopened[layer], &state, allocator_);
  }
  return decoded;
}

void KvCache::Share(const Session& source, Session* branch) {
  branch->layers() = source.layers();
  for (LayerState& state : branch->layers()) {
    state.seal_backlog = 0;
    state.batch_serial = 0;
    for (PageId page : state.pages) allocator_->AddRef(page);
    for (PageId page : state.exact_pages) allocator_->AddRef(page);
    for (const BasisRun& run : state.bases) allocator_->AddRef(run.basis);
  }
}

absl::Status KvCache::Read(const Session& session, int32_t layer, int64_t begin, int64_t end,
                           absl::Span<float> k, absl::Span<float> v) {
  const SessionConfig& config = session.config();
  const LayerState& state = session.layers()[layer];
  ReadTask task;
  task.shape = config.shape;
  task.format = config.format;
  std::vector<PageId> exact_table;
  if (config.keeps_exact_pages()) {
    FillExactTable(state, AppendReservation(), &exact_table);
    task.format = DenseFormat(config.format);
    task.pages = exact_table;
  } else {
    task.pages = state.pages;
    task.num_sealed_pages = state.num_sealed;
    task.bases = SealedRuns(state);
    task.stored_bits = config.stored_bits;
  }
  task.key_scales = config.layer_key_scales(layer);
  task.value_scales = config.layer_value_scales(layer);
  task.begin = begin;
  task.end = end;
  task.k = k.data();
  task.v = v.data();
  return backend_->ReadTokens(task);
}

absl::Span<const BasisRun> KvCache::SealedRuns(const LayerState& state) {
  const absl::Span<const BasisRun> runs = state.bases;
  return !runs.empty() && runs.back().num_pages == 0 ? runs.first(runs.size() - 1) : runs;
}

absl::StatusOr<PageLease> KvCache::ReserveBasis(const Session& session) {
  PageRequest request;
  request.bytes = session.basis_bytes();
  request.state = PageState::kBasis;
  request.tenant = session.tenant_id();
  request.may_use_reserve = true;
  absl::StatusOr<PageLease> lease = allocator_->Reserve({&request, 1});
  if (!lease.ok()) return lease.status();
  absl::Status status = ZeroPages(*lease);
  if (!status.ok()) return status;
  return lease;
}

void KvCache::CommitBasis(PageLease lease, LayerState* state) {
  if (!state->bases.empty() && state->bases.back().num_pages == 0) {
    allocator_->Release(state->bases.back().basis);
    state->bases.pop_back();
  }
  state->bases.push_back({0, lease.Take().front()});
  state->queries.Clear();
  state->refit_wanted = false;
  state->drift_ratio = 0;
}

absl::Status KvCache::LoadBasis(Session* session, int32_t layer, absl::Span<const float> mean,
                                absl::Span<const float> basis) {
  LayerState& state = session->layers()[layer];
  if (!IsProgressive(session->config().format)) {
    return absl::FailedPreconditionError("basis: only progressive sessions have one");
  }
  if (SealedRuns(state).size() == kMaxBasisRuns) {
    return absl::FailedPreconditionError(absl::StrCat("basis: layer ", layer, " has pages of ",
                                                      kMaxBasisRuns, " bases, which is the most"));
  }
  absl::StatusOr<PageLease> lease = ReserveBasis(*session);
  if (!lease.ok()) return lease.status();
  LoadBasisTask task;
  task.shape = session->config().shape;
  task.mean = mean;
  task.basis = basis;
  task.error_factors = session->config().error_factors(layer);
  task.target = lease->pages().front();
  absl::Status status = backend_->LoadBasis(task);
  if (status.ok()) CommitBasis(*std::move(lease), &state);
  return status;
}

void KvCache::Release(Session* session) {
  for (LayerState& state : session->layers()) {
    ReleaseAll(&state.pages, 0, allocator_);
    ReleaseAll(&state.exact_pages, 0, allocator_);
    for (const BasisRun& run : state.bases) allocator_->Release(run.basis);
    const int32_t seal_backlog = state.seal_backlog;
    state = LayerState();
    state.seal_backlog = seal_backlog;  // The sealer still counts it.
  }
}

}  // namespace adaattn

#include "server/session_control.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

absl::Status CheckOpen(const Session& session) {
  if (!session.closed()) return absl::OkStatus();
  return absl::NotFoundError(absl::StrCat("session ", session.id(), " is closed"));
}

absl::Status CheckLayer(const Session& session, int32_t layer) {
  const int32_t num_layers = session.config().num_layers;
  if (layer >= 0 && layer < num_layers) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("layer: ", layer, " is not in [0, ", num_layers, ")"));
}

}  // namespace

absl::Status SessionControl::CheckEqualLengths(const Session& session) const {
  absl::Status status = CheckOpen(session);
  if (!status.ok()) return status;
  const std::vector<LayerState>& layers = session.layers();
  for (size_t layer = 1; layer < layers.size(); ++layer) {
    if (layers[layer].length != layers[0].length) {
      return absl::FailedPreconditionError(
          absl::StrCat("all layers must have equal lengths: layer 0 has ", layers[0].length,
                       " tokens, layer ", layer, " has ", layers[layer].length));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<TruncateResult> SessionControl::Truncate(Session* session, int64_t position) {
  absl::Status status = CheckEqualLengths(*session);
  if (!status.ok()) return status;
  const int64_t start = session->config().start_position;
  const int64_t length = session->layers()[0].length;
  if (position < start || position > start + length) {
    return absl::InvalidArgumentError(
        absl::StrCat("position: ", position, " is not in [", start, ", ", start + length, "]"));
  }
  absl::StatusOr<int32_t> reopened = cache_->Truncate(session, position - start);
  if (!reopened.ok()) return reopened.status();
  return TruncateResult{position - start, *reopened};
}

absl::StatusOr<std::vector<std::shared_ptr<Session>>> SessionControl::Fork(const Session& session,
                                                                           int32_t count) {
  absl::Status status = CheckEqualLengths(session);
  if (!status.ok()) return status;
  std::vector<std::shared_ptr<Session>> branches;
  for (int32_t i = 0; i < count; ++i) {
    absl::StatusOr<std::shared_ptr<Session>> branch = table_->Open(session.config());
    if (!branch.ok()) {
      for (const auto& made : branches) {
        status = Close(made->id(), made->epoch(), made->config().tenant);
        if (!status.ok()) return status;
      }
      return branch.status();
    }
    cache_->Share(session, branch->get());
    branches.push_back(*std::move(branch));
  }
  return branches;
}

absl::Status SessionControl::Export(const Session& session, int32_t layer, int64_t begin,
                                    int64_t end, absl::Span<float> k, absl::Span<float> v) {
  absl::Status status = CheckEqualLengths(session);
  if (status.ok()) status = CheckLayer(session, layer);
  if (!status.ok()) return status;
  const int64_t start = session.config().start_position;
  const int64_t length = session.layers()[layer].length;
  if (begin < start || begin > end || end > start + length) {
    return absl::InvalidArgumentError(absl::StrCat(
        "begin, end: [", begin, ", ", end, ") is not within [", start, ", ", start + length, ")"));
  }
  if (begin == end) return absl::OkStatus();
  return cache_->Read(session, layer, begin - start, end - start, k, v);
}

std::vector<int64_t> SessionControl::Lengths(const Session& session) const {
  std::vector<int64_t> lengths;
  for (const LayerState& state : session.layers()) lengths.push_back(state.length);
  return lengths;
}

absl::Status SessionControl::LoadBasis(Session* session, int32_t layer,
                                       absl::Span<const float> mean,
                                       absl::Span<const float> basis) {
  absl::Status status = CheckOpen(*session);
  if (status.ok()) status = CheckLayer(*session, layer);
  return status.ok() ? cache_->LoadBasis(session, layer, mean, basis) : status;
}

absl::Status SessionControl::AddQuerySample(Session* session, int32_t layer,
                                            absl::Span<const float> rows) {
  absl::Status status = CheckOpen(*session);
  if (status.ok()) status = CheckLayer(*session, layer);
  if (!status.ok()) return status;
  LayerState& state = session->layers()[layer];
  if (!IsProgressive(session->config().format) || !state.bases.empty()) {
    return absl::OkStatus();
  }
  const AttentionShape& shape = session->config().shape;
  const int32_t row_size = shape.num_q_heads * shape.head_dim;
  for (size_t begin = 0; begin + row_size <= rows.size(); begin += row_size) {
    const int32_t slot = state.queries.NextSlot();
    if (slot < 0) continue;
    std::copy_n(rows.data() + begin, row_size, state.queries.Slot(slot, row_size));
  }
  return absl::OkStatus();
}

absl::Status SessionControl::Close(absl::string_view id, uint64_t epoch, absl::string_view tenant) {
  absl::StatusOr<std::shared_ptr<Session>> session = table_->Remove(id, epoch, tenant);
  if (!session.ok()) return session.status();
  if (*session != nullptr) cache_->Release(session->get());
  return absl::OkStatus();
}

int64_t SessionControl::CloseExpired() {
  const std::vector<std::shared_ptr<Session>> expired = table_->RemoveExpired();
  for (const auto& session : expired) cache_->Release(session.get());
  return static_cast<int64_t>(expired.size());
}

int64_t SessionControl::CloseAll() {
  const std::vector<std::shared_ptr<Session>> all = table_->RemoveAll();
  for (const auto& session : all) cache_->Release(session.get());
  return static_cast<int64_t>(all.size());
}

std::vector<SessionFacts> SessionControl::List(absl::string_view tenant, absl::string_view after,
                                               int32_t limit) const {
  std::vector<SessionFacts> list;
  for (auto& session : table_->List(tenant, after, limit)) {
    SessionFacts facts;
    for (const LayerState& state : session->layers()) {
      facts.kv_len = std::max(facts.kv_len, state.length);
      const int64_t dense = static_cast<int64_t>(state.pages.size()) - state.num_sealed;
      const auto exact = static_cast<int64_t>(state.exact_pages.size());
      const bool in_pool = session->config().exact_tier == ExactTier::kPool;
      facts.pages_dense += dense;
      facts.pages_sealed += state.num_sealed;
      facts.pages_exact += exact;
      facts.bytes += (dense + (in_pool ? exact : 0)) * session->dense_page_bytes() +
                     state.num_sealed * session->sealed_page_bytes() +
                     static_cast<int64_t>(state.bases.size()) * session->basis_bytes();
      facts.exact_tier_bytes += (in_pool ? 0 : exact) * session->dense_page_bytes();
      facts.drift_ratio = std::max(facts.drift_ratio, state.drift_ratio);
    }
    facts.session = std::move(session);
    list.push_back(std::move(facts));
  }
  return list;
}

}  // namespace adaattn

#include "server/session.h"

namespace adaattn {
namespace {

absl::Span<const float> LayerScales(const std::vector<float>& scales, int32_t layer,
                                    int32_t num_kv_heads) {
  const auto heads = static_cast<size_t>(num_kv_heads);
  if (scales.size() <= heads) return scales;
  return absl::MakeConstSpan(scales).subspan(layer * heads, heads);
}

}  // namespace

LayerOptions SessionConfig::layer(int32_t layer) const {
  if (layers.empty()) return {};
  return layers.size() == 1 ? layers[0] : layers[layer];
}

absl::Span<const float> SessionConfig::layer_key_scales(int32_t layer) const {
  return LayerScales(key_scales, layer, shape.num_kv_heads);
}

absl::Span<const float> SessionConfig::layer_value_scales(int32_t layer) const {
  return LayerScales(value_scales, layer, shape.num_kv_heads);
}

int32_t QuerySample::NextSlot() {
  const int64_t row = rows_seen_++;
  if (row < kMaxRows) return static_cast<int32_t>(row);
  // SplitMix64 of the row's number.
  uint64_t x = static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  const auto slot = static_cast<int64_t>((x ^ (x >> 31)) % static_cast<uint64_t>(row + 1));
  return slot < kMaxRows ? static_cast<int32_t>(slot) : -1;
}

float* QuerySample::Slot(int32_t slot, int32_t row_size) {
  const size_t end = (static_cast<size_t>(slot) + 1) * row_size;
  if (rows_.size() < end) rows_.resize(end);
  return rows_.data() + end - row_size;
}

void QuerySample::Clear() {
  rows_ = std::vector<float>();
  rows_seen_ = 0;
}

Session::Session(SessionConfig config, SessionId id, TenantId tenant_id, absl::Time now)
    : config_(std::move(config)),
      id_(std::move(id)),
      id_text_(id_.ToString()),
      tenant_id_(tenant_id),
      opened_(now),
      dense_page_bytes_(DensePageBytes(config_.shape, DenseDType(config_.format))),
      sealed_page_bytes_(IsProgressive(config_.format)
                             ? MakePageLayout(config_.shape, config_.stored_bits).page_bytes
                             : 0),
      basis_bytes_(MakeBasisLayout(config_.shape).block_bytes),
      renewed_ns_(absl::ToUnixNanos(now)),
      layers_(config_.num_layers) {}

absl::Duration Session::LeaseLeft(absl::Time now) const {
  return absl::FromUnixNanos(renewed_ns_.load(std::memory_order_relaxed)) + config_.lease - now;
}

}  // namespace adaattn

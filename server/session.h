#ifndef ADAATTN_SERVER_SESSION_H_
#define ADAATTN_SERVER_SESSION_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "kernels/feedback_state.h"
#include "server/attend_options.h"
#include "server/model_profile.h"
#include "server/page_allocator.h"
#include "server/session_id.h"

namespace adaattn {

struct LayerOptions {
  int64_t window = 0;  // 0 = all
  float softcap = 0;   // 0 = none
};

// Where a progressive session keeps the dense originals of its sealed pages.
enum class ExactTier : uint8_t {
  kNone = 0,
  kPool = 1,  // in the pool, beside the sealed pages
  kHost = 2   // in the backend's exact tier
};

// What a session was opened with, decided and validated by the service; never changes.
struct SessionConfig {
  std::string tenant;
  std::string routing_key;
  AttentionShape shape;
  int32_t num_layers = 0;
  float softmax_scale = 0;
  PageFormat format = PageFormat::kProgressiveF16;
  int32_t stored_bits = 8;                  // progressive: 8, 6, 4
  ExactTier exact_tier = ExactTier::kNone;  // progressive
  std::vector<LayerOptions> layers;         // [num_layers], or one for all, or none
  std::vector<float> key_scales;  // FP8 pages: [num_kv_heads] or [num_layers, num_kv_heads]
  std::vector<float> value_scales;
  AttendOptions default_options;
  std::shared_ptr<const ModelProfile> profile;  // null = none
  int64_t max_tokens = 0;                       // per layer
  int64_t start_position = 0;
  absl::Duration lease;

  bool keeps_exact_pages() const { return exact_tier != ExactTier::kNone; }
  LayerOptions layer(int32_t layer) const;
  // Of the layer's predicted errors, [num_kv_heads] or empty.
  absl::Span<const float> error_factors(int32_t layer) const {
    return profile == nullptr ? absl::Span<const float>() : profile->LayerErrorFactors(layer);
  }
  // Empty or [num_kv_heads].
  absl::Span<const float> layer_key_scales(int32_t layer) const;
  absl::Span<const float> layer_value_scales(int32_t layer) const;
};

// Rows of q that order the channels of a basis. Algorithm R with a fixed sequence: the same rows
// always leave the same sample.
class QuerySample {
 public:
  static constexpr int32_t kMaxRows = 256;

  // Whether the next row is kept, and where: a slot below kMaxRows, or -1.
  int32_t NextSlot();
  // The memory of a kept row of `row_size` floats.
  float* Slot(int32_t slot, int32_t row_size);

  absl::Span<const float> rows() const { return rows_; }
  int64_t rows_seen() const { return rows_seen_; }
  void Clear();

 private:
  std::vector<float> rows_;
  int64_t rows_seen_ = 0;
};

// One layer of a session. Engine thread only.
struct LayerState {
  int64_t length = 0;  // tokens in the cache, start_position not included
  // The last append, for the append-once rule; append_len 0 = nothing that could be replayed.
  uint64_t last_step_id = 0;
  int64_t last_position = 0;  // start_position not included
  int32_t last_append_len = 0;

  std::vector<PageId> pages;  // num_sealed sealed pages, then dense ones; one reference each
  int32_t num_sealed = 0;
  std::vector<PageId> exact_pages;  // [num_sealed] the dense originals, where the session keeps
                                    // them; one reference each
  std::vector<BasisRun> bases;      // the last one may have no page yet; one reference each
  bool refit_wanted = false;        // keys drifted: the next pages wait for a new basis
  FeedbackState feedback;
  QuerySample queries;        // empty once a basis stands
  float drift_ratio = 0;      // running mean of SealResult::drift_ratio; 0 = nothing sealed
  int32_t seal_backlog = 0;   // the sealer's: pages it has queued
  bool seal_asked = false;    // likewise: sealed at any length
  uint64_t batch_serial = 0;  // the runner's: the last batch that this layer was part of
};

// One growing KV history over all layers of a model. Made by SessionTable.
// Threads: config and id are constant, the atomics belong to all; `layers` is the engine thread's.
class Session {
 public:
  Session(SessionConfig config, SessionId id, TenantId tenant_id, absl::Time now);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const SessionConfig& config() const { return config_; }
  const std::string& id() const { return id_text_; }
  uint64_t epoch() const { return id_.epoch; }
  TenantId tenant_id() const { return tenant_id_; }
  absl::Time opened() const { return opened_; }
  int64_t dense_page_bytes() const { return dense_page_bytes_; }
  int64_t sealed_page_bytes() const { return sealed_page_bytes_; }
  int64_t basis_bytes() const { return basis_bytes_; }

  // The lease starts anew at `now`.
  void Renew(absl::Time now) {
    renewed_ns_.store(absl::ToUnixNanos(now), std::memory_order_relaxed);
  }
  absl::Duration LeaseLeft(absl::Time now) const;
  // Tasks in the queue or running: their session does not expire.
  void TaskBegins() { tasks_in_flight_.fetch_add(1, std::memory_order_relaxed); }
  void TaskEnds() { tasks_in_flight_.fetch_sub(1, std::memory_order_relaxed); }
  bool in_use() const { return tasks_in_flight_.load(std::memory_order_relaxed) > 0; }

  bool closed() const { return closed_.load(std::memory_order_acquire); }
  void SetClosed() { closed_.store(true, std::memory_order_release); }

  std::vector<LayerState>& layers() { return layers_; }
  const std::vector<LayerState>& layers() const { return layers_; }

 private:
  const SessionConfig config_;
  const SessionId id_;
  const std::string id_text_;
  const TenantId tenant_id_;
  const absl::Time opened_;
  const int64_t dense_page_bytes_;
  const int64_t sealed_page_bytes_;
  const int64_t basis_bytes_;
  std::atomic<int64_t> renewed_ns_;
  std::atomic<int32_t> tasks_in_flight_{0};
  std::atomic<bool> closed_{false};
  std::vector<LayerState> layers_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_SESSION_H_

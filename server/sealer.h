#ifndef ADAATTN_SERVER_SEALER_H_
#define ADAATTN_SERVER_SEALER_H_

#include <cstdint>
#include <deque>
#include <memory>

#include "absl/status/statusor.h"
#include "server/engine_observer.h"
#include "server/kv_cache.h"
#include "server/session_table.h"

namespace adaattn {

struct SealOptions {
  // Tokens of a session that its basis is fitted on; a multiple of 64, >= 64.
  int32_t fit_tokens = 1024;
  // Pages sealed in one go between two batches: the longest that a step may wait for sealing.
  int32_t pages_per_slice = 2;
  // Sealing waits until the queue is empty. Above this many sealable pages one slice is sealed
  // between any two batches. When the pool is full, sealing goes first until a batch fits: memory
  // that waits unsealed never refuses a step.
  int64_t max_backlog_pages = 64;
  // Tokens of a layer from which on its pages are sealed; shorter ones stay dense and are answered
  // exactly, which takes less time. -1 = where the backend has it that sealed pages pay
  // (TokensToSeal), for steps as large as the last ones; 0 = at any length. A layer that has begun
  // to be sealed goes on, one that someone waits for (Ask) begins at any length, and so do all once
  // the pool is full: sealed pages take half the room.
  int64_t min_tokens = -1;
  // Mean drift (SealResult::drift_ratio) of a layer above which a new basis is fitted on its next
  // fit_tokens, at most kMaxBasisRuns in all. 0 = never.
  float refit_drift_ratio = 0;
};

// Seals the pages that are due and fits the bases they need, a slice at a time. Threads: the
// engine's only.
class Sealer {
 public:
  Sealer(const SealOptions& options, KvCache* cache, const SessionTable* table)
      : options_(options), cache_(cache), table_(table) {}

  // Remembers a layer whose length has changed; cheap.
  void Notice(const std::shared_ptr<Session>& session, int32_t layer);
  // A step over progressive sessions attended `kv_heads` kv heads, of all its sequences.
  void NoticeStep(int64_t kv_heads);
  // Seals the session's pages from now on as soon as they are due, however short it is.
  void Ask(const std::shared_ptr<Session>& session);
  // The same of every layer that can be sealed now, since memory is short. False: there is none.
  bool QueueAll();
  // Does at most one slice of work. OK with pages_sealed 0 and bases_fitted 0: nothing was due, or
  // (pages_deferred > 0) there was no room. Errors: kUnavailable, the device is lost.
  absl::StatusOr<SealReport> RunSlice();

  // Whether some page of the session could be sealed.
  bool Owes(const Session& session) const;

  bool idle() const { return queue_.empty(); }
  int64_t backlog_pages() const { return backlog_pages_; }
  bool over_limit() const { return backlog_pages_ > options_.max_backlog_pages; }

 private:
  struct Entry {
    std::shared_ptr<Session> session;
    int32_t layer = 0;
  };

  // Pages of the layer that can be sealed now, or once a basis has been fitted on what is there.
  int32_t Due(const Session& session, int32_t layer) const;
  // Whether a layer can be too short for sealed pages to pay, and whether this one is.
  bool KnowsShort() const;
  bool IsShort(const Session& session, int32_t layer) const;
  void Enqueue(const std::shared_ptr<Session>& session, int32_t layer, int32_t due);
  void Account(int32_t due, LayerState* state);
  absl::Status FitBasis(Session* session, int32_t layer);
  absl::StatusOr<PageLease> ReservePages(const Session& session, int32_t count);
  absl::Status SealSome(Session* session, int32_t layer, int32_t due, SealReport* report);

  const SealOptions options_;
  KvCache* const cache_;
  const SessionTable* const table_;
  double step_kv_heads_ = 0;  // running mean of the last steps; 0 = none yet
  std::deque<Entry> queue_;
  int64_t backlog_pages_ = 0;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_SEALER_H_

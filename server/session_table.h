#ifndef ADAATTN_SERVER_SESSION_TABLE_H_
#define ADAATTN_SERVER_SESSION_TABLE_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/mutex.h"
#include "server/clock.h"
#include "server/session.h"

namespace adaattn {

struct SessionTableOptions {
  std::string instance;         // MakeInstanceName()
  int64_t max_sessions = 4096;  // of all tenants
  int64_t max_tenant_sessions = 1024;
  int64_t remembered_expiries = 4096;  // ended leases that are answered with "lease expired"
};

// The directory of sessions: who is where, whose, and until when. Pages are KvCache's.
// Threads: all methods may be called from any thread.
class SessionTable {
 public:
  SessionTable(const SessionTableOptions& options, const Clock* clock);

  // A new session. Errors: kResourceExhausted naming the limit.
  absl::StatusOr<std::shared_ptr<Session>> Open(SessionConfig config);

  // The session of `id`; renews its lease. Errors:
  //   kInvalidArgument     `id` was made by no server
  //   kFailedPrecondition  "session lost": another instance's id, another epoch, lease expired
  //   kNotFound            closed, or never was
  //   kPermissionDenied    another tenant's
  absl::StatusOr<std::shared_ptr<Session>> Find(absl::string_view id, uint64_t epoch,
                                                absl::string_view tenant);

  // Takes the session out and marks it closed; its pages go with KvCache::Release on the engine
  // thread (SessionControl::Close does both). Null without error when it was closed or expired
  // before; else Find's errors.
  absl::StatusOr<std::shared_ptr<Session>> Remove(absl::string_view id, uint64_t epoch,
                                                  absl::string_view tenant);

  // Takes out every session whose lease is over and that no task waits for.
  std::vector<std::shared_ptr<Session>> RemoveExpired();
  // Takes out all.
  std::vector<std::shared_ptr<Session>> RemoveAll();

  std::vector<std::shared_ptr<Session>> All() const;
  // The tenant's sessions in the order of their ids, at most `limit`, those after `after`.
  std::vector<std::shared_ptr<Session>> List(absl::string_view tenant, absl::string_view after,
                                             int32_t limit) const;

  int64_t size() const { return size_.load(std::memory_order_relaxed); }
  const std::string& instance() const { return options_.instance; }

 private:
  static absl::Status CheckOwner(const Session& session, uint64_t epoch, absl::string_view tenant);
  static bool IsOver(const Session& session, absl::Time now);
  absl::Status WhyNotHere(absl::string_view id) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void EraseLocked(const Session& session) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void RememberExpiryLocked(const Session& session) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  struct Tenant {
    TenantId id{0};
    int64_t sessions = 0;
  };

  const SessionTableOptions options_;
  const Clock* const clock_;
  std::atomic<int64_t> size_{0};
  mutable Mutex mutex_;
  absl::flat_hash_map<std::string, std::shared_ptr<Session>> sessions_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, Tenant> tenants_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, absl::Duration> expired_ ABSL_GUARDED_BY(mutex_);  // leases
  std::deque<std::string> expired_order_ ABSL_GUARDED_BY(mutex_);
  std::mt19937_64 random_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_SESSION_TABLE_H_

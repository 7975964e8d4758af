#include "server/session_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

absl::Status LeaseExpired(absl::string_view id, absl::Duration lease) {
  return absl::FailedPreconditionError(absl::StrCat("session lost: the lease of ", id,
                                                    " expired after ", absl::FormatDuration(lease),
                                                    " without a call"));
}

}  // namespace

SessionTable::SessionTable(const SessionTableOptions& options, const Clock* clock)
    : options_(options), clock_(clock) {
  std::random_device device;
  MutexLock lock(&mutex_);
  std::seed_seq seed{device(), device(), device(), device()};
  random_.seed(seed);
}

absl::StatusOr<std::shared_ptr<Session>> SessionTable::Open(SessionConfig config) {
  MutexLock lock(&mutex_);
  if (static_cast<int64_t>(sessions_.size()) >= options_.max_sessions) {
    return absl::ResourceExhaustedError(absl::StrCat("sessions: this server holds its limit of ",
                                                     options_.max_sessions, "; ask later"));
  }
  Tenant& tenant = tenants_[config.tenant];
  if (tenant.id == TenantId{0}) tenant.id = TenantId{static_cast<uint32_t>(tenants_.size())};
  if (tenant.sessions >= options_.max_tenant_sessions) {
    return absl::ResourceExhaustedError(absl::StrCat("sessions: the tenant holds its limit of ",
                                                     options_.max_tenant_sessions,
                                                     "; close one first"));
  }
  SessionId id;
  id.routing_key = config.routing_key;
  id.instance = options_.instance;
  id.epoch = 1;
  id.token = random_();
  auto session =
      std::make_shared<Session>(std::move(config), std::move(id), tenant.id, clock_->Now());
  ++tenant.sessions;
  sessions_[session->id()] = session;
  size_.store(static_cast<int64_t>(sessions_.size()), std::memory_order_relaxed);
  return session;
}

absl::Status SessionTable::WhyNotHere(absl::string_view id) const {
  const absl::StatusOr<SessionId> parsed = ParseSessionId(id);
  if (!parsed.ok()) return parsed.status();
  if (parsed->instance != options_.instance) {
    return absl::FailedPreconditionError(
        absl::StrCat("session lost: ", id, " was opened by server instance ", parsed->instance,
                     ", this is ", options_.instance, "; open and import again"));
  }
  const auto expired = expired_.find(id);
  if (expired != expired_.end()) return LeaseExpired(id, expired->second);
  return absl::NotFoundError(absl::StrCat("session ", id, " is closed or was never opened"));
}

absl::Status SessionTable::CheckOwner(const Session& session, uint64_t epoch,
                                      absl::string_view tenant) {
  if (session.config().tenant != tenant) {
    return absl::PermissionDeniedError(
        absl::StrCat("session ", session.id(), " is another tenant's"));
  }
  if (session.epoch() != epoch) {
    return absl::FailedPreconditionError(absl::StrCat("session lost: epoch ", epoch, " of ",
                                                      session.id(), " is not ", session.epoch()));
  }
  return absl::OkStatus();
}

bool SessionTable::IsOver(const Session& session, absl::Time now) {
  return session.LeaseLeft(now) < absl::ZeroDuration() && !session.in_use();
}

absl::StatusOr<std::shared_ptr<Session>> SessionTable::Find(absl::string_view id, uint64_t epoch,
                                                            absl::string_view tenant) {
  const absl::Time now = clock_->Now();
  MutexLock lock(&mutex_);
  const auto found = sessions_.find(id);
  if (found == sessions_.end()) return WhyNotHere(id);
  Session& session = *found->second;
  absl::Status status = CheckOwner(session, epoch, tenant);
  if (!status.ok()) return status;
  if (IsOver(session, now)) return LeaseExpired(id, session.config().lease);
  session.Renew(now);
  return found->second;
}

void SessionTable::EraseLocked(const Session& session) {
  --tenants_[session.config().tenant].sessions;
  sessions_.erase(session.id());
  size_.store(static_cast<int64_t>(sessions_.size()), std::memory_order_relaxed);
}

absl::StatusOr<std::shared_ptr<Session>> SessionTable::Remove(absl::string_view id, uint64_t epoch,
                                                              absl::string_view tenant) {
  MutexLock lock(&mutex_);
  const auto found = sessions_.find(id);
  if (found == sessions_.end()) {
    absl::Status status = WhyNotHere(id);
    if (absl::IsNotFound(status) || expired_.contains(id)) return std::shared_ptr<Session>();
    return status;
  }
  std::shared_ptr<Session> session = found->second;
  absl::Status status = CheckOwner(*session, epoch, tenant);
  if (!status.ok()) return status;
  session->SetClosed();
  EraseLocked(*session);
  return session;
}

void SessionTable::RememberExpiryLocked(const Session& session) {
  if (options_.remembered_expiries <= 0) return;
  while (static_cast<int64_t>(expired_order_.size()) >= options_.remembered_expiries) {
    expired_.erase(expired_order_.front());
    expired_order_.pop_front();
  }
  expired_[session.id()] = session.config().lease;
  expired_order_.push_back(session.id());
}

std::vector<std::shared_ptr<Session>> SessionTable::RemoveExpired() {
  std::vector<std::shared_ptr<Session>> expired;
  const absl::Time now = clock_->Now();
  MutexLock lock(&mutex_);
  for (const auto& [id, session] : sessions_) {
    if (IsOver(*session, now)) expired.push_back(session);
  }
  for (const auto& session : expired) {
    session->SetClosed();
    EraseLocked(*session);
    RememberExpiryLocked(*session);
  }
  return expired;
}

std::vector<std::shared_ptr<Session>> SessionTable::RemoveAll() {
  std::vector<std::shared_ptr<Session>> all;
  MutexLock lock(&mutex_);
  for (const auto& [id, session] : sessions_) all.push_back(session);
  for (const auto& session : all) {
    session->SetClosed();
    EraseLocked(*session);
  }
  return all;
}

std::vector<std::shared_ptr<Session>> SessionTable::All() const {
  std::vector<std::shared_ptr<Session>> sessions;
  MutexLock lock(&mutex_);
  sessions.reserve(sessions_.size());
  for (const auto& [id, session] : sessions_) sessions.push_back(session);
  return sessions;
}

std::vector<std::shared_ptr<Session>> SessionTable::List(absl::string_view tenant,
                                                         absl::string_view after,
                                                         int32_t limit) const {
  std::vector<std::shared_ptr<Session>> sessions;
  {
    MutexLock lock(&mutex_);
    for (const auto& [id, session] : sessions_) {
      if (session->config().tenant == tenant && id > after) sessions.push_back(session);
    }
  }
  std::sort(sessions.begin(), sessions.end(),
            [](const auto& a, const auto& b) { return a->id() < b->id(); });
  if (static_cast<int64_t>(sessions.size()) > limit) sessions.resize(limit);
  return sessions;
}

}  // namespace adaattn

#ifndef ADAATTN_SERVER_SESSION_CONTROL_H_
#define ADAATTN_SERVER_SESSION_CONTROL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/kv_cache.h"
#include "server/session_table.h"

namespace adaattn {

struct TruncateResult {
  int64_t kv_len = 0;
  int32_t pages_reopened = 0;  // over all layers
};

struct SessionFacts {
  std::shared_ptr<Session> session;
  int64_t kv_len = 0;       // of the longest layer
  int64_t pages_dense = 0;  // not sealed
  int64_t pages_sealed = 0;
  int64_t pages_exact = 0;  // originals of sealed pages
  // Shared pages counted in full.
  int64_t bytes = 0;             // of the pool
  int64_t exact_tier_bytes = 0;  // of the exact tier in host memory
  float drift_ratio = 0;
};

// Everything but attention that can be done to a session: the bodies of the control RPCs.
// Threads: the engine's only; the service wraps calls in Engine::Post and finishes its RPC there.
// Sessions come from SessionTable::Find; all methods answer kNotFound for one closed meanwhile.
class SessionControl {
 public:
  SessionControl(SessionTable* table, KvCache* cache) : table_(table), cache_(cache) {}

  // Drops tokens from `position` (of the wire) on, in every layer.
  // Errors: kFailedPrecondition, all lengths equal is required, naming two that differ;
  // kInvalidArgument when position is outside [start_position, start_position + length];
  // kResourceExhausted when no page is left to reopen into. Then nothing has changed.
  absl::StatusOr<TruncateResult> Truncate(Session* session, int64_t position);

  // `count` branches that share every page; a page is copied when a branch first writes to it.
  // Errors: as Truncate's for lengths, kResourceExhausted for sessions; then no branch is left.
  absl::StatusOr<std::vector<std::shared_ptr<Session>>> Fork(const Session& session, int32_t count);

  // Tokens [begin, end) of the wire's positions of one layer; k, v [tokens, num_kv_heads,
  // head_dim]. Errors: kInvalidArgument naming the layer's range; kFailedPrecondition when layers
  // differ.
  absl::Status Export(const Session& session, int32_t layer, int64_t begin, int64_t end,
                      absl::Span<float> k, absl::Span<float> v);

  // The lengths of all layers, start_position not included.
  std::vector<int64_t> Lengths(const Session& session) const;

  // A basis that the caller brings, for pages sealed from here on: mean [num_kv_heads, head_dim],
  // basis [num_kv_heads, head_dim, head_dim]. Errors: kFailedPrecondition when the session is not
  // progressive or has kMaxBasisRuns runs; kInvalidArgument when it is not orthonormal.
  absl::Status LoadBasis(Session* session, int32_t layer, absl::Span<const float> mean,
                         absl::Span<const float> basis);
  // Rows [rows, num_q_heads, head_dim] for the fit; ignored once a basis stands.
  absl::Status AddQuerySample(Session* session, int32_t layer, absl::Span<const float> rows);

  // Ends the session and frees its pages. OK when it is closed already.
  absl::Status Close(absl::string_view id, uint64_t epoch, absl::string_view tenant);
  // Ends those whose lease is over; returns how many.
  int64_t CloseExpired();
  // Ends all (drain, tests).
  int64_t CloseAll();

  std::vector<SessionFacts> List(absl::string_view tenant, absl::string_view after,
                                 int32_t limit) const;

 private:
  absl::Status CheckEqualLengths(const Session& session) const;

  SessionTable* const table_;
  KvCache* const cache_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_SESSION_CONTROL_H_

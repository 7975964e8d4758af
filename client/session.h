#ifndef ADAATTN_CLIENT_SESSION_H_
#define ADAATTN_CLIENT_SESSION_H_

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/types.h"

namespace adaattn::client {

class Connection;

// One sequence's step in one layer: append append_len rows, attend with q_len rows.
struct Step {
  int32_t layer = 0;
  int32_t append_len = 0;
  int32_t q_len = 0;
  TensorView q, k, v;  // [q_len, num_q_heads, head_dim], [append_len, num_kv_heads, head_dim]
  std::optional<AttendOptions> options;
  std::optional<int64_t> q_position;
  DType output_dtype = DType::kUnspecified;
};

// An open session. Knows the length of each layer and numbers the steps, so that callers state
// neither. The destructor closes the session on the server unless Release or Close was called.
//
// Threads: calls about different layers may run at the same time; of one layer, one at a time.
//
// A call that ends with UNAVAILABLE, CANCELLED or DEADLINE_EXCEEDED (after its own retries) leaves
// open whether the step was applied. Ask the same step again, with the same rows, before any other
// of that layer: it carries the same step id and position, and is appended at most once.
class Session {
 public:
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  const SessionRef& ref() const { return ref_; }
  const SessionGrant& grant() const { return grant_; }
  const std::string& route_key() const { return route_key_; }
  // Tokens of the layer as last heard from the server, start_position not included.
  int64_t length(int32_t layer) const;

  // Appends a prefill in chunks that fit the server's message limit. After a lost connection it
  // finds the first chunk that was not applied and goes on there. When it returns OK, every token
  // is in the cache.
  absl::Status Import(const ImportInput& input);

  // The status is the step's own: an error of the sequence is returned as the call's.
  absl::StatusOr<AttendOutput> Attend(const Step& step);

  // For messages of several sessions, and for streams: the SequenceInput of the layer's next step,
  // and what to tell the session when the answer is there. Until then the layer has no other step.
  SequenceInput NextStep(int32_t layer, int32_t append_len, int32_t q_len) const;
  void StepAnswered(int32_t layer, const SequenceOutcome& outcome);

  // Drops tokens from `position` (start_position included) on, in every layer.
  absl::StatusOr<TruncateResult> Truncate(int64_t position);
  absl::StatusOr<std::vector<std::unique_ptr<Session>>> Fork(int32_t count = 1);
  // Calls `sink` for each chunk in order; stops when it returns an error, and returns that.
  absl::Status Export(const ExportRange& range,
                      const std::function<absl::Status(ExportChunk)>& sink);
  // Renews the lease; returns what is left of it.
  absl::StatusOr<absl::Duration> KeepAlive();
  absl::Status Close();
  // The session lives on without this handle, until its lease ends.
  SessionRef Release();

 private:
  friend class Client;

  struct LayerState {
    int64_t length = 0;
    uint64_t steps = 0;  // answered ones: numbers the next
  };

  Session(std::shared_ptr<Connection> connection, SessionRef ref, SessionGrant grant,
          std::string route_key, int64_t start_position, std::vector<LayerState> layers);

  const std::shared_ptr<Connection> connection_;
  const SessionRef ref_;
  const SessionGrant grant_;
  const std::string route_key_;
  const int64_t start_position_;
  mutable absl::Mutex mutex_;
  std::vector<LayerState> layers_ ABSL_GUARDED_BY(mutex_);
  bool open_ ABSL_GUARDED_BY(mutex_) = true;
};

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_SESSION_H_

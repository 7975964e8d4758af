#ifndef ADAATTN_SERVER_ATTENTION_TASK_H_
#define ADAATTN_SERVER_ATTENTION_TASK_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "server/attend_options.h"
#include "server/session.h"

namespace adaattn {

// One tensor as it arrived: row-major little-endian bytes in pieces, in order. The bytes belong to
// AttentionTask::payload_owner. A piece may end inside an element.
struct TensorPieces {
  DType type = DType::kBf16;
  absl::InlinedVector<absl::Span<const std::byte>, 2> pieces;
  std::vector<float> scales;  // kF8E4m3: value = stored * scales[head]; empty = 1
  int64_t bytes() const;
};

// One sequence of a message. Positions are those of the wire: start_position included.
struct SequenceTask {
  std::shared_ptr<Session> session;  // null where `status` is not OK
  absl::Status status;               // why it was not found; the engine only passes it on
  int64_t position = 0;
  uint64_t step_id = 0;
  int32_t append_len = 0;
  int32_t q_len = 0;
  std::optional<int64_t> q_position;
};

// Why a sequence was read deeper, or its target raised, than its options say.
enum class Fallback : uint8_t {
  kNone = 0,
  kNoBasis = 1,
  kBudget = 2,
  kPressure = 3,
  kStoredBits = 4,  // deterministic: the bound took every stored bit,
  kExactPages = 5,  // or originals of sealed pages,
  kBoundUnmet = 6   // or exceeds the target with all that is kept
};
inline constexpr size_t kNumFallbacks = 7;
// "none", "no_basis", "budget", "pressure", "stored_bits", "exact_pages", "bound_unmet"
const char* FallbackName(Fallback fallback);

// The decisions of one sequence, summed over kv heads; the fields of proto Decision.
struct DecisionSummary {
  double mean_key_bits = 0;  // over sealed (page, kv head) pairs; 16 where nothing is sealed
  double mean_value_bits = 0;
  double mean_rank = 0;
  int64_t pages_sealed = 0;
  int64_t pages_skipped = 0;
  double theta = 0;            // mean over kv heads
  double entropy = 0;          // likewise
  double predicted_error = 0;  // root mean square over kv heads
  float error_bound = 0;       // deterministic: largest of the kv heads
  float lse_below = 0;         // likewise, see HeadDecision
  float lse_above = 0;
  int64_t exact_pages = 0;  // sealed (page, kv head) pairs whose originals were read
  int64_t bytes_read = 0;   // K and V with metadata; without the bases
  int64_t bytes_bf16 = 0;   // of a BF16 cache for the same rows
  int64_t basis_bytes = 0;
  Fallback fallback = Fallback::kNone;
  float effective_target = 0;  // kBudget, deterministic: the target used; else 0
};

struct SequenceOutcome {
  absl::Status status;
  int64_t kv_len = 0;  // of the layer after the step, start_position not included
  bool replayed = false;
  bool attended = false;  // `decision` is set
  AttendMode mode = AttendMode::kStatistical;
  DecisionSummary decision;
};

// o and lse of one task; whoever holds the last reference frees it.
struct ReplyBuffer {
  std::unique_ptr<std::byte[]> bytes;
  int64_t out_bytes = 0;  // [sum q_len, num_q_heads, head_dim] out_type, from the first byte
  int64_t lse_bytes = 0;  // [sum q_len, num_q_heads] f32, right behind; both 0 without q
};

struct TaskTimes {
  absl::Duration queue, copy_in, append, scan, select, attend, merge, copy_out;
};

struct AttentionReply {
  absl::Status status;  // of the whole task; when it is not OK, nothing below is set
  absl::Duration retry_after = absl::ZeroDuration();  // with kResourceExhausted, kUnavailable
  std::shared_ptr<const ReplyBuffer> buffer;  // rows of failed sequences are 0, their lse -inf
  std::vector<SequenceOutcome> sequences;     // as in the task
  std::vector<HeadDecision> heads;  // kPerHead: [num_sequences, num_kv_heads], unattended ones 0
  DecisionDetail detail = DecisionDetail::kSummary;  // of what was attended
  TaskTimes times;
};

// Set once nobody waits for an answer any more: what has not begun by then ends as kCancelled.
using CancelFlag = std::shared_ptr<const std::atomic<bool>>;

inline bool IsCancelled(const CancelFlag& flag) {
  return flag != nullptr && flag->load(std::memory_order_relaxed);
}

// One Attend message after parsing and validation, or one chunk of an import (then exactly one
// sequence, no q, and k, v [num_layers, append_len, num_kv_heads, head_dim]).
//
// What the service has checked: every tensor's shape, type and byte count against the sums of q_len
// and append_len (sequences that were not found included: their rows are skipped), FP8 scales,
// layer range, q_len and append_len not both 0, option ranges, that all found sessions have `shape`
// and `format`, and that q, k and v have one type (kF8E4m3 counts as kF16).
struct AttentionTask {
  AttentionShape shape;
  PageFormat format = PageFormat::kBf16;  // of the sessions
  int32_t layer = 0;
  int32_t num_layers = 1;  // > 1: an import chunk
  bool is_import = false;  // a replay is known by its position alone
  bool exact = false;      // resolved mode kExact; only groups tasks, the engine resolves again
  absl::InlinedVector<SequenceTask, 1> sequences;
  TensorPieces q, k, v;           // no pieces where the sums of q_len or append_len are 0
  DType out_type = DType::kBf16;  // kF32, kF16, kBf16
  AttendOptions options;
  absl::Time deadline = absl::InfiniteFuture();
  CancelFlag cancelled;                 // null = nobody can take the task back
  std::shared_ptr<void> payload_owner;  // keeps the pieces' bytes

  // Called exactly once per scheduled task, on the engine thread, with the task itself. Must not
  // block or call back into the batcher's Schedule with unbounded work.
  std::function<void(std::unique_ptr<AttentionTask>)> done;
  AttentionReply reply;

  // Set by the batcher.
  absl::Time enqueued;
  int64_t tokens = 0;  // q rows + appended rows, over layers
  int64_t bytes = 0;   // of payload

  // The type in which q, k, v reach the backend.
  DType in_type() const;
  int64_t q_rows() const;         // tokens
  int64_t appended_rows() const;  // tokens, over layers
};

// Ends the task: reports `reply` through done. The last thing that happens to a scheduled task.
void FinishTask(std::unique_ptr<AttentionTask> task);
// The same with nothing but a status.
void FailTask(std::unique_ptr<AttentionTask> task, const absl::Status& status,
              absl::Duration retry_after);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ATTENTION_TASK_H_

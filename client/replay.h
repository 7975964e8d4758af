#ifndef ADAATTN_CLIENT_REPLAY_H_
#define ADAATTN_CLIENT_REPLAY_H_

// Replays a captured trace through a server and compares the answers with the expected ones.

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/client.h"
#include "client/trace.h"
#include "client/types.h"

namespace adaattn::client {

struct ReplayConfig {
  std::string name;  // of the mode, in reports
  PageFormat page_format = PageFormat::kProgressive;
  DType element_type = DType::kUnspecified;
  int32_t stored_bits = 0;  // 0 = the server's default
  ExactTier exact_tier = ExactTier::kNone;
  AttendOptions options;
  int32_t concurrency = 1;  // sessions that replay the trace at the same time, >= 1
  int32_t max_rows = 0;     // captured rows to replay; 0 = all
};

// Of a set of numbers, by linear interpolation between the two nearest ranks.
struct Quantiles {
  double p50 = 0;
  double p99 = 0;
};
Quantiles ComputeQuantiles(std::vector<double> values);

inline constexpr int kNumStages = 8;
// queue, copy_in, append, scan, select, attend, merge, copy_out.
extern const std::array<const char*, kNumStages> kStageNames;
std::array<double, kNumStages> StageMicroseconds(const StageTimes& times);

// What one replay showed, over all its sessions. Errors are per (captured row, q head): the L2 norm
// of the difference over the norm of the expected output.
struct ReplayReport {
  std::string trace;
  std::string mode;
  bool has_theta = false;
  double theta = 0;  // mean over steps and kv heads, where a ladder ran
  int64_t steps = 0;
  double relative_error_mean = 0;
  double relative_error_p99 = 0;
  double predicted_error_mean = 0;  // what the server predicted; not a bound
  double lse_error_max = 0;
  int64_t bytes_read = 0;
  int64_t bytes_bf16 = 0;
  int64_t basis_bytes = 0;          // on top of bytes_read
  double bytes_fraction = 0;        // bytes_read / bytes_bf16
  double bytes_fraction_steps = 0;  // the mean over steps of each step's fraction
  double mean_key_bits = 0;
  double mean_value_bits = 0;
  double mean_rank = 0;
  double pages_skipped_fraction = 0;
  Quantiles latency_us;  // from Send to Receive
  std::array<Quantiles, kNumStages> stage_us;
};

// Opens config.concurrency sessions and replays the trace in each over a stream of its own: imports
// the keys before the first captured position together with a query sample (the first quarter of
// the captured rows, which orders the channels of the basis), then for each captured position
// imports on and appends and attends that token. Results do not depend on timing: before each step
// of a progressive session it waits until the pages that are due are sealed (wait_sealed).
// `advance` (may be null) is called after each step, from any thread.
//
// Errors: the first of any session; kInternal when the server's answer has the wrong shape.
absl::StatusOr<ReplayReport> Replay(Client* client, const Trace& trace,
                                    const std::string& trace_name, const ReplayConfig& config,
                                    const std::function<void()>& advance);

// Steps that Replay will take, over all sessions.
int64_t NumReplaySteps(const Trace& trace, const ReplayConfig& config);

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_REPLAY_H_

#include "client/replay.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace adaattn::client {
namespace {

// [heads, tokens, head_dim], as traces have it, to [tokens, heads, head_dim], as the wire has it.
std::vector<uint16_t> TokensFirst(const std::vector<uint16_t>& source, int64_t heads,
                                  int64_t tokens, int64_t head_dim) {
  std::vector<uint16_t> target(source.size());
  for (int64_t head = 0; head < heads; ++head) {
    for (int64_t token = 0; token < tokens; ++token) {
      std::copy_n(&source[(head * tokens + token) * head_dim], head_dim,
                  &target[(token * heads + head) * head_dim]);
    }
  }
  return target;
}

// A trace in the order of the wire.
struct WireTrace {
  const Trace* trace = nullptr;
  std::vector<uint16_t> q, k, v;  // [rows or tokens, heads, head_dim] FP16

  TensorView Tokens(const std::vector<uint16_t>& kv, int64_t begin, int64_t end) const {
    const int64_t heads = trace->shape.num_kv_heads, head_dim = trace->shape.head_dim;
    const absl::Span<const uint16_t> all(kv);
    return MakeView(DType::kF16, {end - begin, heads, head_dim},
                    all.subspan(begin * heads * head_dim, (end - begin) * heads * head_dim));
  }
  TensorView Rows(int64_t begin, int64_t end) const {
    const int64_t heads = trace->shape.num_q_heads, head_dim = trace->shape.head_dim;
    const absl::Span<const uint16_t> all(q);
    return MakeView(DType::kF16, {end - begin, heads, head_dim},
                    all.subspan(begin * heads * head_dim, (end - begin) * heads * head_dim));
  }
};

WireTrace MakeWireTrace(const Trace& trace) {
  const AttentionShape& shape = trace.shape;
  return {&trace, TokensFirst(trace.q, shape.num_q_heads, trace.num_rows, shape.head_dim),
          TokensFirst(trace.k, shape.num_kv_heads, trace.num_tokens, shape.head_dim),
          TokensFirst(trace.v, shape.num_kv_heads, trace.num_tokens, shape.head_dim)};
}

// What one session saw.
struct Samples {
  std::vector<double> errors;
  std::vector<double> latencies_us;
  std::array<std::vector<double>, kNumStages> stages_us;
  std::vector<Decision> decisions;
  double lse_error_max = 0;
};

absl::Status Compare(const Trace& trace, int32_t row, const AttendOutput& output,
                     Samples* samples) {
  const int64_t heads = trace.shape.num_q_heads, head_dim = trace.shape.head_dim;
  if (output.o.dtype != DType::kF32 || output.o.shape != Shape({1, heads, head_dim}) ||
      output.lse.shape != Shape({1, heads})) {
    return absl::InternalError("o, lse: not the shape and type that were asked for");
  }
  const absl::Span<const float> o = output.o.floats(), lse = output.lse.floats();
  for (int64_t head = 0; head < heads; ++head) {
    const float* expected = &trace.expected_o[(head * trace.num_rows + row) * head_dim];
    double difference = 0, norm = 0;
    for (int64_t c = 0; c < head_dim; ++c) {
      const double delta = static_cast<double>(o[head * head_dim + c]) - expected[c];
      difference += delta * delta;
      norm += static_cast<double>(expected[c]) * expected[c];
    }
    samples->errors.push_back(std::sqrt(difference / norm));
    const double lse_error =
        std::abs(static_cast<double>(lse[head]) - trace.expected_lse[head * trace.num_rows + row]);
    // Not std::max: a NaN must stay.
    if (!(lse_error <= samples->lse_error_max)) samples->lse_error_max = lse_error;
  }
  return absl::OkStatus();
}

absl::Status ReplayStep(const WireTrace& wire, int32_t row, Session* session, AttendStream* stream,
                        Samples* samples) {
  const int64_t position = wire.trace->positions[row];
  AttendInput input;
  input.sequences.push_back(session->NextStep(/*layer=*/0, /*append_len=*/1, /*q_len=*/1));
  input.q = wire.Rows(row, row + 1);
  input.k = wire.Tokens(wire.k, position, position + 1);
  input.v = wire.Tokens(wire.v, position, position + 1);
  input.output_dtype = DType::kF32;
  const absl::Time start = absl::Now();
  absl::StatusOr<AttendOutput> output = stream->Attend(input);
  const absl::Duration latency = absl::Now() - start;
  if (!output.ok()) return output.status();
  if (output->sequences.size() != 1) return absl::InternalError("not one sequence answered");
  const SequenceOutcome& outcome = output->sequences[0];
  if (!outcome.status.ok()) return outcome.status;
  session->StepAnswered(/*layer=*/0, outcome);
  if (!outcome.decision) return absl::InternalError("the answer has no decision");
  samples->latencies_us.push_back(absl::ToDoubleMicroseconds(latency));
  const auto stages = StageMicroseconds(output->stage_times);
  for (int i = 0; i < kNumStages; ++i) samples->stages_us[i].push_back(stages[i]);
  samples->decisions.push_back(*outcome.decision);
  return Compare(*wire.trace, row, *output, samples);
}

// What a step reads must not depend on how far sealing got: a progressive session waits for it.
absl::Status ImportUntil(const WireTrace& wire, int64_t end, bool with_sample, bool progressive,
                         Session* session) {
  const int64_t begin = session->length(0);
  if (begin >= end && !progressive) return absl::OkStatus();
  ImportInput input;
  input.wait_sealed = progressive;
  if (begin < end) {
    input.k = wire.Tokens(wire.k, begin, end);
    input.v = wire.Tokens(wire.v, begin, end);
  }
  if (with_sample) input.query_sample = wire.Rows(0, std::max(1, wire.trace->num_rows / 4));
  return session->Import(input);
}

absl::Status ReplaySession(Client* client, const WireTrace& wire, const ReplayConfig& config,
                           int32_t num_rows, const std::function<void()>& advance,
                           Samples* samples) {
  const Trace& trace = *wire.trace;
  SessionOptions options;
  options.model = {1, trace.shape.num_q_heads, trace.shape.num_kv_heads, trace.shape.head_dim,
                   static_cast<float>(trace.softmax_scale)};
  options.page_format = config.page_format;
  options.element_type = config.element_type;
  options.stored_bits = config.stored_bits;
  options.exact_tier = config.exact_tier;
  options.max_tokens = trace.num_tokens;
  options.default_options = config.options;
  absl::StatusOr<std::unique_ptr<Session>> session = client->OpenSession(options);
  if (!session.ok()) return session.status();
  StreamOptions stream_options;
  stream_options.route_key = (*session)->route_key();
  const std::unique_ptr<AttendStream> stream = client->OpenStream(stream_options);
  for (int32_t row = 0; row < num_rows; ++row) {
    const bool progressive = config.page_format == PageFormat::kProgressive;
    absl::Status status = ImportUntil(wire, trace.positions[row], row == 0 && progressive,
                                      progressive, session->get());
    if (status.ok()) status = ReplayStep(wire, row, session->get(), stream.get(), samples);
    if (!status.ok()) {
      return absl::Status(
          status.code(),
          absl::StrCat("row ", row, " at position ", trace.positions[row], ": ", status.message()));
    }
    if (advance) advance();
  }
  if (absl::Status status = stream->Finish(); !status.ok()) return status;
  return (*session)->Close();
}

double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

void SummarizeDecisions(const std::vector<Decision>& decisions, ReplayReport* report) {
  const auto count = static_cast<double>(decisions.size());
  int64_t sealed = 0, skipped = 0;
  for (const Decision& decision : decisions) {
    report->bytes_read += decision.bytes_read;
    report->bytes_bf16 += decision.bytes_bf16;
    report->basis_bytes += decision.basis_bytes;
    report->bytes_fraction_steps += decision.bytes_read / (decision.bytes_bf16 * count);
    report->mean_key_bits += decision.mean_key_bits / count;
    report->mean_value_bits += decision.mean_value_bits / count;
    report->mean_rank += decision.mean_rank / count;
    report->theta += decision.theta / count;
    report->predicted_error_mean += decision.predicted_error / count;
    sealed += decision.pages_sealed;
    skipped += decision.pages_skipped;
  }
  if (report->bytes_bf16 > 0) {
    report->bytes_fraction =
        static_cast<double>(report->bytes_read) / static_cast<double>(report->bytes_bf16);
  }
  if (sealed > 0) {
    report->pages_skipped_fraction = static_cast<double>(skipped) / static_cast<double>(sealed);
  }
  report->has_theta = report->theta > 0;
}

ReplayReport Summarize(const std::vector<Samples>& sessions) {
  Samples all;
  const auto append = [](const auto& from, auto* to) {
    to->insert(to->end(), from.begin(), from.end());
  };
  for (const Samples& samples : sessions) {
    append(samples.errors, &all.errors);
    append(samples.latencies_us, &all.latencies_us);
    append(samples.decisions, &all.decisions);
    for (int i = 0; i < kNumStages; ++i) append(samples.stages_us[i], &all.stages_us[i]);
    if (!(samples.lse_error_max <= all.lse_error_max)) all.lse_error_max = samples.lse_error_max;
  }
  ReplayReport report;
  report.steps = static_cast<int64_t>(all.latencies_us.size());
  report.relative_error_mean = Mean(all.errors);
  report.relative_error_p99 = ComputeQuantiles(all.errors).p99;
  report.lse_error_max = all.lse_error_max;
  report.latency_us = ComputeQuantiles(all.latencies_us);
  for (int i = 0; i < kNumStages; ++i) report.stage_us[i] = ComputeQuantiles(all.stages_us[i]);
  SummarizeDecisions(all.decisions, &report);
  return report;
}

}  // namespace

const std::array<const char*, kNumStages> kStageNames = {"queue",  "copy_in", "append", "scan",
                                                         "select", "attend",  "merge",  "copy_out"};

std::array<double, kNumStages> StageMicroseconds(const StageTimes& times) {
  return {absl::ToDoubleMicroseconds(times.queue),  absl::ToDoubleMicroseconds(times.copy_in),
          absl::ToDoubleMicroseconds(times.append), absl::ToDoubleMicroseconds(times.scan),
          absl::ToDoubleMicroseconds(times.select), absl::ToDoubleMicroseconds(times.attend),
          absl::ToDoubleMicroseconds(times.merge),  absl::ToDoubleMicroseconds(times.copy_out)};
}

Quantiles ComputeQuantiles(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto at = [&values](double share) {
    const double rank = share * static_cast<double>(values.size() - 1);
    const auto low = static_cast<size_t>(rank);
    const size_t high = std::min(low + 1, values.size() - 1);
    return values[low] + (values[high] - values[low]) * (rank - static_cast<double>(low));
  };
  return {at(0.5), at(0.99)};
}

int64_t NumReplaySteps(const Trace& trace, const ReplayConfig& config) {
  const int32_t rows =
      config.max_rows > 0 ? std::min(config.max_rows, trace.num_rows) : trace.num_rows;
  return static_cast<int64_t>(rows) * config.concurrency;
}

absl::StatusOr<ReplayReport> Replay(Client* client, const Trace& trace,
                                    const std::string& trace_name, const ReplayConfig& config,
                                    const std::function<void()>& advance) {
  const WireTrace wire = MakeWireTrace(trace);
  const auto rows = static_cast<int32_t>(NumReplaySteps(trace, config) / config.concurrency);
  std::vector<Samples> samples(config.concurrency);
  std::vector<absl::Status> statuses(config.concurrency);
  std::vector<std::thread> threads;
  threads.reserve(config.concurrency);
  for (int32_t i = 0; i < config.concurrency; ++i) {
    threads.emplace_back(
        [&, i] { statuses[i] = ReplaySession(client, wire, config, rows, advance, &samples[i]); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  ReplayReport report = Summarize(samples);
  report.trace = trace_name;
  report.mode = config.name;
  return report;
}

}  // namespace adaattn::client

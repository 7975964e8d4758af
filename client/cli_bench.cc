#include <array>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/cli_commands.h"
#include "client/cli_progress.h"
#include "client/cli_report.h"

namespace adaattn::client {
namespace {

constexpr int64_t kWarmupSteps = 10;

struct BenchConfig {
  ModelShape model;
  AttendChoice choice;
  int64_t kv_len = 0;
  int32_t concurrency = 0;
  int64_t steps = 0;  // timed ones, of each session
};

// What the replies said, to be held against the server's counters.
struct Books {
  int64_t steps = 0, bytes_read = 0, basis_bytes = 0, bytes_bf16 = 0;

  void Add(const Books& more) {
    steps += more.steps;
    bytes_read += more.bytes_read;
    basis_bytes += more.basis_bytes;
    bytes_bf16 += more.bytes_bf16;
  }
};

// One closed loop: a session, and what its timed steps took.
struct Worker {
  std::unique_ptr<Session> session;
  std::vector<double> latencies_us;
  std::array<std::vector<double>, kNumStages> stages_us;
  Books timed, warmup;
  absl::Status status;
};

struct BenchReport {
  double steps_per_second = 0;
  Quantiles latency_us;
  std::array<Quantiles, kNumStages> stage_us;
  double bytes_fraction = 0;
  Books books;  // warm-up included
};

// Standard normal BF16 elements.
std::vector<uint16_t> RandomElements(int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<uint16_t> elements(count);
  for (uint16_t& element : elements) {
    const float value = normal(random);
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    element = static_cast<uint16_t>((bits + 0x8000) >> 16);
  }
  return elements;
}

absl::Status OpenWorker(Client* client, const BenchConfig& config, uint32_t seed, Worker* worker) {
  const ModelShape& model = config.model;
  SessionOptions options;
  options.model = model;
  options.page_format = config.choice.page_format;
  options.element_type = config.choice.element_type;
  options.stored_bits = config.choice.stored_bits;
  options.exact_tier = config.choice.exact_tier;
  options.default_options = config.choice.options;
  options.max_tokens = config.kv_len + config.steps + kWarmupSteps;
  absl::StatusOr<std::unique_ptr<Session>> session = client->OpenSession(options);
  if (!session.ok()) return session.status();
  worker->session = *std::move(session);
  if (config.kv_len == 0) return absl::OkStatus();
  const int64_t count = config.kv_len * model.num_kv_heads * model.head_dim;
  const std::vector<uint16_t> k = RandomElements(count, seed), v = RandomElements(count, seed + 1);
  const Shape shape = {config.kv_len, model.num_kv_heads, model.head_dim};
  ImportInput input;
  input.k = MakeView<uint16_t>(DType::kBf16, shape, k);
  input.v = MakeView<uint16_t>(DType::kBf16, shape, v);
  return worker->session->Import(input);
}

absl::Status RunSteps(Client* client, const BenchConfig& config, uint32_t seed, int64_t steps,
                      Progress* progress, Worker* worker) {
  const ModelShape& model = config.model;
  const auto q = RandomElements(int64_t{model.num_q_heads} * model.head_dim, seed);
  const auto kv = RandomElements(int64_t{model.num_kv_heads} * model.head_dim, seed + 1);
  StreamOptions options;
  options.route_key = worker->session->route_key();
  const std::unique_ptr<AttendStream> stream = client->OpenStream(options);
  for (int64_t step = 0; step < steps; ++step) {
    AttendInput input;
    input.sequences.push_back(worker->session->NextStep(0, 1, 1));
    input.q = MakeView<uint16_t>(DType::kBf16, {1, model.num_q_heads, model.head_dim}, q);
    input.k = MakeView<uint16_t>(DType::kBf16, {1, model.num_kv_heads, model.head_dim}, kv);
    input.v = input.k;
    const absl::Time start = absl::Now();
    const absl::StatusOr<AttendOutput> output = stream->Attend(input);
    const absl::Duration latency = absl::Now() - start;
    if (!output.ok()) return output.status();
    if (!output->sequences.at(0).status.ok()) return output->sequences[0].status;
    worker->session->StepAnswered(0, output->sequences[0]);
    worker->latencies_us.push_back(absl::ToDoubleMicroseconds(latency));
    const auto stages = StageMicroseconds(output->stage_times);
    for (int i = 0; i < kNumStages; ++i) worker->stages_us[i].push_back(stages[i]);
    const auto& decision = output->sequences[0].decision;
    worker->timed.Add(
        decision ? Books{1, decision->bytes_read, decision->basis_bytes, decision->bytes_bf16}
                 : Books{1});
    progress->Advance();
  }
  return stream->Finish();
}

// Runs `work` for every worker at once; the first error.
absl::Status ForEach(std::vector<Worker>* workers,
                     const std::function<absl::Status(uint32_t seed, Worker*)>& work) {
  std::vector<std::thread> threads;
  for (size_t i = 0; i < workers->size(); ++i) {
    threads.emplace_back([&work, worker = &(*workers)[i], seed = static_cast<uint32_t>(2 * i)] {
      worker->status = work(seed, worker);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Worker& worker : *workers) {
    if (!worker.status.ok()) return worker.status;
  }
  return absl::OkStatus();
}

absl::StatusOr<BenchReport> RunBenchmark(Client* client, const BenchConfig& config) {
  std::vector<Worker> workers(config.concurrency);
  Progress progress("bench", config.concurrency * (config.steps + kWarmupSteps));
  absl::Status status = ForEach(&workers, [&](uint32_t seed, Worker* worker) {
    return OpenWorker(client, config, seed, worker);
  });
  if (!status.ok()) return status;
  const auto step = [&](int64_t steps) {
    return ForEach(&workers, [&, steps](uint32_t seed, Worker* worker) {
      return RunSteps(client, config, seed, steps, &progress, worker);
    });
  };
  if (status = step(kWarmupSteps); !status.ok()) return status;
  for (Worker& worker : workers) {
    worker.latencies_us.clear();
    for (auto& stage : worker.stages_us) stage.clear();
    worker.warmup = std::exchange(worker.timed, Books());
  }
  const absl::Time start = absl::Now();
  if (status = step(config.steps); !status.ok()) return status;
  const absl::Duration elapsed = absl::Now() - start;

  BenchReport report;
  std::vector<double> latencies;
  Books timed;
  for (const Worker& worker : workers) {
    latencies.insert(latencies.end(), worker.latencies_us.begin(), worker.latencies_us.end());
    timed.Add(worker.timed);
    report.books.Add(worker.warmup);
  }
  report.books.Add(timed);
  for (int i = 0; i < kNumStages; ++i) {
    std::vector<double> stage;
    for (const Worker& worker : workers) {
      stage.insert(stage.end(), worker.stages_us[i].begin(), worker.stages_us[i].end());
    }
    report.stage_us[i] = ComputeQuantiles(std::move(stage));
  }
  report.steps_per_second = static_cast<double>(latencies.size()) / absl::ToDoubleSeconds(elapsed);
  report.latency_us = ComputeQuantiles(std::move(latencies));
  if (timed.bytes_bf16 > 0) {
    report.bytes_fraction =
        static_cast<double>(timed.bytes_read) / static_cast<double>(timed.bytes_bf16);
  }
  return report;
}

void Print(const BenchReport& report, bool json) {
  if (json) {
    nlohmann::ordered_json out = {
        {"steps_per_second", report.steps_per_second},
        {"bytes_fraction", report.bytes_fraction},
        {"books",
         {{"steps", report.books.steps},
          {"bytes_read", report.books.bytes_read},
          {"basis_bytes", report.books.basis_bytes},
          {"bytes_bf16", report.books.bytes_bf16}}},
        {"latency_us", {{"p50", report.latency_us.p50}, {"p99", report.latency_us.p99}}}};
    for (int i = 0; i < kNumStages; ++i) {
      out["stage_us"][kStageNames[i]] = {{"p50", report.stage_us[i].p50},
                                         {"p99", report.stage_us[i].p99}};
    }
    std::puts(out.dump(2).c_str());
    return;
  }
  std::printf("%.0f steps/s, %.1f%% of BF16's bytes\n\n", report.steps_per_second,
              100 * report.bytes_fraction);
  const auto row = [](const char* name, const Quantiles& quantiles) -> std::vector<std::string> {
    return {name, absl::StrFormat("%.0f", quantiles.p50), absl::StrFormat("%.0f", quantiles.p99)};
  };
  std::vector<std::vector<std::string>> rows = {{"us", "p50", "p99"}};
  rows.push_back(row("end to end", report.latency_us));
  for (int i = 0; i < kNumStages; ++i) rows.push_back(row(kStageNames[i], report.stage_us[i]));
  std::fputs(FormatTable(rows).c_str(), stdout);
}

absl::StatusOr<int> RunBench(const Args& args) {
  for (const auto& [flag, least, most] :
       {std::make_tuple("q-heads", 1.0, 4096.0), std::make_tuple("kv-heads", 1.0, 256.0),
        std::make_tuple("head-dim", 1.0, 4096.0), std::make_tuple("kv-len", 0.0, 1e9),
        std::make_tuple("concurrency", 1.0, 1024.0), std::make_tuple("steps", 1.0, 1e9)}) {
    if (absl::Status status = CheckRange(args, flag, least, most); !status.ok()) {
      return UsageError(status);
    }
  }
  BenchConfig config;
  config.model = {1, static_cast<int32_t>(args.Int("q-heads")),
                  static_cast<int32_t>(args.Int("kv-heads")),
                  static_cast<int32_t>(args.Int("head-dim")), 0};
  config.kv_len = args.Int("kv-len");
  config.concurrency = static_cast<int32_t>(args.Int("concurrency"));
  config.steps = args.Int("steps");
  absl::StatusOr<AttendChoice> choice = ParseAttendFlags(args, args.String("mode"));
  if (!choice.ok()) return UsageError(choice.status());
  config.choice = *choice;
  auto client = Connect(args);
  if (!client.ok()) return UsageError(client.status());
  const absl::StatusOr<BenchReport> report = RunBenchmark(client->get(), config);
  if (!report.ok()) return report.status();
  Print(*report, args.Bool("json"));
  return kExitOk;
}

}  // namespace

Command BenchCommand() {
  Command command{"bench", "", "closed-loop steps of a synthetic shape over streams", AttendFlags(),
                  RunBench};
  command.flags.push_back({"mode", Flag::Type::kString, "default",
                           "exact, full_depth, statistical, deterministic, static"});
  command.flags.push_back({"q-heads", Flag::Type::kInt, "12", "query heads"});
  command.flags.push_back({"kv-heads", Flag::Type::kInt, "2", "key and value heads"});
  command.flags.push_back({"head-dim", Flag::Type::kInt, "128", "elements of a head"});
  command.flags.push_back(
      {"kv-len", Flag::Type::kInt, "8192", "tokens in each cache before the first step"});
  command.flags.push_back(
      {"concurrency", Flag::Type::kInt, "4", "sessions, each waiting for its answer"});
  command.flags.push_back({"steps", Flag::Type::kInt, "200", "timed steps of each session"});
  return command;
}

}  // namespace adaattn::client

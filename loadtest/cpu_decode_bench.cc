// Decode on the CPU against the machine's own roofs, all measured in one run.
//
//   adaattn_cpu_decode_bench [--check] [--trace=FILE]... [--benchmark_...]
//
// For every trace (default: the two 8k captures of tests/data): exact attention over BF16 pages,
// the ladder at theta .004 with one stage and with two (half the rank first, z 2), one sequence at
// the trace's full length, q of its last rows. The binding roof is the larger of bytes over copy
// bandwidth and operations over the FMA rate; figures are the best of all repetitions, which come
// in random order. With --check the exit status is 1 when exact decode stays below half of its roof
// or a ladder is no faster than exact.

#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "loadtest/cpu_roof.h"
#include "loadtest/trace_cache.h"

namespace adaattn {
namespace {

constexpr double kMinRoofFraction = 0.5;
constexpr int64_t kCopyBytes = int64_t{128} << 20;  // of each thread's buffers; beyond any cache
constexpr int64_t kFmaIterations = 2000000;
constexpr int kRepetitions = 7;
constexpr int32_t kRows = 8;  // steps of an iteration, one after the other

int NumThreads() { return std::max(1, static_cast<int>(std::thread::hardware_concurrency())); }

template <class Work>
void OnAllThreads(Work work) {
  std::vector<std::thread> threads;
  for (int i = 1; i < NumThreads(); ++i) threads.emplace_back([&work, i] { work(i); });
  work(0);
  for (std::thread& thread : threads) thread.join();
}

void CopyBandwidth(benchmark::State& state) {
  std::vector<std::vector<char>> buffers(2 * NumThreads(), std::vector<char>(kCopyBytes, 1));
  while (state.KeepRunning()) {
    OnAllThreads([&](int i) {
      std::memcpy(buffers[2 * i].data(), buffers[2 * i + 1].data(), kCopyBytes);
      benchmark::DoNotOptimize(buffers[2 * i].data());
    });
  }
  // Bytes read and bytes written.
  state.counters["per_second"] =
      benchmark::Counter(2.0 * static_cast<double>(kCopyBytes) * NumThreads(),
                         benchmark::Counter::kIsIterationInvariantRate);
}

void FmaRate(benchmark::State& state) {
  std::vector<float> sinks(NumThreads());
  std::vector<int64_t> operations(NumThreads());
  while (state.KeepRunning()) {
    OnAllThreads([&](int i) { operations[i] = RunFmaRounds(kFmaIterations, &sinks[i]); });
    benchmark::DoNotOptimize(sinks.data());
  }
  state.counters["per_second"] =
      benchmark::Counter(static_cast<double>(operations[0]) * NumThreads(),
                         benchmark::Counter::kIsIterationInvariantRate);
}

// One trace in one format, attended again and again.
class Decode {
 public:
  Decode(const Trace* trace, PageFormat format, const DecisionParams& params) {
    BackendOptions options;
    options.pool_bytes = TraceCache::PoolBytes(*trace, format, 8);
    auto backend = CreateCpuBackend(options);
    if (!backend.ok()) return;
    backend_ = *std::move(backend);
    auto cache = TraceCache::Make(backend_.get(), trace, format, 8);
    if (!cache.ok()) return;
    cache_ = *std::move(cache);
    for (int32_t i = 0; i < kRows; ++i) {
      steps_.push_back(cache_->Step(trace->num_rows - 1 - i, params, trace->num_tokens));
      rows_.push_back(trace->num_rows - 1 - i);
    }
  }

  void Run(benchmark::State& state) {
    if (cache_ == nullptr) return state.SkipWithError("the trace could not be loaded");
    std::vector<AttendBatch> batches;
    std::vector<std::vector<SequenceStep>> steps;
    StageTimes sum;
    for (const SequenceStep& step : steps_) steps.push_back({step});
    auto batch = cache_->Prepare(steps[0], {rows_[0]});
    if (!batch.ok()) return state.SkipWithError("no step buffers");
    const auto plan = backend_->PlanAttend(*batch);
    if (!plan.ok()) return state.SkipWithError("no kernel for this shape");
    while (state.KeepRunning()) {
      for (const std::vector<SequenceStep>& step : steps) {
        batch->sequences = step;
        const auto ticket = backend_->RunAttend(**plan, *batch);
        if (!ticket.ok() || !backend_->Wait(*ticket).ok()) state.SkipWithError("the step failed");
        const StageTimes& times = *batch->buffers->stage_times();
        sum.append += times.append;
        sum.scan += times.scan;
        sum.select += times.select;
        sum.attend += times.attend;
        sum.merge += times.merge;
      }
    }
    const double steps_run = static_cast<double>(state.iterations()) * kRows;
    const auto microseconds = [&](absl::Duration d) {
      return absl::ToDoubleMicroseconds(d) / steps_run;
    };
    state.counters["append_us"] = microseconds(sum.append);
    state.counters["scan_us"] = microseconds(sum.scan);
    state.counters["select_us"] = microseconds(sum.select);
    state.counters["attend_us"] = microseconds(sum.attend);
    state.counters["merge_us"] = microseconds(sum.merge);
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<TraceCache> cache_;
  std::vector<SequenceStep> steps_;
  std::vector<int32_t> rows_;
};

// Prints as usual and keeps the best time and rate of each benchmark's repetitions.
class BestReporter final : public benchmark::ConsoleReporter {
 public:
  void ReportRuns(const std::vector<Run>& runs) override {
    ConsoleReporter::ReportRuns(runs);
    for (const Run& run : runs) {
      if (run.run_type != Run::RT_Iteration || run.error_occurred) continue;
      const std::string name = run.run_name.function_name;
      const double seconds = run.real_accumulated_time / static_cast<double>(run.iterations);
      const auto at = seconds_.emplace(name, seconds).first;
      at->second = std::min(at->second, seconds);
      const auto rate = run.counters.find("per_second");
      if (rate != run.counters.end()) {
        double& best = rates_[name];
        best = std::max<double>(best, rate->second.value);
      }
    }
  }
  double seconds(const std::string& name) const {
    const auto at = seconds_.find(name);
    return at == seconds_.end() ? 0 : at->second;
  }
  double rate(const std::string& name) const {
    const auto at = rates_.find(name);
    return at == rates_.end() ? 0 : at->second;
  }

 private:
  std::map<std::string, double> seconds_;
  std::map<std::string, double> rates_;
};

std::string TraceName(const Trace& trace) {
  return trace.shape.DebugString() + "/" + std::to_string(trace.num_tokens);
}

void Register(const Trace* trace, const std::string& kind, PageFormat format,
              const DecisionParams& params) {
  const std::string name = kind + " " + TraceName(*trace);
  const auto decode = std::make_shared<Decode>(trace, format, params);
  benchmark::RegisterBenchmark(name.c_str(),
                               [decode](benchmark::State& state) { decode->Run(state); })
      ->UseRealTime()
      ->Unit(benchmark::kMicrosecond)
      ->Repetitions(kRepetitions);
}

void RegisterTrace(const Trace* trace) {
  Register(trace, "exact", PageFormat::kBf16, DecisionParams());
  DecisionParams params;
  params.theta = 0.004f;
  Register(trace, "ladder", PageFormat::kProgressiveF16, params);
  params.coarse_rank = trace->shape.head_dim / 2;
  Register(trace, "ladder2", PageFormat::kProgressiveF16, params);
}

// Prints what the run showed of one trace; false if it misses what it must reach.
bool Summarise(const Trace& trace, const BestReporter& best) {
  const std::string name = TraceName(trace);
  const AttentionShape& shape = trace.shape;
  const double tokens = static_cast<double>(trace.num_tokens);
  const double exact = best.seconds("exact " + name) / kRows;
  const double bytes = tokens * shape.num_kv_heads * shape.head_dim * 4;
  const double operations = tokens * shape.num_q_heads * shape.head_dim * 4;
  const double copy_time = bytes / best.rate("copy_bandwidth");
  const double fma_time = operations / best.rate("fma_rate");
  const double fraction = std::max(copy_time, fma_time) / exact;
  const double ladder = best.seconds("ladder " + name) / kRows;
  const double ladder2 = best.seconds("ladder2 " + name) / kRows;
  std::printf("%s tokens\n", name.c_str());
  std::printf("  exact BF16        %8.1f us  %6.2f GB/s  %7.1f GFLOPS  %.2f of the %s roof\n",
              exact * 1e6, bytes / exact / 1e9, operations / exact / 1e9, fraction,
              copy_time > fma_time ? "copy" : "FMA");
  std::printf("  ladder, one stage %8.1f us  %.2f of exact's time\n", ladder * 1e6, ladder / exact);
  std::printf("  ladder, two stage %8.1f us  %.2f of exact's time\n", ladder2 * 1e6,
              ladder2 / exact);
  return fraction >= kMinRoofFraction && ladder < exact && ladder2 < exact;
}

int Main(int argc, char** argv) {
  std::string command;
  for (int i = 0; i < argc; ++i) command += (i > 0 ? " " : "") + std::string(argv[i]);
  // Repetitions of all benchmarks in random order: what else the machine does hits them alike.
  std::vector<char*> args(argv, argv + argc);
  std::string interleaved = "--benchmark_enable_random_interleaving=true";
  args.insert(args.begin() + 1, interleaved.data());
  argc = static_cast<int>(args.size());
  argv = args.data();
  benchmark::Initialize(&argc, argv);
  bool check = false;
  std::vector<std::string> paths;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--check") == 0) {
      check = true;
    } else if (std::strncmp(argv[i], "--trace=", 8) == 0) {
      paths.emplace_back(argv[i] + 8);
    } else {
      std::fprintf(stderr, "unknown argument %s; --check, --trace=FILE, --benchmark_...\n",
                   argv[i]);
      return 2;
    }
  }
  if (paths.empty()) {
    const std::string data = ADAATTN_TEST_DATA;
    paths = {data + "/qwen25-coder-1.5b-layer14-8k.safetensors",
             data + "/smollm2-135m-layer15-8k.safetensors"};
  }
  std::vector<std::unique_ptr<Trace>> traces;
  for (const std::string& path : paths) {
    absl::StatusOr<Trace> trace = LoadTrace(path);
    if (!trace.ok()) {
      std::fprintf(stderr, "%s\n", trace.status().ToString().c_str());
      return 2;
    }
    traces.push_back(std::make_unique<Trace>(*std::move(trace)));
  }
  const auto backend = CreateCpuBackend(BackendOptions());
  if (!backend.ok()) return 2;
  std::printf("machine: %s, %d threads, %s\ncommand: %s\ncommit: %s\n",
              (*backend)->info().device.c_str(), NumThreads(), (*backend)->info().kernels.c_str(),
              command.c_str(), ADAATTN_COMMIT);
  benchmark::RegisterBenchmark("copy_bandwidth", CopyBandwidth)
      ->UseRealTime()
      ->Repetitions(kRepetitions);
  benchmark::RegisterBenchmark("fma_rate", FmaRate)->UseRealTime()->Repetitions(kRepetitions);
  for (const auto& trace : traces) RegisterTrace(trace.get());
  BestReporter best;
  benchmark::RunSpecifiedBenchmarks(&best);
  std::printf("\nbest of %d: copy %.2f GB/s (read and written), FMA %.1f GFLOPS\n", kRepetitions,
              best.rate("copy_bandwidth") / 1e9, best.rate("fma_rate") / 1e9);
  bool good = true;
  for (const auto& trace : traces) good &= Summarise(*trace, best);
  if (check && !good) std::printf("MISSED: exact below half of its roof, or a ladder no faster\n");
  return check && !good ? 1 : 0;
}

}  // namespace
}  // namespace adaattn

int main(int argc, char** argv) { return adaattn::Main(argc, argv); }

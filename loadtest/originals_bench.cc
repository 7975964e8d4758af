#include "loadtest/originals_bench.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "kernels/cuda/status.h"
#include "loadtest/bench_case.h"
#include "loadtest/bench_trace.h"
#include "loadtest/originals_case.h"

namespace adaattn {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kWarmUps = 3;

struct Bench {
  int runs = 0;
  const L2Flush& flush;
};

// Microseconds: medians, and the least.
struct StepTimes {
  double step = 0, min_step = 0;
  double attend = 0;  // StageTimes::attend
};

// What the last run of a step gave.
struct StepFacts {
  int64_t bytes = 0;  // K, V and bases
  int64_t exact_pages = 0;
  int64_t num_met = 0, num_kv_heads = 0;  // over all sequences
  float largest_bound = 0;                // not finite where nothing can be said of some kv head
  std::vector<float> out;
};

double Median(std::vector<double>* values) {
  std::sort(values->begin(), values->end());
  return (*values)[values->size() / 2];
}

absl::StatusOr<StepTimes> Time(const Bench& bench, const OriginalsStep& step, OriginalsCase* test) {
  std::vector<double> steps, attends;
  for (int i = -kWarmUps; i < bench.runs; ++i) {
    ADAATTN_RETURN_IF_ERROR(bench.flush.Run(nullptr));
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
    const auto begin = Clock::now();
    ADAATTN_RETURN_IF_ERROR(test->Run(step));
    const std::chrono::duration<double, std::micro> taken = Clock::now() - begin;
    if (i < 0) continue;
    steps.push_back(taken.count());
    attends.push_back(absl::ToDoubleMicroseconds(step.batch.buffers->stage_times()->attend));
  }
  StepTimes times;
  times.step = Median(&steps);
  times.min_step = steps.front();
  times.attend = Median(&attends);
  return times;
}

StepFacts Facts(const OriginalsCase& test, const OriginalsStep& step, float target) {
  const AttentionShape& shape = test.shape();
  StepFacts facts;
  facts.num_kv_heads = int64_t{test.num_sequences()} * shape.num_kv_heads;
  for (const HeadDecision& decision :
       absl::MakeConstSpan(step.batch.buffers->decisions(), facts.num_kv_heads)) {
    facts.bytes += decision.key_bytes + decision.value_bytes + decision.basis_bytes;
    facts.exact_pages += decision.exact_pages;
    facts.num_met += decision.error_bound <= target ? 1 : 0;
    if (!(decision.error_bound <= facts.largest_bound)) {
      facts.largest_bound = decision.error_bound;
    }
  }
  const auto* out = reinterpret_cast<const float*>(step.batch.buffers->out());
  facts.out.assign(out, out + int64_t{test.num_sequences()} * shape.num_q_heads * shape.head_dim);
  return facts;
}

std::string CaseName(const char* kind, const OriginalsCase& test) {
  return BenchCaseName(kind, test.shape(), test.num_sequences(), test.kv_len());
}

int64_t AsBf16(const OriginalsCase& test) {
  return BytesAsBf16(test.shape(), test.num_sequences(), test.kv_len());
}

nlohmann::json Describe(const std::string& name, const OriginalsCase& test, Originals originals,
                        const StepTimes& times, const StepFacts& facts) {
  return {{"case", name},
          {"num_sequences", test.num_sequences()},
          {"kv_len", test.kv_len()},
          {"num_q_heads", test.shape().num_q_heads},
          {"num_kv_heads", test.shape().num_kv_heads},
          {"head_dim", test.shape().head_dim},
          {"originals", OriginalsName(originals)},
          {"median_us", times.step},
          {"min_us", times.min_step},
          {"attend_us", times.attend},
          {"bytes_read", facts.bytes},
          {"bytes_as_bf16", AsBf16(test)}};
}

// Times one bounded step and leaves its output in `out`.
absl::StatusOr<bool> BenchBoundedStep(const Bench& bench, Originals originals, float target,
                                      OriginalsCase* test, nlohmann::json* report,
                                      std::vector<float>* out) {
  ADAATTN_ASSIGN_OR_RETURN(const OriginalsStep step, test->Bounded(originals, target));
  ADAATTN_ASSIGN_OR_RETURN(const StepTimes times, Time(bench, step, test));
  StepFacts facts = Facts(*test, step, target);
  const std::string name = CaseName("bounded", *test);
  const double fraction = static_cast<double>(facts.bytes) / AsBf16(*test);
  const double met = static_cast<double>(facts.num_met) / facts.num_kv_heads;
  const double exact_share =
      static_cast<double>(facts.exact_pages) / (facts.num_kv_heads * test->num_sealed_pages());
  const bool good = originals == Originals::kNone || facts.num_met == facts.num_kv_heads;
  std::printf(
      "%-30s originals %s target %.3f  step median %9.2f us  min %9.2f  attend %9.2f  reads %.4f "
      "of BF16  originals of %.4f of sealed pages  bound met by %.4f of kv heads, largest %.5f%s\n",
      name.c_str(), OriginalsName(originals), target, times.step, times.min_step, times.attend,
      fraction, exact_share, met, facts.largest_bound, good ? "" : "  FAIL");
  std::fflush(stdout);
  nlohmann::json entry = Describe(name, *test, originals, times, facts);
  entry["target"] = target;
  entry["runs"] = bench.runs;
  entry["fraction_of_bf16"] = fraction;
  entry["exact_page_share"] = exact_share;
  entry["bound_met_share"] = met;
  entry["largest_bound"] = facts.largest_bound;
  report->push_back(std::move(entry));
  *out = std::move(facts.out);
  return good;
}

// Likewise of an exact step.
absl::Status BenchExactStep(const Bench& bench, Originals originals, OriginalsCase* test,
                            nlohmann::json* report, std::vector<float>* out) {
  ADAATTN_ASSIGN_OR_RETURN(const OriginalsStep step, test->Exact(originals));
  ADAATTN_ASSIGN_OR_RETURN(const StepTimes times, Time(bench, step, test));
  StepFacts facts = Facts(*test, step, 0);
  const std::string name = CaseName("exact_fp16", *test);
  const double rate = facts.bytes / times.attend * 1e-3;
  std::printf("%-30s pages in %s  step median %9.2f us  min %9.2f  attend %9.2f  %7.1f GB/s read\n",
              name.c_str(), OriginalsName(originals), times.step, times.min_step, times.attend,
              rate);
  std::fflush(stdout);
  nlohmann::json entry = Describe(name, *test, originals, times, facts);
  entry["runs"] = bench.runs;
  entry["gigabytes_per_second"] = rate;
  report->push_back(std::move(entry));
  *out = std::move(facts.out);
  return absl::OkStatus();
}

// Moving originals changes no bit.
bool SaySame(const std::vector<float>& pool, const std::vector<float>& tier) {
  if (pool == tier) return true;
  std::printf("the output depends on where the originals lie  FAIL\n");
  return false;
}

// measure(test, report) of each size on each trace, filled in; false when one says so.
template <class Measure>
absl::StatusOr<bool> ForEachCase(const ProgressiveBenchOptions& options, nlohmann::json* report,
                                 const Measure& measure) {
  const std::vector<std::string> paths = BenchTraces(options);
  if (paths.empty()) return absl::NotFoundError("no captured trace found; name one with --trace=");
  bool good = true;
  for (const std::string& path : paths) {
    ADAATTN_ASSIGN_OR_RETURN(const Trace captured, LoadBenchTrace(path));
    const Trace trace = RepeatHeads(captured, BenchShape(options, captured.shape.head_dim));
    std::printf("%s\n", path.c_str());
    std::vector<ProgressiveBenchOptions::Size> sizes = options.sizes;
    const auto whole = static_cast<int32_t>(trace.num_tokens);
    if (sizes.empty()) sizes = {{1, whole}, {8, whole}};
    int32_t most = 0;
    for (const auto& size : sizes) most = std::max(most, size.num_sequences);
    ADAATTN_ASSIGN_OR_RETURN(
        auto test, OriginalsCase::Create(CreateCudaBackend, &trace, options.stored_bits, most));
    nlohmann::json cases = nlohmann::json::array();
    for (const auto& size : sizes) {
      ADAATTN_RETURN_IF_ERROR(test->Fill(size.num_sequences, size.kv_len));
      ADAATTN_ASSIGN_OR_RETURN(const bool case_good, measure(test.get(), &cases));
      good &= case_good;
    }
    for (nlohmann::json& entry : cases) {
      entry["trace"] = BenchTraceName(path);
      entry["trace_path"] = path;
      report->push_back(std::move(entry));
    }
  }
  return good;
}

}  // namespace

absl::StatusOr<bool> BenchBounded(const ProgressiveBenchOptions& options, int runs,
                                  const L2Flush& flush, nlohmann::json* report) {
  const Bench bench{runs, flush};
  std::vector<float> targets = {0.1f, 0.02f};
  if (options.target > 0) targets = {static_cast<float>(options.target)};
  const auto measure = [&](OriginalsCase* test, nlohmann::json* cases) -> absl::StatusOr<bool> {
    bool good = true;
    for (const float target : targets) {
      std::vector<float> pool, tier, none;
      for (const auto& [originals, out] :
           {std::make_pair(Originals::kPool, &pool), std::make_pair(Originals::kTier, &tier),
            std::make_pair(Originals::kNone, &none)}) {
        ADAATTN_ASSIGN_OR_RETURN(const bool step_good,
                                 BenchBoundedStep(bench, originals, target, test, cases, out));
        good &= step_good;
      }
      good &= SaySame(pool, tier);
    }
    return good;
  };
  return ForEachCase(options, report, measure);
}

absl::StatusOr<bool> BenchHostPages(const ProgressiveBenchOptions& options, int runs,
                                    const L2Flush& flush, nlohmann::json* report) {
  const Bench bench{runs, flush};
  const auto measure = [&](OriginalsCase* test, nlohmann::json* cases) -> absl::StatusOr<bool> {
    std::vector<float> pool, tier;
    ADAATTN_RETURN_IF_ERROR(BenchExactStep(bench, Originals::kPool, test, cases, &pool));
    ADAATTN_RETURN_IF_ERROR(BenchExactStep(bench, Originals::kTier, test, cases, &tier));
    return SaySame(pool, tier);
  };
  return ForEachCase(options, report, measure);
}

}  // namespace adaattn

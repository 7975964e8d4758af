#include "loadtest/tune_bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/tuning.h"
#include "loadtest/bench_trace.h"
#include "loadtest/decode_case.h"
#include "loadtest/device_timer.h"
#include "loadtest/progressive_case.h"
#include "loadtest/trace_pool.h"

namespace adaattn {
namespace {

constexpr int32_t kQHeads = 32, kKvHeads = 8;
constexpr int64_t kMostTokens = 262144;  // of all sequences of a step
constexpr int32_t kLongest = 131072;     // of one sequence
constexpr double kWorthwhile = 0.99;  // a time beyond that share of the default's changes nothing

struct Step {
  int32_t num_sequences = 0;
  int32_t kv_len = 0;
};
constexpr Step kTunedSteps[] = {{1, 32768}, {8, 32768}, {32, 8192}};
// For what is done about few heads.
constexpr Step kSmallSteps[] = {{1, 8192}, {1, 32768}, {2, 32768},
                                {4, 8192}, {4, 16384}, {8, 8192}};

class Tuner {
 public:
  Tuner(const ProgressiveBenchOptions& options, int runs, const L2Flush& flush, int32_t num_sms,
        TracePool* pool)
      : options_(options), runs_(runs), flush_(flush), num_sms_(num_sms), pool_(pool) {}

  // Fills in everything but the device's name.
  absl::Status Measure(CudaTuning* tuning) {
    ADAATTN_RETURN_IF_ERROR(TuneExact(tuning));
    ADAATTN_RETURN_IF_ERROR(TuneProgressive(tuning));
    ADAATTN_RETURN_IF_ERROR(TuneConclude(tuning));
    for (const int32_t count : {1, 2, 4, 8, 16, 32, 64}) {
      ADAATTN_RETURN_IF_ERROR(FindCrossover(count, tuning));
    }
    return absl::OkStatus();
  }

 private:
  // Median microseconds of one step.
  absl::StatusOr<double> Exact(DType type, const Step& step, int32_t ctas_per_sm) const;
  absl::StatusOr<double> Progressive(const Step& step, const CudaTuning& tuning) const;

  // The candidate whose steps take the least time (geometric mean), or the default.
  template <class Time>
  absl::Status Choose(const char* name, absl::Span<const Step> steps,
                      const std::vector<int32_t>& candidates, const Time& time,
                      int32_t* value) const;
  absl::Status TuneExact(CudaTuning* tuning) const;
  absl::Status TuneProgressive(CudaTuning* tuning) const;
  absl::Status TuneConclude(CudaTuning* tuning) const;
  absl::Status FindCrossover(int32_t num_sequences, CudaTuning* tuning) const;

  const ProgressiveBenchOptions& options_;
  const int runs_;
  const L2Flush& flush_;
  const int32_t num_sms_;
  TracePool* const pool_;
};

absl::StatusOr<double> Tuner::Exact(DType type, const Step& step, int32_t ctas_per_sm) const {
  DecodeCaseOptions options;
  options.shape = pool_->shape();
  options.kv_type = type;
  options.kv_lens.assign(step.num_sequences, step.kv_len);
  ADAATTN_ASSIGN_OR_RETURN(
      auto test, DecodeCase::Create(options, std::min(ctas_per_sm * num_sms_, kMaxDecodeCtas)));
  ADAATTN_ASSIGN_OR_RETURN(
      const auto times,
      TimeFlushed(nullptr, runs_, flush_, [&](cudaStream_t stream) { return test->Run(stream); }));
  return times[times.size() / 2];
}

absl::StatusOr<double> Tuner::Progressive(const Step& step, const CudaTuning& tuning) const {
  ProgressiveCaseOptions options;
  options.num_sequences = step.num_sequences;
  options.kv_len = step.kv_len;
  options.tuning = tuning;
  if (options_.theta > 0) options.decision.theta = static_cast<float>(options_.theta);
  if (options_.two_stage) options.decision.coarse_rank = pool_->shape().head_dim / 2;
  options.decision.coarse_z = static_cast<float>(options_.coarse_z);
  ADAATTN_ASSIGN_OR_RETURN(auto test, ProgressiveCase::Create(pool_, options));
  ADAATTN_ASSIGN_OR_RETURN(const auto times, test->Time(runs_, flush_));
  return times[times.size() / 2];
}

template <class Time>
absl::Status Tuner::Choose(const char* name, absl::Span<const Step> steps,
                           const std::vector<int32_t>& candidates, const Time& time,
                           int32_t* value) const {
  const int32_t usual = *value;
  std::vector<double> logs(candidates.size());
  double usual_log = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    for (const Step& step : steps) {
      ADAATTN_ASSIGN_OR_RETURN(const double log_time, time(step, candidates[i]));
      logs[i] += log_time / static_cast<double>(steps.size());
    }
    std::printf("%s %d: %.2f us (geometric mean)\n", name, candidates[i], std::exp(logs[i]));
    if (candidates[i] == usual) usual_log = logs[i];
  }
  const auto best = std::min_element(logs.begin(), logs.end());
  if (*best < usual_log + std::log(kWorthwhile)) *value = candidates[best - logs.begin()];
  return absl::OkStatus();
}

absl::Status Tuner::TuneExact(CudaTuning* tuning) const {
  return Choose(
      "exact_ctas_per_sm", kTunedSteps, {1, 2, 3, 4},
      [this](const Step& step, int32_t ctas) -> absl::StatusOr<double> {
        ADAATTN_ASSIGN_OR_RETURN(const double bf16, Exact(DType::kBf16, step, ctas));
        ADAATTN_ASSIGN_OR_RETURN(const double fp8, Exact(DType::kF8E4m3, step, ctas));
        return (std::log(bf16) + std::log(fp8)) / 2;
      },
      &tuning->exact_ctas_per_sm);
}

absl::Status Tuner::TuneProgressive(CudaTuning* tuning) const {
  return Choose(
      "progressive_cta_percent", kTunedSteps, {50, 75, 100, 125, 150, 200},
      [this, tuning](const Step& step, int32_t percent) -> absl::StatusOr<double> {
        CudaTuning tried = *tuning;
        tried.progressive_cta_percent = percent;
        ADAATTN_ASSIGN_OR_RETURN(const double time, Progressive(step, tried));
        return std::log(time);
      },
      &tuning->progressive_cta_percent);
}

absl::Status Tuner::TuneConclude(CudaTuning* tuning) const {
  return Choose(
      "conclude_pages", kSmallSteps, {0, 8, 16, 32, 64},
      [this, tuning](const Step& step, int32_t pages) -> absl::StatusOr<double> {
        CudaTuning tried = *tuning;
        tried.conclude_pages = pages;
        ADAATTN_ASSIGN_OR_RETURN(const double time, Progressive(step, tried));
        return std::log(time);
      },
      &tuning->conclude_pages);
}

// From the longest down, as long as progressive decode is faster than something.
absl::Status Tuner::FindCrossover(int32_t num_sequences, CudaTuning* tuning) const {
  Crossover crossover;
  crossover.kv_heads = num_sequences * kKvHeads;
  bool beats_bf16 = true, beats_fp8 = true;
  for (int32_t kv_len = kLongest; kv_len >= 1024 && (beats_bf16 || beats_fp8); kv_len /= 2) {
    const Step step = {num_sequences, kv_len};
    if (int64_t{num_sequences} * kv_len > kMostTokens) continue;
    const int32_t ctas = tuning->exact_ctas_per_sm;
    ADAATTN_ASSIGN_OR_RETURN(const double bf16, Exact(DType::kBf16, step, ctas));
    ADAATTN_ASSIGN_OR_RETURN(const double fp8, Exact(DType::kF8E4m3, step, ctas));
    ADAATTN_ASSIGN_OR_RETURN(const double progressive, Progressive(step, *tuning));
    std::printf("%2d x %5d: BF16 %8.2f us  FP8 %8.2f  progressive %8.2f\n", num_sequences, kv_len,
                bf16, fp8, progressive);
    beats_bf16 &= progressive <= bf16;
    beats_fp8 &= progressive <= fp8;
    if (beats_bf16) crossover.over_bf16 = kv_len;
    if (beats_fp8) crossover.over_fp8 = kv_len;
  }
  tuning->crossovers.push_back(crossover);
  return absl::OkStatus();
}

}  // namespace

absl::Status TuneDevice(const ProgressiveBenchOptions& options, int runs, const L2Flush& flush,
                        const nlohmann::json& provenance, const std::string& file) {
  const std::vector<std::string> paths = BenchTraces(options);
  if (paths.empty()) return absl::NotFoundError("no captured trace found; name one with --trace=");
  ADAATTN_ASSIGN_OR_RETURN(const Trace trace, LoadBenchTrace(paths.front()));
  const AttentionShape shape{kQHeads, kKvHeads, trace.shape.head_dim};
  int64_t free_bytes = 0;
  for (int32_t count = 1; count <= 64; count *= 2) {
    const auto kv_len = static_cast<int32_t>(std::min<int64_t>(kMostTokens / count, kLongest));
    free_bytes =
        std::max(free_bytes, TracePool::CaseBytes(shape, options.stored_bits, count, kv_len));
  }
  ADAATTN_ASSIGN_OR_RETURN(auto pool,
                           TracePool::Create(&trace, shape, options.stored_bits, free_bytes));
  CudaTuning tuning;
  tuning.device = provenance["device"].get<std::string>();
  Tuner tuner(options, runs, flush, provenance["multiprocessors"].get<int32_t>(), pool.get());
  ADAATTN_RETURN_IF_ERROR(tuner.Measure(&tuning));
  nlohmann::json measured = provenance;
  measured["trace"] = paths.front().substr(paths.front().rfind('/') + 1);
  measured["shape"] = shape.DebugString();
  std::ofstream out(file);
  out << FormatTuning(tuning, measured.dump());
  out.close();
  if (!out) return absl::UnknownError(absl::StrCat(file, ": cannot be written"));
  std::printf("wrote %s\n", file.c_str());
  return absl::OkStatus();
}

}  // namespace adaattn

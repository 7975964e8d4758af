#include "loadtest/progressive_bench.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "client/trace.h"
#include "kernels/cuda/status.h"
#include "kernels/policy/ladder.h"
#include "kernels/policy/names.h"
#include "loadtest/bench_trace.h"
#include "loadtest/progressive_case.h"
#include "loadtest/row_judge.h"
#include "loadtest/trace_pool.h"

namespace adaattn {
namespace {

constexpr int kProbes = 10;
constexpr int kFollowedSteps = 64;  // by feedback, which has settled then

struct CaseSize {
  AttentionShape shape;
  int32_t num_sequences = 0;
  int32_t kv_len = 0;
};

// What a case is judged by: some of its rows, and the answers to them.
struct Sample {
  struct Row {
    int32_t sequence = 0;
    int32_t q_head = 0;
  };
  std::vector<Row> rows;
  std::vector<const RowJudge::Answer*> answers;
  double fp8_error = 0;  // mean
  double goal = 0;       // of the mean error
};

// One run of a case, judged.
struct Judged {
  double mean_error = 0, worst_error = 0;
  double predicted_error = 0;  // mean over kv heads
  double theta = 0;            // geometric mean over kv heads; 0: some read everything
  int64_t bytes = 0;           // K, V and bases
  bool recount_equal = true;
  HeadDecision sum = {};  // page counts of all kv heads
};

std::vector<CaseSize> Cases(const ProgressiveBenchOptions& options, const Trace& trace) {
  const int32_t d = trace.shape.head_dim;
  const AttentionShape usual = BenchShape(options, d);
  const AttentionShape odd = options.num_q_heads > 0 ? usual : AttentionShape{28, 4, d};
  if (!options.sizes.empty()) {
    std::vector<CaseSize> cases;
    for (const auto& size : options.sizes) {
      cases.push_back({usual, size.num_sequences, size.kv_len});
    }
    return cases;
  }
  if (d == 256) return {{usual, 32, 8192}};
  if (d != 128) return {{usual, 32, 16384}};
  if (trace.num_tokens < 32768) return {{usual, 1, 8192}, {usual, 32, 8192}, {usual, 64, 2048}};
  return {{usual, 1, 32768}, {usual, 1, 131072}, {usual, 8, 32768}, {odd, 16, 32768}};
}

// Every n-th (sequence, q head); n is odd, so that no group of heads is left out.
Sample TakeSample(const ProgressiveCase& test, RowJudge* judge,
                  const ProgressiveBenchOptions& options) {
  const int32_t most = options.sample;
  const int32_t heads = test.shape().num_q_heads, all = test.num_sequences() * heads;
  const int32_t stride = (all + most - 1) / most | 1;
  Sample sample;
  std::vector<TraceRow> sources;
  for (int32_t i = 0; i < all; i += stride) {
    sample.rows.push_back({i / heads, i % heads});
    sources.push_back(test.Source(i / heads, i % heads));
  }
  sample.answers = judge->Judge(sources);
  for (const RowJudge::Answer* answer : sample.answers) sample.fp8_error += answer->fp8_error;
  sample.fp8_error /= static_cast<double>(sample.answers.size());
  const bool tiled = sources[0].num_tokens < test.kv_len();
  sample.goal = options.goal > 0 ? options.goal : tiled ? sample.fp8_error : sample.fp8_error / 2;
  return sample;
}

absl::StatusOr<Judged> RunAndJudge(ProgressiveCase* test, const Sample& sample) {
  ADAATTN_ASSIGN_OR_RETURN(const ProgressiveOutput output, test->Run());
  const AttentionShape& shape = test->shape();
  Judged judged;
  double log_theta = 0;
  for (size_t i = 0; i < sample.rows.size(); ++i) {
    const int64_t row =
        int64_t{sample.rows[i].sequence} * shape.num_q_heads + sample.rows[i].q_head;
    const double error =
        RelativeError(output.out.data() + row * shape.head_dim, sample.answers[i]->out);
    judged.mean_error += error / static_cast<double>(sample.rows.size());
    if (!(judged.worst_error >= error)) judged.worst_error = error;
  }
  for (const HeadDecision& decision : output.decisions) {
    const ReadBytes recount = RecountBytes(decision, shape.head_dim, DenseDType(kTraceFormat));
    judged.recount_equal &=
        recount.key == decision.key_bytes && recount.value == decision.value_bytes;
    judged.bytes += decision.key_bytes + decision.value_bytes + decision.basis_bytes;
    judged.predicted_error +=
        decision.predicted_error / static_cast<double>(output.decisions.size());
    log_theta += std::log2(decision.theta) / static_cast<double>(output.decisions.size());
    for (int32_t i = 0; i < kNumKeyDepths; ++i) judged.sum.key_pages[i] += decision.key_pages[i];
    for (int32_t i = 0; i < kNumValueDepths; ++i) {
      judged.sum.value_pages[i] += decision.value_pages[i];
    }
  }
  judged.theta = std::exp2(log_theta);
  return judged;
}

// The number that the search turns: smaller is more exact.
float* Knob(DecisionParams* decision) {
  return AimsAtError(decision->policy) ? &decision->target_relative_error : &decision->theta;
}

// Leaves the case at the largest knob that reaches the goal, or at the smallest there is.
absl::Status Search(ProgressiveCase* test, const Sample& sample, DecisionParams* decision) {
  const bool budget = AimsAtError(decision->policy);
  double good = std::log2(budget ? 1e-3 : 1e-5), bad = std::log2(budget ? 1.0 : 0.25);
  for (int i = 0; i < kProbes; ++i) {
    const double middle = (good + bad) / 2;
    *Knob(decision) = static_cast<float>(std::exp2(middle));
    ADAATTN_RETURN_IF_ERROR(test->SetDecision(*decision));
    ADAATTN_ASSIGN_OR_RETURN(const Judged judged, RunAndJudge(test, sample));
    (judged.mean_error <= sample.goal ? good : bad) = middle;
  }
  *Knob(decision) = static_cast<float>(std::exp2(good));
  return test->SetDecision(*decision);
}

DecisionParams MakeDecision(const ProgressiveBenchOptions& options, int32_t head_dim) {
  DecisionParams decision;
  decision.policy = options.policy;
  decision.coarse_z = static_cast<float>(options.coarse_z);
  if (options.two_stage) decision.coarse_rank = head_dim / 2;
  const double given = AimsAtError(options.policy) ? options.target : options.theta;
  if (given > 0) *Knob(&decision) = static_cast<float>(given);
  return decision;
}

nlohmann::json Describe(const ProgressiveCase& test, const DecisionParams& decision,
                        const Sample& sample, const Judged& judged,
                        const std::vector<double>& times) {
  const double median = times[times.size() / 2];
  nlohmann::json entry = {
      {"case", test.Name()},
      {"num_sequences", test.num_sequences()},
      {"kv_len", test.kv_len()},
      {"num_q_heads", test.shape().num_q_heads},
      {"num_kv_heads", test.shape().num_kv_heads},
      {"head_dim", test.shape().head_dim},
      {"policy", PolicyName(decision.policy)},
      {"coarse_rank", CoarseChunks(decision, test.shape().head_dim) > 0 ? decision.coarse_rank : 0},
      {"coarse_z", decision.coarse_z},
      {AimsAtError(decision.policy) ? "target" : "theta",
       AimsAtError(decision.policy) ? decision.target_relative_error : decision.theta},
      {"mean_theta", judged.theta},
      {"median_us", median},
      {"min_us", times.front()},
      {"runs", times.size()},
      {"bytes_read", judged.bytes},
      {"bytes_as_bf16", test.bytes_as_bf16()},
      {"fraction_of_bf16", static_cast<double>(judged.bytes) / test.bytes_as_bf16()},
      {"recount_equal", judged.recount_equal},
      {"mean_error", judged.mean_error},
      {"worst_error", judged.worst_error},
      {"predicted_error", judged.predicted_error},
      {"fp8_mean_error", sample.fp8_error},
      {"error_goal", sample.goal},
      {"rows_judged", sample.rows.size()},
      {"key_pages", judged.sum.key_pages},
      {"value_pages", judged.sum.value_pages},
      {"tb_per_s_read", judged.bytes / median * 1e-6},
      {"tb_per_s_as_bf16", test.bytes_as_bf16() / median * 1e-6},
      {"plan", test.plan()}};
  return entry;
}

absl::StatusOr<bool> BenchCase(const ProgressiveBenchOptions& options, int runs,
                               const L2Flush& flush, TracePool* pool, RowJudge* judge,
                               const CaseSize& size, nlohmann::json* report) {
  DecisionParams decision = MakeDecision(options, size.shape.head_dim);
  CudaTuning tuning;
  tuning.conclude_pages = options.conclude_pages;
  ADAATTN_ASSIGN_OR_RETURN(
      auto test,
      ProgressiveCase::Create(pool, {size.num_sequences, size.kv_len, decision, tuning}));
  const Sample sample = TakeSample(*test, judge, options);
  const bool search = (AimsAtError(decision.policy) ? options.target : options.theta) <= 0;
  if (decision.policy == Policy::kFeedback) {
    if (search) return absl::InvalidArgumentError("--policy=feedback needs a --target");
    ADAATTN_RETURN_IF_ERROR(test->Follow(kFollowedSteps));
  }
  if (search) ADAATTN_RETURN_IF_ERROR(Search(test.get(), sample, &decision));
  ADAATTN_ASSIGN_OR_RETURN(const Judged judged, RunAndJudge(test.get(), sample));
  ADAATTN_ASSIGN_OR_RETURN(const auto times, test->Time(runs, flush));
  const bool good = judged.recount_equal && std::isfinite(judged.mean_error) &&
                    (!search || judged.mean_error <= sample.goal);
  nlohmann::json entry = Describe(*test, decision, sample, judged, times);
  std::printf(
      "%-34s %s %.5f  median %8.2f us  min %8.2f  reads %.4f of BF16%s  %5.2f TB/s  %6.2f as BF16  "
      "error %.4f (worst %.3f, predicted %.4f, FP8 %.4f) mean theta %.5f%s\n",
      test->Name().c_str(), AimsAtError(decision.policy) ? "target" : "theta", *Knob(&decision),
      times[times.size() / 2], times.front(), entry["fraction_of_bf16"].get<double>(),
      judged.recount_equal ? "" : " BUT RECOUNT DIFFERS", entry["tb_per_s_read"].get<double>(),
      entry["tb_per_s_as_bf16"].get<double>(), judged.mean_error, judged.worst_error,
      judged.predicted_error, sample.fp8_error, judged.theta, good ? "" : "  FAIL");
  std::fflush(stdout);
  report->push_back(std::move(entry));
  return good;
}

absl::StatusOr<bool> BenchTrace(const ProgressiveBenchOptions& options, int runs,
                                const L2Flush& flush, const Trace& trace, nlohmann::json* report) {
  RowJudge judge(&trace);
  const std::vector<CaseSize> cases = Cases(options, trace);
  std::unique_ptr<TracePool> pool;
  bool good = true;
  for (const CaseSize& size : cases) {
    if (pool == nullptr || !(pool->shape() == size.shape)) {
      pool.reset();  // its memory first
      int64_t free_bytes = 0;
      for (const CaseSize& other : cases) {
        if (!(other.shape == size.shape)) continue;
        free_bytes = std::max(free_bytes, TracePool::CaseBytes(size.shape, options.stored_bits,
                                                               other.num_sequences, other.kv_len));
      }
      ADAATTN_ASSIGN_OR_RETURN(
          pool, TracePool::Create(&trace, size.shape, options.stored_bits, free_bytes));
    }
    ADAATTN_ASSIGN_OR_RETURN(const bool case_good,
                             BenchCase(options, runs, flush, pool.get(), &judge, size, report));
    good &= case_good;
  }
  return good;
}

bool ParseSizes(absl::string_view text, std::vector<ProgressiveBenchOptions::Size>* sizes) {
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::pair<absl::string_view, absl::string_view> numbers = absl::StrSplit(part, 'x');
    ProgressiveBenchOptions::Size size;
    if (!absl::SimpleAtoi(numbers.first, &size.num_sequences) || size.num_sequences < 1 ||
        !absl::SimpleAtoi(numbers.second, &size.kv_len) || size.kv_len < 1) {
      return false;
    }
    sizes->push_back(size);
  }
  return true;
}

bool ParseHeads(absl::string_view text, ProgressiveBenchOptions* options) {
  const std::pair<absl::string_view, absl::string_view> heads = absl::StrSplit(text, '/');
  return absl::SimpleAtoi(heads.first, &options->num_q_heads) &&
         absl::SimpleAtoi(heads.second, &options->num_kv_heads) && options->num_kv_heads > 0 &&
         options->num_q_heads > 0 && options->num_q_heads % options->num_kv_heads == 0;
}

bool ParsePositive(absl::string_view text, double* value) {
  return absl::SimpleAtod(text, value) && *value > 0 && std::isfinite(*value);
}

}  // namespace

AttentionShape BenchShape(const ProgressiveBenchOptions& options, int32_t head_dim) {
  if (options.num_q_heads > 0) return {options.num_q_heads, options.num_kv_heads, head_dim};
  return head_dim == 256 ? AttentionShape{16, 4, 256} : AttentionShape{32, 8, head_dim};
}

bool ParseProgressiveFlag(absl::string_view flag, ProgressiveBenchOptions* options) {
  if (absl::ConsumePrefix(&flag, "--trace=")) {
    options->traces.emplace_back(flag);
    return !flag.empty();
  }
  if (absl::ConsumePrefix(&flag, "--cases=")) return ParseSizes(flag, &options->sizes);
  if (absl::ConsumePrefix(&flag, "--heads=")) return ParseHeads(flag, options);
  if (absl::ConsumePrefix(&flag, "--theta=")) return ParsePositive(flag, &options->theta);
  if (absl::ConsumePrefix(&flag, "--target=")) return ParsePositive(flag, &options->target);
  if (absl::ConsumePrefix(&flag, "--goal=")) return ParsePositive(flag, &options->goal);
  if (absl::ConsumePrefix(&flag, "--z=")) return ParsePositive(flag, &options->coarse_z);
  if (absl::ConsumePrefix(&flag, "--sample=")) {
    return absl::SimpleAtoi(flag, &options->sample) && options->sample > 0;
  }
  if (absl::ConsumePrefix(&flag, "--stored-bits=")) {
    return absl::SimpleAtoi(flag, &options->stored_bits) &&
           (options->stored_bits == 4 || options->stored_bits == 6 || options->stored_bits == 8);
  }
  if (absl::ConsumePrefix(&flag, "--conclude-pages=")) {
    return absl::SimpleAtoi(flag, &options->conclude_pages) && options->conclude_pages >= 0;
  }
  if (flag == "--two-stage") return options->two_stage = true;
  if (!absl::ConsumePrefix(&flag, "--policy=")) return false;
  const std::optional<Policy> policy = ParsePolicy(flag);
  if (policy) options->policy = *policy;
  return policy == Policy::kThreshold || (policy && FollowsBudget(*policy));
}

std::vector<std::string> BenchTraces(const ProgressiveBenchOptions& options) {
  if (!options.traces.empty()) return options.traces;
  std::vector<std::string> found;
  for (const char* name :
       {"qwen25-coder-1.5b-layer14-8k.safetensors", "smollm2-135m-layer15-8k.safetensors",
        "qwen25-coder-1.5b-layer14-32k.safetensors"}) {
    for (const char* folder : {"data/", "tests/data/", "shared/data/", "../shared/data/"}) {
      const std::string path = absl::StrCat(folder, name);
      if (!std::ifstream(path).good()) continue;
      found.push_back(path);
      break;
    }
  }
  return found;
}

absl::StatusOr<bool> BenchProgressive(const ProgressiveBenchOptions& options, int runs,
                                      const L2Flush& flush, nlohmann::json* report) {
  const std::vector<std::string> paths = BenchTraces(options);
  if (paths.empty()) return absl::NotFoundError("no captured trace found; name one with --trace=");
  bool good = true;
  for (const std::string& path : paths) {
    ADAATTN_ASSIGN_OR_RETURN(const Trace trace, LoadBenchTrace(path));
    std::printf("%s\n", path.c_str());
    nlohmann::json cases = nlohmann::json::array();
    ADAATTN_ASSIGN_OR_RETURN(const bool trace_good,
                             BenchTrace(options, runs, flush, trace, &cases));
    good &= trace_good;
    for (nlohmann::json& entry : cases) {
      entry["trace"] = BenchTraceName(path);
      entry["trace_path"] = path;
      report->push_back(std::move(entry));
    }
  }
  return good;
}

}  // namespace adaattn

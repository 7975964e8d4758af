// Checks exact decode against float64 and times it, whole steps through the backend, progressive
// decode on captured traces, and steps that read originals (originals_bench.h).
//
//   adaattn_decode_bench [--check] [--time] [--steps] [--progressive] [--bounded] [--host-pages]
//                        [--tune=FILE] [--json=FILE] [--runs=N] [--flush=written|read]
//                        [flags of progressive_bench.h]
//
// Told nothing of what to do it does the first three. --tune measures the device and writes its
// tuning file (tune_bench.h). L2 is flushed before every timed run, by writing or by reading
// (l2_flush.h); times are medians of device events around one step's launch, of whole steps until
// their results stand in host memory.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "kernels/cuda/status.h"
#include "loadtest/decode_case.h"
#include "loadtest/device_timer.h"
#include "loadtest/l2_flush.h"
#include "loadtest/originals_bench.h"
#include "loadtest/progressive_bench.h"
#include "loadtest/step_bench.h"
#include "loadtest/tune_bench.h"

namespace adaattn {
namespace {

struct Settings {
  bool check = true;
  bool time = true;
  bool steps = true;
  bool progressive = false;
  bool bounded = false;
  bool host_pages = false;
  ProgressiveBenchOptions progressive_options;
  int runs = 31;
  FlushKind flush = FlushKind::kWritten;
  std::string json_file;
  std::string tuning_file;
  std::string command;
};

struct TimedCase {
  AttentionShape shape;
  std::vector<int32_t> kv_lens;
  int32_t q_len = 1;
};

std::vector<int32_t> Same(int32_t count, int32_t length) {
  return std::vector<int32_t>(count, length);
}

// Largest relative L2 error of a row that passes: P is rounded to the operand type (half a unit in
// the last place each, averaging out over keys), and out to its own.
double Tolerance(const DecodeCaseOptions& options) {
  const bool coarse = options.kv_type == DType::kBf16 || options.out_type == DType::kBf16;
  const bool rounds_q = options.kv_type == DType::kBf16 && options.in_type != DType::kBf16;
  return rounds_q ? 1.2e-2 : coarse ? 5e-3 : 1.5e-3;
}

std::vector<DecodeCaseOptions> CheckedCases() {
  std::vector<DecodeCaseOptions> cases;
  auto add = [&cases](AttentionShape shape, DType kv_type, std::vector<int32_t> lens,
                      int32_t q_len = 1) -> DecodeCaseOptions& {
    DecodeCaseOptions options;
    options.shape = shape;
    options.kv_type = kv_type;
    options.kv_lens = std::move(lens);
    options.q_len = q_len;
    options.seed = cases.size() + 1;
    cases.push_back(options);
    return cases.back();
  };
  const std::vector<int32_t> edges = {0, 1, 15, 16, 31, 32, 33, 63, 64, 65, 200, 1000};
  for (const DType type : {DType::kF32, DType::kBf16, DType::kF16, DType::kF8E4m3}) {
    for (const int32_t d : {64, 80, 96, 128, 256}) {
      add({8, 2, d}, type, edges).scales = type == DType::kF8E4m3;
      add({14, 2, d}, type, {700, 64, 129}, 4).out_type = DType::kF32;
      add({4, 4, d}, type, {4000, 3}, 1).out_type = DType::kF32;
    }
    add({32, 2, 128}, type, {500, 6000}, 8);  // group size 16
    add({32, 8, 128}, type, {3000, 100}, 1).window = 130;
    add({32, 8, 128}, type, {3000, 100, 5}, 8).window = 77;
    add({32, 8, 128}, type, {2000, 10}, 2).softcap = 20;
    add({28, 4, 128}, type, {5000, 2500}, 3).in_type = DType::kF32;
    add({32, 8, 128}, type, {1000, 513}, 2).in_type = DType::kF16;
    add({32, 8, 128}, type, {4096, 4095}, 1).q_sigma = 6;               // sharp softmax
    add({32, 8, 128}, type, Same(3, 20000), 1).out_type = DType::kF32;  // many splits
  }
  return cases;
}

absl::StatusOr<bool> CheckAll(int32_t num_ctas) {
  bool all_good = true;
  int index = 0;
  for (const DecodeCaseOptions& options : CheckedCases()) {
    // Few CTAs make long runs and mixed groups, many make short ones.
    const int32_t ctas = index++ % 3 == 0 ? 7 : num_ctas;
    ADAATTN_ASSIGN_OR_RETURN(auto test, DecodeCase::Create(options, ctas));
    const int32_t stride = options.kv_lens[0] > 10000 ? 3 : 1;
    ADAATTN_ASSIGN_OR_RETURN(const DecodeError error, test->Check(stride));
    const bool good = error.worst_out <= Tolerance(options) && error.worst_lse <= 5e-3 &&
                      error.worst_entropy <= 5e-3 &&
                      error.counted_tokens == error.expected_tokens &&
                      error.counted_bytes == error.expected_bytes;
    all_good = all_good && good;
    std::printf("%s %-44s out %.2e (mean %.2e) lse %.1e entropy %.1e tokens %ld/%ld slots %d\n",
                good ? "ok  " : "FAIL", options.Name().c_str(), error.worst_out, error.mean_out,
                error.worst_lse, error.worst_entropy, static_cast<long>(error.counted_tokens),
                static_cast<long>(error.expected_tokens), test->num_slots());
  }
  return all_good;
}

absl::Status TimeAll(const Settings& settings, int32_t num_ctas, const L2Flush& flush,
                     nlohmann::json* report) {
  const AttentionShape usual{32, 8, 128};
  const std::vector<TimedCase> cases = {
      {usual, Same(1, 8192)},          {usual, Same(1, 32768)},
      {usual, Same(1, 131072)},        {usual, Same(8, 32768)},
      {usual, Same(32, 8192)},         {usual, Same(64, 2048)},
      {usual, Same(32, 8192), 4},      {usual, Same(32, 8192), 8},
      {{28, 4, 128}, Same(16, 32768)}, {{32, 8, 64}, Same(32, 16384)},
      {{16, 4, 256}, Same(32, 8192)},
  };
  for (const DType type : {DType::kBf16, DType::kF8E4m3}) {
    for (const TimedCase& timed : cases) {
      DecodeCaseOptions options;
      options.shape = timed.shape;
      options.kv_type = type;
      options.kv_lens = timed.kv_lens;
      options.q_len = timed.q_len;
      ADAATTN_ASSIGN_OR_RETURN(auto test, DecodeCase::Create(options, num_ctas));
      ADAATTN_ASSIGN_OR_RETURN(const auto times, TimeFlushed(nullptr, settings.runs, flush,
                                                             [&test](cudaStream_t stream) {
                                                               return test->Run(stream);
                                                             }));
      const double median = times[times.size() / 2];
      const double rate = test->kv_bytes() / median * 1e-6;
      std::printf("%-36s median %8.2f us  min %8.2f  %5.2f TB/s read  %5.2f as BF16  parts %d\n",
                  options.Name().c_str(), median, times.front(), rate,
                  test->kv_bytes_as_bf16() / median * 1e-6, test->num_slots());
      report->push_back({{"case", options.Name()},
                         {"kv_type", DTypeName(type)},
                         {"num_sequences", timed.kv_lens.size()},
                         {"kv_len", timed.kv_lens[0]},
                         {"q_len", timed.q_len},
                         {"num_q_heads", timed.shape.num_q_heads},
                         {"num_kv_heads", timed.shape.num_kv_heads},
                         {"head_dim", timed.shape.head_dim},
                         {"bytes_as_bf16", test->kv_bytes_as_bf16()},
                         {"median_us", median},
                         {"min_us", times.front()},
                         {"kv_bytes", test->kv_bytes()},
                         {"terabytes_per_second", rate}});
    }
  }
  return absl::OkStatus();
}

std::string CudaVersion(int version) {
  return absl::StrCat(version / 1000, ".", version % 1000 / 10);
}

// What the numbers were measured on and with.
absl::StatusOr<nlohmann::json> Provenance(const Settings& settings) {
  cudaDeviceProp properties;
  int driver = 0, runtime = 0;
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, 0));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaDriverGetVersion(&driver));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaRuntimeGetVersion(&runtime));
  return nlohmann::json{
      {"device", properties.name},          {"multiprocessors", properties.multiProcessorCount},
      {"cuda_driver", CudaVersion(driver)}, {"cuda_runtime", CudaVersion(runtime)},
      {"commit", ADAATTN_COMMIT},           {"command", settings.command}};
}

// What needs captured traces; false when some of it was wrong.
absl::StatusOr<bool> RunOnTraces(const Settings& settings, const L2Flush& flush,
                                 nlohmann::json* report) {
  struct Part {
    const char* name;
    bool wanted;
    decltype(&BenchProgressive) bench;
  };
  bool good = true;
  for (const Part& part : {Part{"progressive", settings.progressive, BenchProgressive},
                           Part{"bounded", settings.bounded, BenchBounded},
                           Part{"host_pages", settings.host_pages, BenchHostPages}}) {
    if (!part.wanted) continue;
    ADAATTN_ASSIGN_OR_RETURN(
        const bool part_good,
        part.bench(settings.progressive_options, settings.runs, flush, &(*report)[part.name]));
    good &= part_good;
  }
  return good;
}

absl::StatusOr<int> Run(const Settings& settings) {
  ADAATTN_ASSIGN_OR_RETURN(const nlohmann::json provenance, Provenance(settings));
  nlohmann::json report = provenance;
  const int32_t num_sms = report["multiprocessors"].get<int32_t>(), num_ctas = 2 * num_sms;
  std::printf("%s, %d multiprocessors, CUDA %s, commit %s\n",
              report["device"].get<std::string>().c_str(), num_sms,
              report["cuda_driver"].get<std::string>().c_str(), ADAATTN_COMMIT);
  bool good = true;
  if (settings.check) {
    ADAATTN_ASSIGN_OR_RETURN(good, CheckAll(num_ctas));
    std::printf("check: %s\n", good ? "passed" : "FAILED");
  }
  for (const char* part : {"decode", "steps", "progressive", "bounded", "host_pages"}) {
    report[part] = nlohmann::json::array();
  }
  L2Flush flush;
  ADAATTN_RETURN_IF_ERROR(flush.Allocate(settings.flush));
  if (settings.time) {
    ADAATTN_RETURN_IF_ERROR(TimeAll(settings, num_ctas, flush, &report["decode"]));
  }
  if (settings.steps) {
    ADAATTN_RETURN_IF_ERROR(TimeSteps(10 * settings.runs, num_sms, &report["steps"]));
  }
  ADAATTN_ASSIGN_OR_RETURN(const bool traces_good, RunOnTraces(settings, flush, &report));
  if (!settings.tuning_file.empty()) {
    ADAATTN_RETURN_IF_ERROR(TuneDevice(settings.progressive_options, settings.runs, flush,
                                       provenance, settings.tuning_file));
  }
  if (!settings.json_file.empty()) std::ofstream(settings.json_file) << report.dump(2) << "\n";
  return good && traces_good ? 0 : 1;
}

bool ParseFlags(absl::Span<char*> arguments, Settings* settings) {
  bool check = false, time = false, steps = false;
  for (absl::string_view flag : arguments.subspan(1)) {
    if (flag == "--check") {
      check = true;
    } else if (flag == "--time") {
      time = true;
    } else if (flag == "--steps") {
      steps = true;
    } else if (flag == "--progressive") {
      settings->progressive = true;
    } else if (flag == "--bounded") {
      settings->bounded = true;
    } else if (flag == "--host-pages") {
      settings->host_pages = true;
    } else if (absl::ConsumePrefix(&flag, "--tune=")) {
      settings->tuning_file = std::string(flag);
    } else if (absl::ConsumePrefix(&flag, "--json=")) {
      settings->json_file = std::string(flag);
    } else if (absl::ConsumePrefix(&flag, "--runs=")) {
      if (!absl::SimpleAtoi(flag, &settings->runs) || settings->runs < 1) return false;
    } else if (flag == "--flush=written") {
      settings->flush = FlushKind::kWritten;
    } else if (flag == "--flush=read") {
      settings->flush = FlushKind::kRead;
    } else if (!ParseProgressiveFlag(flag, &settings->progressive_options)) {
      return false;
    }
  }
  if (check || time || steps || settings->progressive || settings->bounded ||
      settings->host_pages || !settings->tuning_file.empty()) {
    settings->check = check, settings->time = time, settings->steps = steps;
  }
  settings->command = absl::StrJoin(arguments, " ");
  return true;
}

}  // namespace
}  // namespace adaattn

int main(int argc, char** argv) {
  adaattn::Settings settings;
  if (!adaattn::ParseFlags(absl::MakeSpan(argv, static_cast<size_t>(argc)), &settings)) {
    std::fprintf(
        stderr,
        "usage: %s [--check] [--time] [--steps] [--progressive] [--bounded] [--host-pages]\n"
        "       [--tune=FILE] [--json=FILE] [--runs=N >= 1] [--flush=written|read]\n"
        "       [--trace=FILE|joined:FILE|random:HEAD_DIM]... [--cases=BATCHxTOKENS,...]\n"
        "       [--heads=Q/KV] [--stored-bits=4|6|8] [--policy=threshold|budget|feedback]\n"
        "       [--theta=X] [--target=X] [--goal=X] [--two-stage] [--z=X] [--sample=N]\n"
        "       [--conclude-pages=N]\n",
        argv[0]);
    return 2;
  }
  const absl::StatusOr<int> result = adaattn::Run(settings);
  if (!result.ok()) {
    std::fprintf(stderr, "%s\n", result.status().ToString().c_str());
    return 1;
  }
  return *result;
}

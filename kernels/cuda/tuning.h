#ifndef ADAATTN_KERNELS_CUDA_TUNING_H_
#define ADAATTN_KERNELS_CUDA_TUNING_H_

// Numbers that only measuring a device gives: how finely work is split, and from what length on
// progressive pages pay. There is a table of known devices; `adaattn_bench tune` measures the one
// at hand and writes a tuning file, which goes before the table:
//
//   {"version": 1,
//    "devices": [{"device": "NVIDIA H100 80GB HBM3",
//                 "exact_ctas_per_sm": 2,
//                 "progressive_cta_percent": 100,
//                 "conclude_pages": 32,
//                 "crossovers": [{"kv_heads": 8, "over_bf16": 4096, "over_fp8": null}],
//                 "provenance": {...}}]}                         any; for people

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/attention.h"

namespace adaattn {

inline constexpr int32_t kTuningVersion = 1;

// Lengths in tokens from which on a progressive step took less time than an exact one over BF16 or
// FP8 pages, with `kv_heads` = sequences times kv heads in the step. kNeverFaster: at no length
// measured.
struct Crossover {
  static constexpr int32_t kNeverFaster = INT32_MAX;
  int32_t kv_heads = 0;
  int32_t over_bf16 = kNeverFaster;
  int32_t over_fp8 = kNeverFaster;
};

struct CudaTuning {
  std::string device;                     // as the runtime names it; "" for one nobody measured
  int32_t exact_ctas_per_sm = 2;          // 1 to 8
  int32_t progressive_cta_percent = 100;  // 25 to 400: multiprocessors that a plan counts on
  // 0 to 128: the pages of a CTA up to which few heads' steps end with one launch, for each CTA of
  // a head (MaxConcludePages); 0: none does. A file need not say.
  int32_t conclude_pages = 32;
  std::vector<Crossover> crossovers;  // by kv_heads, ascending; empty: not measured
};

// Reads the text of a tuning file. Errors: kInvalidArgument, naming the field, what it holds and
// what it must hold; unknown fields and another version are errors too.
absl::StatusOr<std::vector<CudaTuning>> ParseTuning(absl::string_view text);

// The text of a tuning file that holds `tuning`; `provenance` is a JSON object.
std::string FormatTuning(const CudaTuning& tuning, absl::string_view provenance);

// What the table says of the device called `device`: what docs/kernels.md has measured on it. The
// defaults, with `device` empty, of a device that it does not know.
CudaTuning BuiltInTuning(absl::string_view device);

// A tuning and who gave it, for people: the file's path, "built-in, NAME", or "built-in".
struct LoadedTuning {
  CudaTuning tuning;
  std::string source;
};

// What `path` says of the device called `device`; BuiltInTuning where path is "" or the file does
// not know the device. Errors: kNotFound, or as ParseTuning with the path in front.
absl::StatusOr<LoadedTuning> LoadTuning(const std::string& path, absl::string_view device);

// From what length on sessions seal their pages: the crossovers over 16-bit pages, which is what
// sessions hold that have not sealed theirs.
std::vector<SealCrossover> SealCrossovers(const CudaTuning& tuning);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_TUNING_H_

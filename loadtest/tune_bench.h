#ifndef ADAATTN_LOADTEST_TUNE_BENCH_H_
#define ADAATTN_LOADTEST_TUNE_BENCH_H_

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "absl/status/status.h"
#include "loadtest/l2_flush.h"
#include "loadtest/progressive_bench.h"

namespace adaattn {

// Measures what kernels/cuda/tuning.h holds, 32 q heads over 8 kv heads, on the first trace of
// `options` (theta .004 unless given), and writes it to `file` with `provenance` (the device's name
// under "device"). Numbers leave their defaults only for a gain of more than 1 %.
absl::Status TuneDevice(const ProgressiveBenchOptions& options, int runs, const L2Flush& flush,
                        const nlohmann::json& provenance, const std::string& file);

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_TUNE_BENCH_H_

#ifndef ADAATTN_LOADTEST_STEP_BENCH_H_
#define ADAATTN_LOADTEST_STEP_BENCH_H_

#include <cstdint>
#include <nlohmann/json_fwd.hpp>

#include "absl/status/status.h"

namespace adaattn {

// Times whole steps through the CUDA backend, batch 1 and 32, dense and sealed pages: how long
// PlanAttend and RunAttend keep the host, how long of that is spent on packing the step rather than
// in the CUDA runtime, and how long a step takes until its results stand in host memory. Steps
// repeat, as those of a model's layers do; packing is timed with new schedules, too.
// Prints, and appends to `report`. Caches stay warm between steps.
absl::Status TimeSteps(int runs, int32_t num_sms, nlohmann::json* report);

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_STEP_BENCH_H_

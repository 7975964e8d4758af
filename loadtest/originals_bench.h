#ifndef ADAATTN_LOADTEST_ORIGINALS_BENCH_H_
#define ADAATTN_LOADTEST_ORIGINALS_BENCH_H_

// Times whole steps that read originals, through the CUDA backend: PlanAttend, RunAttend, Wait, and
// what of that is the attending kernel's. On the traces, heads and stored bits of `options`; its
// sizes, or one sequence and eight of each whole trace. L2 is flushed before every step. Both print
// one line a case and append to `report`.

#include <nlohmann/json_fwd.hpp>

#include "absl/status/statusor.h"
#include "loadtest/l2_flush.h"
#include "loadtest/progressive_bench.h"

namespace adaattn {

// Bounded steps at the target of `options`, or at .1 and .02: with originals in the pool, with
// originals in the exact tier, without. False when a bound is above the target although originals
// are kept, or an output depends on where.
absl::StatusOr<bool> BenchBounded(const ProgressiveBenchOptions& options, int runs,
                                  const L2Flush& flush, nlohmann::json* report);

// Exact decode over FP16 pages in the pool and in the exact tier, from where they cross PCIe. False
// when an output depends on where.
absl::StatusOr<bool> BenchHostPages(const ProgressiveBenchOptions& options, int runs,
                                    const L2Flush& flush, nlohmann::json* report);

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_ORIGINALS_BENCH_H_

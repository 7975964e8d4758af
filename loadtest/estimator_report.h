#ifndef ADAATTN_LOADTEST_ESTIMATOR_REPORT_H_
#define ADAATTN_LOADTEST_ESTIMATOR_REPORT_H_

#include "absl/status/status.h"
#include "client/trace.h"
#include "loadtest/estimator_runner.h"

namespace adaattn {

// Prints each estimator's cost, bias, spread about the exact value, and how often that lay in its
// interval, on a trace's rows of attention, its heads' keys and the keys and values of its pages.
// Exact values are the host's.
absl::Status PrintEstimators(const Trace& trace, EstimatorRunner* runner);

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_ESTIMATOR_REPORT_H_

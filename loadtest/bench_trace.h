#ifndef ADAATTN_LOADTEST_BENCH_TRACE_H_
#define ADAATTN_LOADTEST_BENCH_TRACE_H_

// What benchmarks attend: captured traces, traces made of them, random numbers.

#include <string>

#include "absl/status/statusor.h"
#include "client/trace.h"
#include "kernels/shape.h"

namespace adaattn {

// A trace whose heads have twice the channels: kv heads two by two side by side, q head i of the
// one with q head i of the other, softmax_scale over sqrt(2), tokens and positions as they were. An
// odd kv head is left out, and so are the answers. kInvalidArgument for a trace of one kv head.
absl::StatusOr<Trace> JoinHeads(const Trace& trace);

// `trace` with the heads of `shape`, whose head_dim it has: those of the first sequence of a batch
// (row_judge.h). Without answers.
Trace RepeatHeads(const Trace& trace, const AttentionShape& shape);

// A captured trace, for "random:D" normal numbers of head_dim D, for "joined:FILE" a captured one
// through JoinHeads. Errors: as LoadTrace and JoinHeads; kInvalidArgument unless D is 16 to 256.
absl::StatusOr<Trace> LoadBenchTrace(const std::string& path);

// What reports call it: `path` without folders.
std::string BenchTraceName(const std::string& path);

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_BENCH_TRACE_H_

#ifndef ADAATTN_LOADTEST_ROW_JUDGE_H_
#define ADAATTN_LOADTEST_ROW_JUDGE_H_

// The right answers for rows of a captured trace, and what dense FP8 would answer.

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "client/trace.h"
#include "kernels/shape.h"

namespace adaattn {

// One row of one q head of the trace, attending its first `num_tokens` tokens, wherever it was
// captured.
struct TraceRow {
  int32_t row = 0;
  int32_t q_head = 0;
  int64_t num_tokens = 0;

  friend bool operator<(const TraceRow& a, const TraceRow& b) {
    return std::tie(a.row, a.q_head, a.num_tokens) < std::tie(b.row, b.q_head, b.num_tokens);
  }
};

// How a batch of `shape` is made of a trace with fewer heads: kv heads take the trace's in turn,
// their q heads those of that head's group in turn, starting elsewhere in every sequence.
// Sequences of `kv_len` tokens take the rows captured nearest to the end of what they hold: the
// first tokens of the trace, or all of it several times over.
int32_t SourceKvHead(const Trace& trace, int32_t kv_head);
TraceRow SourceRow(const Trace& trace, const AttentionShape& shape, int32_t kv_len,
                   int32_t sequence, int32_t q_head);

// |out - expected| / |expected|, L2.
double RelativeError(const float* out, const std::vector<double>& expected);

// Computes answers once and keeps them. Not thread-safe; uses every core while it computes.
class RowJudge {
 public:
  struct Answer {
    std::vector<double> out;  // [head_dim], float64 on the trace's own FP16 values
    double fp8_error = 0;     // relative L2 with K and V in e4m3, scale 1, all else in float64
  };

  // Keeps a reference to the trace.
  explicit RowJudge(const Trace* trace);

  // The answers to `rows`, in their order; valid as long as the judge.
  // Requires: rows, heads and tokens that the trace has.
  std::vector<const Answer*> Judge(const std::vector<TraceRow>& rows);

 private:
  Answer Compute(const TraceRow& row) const;

  const Trace* const trace_;
  std::vector<float> keys_, values_;          // [num_kv_heads, num_tokens, head_dim]
  std::vector<float> fp8_keys_, fp8_values_;  // likewise
  std::map<TraceRow, Answer> answers_;
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_ROW_JUDGE_H_

#ifndef ADAATTN_TESTS_UNIT_TRACE_TESTING_H_
#define ADAATTN_TESTS_UNIT_TRACE_TESTING_H_

// Captured traces as the progressive reference's input: every kv head sealed with a basis fitted on
// its first tokens, every captured row a decode step over the tokens before it.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "client/trace.h"
#include "kernels/format/float_types.h"
#include "kernels/format/seal.h"
#include "kernels/reference/progressive_f64.h"
#include "unit/format_testing.h"

namespace adaattn {

inline std::vector<float> FromFp16(const std::vector<uint16_t>& bits) {
  std::vector<float> values;
  values.reserve(bits.size());
  for (const uint16_t value : bits) values.push_back(ToFloat(Fp16{value}));
  return values;
}

class TraceReplay {
 public:
  // Fits on the first `fit_tokens` tokens and the first quarter of the rows' queries.
  TraceReplay(const std::string& path, int64_t fit_tokens, int32_t stored_bits)
      : trace_(LoadTrace(path).value()),
        q_(FromFp16(trace_.q)),
        k_(FromFp16(trace_.k)),
        v_(FromFp16(trace_.v)),
        block_(static_cast<size_t>(MakeBasisLayout(trace_.shape).block_bytes)) {
    for (int32_t head = 0; head < trace_.shape.num_kv_heads; ++head) {
      SealAll(head, fit_tokens, stored_bits);
    }
  }
  const Trace& trace() const { return trace_; }
  int64_t visible_tokens(int32_t row) const {
    return int64_t{trace_.positions[static_cast<size_t>(row)]} + 1;
  }
  // Sealed pages of a row: its full pages but the newest.
  int32_t num_sealed_pages(int32_t row) const {
    const int64_t full = visible_tokens(row) / kPageTokens;
    return full > 0 ? static_cast<int32_t>(full - 1) : 0;
  }

  ProgressiveResultF64 Run(int32_t kv_head, int32_t row, const DecisionParams& decision) const {
    const int64_t d = trace_.shape.head_dim, group = trace_.shape.group_size();
    std::vector<float> q;
    for (int64_t g = 0; g < group; ++g) {
      const float* const at = q_.data() + ((kv_head * group + g) * trace_.num_rows + row) * d;
      q.insert(q.end(), at, at + d);
    }
    ProgressiveStepF64 step;
    step.q = q.data();
    step.group_size = static_cast<int32_t>(group);
    step.q_start = visible_tokens(row) - 1;
    step.num_sealed_pages = num_sealed_pages(row);
    const int64_t sealed = int64_t{step.num_sealed_pages} * kPageTokens;
    step.num_dense_tokens = visible_tokens(row) - sealed;
    step.dense_keys = k_.data() + (kv_head * trace_.num_tokens + sealed) * d;
    step.dense_values = v_.data() + (kv_head * trace_.num_tokens + sealed) * d;
    step.softmax_scale = trace_.softmax_scale;
    step.decision = decision;
    return heads_[static_cast<size_t>(kv_head)].Run(step);
  }

  // Relative error of q head `g` of the kv head against the trace's answer.
  double Error(const ProgressiveResultF64& result, int32_t kv_head, int32_t row, int32_t g) const {
    const int64_t d = trace_.shape.head_dim;
    const int64_t q_head = int64_t{kv_head} * trace_.shape.group_size() + g;
    const float* const expected = trace_.expected_o.data() + (q_head * trace_.num_rows + row) * d;
    return RelativeError({result.out.data() + g * d, static_cast<size_t>(d)},
                         std::vector<double>(expected, expected + d));
  }

 private:
  void SealAll(int32_t head, int64_t fit_tokens, int32_t stored_bits) {
    const AttentionShape& shape = trace_.shape;
    const int64_t d = shape.head_dim, n = trace_.num_tokens;
    std::vector<float> queries;
    for (int64_t g = 0; g < shape.group_size(); ++g) {
      const float* const at = q_.data() + (head * shape.group_size() + g) * trace_.num_rows * d;
      queries.insert(queries.end(), at, at + std::max(1, trace_.num_rows / 4) * d);
    }
    const float* const keys = k_.data() + head * n * d;
    const float* const values = v_.data() + head * n * d;
    const Basis basis =
        FitBasis(shape.head_dim, {keys, static_cast<size_t>(fit_tokens * d)}, queries).value();
    WriteBasis(basis, shape, head, block_.data());
    const SealedHead sealed = MakeSealedHead(shape, head, stored_bits, TileOrder::kLanes);
    const BasisView view = ViewBasis(block_.data(), shape, head);
    heads_.emplace_back(sealed);
    std::vector<std::byte> page(static_cast<size_t>(sealed.layout.page_bytes));
    for (int64_t p = 0; p < n / kPageTokens; ++p) {
      SealHead(sealed, view, keys + p * kPageTokens * d, values + p * kPageTokens * d, page.data());
      heads_.back().AddPage(view, page.data());
    }
  }

  Trace trace_;
  std::vector<float> q_, k_, v_;
  std::vector<std::byte> block_;
  std::vector<ProgressiveHeadF64> heads_;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_TRACE_TESTING_H_

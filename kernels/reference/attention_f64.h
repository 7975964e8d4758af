#ifndef ADAATTN_KERNELS_REFERENCE_ATTENTION_F64_H_
#define ADAATTN_KERNELS_REFERENCE_ATTENTION_F64_H_

#include <cstdint>
#include <vector>

#include "kernels/shape.h"

namespace adaattn {

// The tokens that the row at one cache position sees: [begin, end), empty where begin >= end.
struct VisibleRange {
  int64_t begin = 0;
  int64_t end = 0;
};

// Causal and windowed: a row at `position` sees keys in (position - window, position] of the
// `kv_len` that exist; window 0 = all.
VisibleRange VisibleTokens(int64_t position, int64_t kv_len, int64_t window);

// One sequence's attention; see SequenceStep for the meaning of the fields.
struct AttentionF64Params {
  AttentionShape shape;
  int64_t kv_len = 0;
  int32_t q_len = 0;
  int64_t q_start = 0;
  double softmax_scale = 0;
  double softcap = 0;  // 0 = none
  int64_t window = 0;  // 0 = all
};

struct AttentionF64Result {
  std::vector<double> out;  // [q_len, num_q_heads, head_dim]
  std::vector<double> lse;  // [q_len, num_q_heads] natural log; empty range: -inf, out 0
};

// Exact attention in double precision: what everything else is judged by.
//
//   q  [q_len, num_q_heads, head_dim]    k, v  [kv_len, num_kv_heads, head_dim]
//
// NaN and infinity spread as IEEE arithmetic spreads them.
AttentionF64Result AttentionF64(const AttentionF64Params& params, const float* q, const float* k,
                                const float* v);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_REFERENCE_ATTENTION_F64_H_

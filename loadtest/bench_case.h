#ifndef ADAATTN_LOADTEST_BENCH_CASE_H_
#define ADAATTN_LOADTEST_BENCH_CASE_H_

// What reports call a case of a benchmark, and what its bandwidth is relative to.

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/shape.h"

namespace adaattn {

// kind_d128_n8_kv32768_h32/8
inline std::string BenchCaseName(absl::string_view kind, const AttentionShape& shape,
                                 int64_t num_sequences, int64_t kv_len) {
  return absl::StrCat(kind, "_d", shape.head_dim, "_n", num_sequences, "_kv", kv_len, "_h",
                      shape.num_q_heads, "/", shape.num_kv_heads);
}

// Of K and V.
inline int64_t BytesAsBf16(const AttentionShape& shape, int64_t num_sequences, int64_t kv_len) {
  return num_sequences * kv_len * 2 * shape.num_kv_heads * shape.head_dim * 2;
}

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_BENCH_CASE_H_

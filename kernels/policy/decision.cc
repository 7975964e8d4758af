#include "kernels/policy/decision.h"

namespace adaattn {

ReadBytes RecountBytes(const HeadDecision& decision, int32_t head_dim, DType dense_type) {
  const int64_t dense = int64_t{decision.dense_tokens} * head_dim * DTypeBytes(dense_type);
  const int64_t exact =
      int64_t{decision.exact_pages} * kPageTokens * head_dim * DTypeBytes(dense_type);
  ReadBytes bytes{dense + exact, dense + exact};
  for (int32_t i = 0; i < kNumKeyDepths; ++i) {
    bytes.key += decision.key_pages[i] * KeyReadBytes(head_dim, KeyDepthBits(i), KeyDepthChunks(i));
  }
  for (int32_t i = 0; i < kNumValueDepths; ++i) {
    bytes.value += decision.value_pages[i] * ValueReadBytes(head_dim, 2 * i);
  }
  return bytes;
}

}  // namespace adaattn

#ifndef ADAATTN_TESTS_UNIT_FORMAT_TESTING_H_
#define ADAATTN_TESTS_UNIT_FORMAT_TESTING_H_

// Made-up heads for the tests of format, policy and reference.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "kernels/format/basis.h"
#include "kernels/format/seal.h"

namespace adaattn {

inline std::vector<float> RandomNormal(uint32_t seed, size_t count, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// Keys as models make them after their position encoding: a large mean, channels of very different
// size that are correlated with their neighbours. [n, head_dim]
inline std::vector<float> ModelLikeKeys(uint32_t seed, int64_t n, int32_t head_dim) {
  std::vector<float> keys = RandomNormal(seed, static_cast<size_t>(n * head_dim));
  for (int64_t t = 0; t < n; ++t) {
    float* const key = keys.data() + t * head_dim;
    for (int32_t c = 0; c < head_dim; ++c) {
      const float size = c % 16 == 3 ? 8.0f : 1.0f / static_cast<float>(1 + c % 7);
      key[c] = size * (key[c] + (c > 0 ? 0.5f * key[c - 1] : 0.0f)) + (c % 5 == 0 ? 6.0f : 0.2f);
    }
  }
  return keys;
}

// A basis block with one fitted head per kv head of `shape`, all fitted on `keys`.
inline std::vector<std::byte> FittedBlock(const AttentionShape& shape,
                                          absl::Span<const float> keys) {
  std::vector<std::byte> block(static_cast<size_t>(MakeBasisLayout(shape).block_bytes));
  const Basis basis = FitBasis(shape.head_dim, keys, {}).value();
  for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
    WriteBasis(basis, shape, head, block.data());
  }
  return block;
}

inline SealedHead MakeSealedHead(const AttentionShape& shape, int32_t kv_head, int32_t stored_bits,
                                 TileOrder order) {
  SealedHead head;
  head.head_dim = shape.head_dim;
  head.kv_head = kv_head;
  head.layout = MakePageLayout(shape, stored_bits);
  head.order = order;
  return head;
}

inline constexpr int32_t kHeadDims[] = {64, 80, 96, 128, 256};

inline double RelativeError(absl::Span<const double> actual, absl::Span<const double> expected) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return std::sqrt(error / norm);
}

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_FORMAT_TESTING_H_

#ifndef ADAATTN_KERNELS_FORMAT_BASIS_H_
#define ADAATTN_KERNELS_FORMAT_BASIS_H_

// The rotation of one kv head's keys: fitting it, checking one that a caller brings, and its block
// in the pool. Host code; the device reads the block by BasisLayout.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/format/float_types.h"
#include "kernels/format/page_layout.h"
#include "kernels/shape.h"

namespace adaattn {

// One kv head's basis on the host.
struct Basis {
  int32_t head_dim = 0;
  std::vector<float> mean;      // [head_dim]
  std::vector<float> rotation;  // [head_dim, head_dim] row = input channel, column = rank
  // [head_dim] mean square of the fitted keys' (k - mean) rotation; all zero when not known.
  std::vector<float> energy;
  ValueFactors value_factors;  // of the head's values; 1 when not known
};

// Both times `error_factor`, of the head's predicted errors.
constexpr ValueFactors Scaled(const ValueFactors& factors, float error_factor) {
  return {factors.spread * error_factor, factors.rounding * error_factor};
}

// Fits a basis on `keys` [n, head_dim]: the eigenvectors of the second moment of k - mean, in
// double precision. Channels are ordered by E[(q B)_c^2] E[(k B)_c^2] over `queries` [m, head_dim]
// where m > 0, else by E[(k B)_c^2]; ties keep the eigenvalues' order. Each column's entry of
// largest magnitude is positive. Constant keys and n < head_dim give a complete orthonormal basis
// all the same.
//
// Errors: kInvalidArgument for no keys, sizes that are no multiple of head_dim, NaN or infinity.
absl::StatusOr<Basis> FitBasis(int32_t head_dim, absl::Span<const float> keys,
                               absl::Span<const float> queries);

// Checks a basis that a caller brings: `mean` [head_dim], `rotation` [head_dim, head_dim] (row =
// input channel, column = rank). Its energies are unknown.
//
// Errors: kInvalidArgument, naming field, place and value, for wrong sizes, NaN or infinity, or
// columns whose products with each other differ from 0 and 1 by more than kOrthonormalTolerance.
absl::StatusOr<Basis> CheckBasis(int32_t head_dim, absl::Span<const float> mean,
                                 absl::Span<const float> rotation);
inline constexpr float kOrthonormalTolerance = 1e-3f;

// One kv head's part of a basis block. The pointers belong to the block.
struct BasisView {
  const float* mean = nullptr;        // [head_dim]
  const Fp16* query_basis = nullptr;  // Q [head_dim, head_dim], row = input channel
  const float* key_basis = nullptr;   // K = Q^-T, likewise
  const float* energy = nullptr;      // [head_dim]
  const ValueFactors* value_factors = nullptr;
};

// Writes `basis` as the part of `kv_head` of a block of MakeBasisLayout(shape) at `block`: Q is the
// rotation rounded to FP16, K the inverse transpose of that very matrix.
// Requires: basis.head_dim == shape.head_dim; `block` is aligned to 4 bytes.
void WriteBasis(const Basis& basis, const AttentionShape& shape, int32_t kv_head, std::byte* block);

// The part of `kv_head` of such a block.
BasisView ViewBasis(const std::byte* block, const AttentionShape& shape, int32_t kv_head);

// out[r] = sum_c (key[c] - mean[c]) K[c][r]: a key in the rotated frame. `out` is not `key`.
void RotateKey(const BasisView& basis, int32_t head_dim, const float* key, float* out);

// out[c] = mean[c] + sum_r rotated[r] Q[c][r]: the inverse of RotateKey.
void RestoreKey(const BasisView& basis, int32_t head_dim, const float* rotated, float* out);

// out[r] = sum_c query[c] Q[c][r]. Scores of a basis are q.k = (q Q).((k - mean) K) + q.mean.
void RotateQuery(const BasisView& basis, int32_t head_dim, const float* query, float* out);

// q.mean, what every score of this basis is raised by before the softmax scale.
float QueryMeanScore(const BasisView& basis, int32_t head_dim, const float* query);

// How far keys have drifted from those that the basis was fitted on: the mean square of `rotated`
// [n, head_dim] outside the leading half of the ranks, over the fitted energy there. 1: as well as
// when fitted; also where the basis has no energies to compare with.
float DriftRatio(const BasisView& basis, int32_t head_dim, absl::Span<const float> rotated);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_FORMAT_BASIS_H_

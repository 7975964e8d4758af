#ifndef ADAATTN_KERNELS_CUDA_ESTIMATORS_H_
#define ADAATTN_KERNELS_CUDA_ESTIMATORS_H_

// The estimators of policy/rank.h and policy/entropy_estimators.h on the device, for many matrices
// or rows of attention at once. They draw the same random numbers as those of the host, so that
// both agree to rounding.
//
// X is read once: what needs all of it is X^T X, and for the randomized SVD X^T times the random
// directions (estimator_gram.h). A CTA takes each matrix, or each probe of one, from there to its
// end (estimator_rank.h, tridiagonal.h). That is less work than products with X where more than
// dim / 2 vectors are multiplied, and leaves nothing of a size that a library would do better:
// cuBLAS, cuSOLVER and what they need are 950 MB of shared libraries.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "absl/status/status.h"
#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"
#include "kernels/policy/entropy_estimators.h"
#include "kernels/policy/rank.h"
#include "kernels/shape.h"

namespace adaattn {

inline constexpr int32_t kMaxRankDim = 256;
inline constexpr int32_t kMaxRankRange = 64;  // directions of the randomized SVD
inline constexpr int32_t kMaxRankSteps = 32;  // of Lanczos
inline constexpr int32_t kMaxEntropyDraws = 64;

// `count` matrices of [rows, dim] elements in device memory, row-major: keys or values of pages or
// of whole heads, `stride` elements apart or wherever their pages are.
struct MatrixBatch {
  const std::byte* values = nullptr;
  DType type = DType::kF32;  // kF32, kF16 or kBf16
  int32_t dim = 0;           // 1..kMaxRankDim
  int64_t rows = 0;
  int64_t stride = 0;
  // Device memory [count, PagesOf(rows)]: where each kPageTokens rows of a matrix begin, in
  // elements from `values`; null where matrices are in one piece.
  const int64_t* pages = nullptr;
  int32_t count = 0;
  bool centred = false;  // each column less its mean
};

ADAATTN_HD constexpr int64_t PagesOf(int64_t rows) {
  return (rows + kPageTokens - 1) / kPageTokens;
}

struct RankParams {
  MatrixBatch x;
  RankOptions options;
  uint64_t seed = 0;               // matrix i takes seed + i
  std::byte* workspace = nullptr;  // RankWorkspaceBytes
  RankEstimate* out = nullptr;     // [count], device memory
  double* energies = nullptr;      // [count, dim], descending; of RankMethod::kSpectrum, or null
};

// kInvalidArgument for what is out of range.
absl::Status CheckRankParams(const RankParams& params);
int64_t RankWorkspaceBytes(const RankParams& params);
// Enqueues all of it.
absl::Status EstimateRanks(const RankParams& params, cudaStream_t stream);

// Rows of attention over pages of kPageTokens scores, in device memory.
struct EntropyParams {
  int32_t num_rows = 0;
  const int32_t* tokens = nullptr;   // [rows] scores of each
  const float* scores = nullptr;     // [rows, score_stride] nats
  const double* page_lse = nullptr;  // [rows, page_stride]
  int64_t score_stride = 0;
  int64_t page_stride = 0;
  EntropyMethod method = EntropyMethod::kExact;
  int32_t num_draws = 0;           // 1..kMaxEntropyDraws, of EntropyMethod::kSampled
  uint64_t seed = 0;               // row i takes seed + i
  double* workspace = nullptr;     // [rows, page_stride], of EntropyMethod::kSampled
  EntropyEstimate* out = nullptr;  // [rows]
};

absl::Status EstimateEntropies(const EntropyParams& params, cudaStream_t stream);

// The log sum of exponentials of every page of every row, to `page_lse`. Of `params` only rows,
// tokens, scores and strides count.
absl::Status SumPages(const EntropyParams& params, double* page_lse, cudaStream_t stream);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_ESTIMATORS_H_

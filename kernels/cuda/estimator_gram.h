#ifndef ADAATTN_KERNELS_CUDA_ESTIMATOR_GRAM_H_
#define ADAATTN_KERNELS_CUDA_ESTIMATOR_GRAM_H_

// X^T X of matrices X [rows, dim], and X^T Omega with the normal Omega [rows, range] that policy/
// rank.h multiplies with. A CTA makes a tile of 64 x 64 of one of them from a part of the rows; a
// second pass adds the parts up and takes the means out: (X - 1 m)^T Y = X^T Y - s_x s_y^T / rows,
// s the columns' sums. Products of 64 rows are summed in FP32, everything else is FP64.

#include <cstddef>
#include <cstdint>

#include "kernels/cuda/estimator_team.h"
#include "kernels/cuda/estimators.h"
#include "kernels/format/float_types.h"
#include "kernels/format/page_layout.h"
#include "kernels/policy/counter_random.h"

namespace adaattn {

inline constexpr int32_t kGramTile = 64;   // channels, and rows at a time
inline constexpr int32_t kGramRows = 256;  // of a part, unless there are more than kMaxGramParts
inline constexpr int32_t kMaxGramParts = 32;

// A tile's products, and the sums of the columns of its right operand behind them.
inline constexpr int32_t kGramCells = kGramTile * (kGramTile + 1);

// Byte offsets into the workspace, and what sizes follow from. Row-major, outermost first; N
// matrices, P parts, D channels, W directions.
struct RankWorkspace {
  int64_t parts = 0;    // double [N, P, tiles, kGramCells]
  int64_t gram = 0;     // double [N, D, D]: X^T X
  int64_t range = 0;    // double [N, W, D]: the range's directions, one after the other
  int64_t image = 0;    // double [N, W, D]: X^T X times them
  int64_t small = 0;    // double [N, W, W]
  int64_t basis = 0;    // double [N, probes, steps, D]: of Lanczos
  int64_t entropy = 0;  // double [N, probes]
  int64_t bytes = 0;
  int32_t num_parts = 0;
  int64_t part_rows = 0;  // a multiple of kGramTile
  int32_t blocks = 0;     // of kGramTile channels
  int32_t pairs = 0;      // tiles of X^T X, column by column of its upper triangle
  int32_t tiles = 0;      // and of X^T Omega
  int32_t width = 0;      // directions
};

ADAATTN_HD RankWorkspace MakeRankWorkspace(const RankParams& p) {
  RankWorkspace w;
  const int64_t d = p.x.dim, n = p.x.count;
  const bool svd = p.options.method == RankMethod::kRandomizedSvd;
  const bool hutchinson = p.options.method == RankMethod::kHutchinson;
  w.blocks = (p.x.dim + kGramTile - 1) / kGramTile;
  w.pairs = w.blocks * (w.blocks + 1) / 2;
  w.tiles = w.pairs + (svd ? w.blocks : 0);
  const int64_t most = p.x.rows < d ? p.x.rows : d;
  w.width = !svd ? 0 : static_cast<int32_t>(p.options.range < most ? p.options.range : most);
  const int64_t parts = (p.x.rows + kGramRows - 1) / kGramRows;
  const int64_t wanted = parts < 1 ? 1 : parts < kMaxGramParts ? parts : kMaxGramParts;
  w.part_rows = (p.x.rows + wanted * kGramTile - 1) / (wanted * kGramTile) * kGramTile;
  w.num_parts = static_cast<int32_t>(wanted);
  int64_t end = 0;
  const auto add = [&end](int64_t doubles) {
    const int64_t begin = end;
    end += AlignPage(doubles * 8);
    return begin;
  };
  w.parts = add(n * w.num_parts * w.tiles * kGramCells);
  w.gram = add(n * d * d);
  w.range = add(n * w.width * d);
  w.image = add(n * w.width * d);
  w.small = add(n * w.width * w.width);
  w.basis = add(hutchinson ? n * p.options.probes * p.options.steps * d : 0);
  w.entropy = add(hutchinson ? n * p.options.probes : 0);
  w.bytes = end;
  return w;
}

ADAATTN_HD double* RankDoubles(const RankParams& p, int64_t offset) {
  return reinterpret_cast<double*>(p.workspace + offset);
}

struct GramShared {
  alignas(16) float left[kGramTile][kGramTile];   // [row][channel]
  alignas(16) float right[kGramTile][kGramTile];  // [row][channel or direction]
};

// One tile of one part of a matrix.
template <class Team>
class GramTile {
 public:
  ADAATTN_HD GramTile(const RankParams& params, const RankWorkspace& work, int32_t matrix,
                      int32_t part, int32_t tile, const Team& team, GramShared& shared)
      : p_(params), w_(work), matrix_(matrix), part_(part), team_(team), shared_(shared) {
    random_ = tile >= w_.pairs;
    left_ = tile;
    if (random_) {
      left_ -= w_.pairs;
    } else {
      while (left_ > right_) left_ -= ++right_;
    }
    cells_ = RankDoubles(p_, w_.parts) +
             ((int64_t{matrix} * w_.num_parts + part) * w_.tiles + tile) * kGramCells;
  }

  ADAATTN_HD void Run() const {
    for (int32_t i = team_.thread; i < kGramCells; i += team_.num_threads) cells_[i] = 0;
    const int64_t begin = part_ * w_.part_rows;
    const int64_t end = begin + w_.part_rows < p_.x.rows ? begin + w_.part_rows : p_.x.rows;
    for (int64_t row = begin; row < end; row += kGramTile) {
      team_.SyncCta();
      Load(row, end);
      team_.SyncCta();
      Add();
    }
  }

 private:
  ADAATTN_HD float Element(int64_t row, int32_t channel) const {
    if (channel >= p_.x.dim) return 0;
    int64_t at = matrix_ * p_.x.stride + row * p_.x.dim + channel;
    if (p_.x.pages != nullptr) {
      at = p_.x.pages[matrix_ * PagesOf(p_.x.rows) + row / kPageTokens] +
           row % kPageTokens * p_.x.dim + channel;
    }
    if (p_.x.type == DType::kF32) return reinterpret_cast<const float*>(p_.x.values)[at];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(p_.x.values)[at];
    return p_.x.type == DType::kF16 ? ToFloat(Fp16{bits}) : ToFloat(Bf16{bits});
  }
  ADAATTN_HD float Direction(int64_t row, int32_t direction) const {
    if (direction >= w_.width) return 0;
    return static_cast<float>(NormalAt(p_.seed + static_cast<uint64_t>(matrix_),
                                       static_cast<uint64_t>(row),
                                       static_cast<uint64_t>(direction)));
  }
  ADAATTN_HD void Load(int64_t first, int64_t end) const {
    for (int32_t i = team_.thread; i < kGramTile * kGramTile; i += team_.num_threads) {
      const int32_t r = i / kGramTile, c = i % kGramTile;
      const int64_t row = first + r;
      const bool in = row < end;
      shared_.left[r][c] = in ? Element(row, left_ * kGramTile + c) : 0;
      shared_.right[r][c] = !in       ? 0
                            : random_ ? Direction(row, c)
                                      : Element(row, right_ * kGramTile + c);
    }
  }
  // Four by four cells a thread.
  ADAATTN_HD void Add() const {
    constexpr int32_t kEach = 4, kAcross = kGramTile / kEach;
    for (int32_t t = team_.thread; t < kAcross * kAcross; t += team_.num_threads) {
      const int32_t i = t / kAcross * kEach, j = t % kAcross * kEach;
      float sums[kEach][kEach] = {};
      for (int32_t r = 0; r < kGramTile; ++r) {
        float x[kEach], y[kEach];
        for (int32_t e = 0; e < kEach; ++e) {
          x[e] = shared_.left[r][i + e];
          y[e] = shared_.right[r][j + e];
        }
        for (int32_t a = 0; a < kEach; ++a) {
          for (int32_t b = 0; b < kEach; ++b) sums[a][b] += x[a] * y[b];
        }
      }
      for (int32_t a = 0; a < kEach; ++a) {
        for (int32_t b = 0; b < kEach; ++b) {
          cells_[(i + a) * kGramTile + j + b] += static_cast<double>(sums[a][b]);
        }
      }
    }
    for (int32_t j = team_.thread; j < kGramTile; j += team_.num_threads) {
      double sum = 0;
      for (int32_t r = 0; r < kGramTile; ++r) sum += static_cast<double>(shared_.right[r][j]);
      cells_[kGramTile * kGramTile + j] += sum;
    }
  }

  const RankParams& p_;
  const RankWorkspace& w_;
  const int32_t matrix_, part_;
  const Team& team_;
  GramShared& shared_;
  bool random_;
  int32_t left_, right_ = 0;  // blocks of channels; right_ of a random tile counts for nothing
  double* cells_;
};

// The tile of X^T X that holds blocks left <= right.
ADAATTN_HD int32_t GramPair(int32_t left, int32_t right) { return right * (right + 1) / 2 + left; }

// Adds up the parts of a matrix: X^T X to `gram`, X^T Omega, transposed, to `range`.
template <class Team>
class GramSum {
 public:
  ADAATTN_HD GramSum(const RankParams& params, const RankWorkspace& work, int32_t matrix)
      : p_(params), w_(work), matrix_(matrix) {}

  // `team` may be one of `num_ctas` CTAs that share the matrix.
  ADAATTN_HD void Run(const Team& team, int32_t cta, int32_t num_ctas) const {
    const int32_t d = p_.x.dim;
    double* gram = RankDoubles(p_, w_.gram) + int64_t{matrix_} * d * d;
    double* range = RankDoubles(p_, w_.range) + int64_t{matrix_} * w_.width * d;
    const int32_t first = cta * team.num_threads + team.thread, step = num_ctas * team.num_threads;
    for (int32_t i = first; i < d * d; i += step) {
      const int32_t a = i / d, b = i % d;
      if (a > b) continue;
      gram[int64_t{a} * d + b] = gram[int64_t{b} * d + a] = Product(a, b);
    }
    for (int32_t i = first; i < w_.width * d; i += step) {
      range[i] = Sketch(i % d, i / d);
    }
  }

 private:
  // Over the parts.
  ADAATTN_HD double Sum(int32_t tile, int32_t cell) const {
    const double* at = RankDoubles(p_, w_.parts) +
                       (int64_t{matrix_} * w_.num_parts * w_.tiles + tile) * kGramCells + cell;
    double sum = 0;
    for (int32_t part = 0; part < w_.num_parts; ++part) {
      sum += at[int64_t{part} * w_.tiles * kGramCells];
    }
    return sum;
  }
  ADAATTN_HD double ColumnSum(int32_t channel) const {
    return Sum(GramPair(0, channel / kGramTile), kGramTile * kGramTile + channel % kGramTile);
  }
  ADAATTN_HD double Product(int32_t a, int32_t b) const {
    const double sum =
        Sum(GramPair(a / kGramTile, b / kGramTile), a % kGramTile * kGramTile + b % kGramTile);
    if (!p_.x.centred || p_.x.rows == 0) return sum;
    return sum - ColumnSum(a) * ColumnSum(b) / static_cast<double>(p_.x.rows);
  }
  ADAATTN_HD double Sketch(int32_t channel, int32_t direction) const {
    const int32_t tile = w_.pairs + channel / kGramTile;
    const double sum = Sum(tile, channel % kGramTile * kGramTile + direction);
    if (!p_.x.centred || p_.x.rows == 0) return sum;
    return sum - ColumnSum(channel) * Sum(tile, kGramTile * kGramTile + direction) /
                     static_cast<double>(p_.x.rows);
  }

  const RankParams& p_;
  const RankWorkspace& w_;
  const int32_t matrix_;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_ESTIMATOR_GRAM_H_

#include "kernels/policy/rank.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace adaattn {
namespace {

using Matrix = Eigen::MatrixXd;
using Vector = Eigen::VectorXd;
using FloatRows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

Matrix Load(const RowsView& x) {
  return Eigen::Map<const FloatRows>(x.values.data(), x.rows(), x.dim).cast<double>();
}

// X^T X v without the matrix X^T X.
Matrix ApplyGram(const Matrix& x, const Matrix& v) { return x.transpose() * (x * v); }

Matrix Gaussian(Eigen::Index rows, Eigen::Index cols, uint64_t seed) {
  return Matrix::NullaryExpr(rows, cols, [seed](Eigen::Index row, Eigen::Index col) {
    return NormalAt(seed, static_cast<uint64_t>(row), static_cast<uint64_t>(col));
  });
}

// An orthonormal basis [rows, min(rows, cols)] of v's columns.
Matrix Orthonormal(const Matrix& v) {
  const Eigen::HouseholderQR<Matrix> qr(v);
  return qr.householderQ() * Matrix::Identity(v.rows(), std::min(v.rows(), v.cols()));
}

// z^T f(G) z / |z|^2 for G = X^T X / trace and f(x) = -x ln x: Gauss quadrature whose nodes and
// weights are those of the Lanczos matrix that starts at z.
double LanczosEntropy(const Matrix& x, double trace, const Vector& z, int32_t steps) {
  const Eigen::Index dim = x.cols();
  const Eigen::Index most = std::min<Eigen::Index>(steps, dim);
  Matrix basis(dim, most);
  Vector diagonal(most), beside(most);
  Vector v = z.normalized();
  Eigen::Index size = 0;
  for (; size < most; ++size) {
    basis.col(size) = v;
    Vector next = ApplyGram(x, v) / trace;
    diagonal(size) = v.dot(next);
    // In full against all before, twice: nearly equal eigenvalues lose orthogonality at once.
    for (int pass = 0; pass < 2; ++pass) {
      next -= basis.leftCols(size + 1) * (basis.leftCols(size + 1).transpose() * next);
    }
    beside(size) = next.norm();
    if (beside(size) < 1e-12) {
      ++size;
      break;
    }
    v = next / beside(size);
  }
  Eigen::SelfAdjointEigenSolver<Matrix> solver;
  solver.computeFromTridiagonal(diagonal.head(size),
                                beside.head(std::max<Eigen::Index>(size - 1, 0)));
  double sum = 0;
  for (Eigen::Index i = 0; i < size; ++i) {
    const double weight = solver.eigenvectors()(0, i);
    sum += weight * weight * ShareEntropy(solver.eigenvalues()(i));
  }
  return sum;
}

}  // namespace

double RankOfSpectrum(absl::Span<const double> energies) {
  const double total = std::accumulate(energies.begin(), energies.end(), 0.0);
  if (!(total > 0)) return 0;
  double entropy = 0;
  for (const double energy : energies) entropy += ShareEntropy(energy / total);
  return std::exp(entropy);
}

int32_t RankAtEnergy(absl::Span<const double> energies, double energy) {
  std::vector<double> sorted(energies.begin(), energies.end());
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const double needed = energy * std::accumulate(sorted.begin(), sorted.end(), 0.0);
  double held = 0;
  int32_t rank = 0;
  // Of equal energies the last sum may stay a rounding error below the whole.
  while (rank < static_cast<int32_t>(sorted.size()) && held < needed * (1 - 1e-12)) {
    held += sorted[static_cast<size_t>(rank++)];
  }
  return rank;
}

std::vector<double> ExactSpectrum(const RowsView& x) {
  std::vector<double> energies(static_cast<size_t>(x.dim), 0.0);
  if (x.rows() == 0) return energies;
  const Matrix loaded = Load(x);
  const Matrix gram = loaded.transpose() * loaded;
  const Eigen::SelfAdjointEigenSolver<Matrix> solver(gram, Eigen::EigenvaluesOnly);
  for (int32_t i = 0; i < x.dim; ++i) {
    energies[static_cast<size_t>(i)] = std::max(0.0, solver.eigenvalues()(x.dim - 1 - i));
  }
  return energies;
}

RankEstimate StableRankByPower(const RowsView& x, int32_t iterations, uint64_t seed) {
  RankEstimate estimate;
  if (x.rows() == 0) return estimate;
  const Matrix loaded = Load(x);
  const double trace = loaded.squaredNorm();
  if (!(trace > 0)) return estimate;
  Vector v = Gaussian(x.dim, 1, seed).col(0).normalized();
  double energy = 0;
  for (int32_t i = 0; i < iterations; ++i) {
    const Vector next = ApplyGram(loaded, v);
    energy = v.dot(next);  // Rayleigh's quotient: at most s_1^2
    if (!(energy > 0)) break;
    v = next.normalized();
  }
  return StableRankOf(trace, energy);
}

RankEstimate RankByRandomizedSvd(const RowsView& x, int32_t range, int32_t power_steps,
                                 uint64_t seed) {
  RankEstimate estimate;
  if (x.rows() == 0) return estimate;
  const Matrix loaded = Load(x);
  const double trace = loaded.squaredNorm();
  if (!(trace > 0)) return estimate;
  const Eigen::Index width = std::min<Eigen::Index>({range, x.dim, loaded.rows()});
  Matrix q = Orthonormal(loaded.transpose() * Gaussian(loaded.rows(), width, seed));
  for (int32_t i = 0; i < power_steps; ++i) q = Orthonormal(ApplyGram(loaded, q));
  const Eigen::JacobiSVD<Matrix> svd(loaded * q);
  std::vector<double> energies;
  for (const double value : svd.singularValues()) energies.push_back(value * value);
  return RankOfFoundEnergies(energies.data(), static_cast<int32_t>(width), trace,
                             std::min<Eigen::Index>(x.dim, loaded.rows()) - width);
}

RankEstimate RankByHutchinson(const RowsView& x, int32_t probes, int32_t steps, uint64_t seed) {
  RankEstimate estimate;
  if (x.rows() == 0) return estimate;
  const Matrix loaded = Load(x);
  const double trace = loaded.squaredNorm();
  if (!(trace > 0)) return estimate;
  std::vector<double> entropies;
  for (int32_t i = 0; i < probes; ++i) {
    const Vector z = Vector::NullaryExpr(x.dim, [seed, i](Eigen::Index c) {
      return SignAt(seed, static_cast<uint64_t>(c), static_cast<uint64_t>(i));
    });
    entropies.push_back(x.dim * LanczosEntropy(loaded, trace, z, steps));
  }
  return RankOfProbes(entropies.data(), probes);
}

RankEstimate EstimateRank(const RowsView& x, const RankOptions& options, uint64_t seed) {
  switch (options.method) {
    case RankMethod::kRandomizedSvd:
      return RankByRandomizedSvd(x, options.range, options.power_steps, seed);
    case RankMethod::kHutchinson:
      return RankByHutchinson(x, options.probes, options.steps, seed);
    case RankMethod::kPower:
      return StableRankByPower(x, options.iterations, seed);
    case RankMethod::kSpectrum:
      break;
  }
  const double rank = RankOfSpectrum(ExactSpectrum(x));
  return RankEstimate{rank, rank, rank};
}

}  // namespace adaattn

#include "kernels/policy/rank.h"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>

namespace adaattn {
namespace {

using Matrix = Eigen::MatrixXd;
using Vector = Eigen::VectorXd;
using FloatRows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr double kNormalQuantile = 1.959964;  // of .975

Matrix Load(const RowsView& x) {
  return Eigen::Map<const FloatRows>(x.values.data(), x.rows(), x.dim).cast<double>();
}

// X^T X v without the matrix X^T X.
Matrix ApplyGram(const Matrix& x, const Matrix& v) { return x.transpose() * (x * v); }

Matrix Gaussian(Eigen::Index rows, Eigen::Index cols, std::mt19937_64* random) {
  std::normal_distribution<double> normal;
  return Matrix::NullaryExpr(rows, cols, [&] { return normal(*random); });
}

// An orthonormal basis [rows, min(rows, cols)] of v's columns.
Matrix Orthonormal(const Matrix& v) {
  const Eigen::HouseholderQR<Matrix> qr(v);
  return qr.householderQ() * Matrix::Identity(v.rows(), std::min(v.rows(), v.cols()));
}

double EntropyTermOf(double x) { return x > 0 ? -x * std::log(x) : 0; }

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
    sum += weight * weight * EntropyTermOf(solver.eigenvalues()(i));
  }
  return sum;
}

}  // namespace

double RankOfSpectrum(absl::Span<const double> energies) {
  const double total = std::accumulate(energies.begin(), energies.end(), 0.0);
  if (!(total > 0)) return 0;
  double entropy = 0;
  for (const double energy : energies) entropy += EntropyTermOf(energy / total);
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
  std::mt19937_64 random(seed);
  Vector v = Gaussian(x.dim, 1, &random).col(0).normalized();
  double energy = 0;
  for (int32_t i = 0; i < iterations; ++i) {
    const Vector next = ApplyGram(loaded, v);
    energy = v.dot(next);  // Rayleigh's quotient: at most s_1^2
    if (!(energy > 0)) break;
    v = next.normalized();
  }
  if (!(energy > 0)) return estimate;
  estimate.rank = estimate.high = trace / energy;
  estimate.low = 1;
  return estimate;
}

RankEstimate RankByRandomizedSvd(const RowsView& x, int32_t range, int32_t power_steps,
                                 uint64_t seed) {
  RankEstimate estimate;
  if (x.rows() == 0) return estimate;
  const Matrix loaded = Load(x);
  const double trace = loaded.squaredNorm();
  if (!(trace > 0)) return estimate;
  const Eigen::Index width = std::min<Eigen::Index>({range, x.dim, loaded.rows()});
  std::mt19937_64 random(seed);
  Matrix q = Orthonormal(loaded.transpose() * Gaussian(loaded.rows(), width, &random));
  for (int32_t i = 0; i < power_steps; ++i) q = Orthonormal(ApplyGram(loaded, q));
  const Eigen::JacobiSVD<Matrix> svd(loaded * q);
  std::vector<double> energies;
  double found = 0;
  for (Eigen::Index i = 0; i < svd.singularValues().size(); ++i) {
    energies.push_back(svd.singularValues()(i) * svd.singularValues()(i));
    found += energies.back();
  }
  const double rest = std::max(0.0, trace - found);
  const auto unseen = std::min<Eigen::Index>(x.dim, loaded.rows()) - width;
  // The rest in one direction, or evenly over all that are left: the least and the most it can be.
  energies.push_back(rest);
  estimate.low = RankOfSpectrum(energies);
  energies.pop_back();
  energies.insert(energies.end(), static_cast<size_t>(unseen),
                  unseen > 0 ? rest / static_cast<double>(unseen) : 0.0);
  estimate.rank = estimate.high = RankOfSpectrum(energies);
  return estimate;
}

RankEstimate RankByHutchinson(const RowsView& x, int32_t probes, int32_t steps, uint64_t seed) {
  RankEstimate estimate;
  if (x.rows() == 0) return estimate;
  const Matrix loaded = Load(x);
  const double trace = loaded.squaredNorm();
  if (!(trace > 0)) return estimate;
  std::mt19937_64 random(seed);
  double sum = 0, squares = 0;
  for (int32_t i = 0; i < probes; ++i) {
    const Vector z = Vector::NullaryExpr(x.dim, [&] { return random() % 2 == 0 ? 1.0 : -1.0; });
    const double entropy = x.dim * LanczosEntropy(loaded, trace, z, steps);
    sum += entropy;
    squares += entropy * entropy;
  }
  const double mean = sum / probes;
  const double variance = std::max(0.0, squares - sum * mean) / (probes - 1);
  const double half = kNormalQuantile * std::sqrt(variance / probes);
  estimate.rank = std::exp(mean);
  estimate.low = std::exp(mean - half);
  estimate.high = std::exp(mean + half);
  return estimate;
}

}  // namespace adaattn

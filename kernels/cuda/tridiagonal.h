#ifndef ADAATTN_KERNELS_CUDA_TRIDIAGONAL_H_
#define ADAATTN_KERNELS_CUDA_TRIDIAGONAL_H_

// Eigenvalues of symmetric matrices by a CTA (Golub and Van Loan, Matrix Computations, 8.3
// and 8.4): Householder reflections make the matrix tridiagonal, bisection finds every eigenvalue
// by itself. The Gauss rule of a small tridiagonal matrix, nodes and weights, by one thread (Golub
// and Welsch, Calculation of Gauss quadrature rules, 1969).

#include <cmath>
#include <cstdint>

#include "kernels/cuda/estimator_team.h"

namespace adaattn {

// What reflections and bisection share, in shared memory.
struct TridiagonalShared {
  static constexpr int32_t kMaxSize = 256;
  double sums[kMaxTeamWarps];
  double diagonal[kMaxSize];
  double beside[kMaxSize];  // beside[i] couples i and i + 1
  double reflection[kMaxSize];
  double image[kMaxSize];
};

// Makes `a` [size, size], symmetric in full with entries of order 1, tridiagonal; destroys it.
template <class Team>
ADAATTN_HD void Tridiagonalise(const Team& team, int32_t size, double* a, TridiagonalShared& s) {
  constexpr double kNothing = 1e-60;  // squares of what counts for 0
  for (int32_t k = 0; k < size; ++k) {
    const int32_t left = size - k - 1;
    const double* row = a + int64_t{k} * size + k + 1;
    double* rest = a + int64_t{k + 1} * size + k + 1;  // the part that is to be reflected
    const double squares = CtaSum(
        team, left > 0 ? left - 1 : 0, [&](int64_t i) { return row[i + 1] * row[i + 1]; }, s.sums);
    const double head = left > 0 ? row[0] : 0.0;
    const bool reflect = squares > kNothing;  // the same in all threads
    const double norm = sqrt(head * head + squares), image = head > 0 ? -norm : norm;
    if (team.thread == 0) {
      s.diagonal[k] = a[int64_t{k} * size + k];
      s.beside[k] = reflect ? image : head;
    }
    if (!reflect) continue;
    // H = 1 - scale v v^T takes the row to (image, 0, ...).
    const double first = head - image, scale = 2 / (squares + first * first);
    for (int32_t i = team.thread; i < left; i += team.num_threads) {
      s.reflection[i] = i == 0 ? first : row[i];
    }
    team.SyncCta();
    for (int32_t i = team.warp; i < left; i += team.num_warps) {
      const double dot = WarpDot(team, rest + int64_t{i} * size, s.reflection, left);
      if (team.lane == 0) s.image[i] = scale * dot;
    }
    team.SyncCta();
    const double half =
        0.5 * scale *
        CtaSum(
            team, left, [&](int64_t i) { return s.image[i] * s.reflection[i]; }, s.sums);
    for (int32_t i = team.thread; i < left; i += team.num_threads) {
      s.image[i] -= half * s.reflection[i];
    }
    team.SyncCta();
    for (int32_t i = team.warp; i < left; i += team.num_warps) {
      for (int32_t j = team.lane; j < left; j += Team::kLanes) {
        rest[int64_t{i} * size + j] -= s.reflection[i] * s.image[j] + s.image[i] * s.reflection[j];
      }
    }
    team.SyncCta();
  }
  team.SyncCta();
}

// How many eigenvalues of the tridiagonal matrix lie below x (Sturm's sequence).
ADAATTN_HD int32_t EigenvaluesBelow(const double* diagonal, const double* beside, int32_t size,
                                    double x) {
  constexpr double kTiny = 1e-290;
  int32_t below = 0;
  double pivot = 1;
  for (int32_t i = 0; i < size; ++i) {
    const double off = i == 0 ? 0.0 : beside[i - 1] * beside[i - 1];
    pivot = diagonal[i] - x - off / pivot;
    if (fabs(pivot) < kTiny) pivot = -kTiny;
    below += pivot < 0 ? 1 : 0;
  }
  return below;
}

// The tridiagonal matrix's eigenvalues to `out` [size], descending. By a CTA; all see them.
template <class Team>
ADAATTN_HD void Eigenvalues(const Team& team, int32_t size, double* out, TridiagonalShared& s) {
  const double bound = CtaMax(
      team, size,
      [&](int64_t i) {
        return fabs(s.diagonal[i]) + (i > 0 ? fabs(s.beside[i - 1]) : 0.0) +
               (i + 1 < size ? fabs(s.beside[i]) : 0.0);
      },
      s.sums);
  constexpr int32_t kHalvings = 54;  // to 2^-53 of the largest
  for (int32_t i = team.thread; i < size; i += team.num_threads) {
    double low = -bound, high = bound;
    for (int32_t step = 0; step < kHalvings; ++step) {
      const double middle = 0.5 * (low + high);
      if (EigenvaluesBelow(s.diagonal, s.beside, size, middle) > size - 1 - i) {
        high = middle;
      } else {
        low = middle;
      }
    }
    out[i] = 0.5 * (low + high);
  }
  team.SyncCta();
}

// Eigenvalues of the tridiagonal matrix in place of `diagonal`, in any order, and to `first` the
// first components of their unit eigenvectors: QL with implicit shifts, which destroys `beside`
// [size].
ADAATTN_HD void GaussRule(int32_t size, double* diagonal, double* beside, double* first) {
  constexpr double kRounding = 2.2e-16;
  constexpr int32_t kMostTurns = 60;  // of one eigenvalue; two or three are usual
  for (int32_t i = 0; i < size; ++i) first[i] = i == 0 ? 1.0 : 0.0;
  if (size > 0) beside[size - 1] = 0;
  for (int32_t l = 0; l < size; ++l) {
    for (int32_t turn = 0; turn < kMostTurns; ++turn) {
      int32_t m = l;
      while (m + 1 < size &&
             fabs(beside[m]) > kRounding * (fabs(diagonal[m]) + fabs(diagonal[m + 1]))) {
        ++m;
      }
      if (m == l) break;
      double g = (diagonal[l + 1] - diagonal[l]) / (2 * beside[l]);
      double r = sqrt(g * g + 1);
      g = diagonal[m] - diagonal[l] + beside[l] / (g + (g < 0 ? -r : r));
      double s = 1, c = 1, p = 0;
      int32_t i = m - 1;
      for (; i >= l; --i) {
        const double f = s * beside[i], b = c * beside[i];
        r = sqrt(f * f + g * g);
        beside[i + 1] = r;
        if (r == 0) break;  // split: the part below has converged
        s = f / r;
        c = g / r;
        g = diagonal[i + 1] - p;
        const double t = (diagonal[i] - g) * s + 2 * c * b;
        p = s * t;
        diagonal[i + 1] = g + p;
        g = c * t - b;
        const double z = first[i + 1];
        first[i + 1] = s * first[i] + c * z;
        first[i] = c * first[i] - s * z;
      }
      if (i >= l) {
        diagonal[i + 1] -= p;
      } else {
        diagonal[l] -= p;
        beside[l] = g;
      }
      beside[m] = 0;
    }
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_TRIDIAGONAL_H_

#ifndef ADAATTN_KERNELS_CUDA_ESTIMATOR_RANK_H_
#define ADAATTN_KERNELS_CUDA_ESTIMATOR_RANK_H_

// The estimators of policy/rank.h from G = X^T X, a CTA to a matrix, or to a probe of Hutchinson's.

#include <cmath>
#include <cstdint>

#include "kernels/cuda/estimator_gram.h"
#include "kernels/cuda/estimator_team.h"
#include "kernels/cuda/tridiagonal.h"
#include "kernels/policy/counter_random.h"
#include "kernels/policy/rank.h"

namespace adaattn {

struct RankShared {
  TridiagonalShared tridiagonal;  // its arrays serve as vectors, too
  double energies[kMaxRankDim];
  double coefficients[kMaxRankRange];
};

template <class Team>
class RankEstimator {
 public:
  ADAATTN_HD RankEstimator(const RankParams& params, const RankWorkspace& work, int32_t matrix,
                           const Team& team, RankShared& shared)
      : p_(params),
        w_(work),
        matrix_(matrix),
        d_(params.x.dim),
        team_(team),
        shared_(shared),
        gram_(Of(work.gram, int64_t{d_} * d_)) {}

  // By all methods but Hutchinson's.
  ADAATTN_HD void Run() {
    SumTrace();
    if (p_.options.method == RankMethod::kPower) {
      Power();
    } else if (p_.options.method == RankMethod::kRandomizedSvd) {
      RandomizedSvd();
    } else {
      Spectrum();
    }
  }

  // z^T f(G / trace) z dim / |z|^2 of one probe, f(x) = -x ln x, by Lanczos quadrature.
  ADAATTN_HD void RunProbe(int32_t probe) {
    SumTrace();
    double* entropy = Of(w_.entropy, p_.options.probes) + probe;
    if (!(trace_ > 0)) {
      if (team_.thread == 0) *entropy = 0;
      return;
    }
    const int32_t size = Lanczos(probe);
    TridiagonalShared& t = shared_.tridiagonal;
    if (team_.thread != 0) return;
    GaussRule(size, t.diagonal, t.beside, shared_.energies);
    double sum = 0;
    for (int32_t i = 0; i < size; ++i) {
      sum += shared_.energies[i] * shared_.energies[i] * ShareEntropy(t.diagonal[i]);
    }
    *entropy = sum * d_;
  }

  // From all probes; by one thread.
  ADAATTN_HD void FinishProbes() {
    const double* entropies = Of(w_.entropy, p_.options.probes);
    double trace = 0;
    for (int32_t i = 0; i < d_; ++i) trace += gram_[int64_t{i} * d_ + i];
    p_.out[matrix_] = trace > 0 ? RankOfProbes(entropies, p_.options.probes) : RankEstimate();
  }

 private:
  ADAATTN_HD double* Of(int64_t offset, int64_t doubles) const {
    return RankDoubles(p_, offset) + matrix_ * doubles;
  }
  ADAATTN_HD uint64_t seed() const { return p_.seed + static_cast<uint64_t>(matrix_); }

  ADAATTN_HD void SumTrace() {
    trace_ = CtaSum(
        team_, d_, [&](int64_t i) { return gram_[i * d_ + i]; }, shared_.tridiagonal.sums);
  }
  // x . y by the CTA.
  ADAATTN_HD double Dot(const double* x, const double* y) const {
    return CtaSum(
        team_, d_, [&](int64_t i) { return x[i] * y[i]; }, shared_.tridiagonal.sums);
  }
  // G x to `out`; both sides are seen by all after and before it. x and out [d].
  ADAATTN_HD void Apply(const double* x, double* out) const {
    for (int32_t i = team_.warp; i < d_; i += team_.num_warps) {
      const double sum = WarpDot(team_, gram_ + int64_t{i} * d_, x, d_);
      if (team_.lane == 0) out[i] = sum;
    }
    team_.SyncCta();
  }

  ADAATTN_HD void Spectrum() {
    TridiagonalShared& t = shared_.tridiagonal;
    const double scale = trace_ > 0 ? 1 / trace_ : 0;
    for (int64_t i = team_.thread; i < int64_t{d_} * d_; i += team_.num_threads) gram_[i] *= scale;
    team_.SyncCta();
    Tridiagonalise(team_, d_, gram_, t);
    Eigenvalues(team_, d_, shared_.energies, t);
    for (int32_t i = team_.thread; i < d_; i += team_.num_threads) {
      const double energy = shared_.energies[i] > 0 ? shared_.energies[i] * trace_ : 0;
      shared_.energies[i] = energy;
      if (p_.energies != nullptr) p_.energies[int64_t{matrix_} * d_ + i] = energy;
    }
    team_.SyncCta();
    if (team_.thread == 0) {
      p_.out[matrix_] = RankOfFoundEnergies(shared_.energies, d_, trace_, /*unseen=*/0);
    }
  }

  ADAATTN_HD void Power() {
    double* v = shared_.tridiagonal.reflection;
    double* next = shared_.tridiagonal.image;
    for (int32_t c = team_.thread; c < d_; c += team_.num_threads) {
      v[c] = NormalAt(seed(), static_cast<uint64_t>(c), 0);
    }
    Normalise(v);
    double energy = 0;
    for (int32_t i = 0; i < p_.options.iterations && trace_ > 0; ++i) {
      Apply(v, next);
      energy = Dot(v, next);
      if (!(energy > 0)) break;
      for (int32_t c = team_.thread; c < d_; c += team_.num_threads) v[c] = next[c];
      Normalise(v);
    }
    if (team_.thread == 0) p_.out[matrix_] = StableRankOf(trace_, energy);
  }
  // Its thread wrote each element of v.
  ADAATTN_HD void Normalise(double* v) const {
    const double norm = sqrt(Dot(v, v));
    for (int32_t c = team_.thread; c < d_; c += team_.num_threads) {
      v[c] = norm > 0 ? v[c] / norm : 0;
    }
    team_.SyncCta();
  }

  // Takes what lies along the first `count` rows of `basis` [count, d] out of v, twice: once leaves
  // what rounding put there. What of v is left is written by the thread of its channel.
  ADAATTN_HD void Deflate(const double* basis, int32_t count, double* v) const {
    for (int32_t pass = 0; pass < 2; ++pass) {
      team_.SyncCta();
      for (int32_t i = team_.warp; i < count; i += team_.num_warps) {
        const double dot = WarpDot(team_, basis + int64_t{i} * d_, v, d_);
        if (team_.lane == 0) shared_.coefficients[i] = dot;
      }
      team_.SyncCta();
      for (int32_t c = team_.thread; c < d_; c += team_.num_threads) {
        double sum = 0;
        for (int32_t i = 0; i < count; ++i) {
          sum += shared_.coefficients[i] * basis[int64_t{i} * d_ + c];
        }
        v[c] -= sum;
      }
    }
  }

  // Makes the rows of `q` [width, d] orthonormal; what depends on those before it becomes 0.
  ADAATTN_HD void Orthonormalise(double* q) const {
    constexpr double kNothing = 1e-10;  // of a row's length
    for (int32_t j = 0; j < w_.width; ++j) {
      double* row = q + int64_t{j} * d_;
      const double before = sqrt(Dot(row, row));
      Deflate(q, j, row);
      const double after = sqrt(Dot(row, row));
      const double scale = after > kNothing * before ? 1 / after : 0;
      for (int32_t c = team_.thread; c < d_; c += team_.num_threads) row[c] *= scale;
    }
    team_.SyncCta();
  }

  ADAATTN_HD void RandomizedSvd() {
    double* q = Of(w_.range, int64_t{w_.width} * d_);
    double* image = Of(w_.image, int64_t{w_.width} * d_);
    double* small = Of(w_.small, int64_t{w_.width} * w_.width);
    Orthonormalise(q);
    for (int32_t step = 0; step < p_.options.power_steps; ++step) {
      for (int32_t j = 0; j < w_.width; ++j) Apply(q + int64_t{j} * d_, image + int64_t{j} * d_);
      double* const spent = q;
      q = image;
      image = spent;
      Orthonormalise(q);
    }
    for (int32_t j = 0; j < w_.width; ++j) Apply(q + int64_t{j} * d_, image + int64_t{j} * d_);
    const double scale = trace_ > 0 ? 1 / trace_ : 0;
    for (int32_t i = team_.warp; i < w_.width * w_.width; i += team_.num_warps) {
      const int32_t a = i / w_.width, b = i % w_.width;
      if (a > b) continue;
      const double dot = scale * WarpDot(team_, q + int64_t{a} * d_, image + int64_t{b} * d_, d_);
      if (team_.lane == 0) small[a * w_.width + b] = small[b * w_.width + a] = dot;
    }
    team_.SyncCta();
    Tridiagonalise(team_, w_.width, small, shared_.tridiagonal);
    Eigenvalues(team_, w_.width, shared_.energies, shared_.tridiagonal);
    if (team_.thread != 0) return;
    for (int32_t i = 0; i < w_.width; ++i) {
      const double energy = shared_.energies[i];
      shared_.energies[i] = energy > 0 ? energy * trace_ : 0;
    }
    const int64_t most = p_.x.rows < d_ ? p_.x.rows : d_;
    p_.out[matrix_] = RankOfFoundEnergies(shared_.energies, w_.width, trace_, most - w_.width);
  }

  // The Lanczos matrix of G / trace that starts at the probe, to diagonal and beside; its size.
  ADAATTN_HD int32_t Lanczos(int32_t probe) {
    constexpr double kNothing = 1e-12;
    TridiagonalShared& t = shared_.tridiagonal;
    double* v = t.reflection;
    double* next = t.image;
    double* basis = Of(w_.basis, int64_t{p_.options.probes} * p_.options.steps * d_) +
                    int64_t{probe} * p_.options.steps * d_;
    for (int32_t c = team_.thread; c < d_; c += team_.num_threads) {
      v[c] = SignAt(seed(), static_cast<uint64_t>(c), static_cast<uint64_t>(probe)) /
             sqrt(static_cast<double>(d_));
    }
    team_.SyncCta();
    const int32_t most = p_.options.steps < d_ ? p_.options.steps : d_;
    int32_t size = 0;
    while (size < most) {
      for (int32_t c = team_.thread; c < d_; c += team_.num_threads) {
        basis[int64_t{size} * d_ + c] = v[c];
      }
      Apply(v, next);
      for (int32_t c = team_.thread; c < d_; c += team_.num_threads) next[c] /= trace_;
      const double along = Dot(v, next);
      Deflate(basis, size + 1, next);
      const double length = sqrt(Dot(next, next));
      if (team_.thread == 0) {
        t.diagonal[size] = along;
        t.beside[size] = length;
      }
      ++size;
      if (length < kNothing) break;
      for (int32_t c = team_.thread; c < d_; c += team_.num_threads) v[c] = next[c] / length;
      team_.SyncCta();
    }
    return size;
  }

  const RankParams& p_;
  const RankWorkspace& w_;
  const int32_t matrix_, d_;
  const Team& team_;
  RankShared& shared_;
  double* gram_;
  double trace_ = 0;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_ESTIMATOR_RANK_H_

#ifndef ADAATTN_KERNELS_CPU_SELECT_ROWS_H_
#define ADAATTN_KERNELS_CPU_SELECT_ROWS_H_

// The loops over one row's pages that selection consists of. Every array has `count` items, a
// multiple of 8; pages that the row does not see have a log mass of -inf and a share of 0.

#include <cstdint>

#include "kernels/policy/error_model.h"
#include "kernels/policy/ladder.h"
#include "kernels/policy/theta.h"

namespace adaattn {

// What the scans found of one row's pages, or of all rows one after the other.
struct RowScans {
  float* max = nullptr;      // largest visible score; -inf: the row sees none
  float* sum = nullptr;      // sum_t exp(s_t - max); 1 where it sees none
  float* squares = nullptr;  // sum_t exp(2 (s_t - max)); 1 where it sees none
  float* read = nullptr;     // RowEnergy of what was read so far
  float* total = nullptr;
  // Of those, by FinishRow:
  float* lse = nullptr;            // log sum exp of the visible scores
  float* concentration = nullptr;  // sum_t p_t^2 / share^2
  float* variance = nullptr;       // var_s at the depth read so far
  float* log_mass = nullptr;       // what counts for the page until it is attended

  RowScans From(int64_t item) const {
    return RowScans{max + item, sum + item,           squares + item,  read + item,    total + item,
                    lse + item, concentration + item, variance + item, log_mass + item};
  }
};

// Fills the second half of `row`.
//   read_variance    var_s per unit of energy that was read
//   unread_variance  likewise that was not
//   corrected        whether log masses make up for what rounding hides
void FinishRow(const RowScans& row, int32_t count, float read_variance, float unread_variance,
               bool corrected);

float Largest(const float* x, int32_t count);

// |a - b|^2; |a|^2 where b is null.
float SquareDistance(const float* a, const float* b, int32_t count);

// out = exp(x - max) and its sum; max is none below any x. Exactly 0 where x is -inf.
float ExpBelow(const float* x, float max, int32_t count, float* out);

// out += sum over i of weights[i] vectors[i], each of `size` floats, a multiple of 8.
void AddWeighted(const float* const* vectors, const float* weights, int32_t num_vectors,
                 int32_t size, float* out);

// margins = max(margins, lse + z sqrt(variance) - global_lse).
void RaiseMargins(const float* lse, const float* variance, float z, float global_lse, int32_t count,
                  float* margins);

// What the masses of a row's pages are multiplied by, and its global LSE.
struct RowMass {
  float scale = 0;
  float lse = 0;
};
// shares = masses * scale; page_shares = max(page_shares, shares). Returns the sums of the row's
// sealed pages.
MassSums ShareOut(const RowScans& row, const float* masses, const RowMass& mass, int32_t count,
                  float* shares, float* page_shares);

// PageErrorParts of a row's pages, or weighted sums of several rows'.
struct PartsRow {
  float* skipped = nullptr;
  float* score = nullptr;
  float* value = nullptr;
};
// ErrorParts of all pages of a row, page by page from
//   distance2           |mean - o|^2
//   spread, scale_rms   of the pages' summaries
void FillPartsRow(const RowScans& row, const float* shares, const float* distance2,
                  const float* spread, const float* scale_rms, int32_t head_dim, int32_t count,
                  const PartsRow& out);

// Several rows' parts together, and the square root of each page's `skipped`.
struct PartsSum {
  PartsRow parts;
  float* amplitude = nullptr;
};

// sum += weight * parts; amplitudes are left to TakeRoots.
void AddParts(const PartsRow& parts, float weight, int32_t count, const PartsSum& sum);
void TakeRoots(int32_t count, const PartsSum& sum);

// Terms of all pages, page i at factors[i], given as three arrays.
ErrorTerms SumTerms(const PartsRow& parts, const PartsRow& factors, int32_t count);

// Terms of all pages on the ladder with `theta`, rung i as deep as rungs[i] says.
ErrorTerms SumLadder(const PartsSum& sum, const float* shares, float theta,
                     const TermFactors* rungs, int32_t count);

// Of those on rung 0 only, where it skips values: a part of SumLadder that grows with theta.
ErrorTerms SumSkipped(const PartsSum& sum, const float* shares, float theta, int32_t count);

// The rung of every page, what it makes of its parts, and into num_above[i] how many pages are
// above rung i.
void FindRungs(const float* shares, float theta, const TermFactors* rungs, int32_t count,
               uint8_t* rung_of, const PartsRow& factors, int32_t* num_above);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_SELECT_ROWS_H_

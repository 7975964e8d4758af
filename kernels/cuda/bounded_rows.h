#ifndef ADAATTN_KERNELS_CUDA_BOUNDED_ROWS_H_
#define ADAATTN_KERNELS_CUDA_BOUNDED_ROWS_H_

// What the threads of a bounded head share, and the bound of each row: from figures of pages to
// terms (policy/bound_terms.h) to a relative error. A warp a row.

#include "kernels/cuda/bounded_pages.h"

namespace adaattn {

// Storing a page's radius in FP32 when it is sealed: half of head_dim products and some more.
ADAATTN_HD constexpr double RadiusFactor(int32_t head_dim) {
  return 1 + (0.5 * head_dim + 8) * kUnit + kFrameError;
}
// Tokens of a page are summed in FP32, pages in FP64; what a page's weights round beside.
inline constexpr double kBoundedChain = kPageTokens + 16;
// The expectation knows no exact masses and guesses o: it aims a little lower.
inline constexpr double kBoundedPlanMargin = 0.9;

// One kv head of one sequence: where its figures lie, and what all threads know of it.
template <class Team>
struct BoundedContext {
  const BoundedParams& p;
  const Team& team;
  BoundedShared& shared;
  const int32_t sequence, head, head_dim;
  const BoundedWorkspace& layout;  // in shared memory, as is the sequence, once they are there
  std::byte* const memory;
  HeadDecision* const decision;
  // Of the sequence; set once shared memory has it.
  int32_t columns = 0;
  BoundedRange range;

  ADAATTN_HD BoundedContext(const BoundedParams& params, int32_t sequence_index, int32_t kv_head,
                            const Team& threads, BoundedShared& memory_of_cta)
      : p(params),
        team(threads),
        shared(memory_of_cta),
        sequence(sequence_index),
        head(kv_head),
        head_dim(params.shape.head_dim),
        layout(memory_of_cta.workspace),
        memory(params.workspace + (int64_t{sequence_index} * params.shape.num_kv_heads + kv_head) *
                                      MakeBoundedWorkspace(params).bytes),
        decision(params.decisions + int64_t{sequence_index} * params.shape.num_kv_heads + kv_head) {
  }

  template <class T>
  ADAATTN_HD T* At(int64_t offset) const {
    return reinterpret_cast<T*>(memory + offset);
  }
  ADAATTN_HD const BoundedSequence& s() const { return shared.sequence; }
  ADAATTN_HD int64_t Cell(int32_t column, int32_t page) const {
    return int64_t{column} * p.max_pages + page;
  }
  ADAATTN_HD float* Raw(int32_t page, int32_t column) const {
    return At<float>(layout.raw) + (int64_t{page} * layout.columns + column) * kPageTokens;
  }
  ADAATTN_HD BoundedPage& Page(int32_t page) const { return At<BoundedPage>(layout.pages)[page]; }
  ADAATTN_HD BoundedRow& Row(int32_t column) const { return At<BoundedRow>(layout.rows)[column]; }
  ADAATTN_HD bool IsSealed(int32_t page) const { return page < range.num_sealed; }
  ADAATTN_HD RowRange KeysOf(int32_t column) const {
    return RowKeys(s(), column / p.shape.group_size());
  }

  ADAATTN_HD PageId Original(int32_t page) const {
    return PageId{p.table[s().exact_begin + range.first_sealed + page]};
  }
  ADAATTN_HD SealedPart Part(int32_t page) const {
    const PageId id{p.table[s().table_begin + range.first_sealed + page]};
    return SealedPart{p.memory.At(id), &shared.layout, head, head_dim};
  }
  ADAATTN_HD int32_t BasisOf(int32_t page) const {
    int32_t run = 0;
    while (run + 1 < s().num_bases && range.first_sealed + page >= s().basis_end[run]) ++run;
    return run;
  }
  ADAATTN_HD float ValueScale() const {
    return s().value_scales < 0 ? 1.0f : p.scales[s().value_scales + head];
  }
  ADAATTN_HD float KeyScale() const {
    return s().key_scales < 0 ? 1.0f : p.scales[s().key_scales + head];
  }

  // Calls work(i) for i in [0, count), each by a thread of the team; by a warp of it; by the CTA.
  template <class Work>
  ADAATTN_HD void ForThreads(int64_t count, const Work& work) const {
    const int64_t step = int64_t{team.num_ctas} * team.num_threads;
    for (int64_t i = int64_t{team.cta} * team.num_threads + team.thread; i < count; i += step) {
      work(i);
    }
  }
  template <class Work>
  ADAATTN_HD void ForWarps(int64_t count, const Work& work) const {
    const int64_t step = int64_t{team.num_ctas} * team.num_warps;
    for (int64_t i = int64_t{team.cta} * team.num_warps + team.warp; i < count; i += step) work(i);
  }
  template <class Work>
  ADAATTN_HD void ForPages(int32_t begin, int32_t end, const Work& work) const {
    for (int32_t page = begin + team.cta; page < end; page += team.num_ctas) work(page);
  }

  // A sealed page for one row; to_mean as o has it.
  ADAATTN_HD SealedFacts Facts(int32_t column, int32_t page, double lse,
                               const double* to_mean) const {
    const int64_t at = Cell(column, page);
    const double log_mass = At<double>(layout.log_mass)[at];
    const BoundedPage& known = Page(page);
    SealedFacts facts;
    facts.mass = MassRatio(log_mass, lse);
    facts.score_error = At<double>(layout.score_error)[at];
    facts.mean_shift = fabs(log_mass - At<double>(layout.lse)[at]);
    facts.to_mean = to_mean[at];
    facts.radius = static_cast<double>(Part(page).summary().radius) * RadiusFactor(head_dim);
    facts.value_bits = known.depth.value_bits;
    facts.token_range = known.token_range;
    facts.saturated = known.saturated;
    return facts;
  }
};

// The bound of one row, by a warp, to its BoundedRow.
//   exact_count  sealed pages of a rank below it are read from their originals
//   measured     o is what was attended; else it is estimated, and so is the originals' mass, and
//                the bound is 0 where it is expected to hold, else infinite: to say that takes no
//                search for the least one
template <class Team>
ADAATTN_HD void BoundRow(const BoundedContext<Team>& c, int32_t column, int32_t exact_count,
                         bool measured) {
  BoundedRow& row = c.Row(column);
  const Team& team = c.team;
  const int32_t num_pages = c.range.num_pages;
  const double norm = measured ? row.out_norm : row.estimate_norm, lse = row.lse;
  if (lse == -HUGE_VAL) {
    if (team.lane == 0) row.relative = row.below = row.above = 0;
    return;
  }
  const double* to_mean = c.template At<double>(measured ? c.layout.to_mean_out : c.layout.to_mean);
  auto* terms = c.template At<PreparedTerm>(c.layout.terms) + int64_t{column} * (c.p.max_pages + 1);
  const auto dense = [&](double mass, double key, double value) {
    return DenseTerm(mass, static_cast<double>(c.head_dim) / kDotSums, row.query_norm, key, value,
                     norm, c.s().softmax_scale, c.s().softcap);
  };
  double known = 0, reach = 0;
  for (int32_t page = team.lane; page < num_pages; page += Team::kLanes) {
    const bool sealed = c.IsSealed(page), exact = sealed && c.Page(page).rank < exact_count;
    BoundTerm term;
    if (sealed && !exact) {
      term = SealedTerm(c.Facts(column, page, lse, to_mean), norm);
    } else if (!sealed || measured) {
      term = dense(MassRatio(c.template At<double>(c.layout.log_mass)[c.Cell(column, page)], lse),
                   c.Page(page).key_norm, c.Page(page).value_norm);
    }
    terms[page].term = term;
    known += term.mass;
    if (term.mass > 0 && term.distance > reach) reach = term.distance;
  }
  known = team.Sum(known);
  // What the originals will hold: what the rest leaves.
  const double rest = measured || known > 1 ? 0 : 1 - known;
  const BoundTerm originals = dense(rest, 0, 0);
  reach = team.Max(rest > 0 && originals.distance > reach ? originals.distance : reach);
  const double rounding = ValueSumError(kBoundedChain, reach, norm);
  BoundSums sums;
  for (int32_t page = team.lane; page <= num_pages; page += Team::kLanes) {
    BoundTerm term = page < num_pages ? terms[page].term : originals;
    term.distance += rounding;
    terms[page] = PrepareTerm(term);
    AddBoundTerm(terms[page], &sums);
  }
  sums.trivial = team.Max(sums.trivial);
  sums.weight = team.Sum(sums.weight);
  sums.multiplier = team.Sum(sums.multiplier);
  sums.up = team.Sum(sums.up);
  sums.down = team.Sum(sums.down);
  const auto excess = [&](double multiplier, double bound) {
    double sum = 0;
    for (int32_t page = team.lane; page <= num_pages; page += Team::kLanes) {
      if (terms[page].term.mass == 0) continue;
      sum += ExcessOfTerm(terms[page], multiplier, bound);
    }
    return team.Sum(sum);
  };
  const double rounded = rounding + OutputRounding(c.p.out_type, norm, c.head_dim);
  if (!measured) {
    const double goal = kBoundedPlanMargin * c.s().decision.target_relative_error;
    const bool holds = BoundHolds(sums, excess, MostError(goal, norm) - rounded);
    if (team.lane == 0) row.relative = holds ? 0 : HUGE_VAL;
    return;
  }
  const double least = LeastBound(sums, excess);
  if (team.lane != 0) return;
  row.relative = RelativeBound(least + rounded, norm);
  row.below = (sums.up > 0 ? -log(sums.down) : 0) + LseRounding(lse);
  row.above = (sums.up > 0 ? log(sums.up) : 0) + LseRounding(lse);
}

// The largest bound of any row, as BoundRow has it; every thread of the team gets it.
template <class Team>
ADAATTN_HD double LargestBound(const BoundedContext<Team>& c, int32_t exact_count, bool measured) {
  c.team.Sync();
  c.ForWarps(c.columns, [&](int64_t column) {
    BoundRow(c, static_cast<int32_t>(column), exact_count, measured);
  });
  c.team.Sync();
  double worst = 0;
  for (int32_t column = 0; column < c.columns; ++column) {
    const double bound = c.Row(column).relative;
    if (!(bound <= worst)) worst = bound > worst ? bound : HUGE_VAL;  // NaN bounds nothing
  }
  return worst;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_BOUNDED_ROWS_H_

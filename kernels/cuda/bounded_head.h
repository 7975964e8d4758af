#ifndef ADAATTN_KERNELS_CUDA_BOUNDED_HEAD_H_
#define ADAATTN_KERNELS_CUDA_BOUNDED_HEAD_H_

// One kv head of a bounded step, by a team of threads, with the meaning that kernels/cpu/bounded.cc
// gives it:
//   scan     4 bits of every sealed key, all of every dense one; dense tokens attended
//   select   the policy's depths (bounded_select.h)
//   plan     deeper until the bound is expected to hold: every stored bit; originals, heaviest
//            first; all originals
//   attend   values, originals; o, lse and the bound of what was attended; if it does not hold and
//            there is more to read, plan again
// All threads take the same way: what decides it is read from memory after a Sync. Scores and sums
// over a page are FP32, as policy/bound_terms.h counts them; everything else is FP64.

#include "kernels/cuda/bounded_reader.h"
#include "kernels/cuda/bounded_select.h"

namespace adaattn {

template <class Team>
class BoundedHeadStep {
 public:
  ADAATTN_HD BoundedHeadStep(const BoundedParams& params, int32_t sequence, int32_t kv_head,
                             const Team& team, BoundedShared& shared)
      : c_(params, sequence, kv_head, team, shared), team_(team), reader_(c_) {}

  ADAATTN_HD void Run() {
    Start();
    if (c_.columns == 0) return;
    reader_.Rotate();
    c_.ForPages(0, c_.range.num_sealed, [&](int32_t page) { reader_.ScanSealed(page); });
    c_.ForPages(c_.range.num_sealed, c_.range.num_pages, [&](int32_t page) {
      reader_.ScoreTokens(page, reader_.DensePage(page), reader_.TokensOf(page));
    });
    team_.Sync();
    SumMasses(/*scan=*/true);
    c_.ForPages(c_.range.num_sealed, c_.range.num_pages, [&](int32_t page) {
      reader_.AttendTokens(page, reader_.DensePage(page), reader_.TokensOf(page), /*scan=*/true,
                           c_.layout.dense);
    });
    team_.Sync();
    BoundedSelect<Team>(c_, reader_).Run();
    Plan();
    double bound = 0;
    for (;;) {
      Attend();
      bound = LargestBound(c_, exact_count_, /*measured=*/true);
      if (bound <= target() || !Deepen()) break;
      Plan();
    }
    Report(bound);
  }

 private:
  ADAATTN_HD const BoundedSequence& s() const { return c_.s(); }
  ADAATTN_HD double target() const { return s().decision.target_relative_error; }
  ADAATTN_HD int64_t elements() const { return int64_t{c_.columns} * c_.head_dim; }
  template <class T>
  ADAATTN_HD T* At(int64_t offset) const {
    return c_.template At<T>(offset);
  }
  ADAATTN_HD bool IsExact(int32_t page) const { return c_.Page(page).rank < exact_count_; }
  ADAATTN_HD void Start() {
    if (team_.thread == 0) {
      if (team_.cta == 0) *c_.decision = HeadDecision{};
      c_.shared.sequence = c_.p.sequences[c_.sequence];
      c_.shared.workspace = MakeBoundedWorkspace(c_.p);
      c_.shared.layout = MakePageLayout(c_.p.shape, c_.shared.sequence.stored_bits);
    }
    team_.SyncCta();
    c_.columns = c_.p.shape.group_size() * s().q_len;
    c_.range = SeenPages(s());
    const int32_t group = c_.p.shape.group_size(), d = c_.head_dim;
    c_.ForThreads(elements(), [&](int64_t i) {
      const int64_t column = i / d;
      const int64_t row = (s().q_begin + column / group) * c_.p.shape.num_q_heads +
                          int64_t{c_.head} * group + column % group;
      At<float>(c_.layout.query)[i] = ReadElement(c_.p.q, c_.p.in_type, row * d + i % d);
    });
    c_.ForThreads(c_.range.num_pages,
                  [&](int64_t page) { c_.Page(static_cast<int32_t>(page)) = BoundedPage(); });
    for (int64_t i = team_.thread; i < elements(); i += team_.num_threads) {
      reader_.PartialOf(c_.layout.dense)[i] = 0;
    }
    team_.Sync();
  }

  // By a warp: over pages from `first` on.
  ADAATTN_HD double SumMassesOf(int32_t column, int32_t first) const {
    const double* masses = At<double>(c_.layout.log_mass) + c_.Cell(column, 0);
    double max = -HUGE_VAL, sum = 0;
    for (int32_t page = first + team_.lane; page < c_.range.num_pages; page += Team::kLanes) {
      max = masses[page] > max ? masses[page] : max;
    }
    max = team_.Max(max);
    for (int32_t page = first + team_.lane; page < c_.range.num_pages; page += Team::kLanes) {
      sum += MassRatio(masses[page], max);
    }
    sum = team_.Sum(sum);
    return sum > 0 ? max + log(sum) : -HUGE_VAL;
  }

  // The LSE of every row over the masses of all pages; of dense ones, too, when they are scanned.
  ADAATTN_HD void SumMasses(bool scan) {
    c_.ForWarps(c_.columns, [&](int64_t at) {
      const auto column = static_cast<int32_t>(at);
      const double lse = SumMassesOf(column, 0);
      const double dense = scan ? SumMassesOf(column, c_.range.num_sealed) : 0;
      if (team_.lane != 0) return;
      BoundedRow& row = c_.Row(column);
      row.lse = lse;
      if (!scan) return;
      row.scan_lse = lse;
      row.dense_lse = dense;
    });
    team_.Sync();
  }

  // --- Deeper -----------------------------------------------------------------------------------

  ADAATTN_HD void Plan() {
    Refine();
    while (!IsExpectedToHold(exact_count_) && Deepen()) {
    }
  }

  ADAATTN_HD bool IsExpectedToHold(int32_t exact_count) const {
    return LargestBound(c_, exact_count, /*measured=*/false) == 0;
  }

  // To the next level; false: nothing is left to read. From the ladder straight to originals where
  // that costs no more than every stored bit of all pages.
  ADAATTN_HD bool Deepen() {
    const int32_t num_sealed = c_.range.num_sealed;
    if (num_sealed == 0) return false;
    if (level_ == BoundDepth::kExactPages) {
      const bool more = exact_count_ < num_sealed;
      exact_count_ = num_sealed;
      return more;
    }
    const bool stored_read = level_ == BoundDepth::kStoredBits;
    if (s().exact_begin >= 0) {
      RankPages();
      const int32_t count = ExactPagesNeeded();
      if (stored_read || int64_t{count} * 16 <= int64_t{num_sealed} * (s().stored_bits - 2)) {
        level_ = BoundDepth::kExactPages;
        exact_count_ = count;
        return true;
      }
    }
    if (stored_read) return false;
    level_ = BoundDepth::kStoredBits;
    team_.Sync();
    c_.ForThreads(num_sealed, [&](int64_t page) {
      c_.Page(static_cast<int32_t>(page)).depth = FullDepth(c_.head_dim, s().stored_bits);
    });
    Refine();
    return true;
  }

  // Pages by how much they may add to the error, most first.
  ADAATTN_HD void RankPages() {
    team_.Sync();
    const int32_t num_sealed = c_.range.num_sealed;
    c_.ForThreads(num_sealed, [&](int64_t at) {
      const auto page = static_cast<int32_t>(at);
      double weight = 0;
      for (int32_t column = 0; column < c_.columns; ++column) {
        const BoundedRow& row = c_.Row(column);
        if (row.lse == -HUGE_VAL) continue;
        const double norm = row.estimate_norm > 1e-30 ? row.estimate_norm : 1e-30;
        const BoundTerm term =
            SealedTerm(c_.Facts(column, page, row.lse, At<double>(c_.layout.to_mean)), norm);
        const double error = term.score_error < 300 ? term.score_error : 300;
        const double own = term.mass * (expm1(error) * term.distance + term.value_error) / norm;
        weight = own > weight ? own : weight;
      }
      c_.Page(page).weight = weight;
    });
    team_.Sync();
    c_.ForThreads(num_sealed, [&](int64_t at) {
      const auto page = static_cast<int32_t>(at);
      const double weight = c_.Page(page).weight;
      int32_t rank = 0;
      for (int32_t other = 0; other < num_sealed; ++other) {
        const double theirs = c_.Page(other).weight;
        rank += theirs > weight || (theirs == weight && other < page) ? 1 : 0;
      }
      c_.Page(page).rank = rank;
    });
    team_.Sync();
  }

  // The fewest pages, heaviest first, whose originals are expected to make the bound hold.
  ADAATTN_HD int32_t ExactPagesNeeded() {
    int32_t low = 1, high = c_.range.num_sealed;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (IsExpectedToHold(middle)) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }

  // Reads the keys of all pages as deep as their depths say.
  ADAATTN_HD void Refine() {
    team_.Sync();
    c_.ForPages(0, c_.range.num_sealed, [&](int32_t page) {
      if (!IsExact(page)) RefinePage(page);
    });
    team_.Sync();
    SumMasses(/*scan=*/false);
  }

  ADAATTN_HD void RefinePage(int32_t page) {
    BoundedPage& known = c_.Page(page);
    const PageDepth depth = known.depth;
    const int32_t bits = s().stored_bits;
    team_.SyncCta();  // all have read the page's state
    if (depth.key.bits > known.key_bits) {
      reader_.ReadFineBits(page, bits);
      team_.SyncCta();
      if (team_.thread == 0) known.key_bits = bits;
    }
    if (depth.value_bits == 0) return;
    // Attended pages count by their scores; skipped ones by the mass that stands for them.
    for (int32_t column = team_.thread; column < c_.columns; column += team_.num_threads) {
      At<double>(c_.layout.log_mass)[c_.Cell(column, page)] =
          At<double>(c_.layout.lse)[c_.Cell(column, page)];
    }
    if (team_.warp == 0) reader_.SumValueRanges(page);
  }

  // --- Attend -----------------------------------------------------------------------------------

  ADAATTN_HD const std::byte* OriginalOf(int32_t page) const {
    return c_.p.memory.At(c_.Original(page));
  }

  ADAATTN_HD void Attend() {
    const RowRange whole{0, kPageTokens};
    team_.Sync();
    c_.ForPages(0, c_.range.num_sealed, [&](int32_t page) {
      if (IsExact(page)) reader_.ScoreTokens(page, OriginalOf(page), whole);
    });
    team_.Sync();
    SumMasses(/*scan=*/false);
    ShareSkipped();
    for (int64_t i = team_.thread; i < elements(); i += team_.num_threads) {
      reader_.PartialOf(c_.layout.sealed)[i] = reader_.SumMeans(i);
      reader_.PartialOf(c_.layout.exact)[i] = 0;
    }
    c_.ForPages(0, c_.range.num_sealed, [&](int32_t page) {
      if (IsExact(page)) {
        reader_.AttendTokens(page, OriginalOf(page), whole, /*dense=*/false, c_.layout.exact);
      } else if (c_.Page(page).depth.value_bits > 0) {
        reader_.AttendSealed(page);
      }
    });
    team_.Sync();
    JoinOutputs();
  }

  // o in the model's frame and in that of the sealed values, and each page's distance from it.
  ADAATTN_HD void JoinOutputs() {
    const int32_t d = c_.head_dim;
    double* out = At<double>(c_.layout.out);
    double* rotated = At<double>(c_.layout.rotated_out);
    c_.ForThreads(elements(), [&](int64_t i) { rotated[i] = reader_.Joined(c_.layout.sealed, i); });
    team_.Sync();
    c_.ForThreads(elements(), [&](int64_t i) {
      const BoundedRow& row = c_.Row(static_cast<int32_t>(i / d));
      out[i] = HadamardChannel(rotated + i / d * d, d, static_cast<int32_t>(i % d)) +
               reader_.Joined(c_.layout.exact, i) +
               MassRatio(row.dense_lse, row.lse) * reader_.Joined(c_.layout.dense, i);
    });
    team_.Sync();
    c_.ForThreads(elements(), [&](int64_t i) {
      rotated[i] = HadamardChannel(out + i / d * d, d, static_cast<int32_t>(i % d));
    });
    c_.ForWarps(c_.columns, [&](int64_t column) {
      double squares = 0;
      for (int32_t i = team_.lane; i < d; i += Team::kLanes) {
        squares += out[column * d + i] * out[column * d + i];
      }
      squares = team_.Sum(squares);
      if (team_.lane == 0) c_.Row(static_cast<int32_t>(column)).out_norm = sqrt(squares);
    });
    team_.Sync();
    BoundedSelect<Team>::MeanDistances(c_, c_.layout.rotated_out, c_.layout.to_mean_out);
  }

  // Shares of pages that their mean stands for, 0 of others.
  ADAATTN_HD void ShareSkipped() {
    const int32_t num_sealed = c_.range.num_sealed;
    c_.ForThreads(int64_t{c_.columns} * num_sealed, [&](int64_t i) {
      const auto column = static_cast<int32_t>(i / num_sealed);
      const auto page = static_cast<int32_t>(i % num_sealed);
      const bool skipped = !IsExact(page) && c_.Page(page).depth.value_bits == 0;
      const int64_t at = c_.Cell(column, page);
      At<double>(c_.layout.share)[at] =
          skipped ? MassRatio(At<double>(c_.layout.log_mass)[at], c_.Row(column).lse) : 0;
    });
    team_.Sync();
  }

  // --- Report -----------------------------------------------------------------------------------

  ADAATTN_HD void Report(double bound) {
    const int32_t group = c_.p.shape.group_size();
    const auto row_of = [&](int64_t column) {
      return (s().q_begin + column / group) * int64_t{c_.p.shape.num_q_heads} +
             int64_t{c_.head} * group + column % group;
    };
    c_.ForThreads(elements(), [&](int64_t i) {
      const int64_t at = row_of(i / c_.head_dim) * c_.head_dim + i % c_.head_dim;
      WriteOutput(at, At<double>(c_.layout.out)[i]);
    });
    c_.ForThreads(c_.columns, [&](int64_t column) {
      c_.p.lse[row_of(column)] = static_cast<float>(c_.Row(static_cast<int32_t>(column)).lse);
    });
    if (team_.cta != 0) return;
    CountPages();
    if (team_.thread == 0) ReportDecision(bound);
  }

  ADAATTN_HD void WriteOutput(int64_t at, double value) const {
    auto x = static_cast<float>(value);
    if (c_.p.out_type == DType::kF16) x = x > kFp16Max ? kFp16Max : x < -kFp16Max ? -kFp16Max : x;
    WriteElement(c_.p.out, c_.p.out_type, at, x);
  }

  ADAATTN_HD void ReportDecision(double bound) const {
    HeadDecision& decision = *c_.decision;
    const auto up = [](double x) { return nextafterf(static_cast<float>(x), HUGE_VALF); };
    double below = 0, above = 0, entropy = 0;
    for (int32_t column = 0; column < c_.columns; ++column) {
      const BoundedRow& row = c_.Row(column);
      below = row.below > below ? row.below : below;
      above = row.above > above ? row.above : above;
      entropy += row.entropy;
    }
    decision.error_bound = bound == 0 ? 0.0f : up(bound);
    decision.lse_below = up(below);
    decision.lse_above = up(above);
    decision.bound_depth = bound <= target() ? level_ : BoundDepth::kUnmet;
    decision.entropy = static_cast<float>(entropy / c_.columns);
    decision.dense_tokens = c_.range.dense_end - c_.range.dense_begin;
    if (c_.range.num_sealed == 0) return;
    if (UsesLadder(s().decision.policy)) decision.theta = *At<float>(c_.layout.theta);
  }

  // By the first CTA.
  ADAATTN_HD void CountPages() const {
    HeadDecision& decision = *c_.decision;
    const int32_t chunks = NumRankChunks(c_.head_dim);
    for (int32_t page = team_.thread; page < c_.range.num_sealed; page += team_.num_threads) {
      const bool exact = IsExact(page);
      team_.Add(&decision.key_pages[KeyDepthIndex(c_.Page(page).key_bits, chunks)], 1);
      team_.Add(&decision.value_pages[exact ? 0 : c_.Page(page).depth.value_bits / 2], 1);
      if (exact) team_.Add(&decision.exact_pages, 1);
    }
  }

  BoundedContext<Team> c_;
  const Team& team_;
  BoundedReader<Team> reader_;
  BoundDepth level_ = BoundDepth::kPolicy;
  int32_t exact_count_ = 0;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_BOUNDED_HEAD_H_

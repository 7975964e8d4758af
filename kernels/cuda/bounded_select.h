#ifndef ADAATTN_KERNELS_CUDA_BOUNDED_SELECT_H_
#define ADAATTN_KERNELS_CUDA_BOUNDED_SELECT_H_

// The depths that the policy of a bounded step gives its pages, from which it reads deeper: o as
// the scan estimates it, theta, the ladder. As the CPU's select.cc, in double precision.

#include "kernels/cuda/bounded_reader.h"
#include "kernels/policy/theta.h"

namespace adaattn {

template <class Team>
class BoundedSelect {
 public:
  ADAATTN_HD BoundedSelect(const BoundedContext<Team>& context, const BoundedReader<Team>& reader)
      : c_(context), reader_(reader) {}

  // Requires: pages are scanned, dense tokens attended. Leaves depths, and o as estimated with each
  // page's distance from it.
  ADAATTN_HD void Run() {
    ShareOut();
    Estimate();
    Measure();
    if (c_.range.num_sealed == 0) return;
    ChooseTheta();
    const auto theta = *c_.template At<float>(c_.layout.theta);
    c_.ForThreads(c_.range.num_sealed,
                  [&](int64_t page) { Decide(theta, static_cast<int32_t>(page)); });
  }

 private:
  ADAATTN_HD const DecisionParams& params() const { return c_.s().decision; }
  ADAATTN_HD double& Share(int32_t column, int32_t page) const {
    return c_.template At<double>(c_.layout.share)[c_.Cell(column, page)];
  }
  ADAATTN_HD const ScanFigures& Scan(int32_t column, int32_t page) const {
    return c_.template At<ScanFigures>(c_.layout.scan)[c_.Cell(column, page)];
  }
  // Whether the first token of the sequence stands for its page: policy/error_model.h.
  ADAATTN_HD bool FirstStands(int32_t column, int32_t page) const {
    const RowRange keys = c_.KeysOf(column);
    return FirstTokenStandsForPage(c_.range.first_sealed + page == 0,
                                   keys.begin == 0 && keys.end > 0,
                                   Scan(column, page).concentration);
  }
  ADAATTN_HD float FirstValue(int32_t channel) const {
    return c_.Part(0).Value(0, channel, c_.s().stored_bits);
  }

  // Shares of the masses as scanned, and the entropy: every dense token is an item of its own.
  ADAATTN_HD void ShareOut() {
    c_.ForWarps(c_.columns, [&](int64_t at) {
      const auto column = static_cast<int32_t>(at);
      const double lse = c_.Row(column).scan_lse;
      double entropy = 0;
      for (int32_t page = c_.team.lane; page < c_.range.num_pages; page += Team::kLanes) {
        const double log_mass = c_.template At<double>(c_.layout.log_mass)[c_.Cell(column, page)];
        const double share = MassRatio(log_mass, lse);
        Share(column, page) = share;
        if (share > 0 && c_.IsSealed(page)) entropy += share * (lse - log_mass);
      }
      for (int32_t page = c_.range.num_sealed; page < c_.range.num_pages; ++page) {
        const float* raw = c_.Raw(page, column);
        for (int32_t token = c_.team.lane; token < kPageTokens; token += Team::kLanes) {
          const double score = CapScore(raw[token], c_.s().softcap);
          const double share = MassRatio(score, lse);
          if (share > 0) entropy += share * (lse - score);
        }
      }
      entropy = c_.team.Sum(entropy);
      if (c_.team.lane == 0) c_.Row(column).entropy = entropy;
    });
    c_.team.Sync();
  }

  // o in the Hadamard frame: pages by what stands for them, dense tokens as they are.
  ADAATTN_HD void Estimate() {
    const int64_t elements = int64_t{c_.columns} * c_.head_dim;
    auto* dense = c_.template At<double>(c_.layout.out);
    c_.ForThreads(elements, [&](int64_t i) {
      const BoundedRow& row = c_.Row(static_cast<int32_t>(i / c_.head_dim));
      dense[i] = MassRatio(row.dense_lse, row.scan_lse) * reader_.Joined(c_.layout.dense, i);
    });
    for (int64_t i = c_.team.thread; i < elements; i += c_.team.num_threads) {
      reader_.PartialOf(c_.layout.sealed)[i] = reader_.SumMeans(i);
    }
    c_.team.Sync();
    c_.ForThreads(elements, [&](int64_t i) {
      const auto column = static_cast<int32_t>(i / c_.head_dim);
      const auto channel = static_cast<int32_t>(i % c_.head_dim);
      double sum = HadamardChannel(dense + int64_t{column} * c_.head_dim, c_.head_dim, channel) +
                   reader_.Joined(c_.layout.sealed, i);
      if (c_.range.num_sealed > 0 && FirstStands(column, 0)) {
        const SealedPart part = c_.Part(0);
        sum += Share(column, 0) * (static_cast<double>(FirstValue(channel)) -
                                   part.Mean(part.summary().mean_scale, channel));
      }
      c_.template At<double>(c_.layout.estimate)[i] = sum;
    });
    c_.team.Sync();
  }

  // |o| and |mean - o|.
  ADAATTN_HD void Measure() {
    c_.ForWarps(c_.columns, [&](int64_t column) {
      const double* o = c_.template At<double>(c_.layout.estimate) + column * c_.head_dim;
      const auto row = static_cast<int32_t>(column);
      const bool first = c_.range.num_sealed > 0 && FirstStands(row, 0);
      double squares = 0, distance2 = 0;
      for (int32_t i = c_.team.lane; i < c_.head_dim; i += Team::kLanes) {
        squares += o[i] * o[i];
        const double off = first ? static_cast<double>(FirstValue(i)) - o[i] : 0;
        distance2 += off * off;
      }
      squares = c_.team.Sum(squares);
      distance2 = c_.team.Sum(distance2);
      if (c_.team.lane != 0) return;
      c_.Row(row).estimate_norm = sqrt(squares);
      c_.Row(row).first_distance2 = distance2;
    });
    MeanDistances(c_, c_.layout.estimate, c_.layout.to_mean);
    c_.team.Sync();
  }

 public:
  // |mean - o| of every sealed page and row, o [C, D] in the Hadamard frame.
  ADAATTN_HD static void MeanDistances(const BoundedContext<Team>& c, int64_t outputs,
                                       int64_t distances) {
    c.ForWarps(int64_t{c.columns} * c.range.num_sealed, [&](int64_t i) {
      const auto column = static_cast<int32_t>(i / c.range.num_sealed);
      const auto page = static_cast<int32_t>(i % c.range.num_sealed);
      const double* o = c.template At<double>(outputs) + int64_t{column} * c.head_dim;
      const SealedPart part = c.Part(page);
      const float scale = part.summary().mean_scale;
      double squares = 0;
      for (int32_t channel = c.team.lane; channel < c.head_dim; channel += Team::kLanes) {
        const double off = part.Mean(scale, channel) - o[channel];
        squares += off * off;
      }
      squares = c.team.Sum(squares);
      if (c.team.lane == 0) c.template At<double>(distances)[c.Cell(column, page)] = sqrt(squares);
    });
  }

 private:
  ADAATTN_HD void ChooseTheta() {
    auto* theta = c_.template At<float>(c_.layout.theta);
    if (params().policy == Policy::kBudget) {
      c_.ForThreads(c_.range.num_sealed,
                    [&](int64_t page) { SumBudget(static_cast<int32_t>(page)); });
      c_.team.Sync();
      ThetaFromBudget(theta);
    } else if (c_.team.cta == 0 && c_.team.warp == 0) {
      const MassSums sums = SumMasses();
      if (c_.team.lane == 0) {
        *theta = ThetaFromMasses(params(), sums, c_.columns, c_.range.num_sealed);
      }
    }
    c_.team.Sync();
  }

  ADAATTN_HD MassSums SumMasses() const {
    MassSums total;
    for (int32_t column = 0; column < c_.columns; ++column) {
      MassSums sums;
      double dense = 0;
      for (int32_t page = c_.team.lane; page < c_.range.num_pages; page += Team::kLanes) {
        const auto share = static_cast<float>(Share(column, page));
        if (c_.IsSealed(page)) {
          const ScanFigures& scan = Scan(column, page);
          if (share > 0) AddPageMass(share, scan.concentration, scan.variance, &sums);
        } else {
          dense += share;
        }
      }
      const auto sum = [&](float x) { return static_cast<float>(c_.team.Sum(x)); };
      AddMasses(MassSums{sum(sums.entropy), sum(sums.sealed), sum(sums.square),
                         sum(sums.token_square), sum(sums.variance)},
                &total);
      AddDenseMass(static_cast<float>(c_.team.Sum(dense)), &total);
    }
    return total;
  }

  ADAATTN_HD PageFacts FactsOf(int32_t page) const {
    return PageFacts{c_.range.first_sealed + page == 0, c_.Page(page).cut, true};
  }

  ADAATTN_HD void SumBudget(int32_t page) {
    PageBudget budget;
    const PageFacts facts = FactsOf(page);
    const ValueSummary summary = c_.Part(page).summary();
    for (int32_t column = 0; column < c_.columns; ++column) {
      const double norm = c_.Row(column).estimate_norm;
      const double to_mean = c_.template At<double>(c_.layout.to_mean)[c_.Cell(column, page)];
      PageErrorInputs inputs;
      inputs.share = static_cast<float>(Share(column, page));
      inputs.concentration = Scan(column, page).concentration;
      inputs.score_variance = Scan(column, page).variance;
      inputs.mean_distance2 = static_cast<float>(to_mean * to_mean);
      inputs.spread = summary.spread;
      inputs.scale_rms = summary.scale_rms;
      if (page == 0 && FirstStands(column, 0)) SubstituteFirst(column, &inputs);
      const double weight = norm > 0 ? 1 / (norm * norm * c_.columns) : 0;
      AddToBudget(inputs.share, ErrorParts(inputs, c_.head_dim), static_cast<float>(weight),
                  &budget);
    }
    PageRungs& rungs = c_.template At<PageRungs>(c_.layout.budget)[page];
    for (int32_t rung = 0; rung < kNumRungs; ++rung) {
      rungs.at[rung] = TermsOf(budget.parts,
                               RungFactors(params(), rung, facts, c_.head_dim, c_.s().stored_bits));
    }
    rungs.below = budget.share > 0 ? NumThetasBelow(budget.share) : -1;
  }

  ADAATTN_HD void SubstituteFirst(int32_t column, PageErrorInputs* inputs) const {
    const int32_t groups = ValueGroups(c_.head_dim);
    double ranges = 0;
    for (int32_t group = 0; group < groups; ++group) {
      const double range = RangeFromScale(c_.Part(0).value_scale(0, group));
      ranges += range * range;
    }
    inputs->mean_distance2 = static_cast<float>(c_.Row(column).first_distance2);
    inputs->spread = 0;
    inputs->scale_rms = static_cast<float>(sqrt(ranges / groups));
  }

  // The first CTA sums every theta of the grid, and 0.
  ADAATTN_HD void ThetaFromBudget(float* theta) {
    if (c_.team.cta != 0) return;
    auto* sums = c_.template At<ErrorTerms>(c_.layout.theta_sums);
    const auto* pages = c_.template At<PageRungs>(c_.layout.budget);
    for (int32_t i = c_.team.warp; i <= kNumBudgetThetas; i += c_.team.num_warps) {
      double square = 0, amplitude = 0;
      for (int32_t page = c_.team.lane; page < c_.range.num_sealed; page += Team::kLanes) {
        const int32_t below = pages[page].below;
        const int32_t rung = i < kNumBudgetThetas ? BudgetRung(below, i)
                             : below < 0          ? 0
                                                  : kNumRungs - 1;
        const ErrorTerms& terms = pages[page].at[rung];
        square += terms.square;
        amplitude += terms.amplitude;
      }
      square = c_.team.Sum(square);
      amplitude = c_.team.Sum(amplitude);
      if (c_.team.lane == 0) {
        sums[i].square = static_cast<float>(square);
        sums[i].amplitude = static_cast<float>(amplitude);
      }
    }
    c_.team.SyncCta();
    if (c_.team.thread != 0) return;
    *theta =
        ChooseThetaFromTerms(sums, sums[kNumBudgetThetas], params().target_relative_error).theta;
  }

  ADAATTN_HD void Decide(float theta, int32_t page) {
    float share = 0;
    for (int32_t column = 0; column < c_.columns; ++column) {
      const auto own = static_cast<float>(Share(column, page));
      share = own > share ? own : share;
    }
    const int32_t bits = c_.s().stored_bits;
    PageDepth depth = FullDepth(c_.head_dim, bits);
    if (UsesLadder(params().policy)) {
      depth = LadderDepth(params(), theta, share, FactsOf(page), c_.head_dim, bits);
    }
    // Keys are read at the scan's bits or at all of them.
    if (depth.key.bits > kScanBits) depth.key.bits = static_cast<uint8_t>(bits);
    c_.Page(page).depth = depth;
  }

  const BoundedContext<Team>& c_;
  const BoundedReader<Team>& reader_;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_BOUNDED_SELECT_H_

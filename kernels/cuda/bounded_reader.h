#ifndef ADAATTN_KERNELS_CUDA_BOUNDED_READER_H_
#define ADAATTN_KERNELS_CUDA_BOUNDED_READER_H_

// What a bounded head reads: queries, sealed keys and values at any depth, dense tokens. A CTA
// takes a page; figures go to the head's workspace, bytes to its decision.

#include "kernels/cuda/bounded_rows.h"

namespace adaattn {

template <class Team>
class BoundedReader {
 public:
  ADAATTN_HD explicit BoundedReader(const BoundedContext<Team>& context)
      : c_(context), team_(context.team) {}

  // Queries to the frame of every basis that has a visible page, and their norms.
  ADAATTN_HD void Rotate() {
    const BasisLayout layout = MakeBasisLayout(c_.p.shape);
    const int32_t d = c_.head_dim;
    const float* query = At<float>(c_.layout.query);
    c_.ForWarps(c_.columns, [&](int64_t column) {
      const double squares = WarpDot(query + column * d, query + column * d);
      if (team_.lane == 0) c_.Row(static_cast<int32_t>(column)).query_norm = sqrt(squares);
    });
    const int32_t first = c_.range.num_sealed > 0 ? c_.BasisOf(0) : 0;
    const int32_t end = c_.range.num_sealed > 0 ? c_.BasisOf(c_.range.num_sealed - 1) + 1 : 0;
    for (int32_t run = first; run < end; ++run) {
      const std::byte* basis = Basis(run);
      float* rotated = At<float>(c_.layout.rotated) + run * int64_t{c_.layout.columns} * d;
      const std::byte* matrix = basis + layout.query_basis;
      c_.ForThreads(elements(), [&](int64_t i) {
        const float* q = query + i / d * d;
        const auto channel = static_cast<int32_t>(i % d);
        constexpr int32_t kAtOnce = 16;  // reads on their way; head_dim is a multiple of it
        float sum = 0;
        for (int32_t first = 0; first < d; first += kAtOnce) {
          float x[kAtOnce];
          ADAATTN_UNROLL
          for (int32_t c = 0; c < kAtOnce; ++c) {
            x[c] = ReadElement(matrix, DType::kF16, (first + c) * d + channel);
          }
          ADAATTN_UNROLL
          for (int32_t c = 0; c < kAtOnce; ++c) sum = fmaf(q[first + c], x[c], sum);
        }
        rotated[i] = sum;
      });
      const auto* mean = reinterpret_cast<const float*>(basis + layout.mean);
      c_.ForWarps(c_.columns, [&](int64_t column) {
        const double dot = WarpDot(query + column * d, mean);
        if (team_.lane == 0) {
          At<double>(c_.layout.mean_score)[run * int64_t{c_.layout.columns} + column] = dot;
        }
      });
      if (team_.cta == 0) AddBytes(&c_.decision->basis_bytes, BasisReadBytes(d));
    }
    team_.Sync();
  }

  ADAATTN_HD void ScanSealed(int32_t page) {
    const SealedPart part = c_.Part(page);
    LoadRanges(part);
    FillTile(team_, c_.head_dim, c_.shared.tile(), [&](int32_t channel) {
      const auto nibble = part.NibblesOf(channel);
      const float range = c_.shared.ranges[channel];
      return
          [nibble, range](int32_t token) { return DecodeNested(nibble(token), kScanBits, range); };
    });
    for (int32_t i = team_.thread; i < c_.columns * kPageTokens; i += team_.num_threads) {
      const int32_t column = i / kPageTokens, token = i % kPageTokens;
      const double dot = TileDot(Rotated(page, column), c_.shared.tile(), c_.head_dim, token);
      const double score = s().softmax_scale * (dot + MeanScore(page, column));
      c_.Raw(page, column)[token] =
          Sees(column, page, token) ? static_cast<float>(score) : -HUGE_VALF;
    }
    team_.SyncCta();
    for (int32_t column = team_.warp; column < c_.columns; column += team_.num_warps) {
      const ScoreSums sums = SumScores(team_, c_.Raw(page, column), s().softcap);
      const double energy = BoundScores(page, column, kScanBits);
      if (team_.lane != 0) continue;
      const double scale2 = static_cast<double>(s().softmax_scale) * s().softmax_scale;
      ScanFigures& scan = At<ScanFigures>(c_.layout.scan)[c_.Cell(column, page)];
      scan.variance = static_cast<float>(scale2 * CodeVariance(1.0f, kScanBits) * energy);
      scan.concentration =
          sums.sum > 0 ? static_cast<float>(sums.squares / (sums.sum * sums.sum)) : 0.0f;
      At<double>(c_.layout.lse)[c_.Cell(column, page)] = sums.lse();
      At<double>(c_.layout.log_mass)[c_.Cell(column, page)] =
          sums.lse() +
          0.5 * (scan.variance < kMaxScoreVariance ? scan.variance : kMaxScoreVariance);
    }
    if (team_.thread != 0) return;
    BoundedPage& known = c_.Page(page);
    known.key_bits = kScanBits;
    for (int32_t row = 0; row < s().q_len; ++row) {
      const RowRange keys = RowKeys(s(), row);
      const int32_t first = FirstToken(page), last = first + kPageTokens;
      const int32_t seen =
          (keys.end < last ? keys.end : last) - (keys.begin > first ? keys.begin : first);
      known.cut = known.cut || (seen > 0 && seen < kPageTokens);
    }
    AddBytes(&c_.decision->key_bytes,
             KeyReadBytes(c_.head_dim, kScanBits, NumRankChunks(c_.head_dim)));
    AddBytes(&c_.decision->value_bytes, ValueReadBytes(c_.head_dim, 0));
  }

  // Scores of tokens [begin, end) of a page of dense ones: `page` itself or a sealed page's
  // original.
  ADAATTN_HD void ScoreTokens(int32_t page, const std::byte* data, RowRange tokens) {
    const DType type = c_.p.page_type;
    const std::byte* keys = data + DenseKeyOffset(c_.head, c_.head_dim, type);
    FillTokens(team_, c_.head_dim, c_.shared.tile(), keys, type, tokens);
    const float* query = At<float>(c_.layout.query);
    const double scale = static_cast<double>(s().softmax_scale) * c_.KeyScale();
    for (int32_t i = team_.thread; i < c_.columns * kPageTokens; i += team_.num_threads) {
      const int32_t column = i / kPageTokens, token = i % kPageTokens;
      const double dot =
          TileDot(query + int64_t{column} * c_.head_dim, c_.shared.tile(), c_.head_dim, token);
      const bool held = token >= tokens.begin && token < tokens.end;
      c_.Raw(page, column)[token] =
          held && Sees(column, page, token) ? static_cast<float>(scale * dot) : -HUGE_VALF;
    }
    team_.SyncCta();
    for (int32_t column = team_.warp; column < c_.columns; column += team_.num_warps) {
      const double lse = SumScores(team_, c_.Raw(page, column), s().softcap).lse();
      if (team_.lane != 0) continue;
      At<double>(c_.layout.lse)[c_.Cell(column, page)] = lse;
      At<double>(c_.layout.log_mass)[c_.Cell(column, page)] = lse;
    }
    if (team_.warp == 0) {
      const double norm = c_.KeyScale() * LargestNorm(team_, c_.head_dim, c_.shared.tile(),
                                                      tokens.begin, tokens.end);
      if (team_.lane == 0) c_.Page(page).key_norm = norm;
    }
    AddBytes(&c_.decision->key_bytes, TokenBytes(tokens));
  }

  // What finer bits add to the scores: x_b = x_4 + ((fine + 1/2) 2^(1-b) - 2^-4) r.
  ADAATTN_HD void ReadFineBits(int32_t page, int32_t bits) {
    const SealedPart part = c_.Part(page);
    LoadRanges(part);
    const float step = 2.0f / static_cast<float>(1 << bits);
    FillTile(team_, c_.head_dim, c_.shared.tile(), [&](int32_t channel) {
      const auto fine = part.FinesOf(channel);
      const float range = c_.shared.ranges[channel];
      return [fine, range, step](int32_t token) {
        return ((static_cast<float>(fine(token)) + 0.5f) * step - 0.0625f) * range;
      };
    });
    for (int32_t i = team_.thread; i < c_.columns * kPageTokens; i += team_.num_threads) {
      const int32_t column = i / kPageTokens, token = i % kPageTokens;
      float& raw = c_.Raw(page, column)[token];
      const double dot = TileDot(Rotated(page, column), c_.shared.tile(), c_.head_dim, token);
      if (raw > -HUGE_VALF) raw = static_cast<float>(raw + s().softmax_scale * dot);
    }
    team_.SyncCta();
    for (int32_t column = team_.warp; column < c_.columns; column += team_.num_warps) {
      const double lse = SumScores(team_, c_.Raw(page, column), s().softcap).lse();
      if (team_.lane == 0) At<double>(c_.layout.lse)[c_.Cell(column, page)] = lse;
      BoundScores(page, column, bits);
    }
    AddBytes(&c_.decision->key_bytes, int64_t{c_.head_dim} * kPageTokens * (bits - kScanBits) / 8);
  }

  // By a warp.
  ADAATTN_HD void SumValueRanges(int32_t page) {
    const SealedPart part = c_.Part(page);
    const int32_t groups = ValueGroups(c_.head_dim);
    double most = 0, saturated = 0;
    for (int32_t token = team_.lane; token < kPageTokens; token += Team::kLanes) {
      double squares = 0;
      for (int32_t group = 0; group < groups; ++group) {
        const uint8_t scale = part.value_scale(token, group);
        const double range = RangeFromScale(scale);
        squares += range * range * c_.head_dim / groups;
        if (scale == kLargestScale) saturated = 1;
      }
      most = squares > most ? squares : most;
    }
    most = team_.Max(most);
    saturated = team_.Max(saturated);
    if (team_.lane != 0) return;
    c_.Page(page).token_range = sqrt(most);
    c_.Page(page).saturated = saturated > 0;
  }

  ADAATTN_HD void AttendTokens(int32_t page, const std::byte* data, RowRange tokens, bool dense,
                               int64_t sums) {
    Weigh(page, dense);
    const DType type = c_.p.page_type;
    const std::byte* values = data + DenseValueOffset(c_.p.shape, c_.head, type);
    FillTokens(team_, c_.head_dim, c_.shared.tile(), values, type, tokens);
    AddWeightedValues(team_, c_.head_dim, c_.columns, c_.shared.weights, c_.shared.tile(),
                      c_.ValueScale(), PartialOf(sums));
    if (team_.warp == 0) {
      const double norm = c_.ValueScale() * LargestNorm(team_, c_.head_dim, c_.shared.tile(),
                                                        tokens.begin, tokens.end);
      if (team_.lane == 0) c_.Page(page).value_norm = norm;
    }
    AddBytes(&c_.decision->value_bytes, TokenBytes(tokens));
  }

  ADAATTN_HD void AttendSealed(int32_t page) {
    Weigh(page, /*dense=*/false);
    const SealedPart part = c_.Part(page);
    const int32_t bits = c_.Page(page).depth.value_bits, groups = ValueGroups(c_.head_dim);
    for (int32_t i = team_.thread; i < kPageTokens * groups; i += team_.num_threads) {
      c_.shared.ranges[i] = RangeFromScale(part.value_scale(i / groups, i % groups));
    }
    FillTile(team_, c_.head_dim, c_.shared.tile(), [&](int32_t channel) {
      const auto code = part.ValuesOf(channel, bits / 2);
      const float* ranges = c_.shared.ranges + channel / (c_.head_dim / groups);
      return [code, ranges, bits, groups](int32_t token) {
        return DecodeNested(code(token), bits, ranges[token * groups]);
      };
    });
    AddWeightedValues(team_, c_.head_dim, c_.columns, c_.shared.weights, c_.shared.tile(), 1,
                      PartialOf(c_.layout.sealed));
    AddBytes(&c_.decision->value_bytes,
             ValueReadBytes(c_.head_dim, bits) - ValueReadBytes(c_.head_dim, 0));
  }

  // One element of a sum of all CTAs' parts.
  ADAATTN_HD double Joined(int64_t sums, int64_t element) const {
    double sum = 0;
    for (int32_t cta = 0; cta < team_.num_ctas; ++cta) {
      sum += At<double>(sums)[cta * elements() + element];
    }
    return sum;
  }
  // This CTA's part of the sum of share * mean of all sealed pages, for one element of o.
  ADAATTN_HD double SumMeans(int64_t element) const {
    const auto column = static_cast<int32_t>(element / c_.head_dim);
    const auto channel = static_cast<int32_t>(element % c_.head_dim);
    double sum = 0;
    c_.ForPages(0, c_.range.num_sealed, [&](int32_t page) {
      const SealedPart part = c_.Part(page);
      sum += At<double>(c_.layout.share)[c_.Cell(column, page)] *
             part.Mean(part.summary().mean_scale, channel);
    });
    return sum;
  }

  ADAATTN_HD const std::byte* DensePage(int32_t page) const {
    const int32_t at = c_.range.first_dense() + page - c_.range.num_sealed;
    return c_.p.memory.At(PageId{c_.p.table[s().table_begin + at]});
  }
  // Tokens of a dense page that some row sees.
  ADAATTN_HD RowRange TokensOf(int32_t page) const {
    const int32_t first = (c_.range.first_dense() + page - c_.range.num_sealed) * kPageTokens;
    const int32_t begin = c_.range.dense_begin - first, end = c_.range.dense_end - first;
    return RowRange{begin > 0 ? begin : 0, end < kPageTokens ? end : kPageTokens};
  }
  // This CTA's part of a sum of weighted values.
  ADAATTN_HD double* PartialOf(int64_t sums) const {
    return At<double>(sums) + team_.cta * elements();
  }

 private:
  ADAATTN_HD const BoundedSequence& s() const { return c_.s(); }
  ADAATTN_HD int64_t elements() const { return int64_t{c_.columns} * c_.head_dim; }
  template <class T>
  ADAATTN_HD T* At(int64_t offset) const {
    return c_.template At<T>(offset);
  }
  ADAATTN_HD void AddBytes(int64_t* counter, int64_t bytes) const {
    if (team_.thread == 0) team_.Add(counter, bytes);
  }
  // Cache position of the page's first token.
  ADAATTN_HD int32_t FirstToken(int32_t page) const {
    return (c_.IsSealed(page) ? c_.range.first_sealed + page
                              : c_.range.first_dense() + page - c_.range.num_sealed) *
           kPageTokens;
  }
  ADAATTN_HD bool Sees(int32_t column, int32_t page, int32_t token) const {
    const RowRange keys = c_.KeysOf(column);
    const int32_t position = FirstToken(page) + token;
    return position >= keys.begin && position < keys.end;
  }

  ADAATTN_HD const std::byte* Basis(int32_t run) const {
    return c_.p.memory.At(s().basis[run]) + c_.head * MakeBasisLayout(c_.p.shape).head_bytes;
  }

  ADAATTN_HD double WarpDot(const float* a, const float* b) const {
    double sum = 0;
    for (int32_t c = team_.lane; c < c_.head_dim; c += Team::kLanes) {
      sum += static_cast<double>(a[c]) * b[c];
    }
    return team_.Sum(sum);
  }

  ADAATTN_HD const float* Rotated(int32_t page, int32_t column) const {
    return At<float>(c_.layout.rotated) +
           (c_.BasisOf(page) * int64_t{c_.layout.columns} + column) * c_.head_dim;
  }
  ADAATTN_HD double MeanScore(int32_t page, int32_t column) const {
    return At<double>(c_.layout.mean_score)[c_.BasisOf(page) * int64_t{c_.layout.columns} + column];
  }

  // The ranges of a page's keys, to shared memory; for the tile that is filled next.
  ADAATTN_HD void LoadRanges(const SealedPart& part) {
    team_.SyncCta();
    for (int32_t c = team_.thread; c < c_.head_dim; c += team_.num_threads) {
      c_.shared.ranges[c] = RangeFromScale(part.key_scale(c));
    }
  }

  // The error of a row's scores on a sealed page whose keys were read at `bits`, by a warp; returns
  // sum_c (q_c r_c)^2.
  ADAATTN_HD double BoundScores(int32_t page, int32_t column, int32_t bits) {
    const SealedPart part = c_.Part(page);
    const float* query = Rotated(page, column);
    KeyRanges ranges;
    double energy = 0;
    for (int32_t c = team_.lane; c < c_.head_dim; c += Team::kLanes) {
      AddKeyRange(query[c], part.key_scale(c), &ranges);
      const double term = static_cast<double>(query[c]) * RangeFromScale(part.key_scale(c));
      energy += term * term;
    }
    ranges.weighted = team_.Sum(ranges.weighted);
    ranges.largest = team_.Max(ranges.largest);
    ranges.sum = team_.Sum(ranges.sum);
    ranges.squares = team_.Sum(ranges.squares);
    ranges.query_sum = team_.Sum(ranges.query_sum);
    ranges.saturated = team_.Max(ranges.saturated ? 1 : 0) > 0;
    energy = team_.Sum(energy);
    if (team_.lane == 0) {
      At<double>(c_.layout.score_error)[c_.Cell(column, page)] = SealedScoreError(
          ranges, c_.Row(column).query_norm, MeanScore(page, column), c_.head_dim, bits,
          /*half_step=*/0, s().softmax_scale, s().softcap);
    }
    return energy;
  }

  ADAATTN_HD int64_t TokenBytes(RowRange tokens) const {
    return int64_t{tokens.end - tokens.begin} * c_.head_dim * DTypeBytes(c_.p.page_type);
  }

  // Weights of a page's tokens, relative to the row's LSE or to that of its dense tokens, to shared
  // memory.
  ADAATTN_HD void Weigh(int32_t page, bool dense) {
    team_.SyncCta();
    for (int32_t i = team_.thread; i < c_.columns * kPageTokens; i += team_.num_threads) {
      const int32_t column = i / kPageTokens, token = i % kPageTokens;
      const double lse = dense ? c_.Row(column).dense_lse : c_.Row(column).lse;
      const double score = CapScore(c_.Raw(page, column)[token], s().softcap);
      c_.shared.weights[column][token] = static_cast<float>(MassRatio(score, lse));
    }
  }

  const BoundedContext<Team>& c_;
  const Team& team_;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_BOUNDED_READER_H_

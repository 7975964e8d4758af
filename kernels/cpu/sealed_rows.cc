// Per page and row: statistics of scores, page means; per step: the rotation of q.

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/sealed_kernels.h"
#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sealed_rows.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn {
namespace HWY_NAMESPACE {
namespace {

// The row's statistics from 64 raw scores of which none is masked, or all masked ones are -inf.
template <bool kCapped>
HWY_INLINE void RowStatistics(const ScoreMap& map, const float* HWY_RESTRICT raw, float* lse,
                              float* concentration) {
  const F32 d;
  HWY_ALIGN float s[kPageTokens];
  VF top = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int t = 0; t < kPageTokens; t += kLanes) {
    const VF x = hn::LoadU(d, raw + t);
    // The scale is positive: without a cap -inf stays what it is.
    const VF score =
        kCapped ? MapMasked(map, x) : hn::MulAdd(x, hn::Set(d, map.scale), hn::Set(d, map.offset));
    hn::Store(score, d, s + t);
    top = hn::Max(top, score);
  }
  const float max = HorizontalMax(top);
  *lse = -std::numeric_limits<float>::infinity();
  *concentration = 1.0f;
  if (max == *lse) return;
  VF sum = hn::Zero(d), squares = hn::Zero(d);
  for (int t = 0; t < kPageTokens; t += kLanes) {
    const VF p = Exp(hn::Sub(hn::Load(d, s + t), hn::Set(d, max)));
    sum = hn::Add(sum, p);
    squares = hn::MulAdd(p, p, squares);
  }
  const float total = HorizontalSum(sum);
  *lse = max + std::log(total);
  *concentration = HorizontalSum(squares) / (total * total);
}

}  // namespace

void PageStatisticsImpl(const RotatedRows& rows, const ScoreParams& params, const KeyRange* visible,
                        const float* raw, float* lse, float* concentration) {
  HWY_ALIGN float masked[kPageTokens];
  for (int32_t row = 0; row < rows.rows; ++row) {
    const ScoreMap map{params.softmax_scale, params.softmax_scale * rows.mean[row], params.softcap};
    const float* from = raw + int64_t{row} * kPageTokens;
    if (visible[row].end - visible[row].begin < kPageTokens) {
      std::copy_n(from, kPageTokens, masked);
      MaskOutside(static_cast<int>(visible[row].begin), static_cast<int>(visible[row].end), masked);
      from = masked;
    }
    if (params.softcap > 0) {
      RowStatistics<true>(map, from, &lse[row], &concentration[row]);
    } else {
      RowStatistics<false>(map, from, &lse[row], &concentration[row]);
    }
  }
}

HWY_INLINE VF LoadMean(const PageMean& page, int32_t c) {
  const F32 d;
  const hn::Rebind<int8_t, I32> narrow;
  return hn::Mul(hn::ConvertTo(d, hn::PromoteTo(I32(), hn::LoadU(narrow, page.mean + c))),
                 hn::Set(d, page.summary.mean_scale));
}

// kPages at a time, so that acc is read and written once for them.
template <int kPages>
HWY_INLINE void AddPages(const PageMean* pages, int32_t head_dim, const float* weights,
                         int32_t rows, float* acc) {
  const F32 d;
  for (int32_t c = 0; c < head_dim; c += kLanes) {
    VF value[kPages];
    for (int p = 0; p < kPages; ++p) value[p] = LoadMean(pages[p], c);
    for (int32_t row = 0; row < rows; ++row) {
      float* at = acc + int64_t{row} * head_dim + c;
      VF sum = hn::LoadU(d, at);
      for (int p = 0; p < kPages; ++p) {
        sum = hn::MulAdd(value[p], hn::Set(d, weights[p * rows + row]), sum);
      }
      hn::StoreU(sum, d, at);
    }
  }
}

void AddValueMeansImpl(const PageMean* pages, int32_t num_pages, int32_t head_dim,
                       const float* weights, int32_t rows, float* acc) {
  int32_t page = 0;
  for (; page + 4 <= num_pages; page += 4) {
    AddPages<4>(pages + page, head_dim, weights + int64_t{page} * rows, rows, acc);
  }
  for (; page < num_pages; ++page) {
    AddPages<1>(pages + page, head_dim, weights + int64_t{page} * rows, rows, acc);
  }
}

void ValueMeanDistancesImpl(const PageMean& page, int32_t head_dim, const float* o, int32_t rows,
                            float* out) {
  const F32 d;
  ForRowBlocks(rows, [&](auto count, int32_t row) HWY_ATTR {
    constexpr int kRows = decltype(count)::value;
    VF sum[kRows];
    for (int m = 0; m < kRows; ++m) sum[m] = hn::Zero(d);
    for (int32_t c = 0; c < head_dim; c += kLanes) {
      const VF value = LoadMean(page, c);
      for (int m = 0; m < kRows; ++m) {
        const VF off = hn::Sub(value, hn::LoadU(d, o + int64_t{row + m} * head_dim + c));
        sum[m] = hn::MulAdd(off, off, sum[m]);
      }
    }
    for (int m = 0; m < kRows; ++m) out[row + m] = HorizontalSum(sum[m]);
  });
}

void RotateQueriesImpl(const uint16_t* query_basis, const float* mean, const float* q, int32_t rows,
                       int32_t head_dim, float* out, float* mean_score) {
  const F32 d;
  const hn::Rebind<hwy::float16_t, F32> half;
  const auto* basis = reinterpret_cast<const hwy::float16_t*>(query_basis);
  std::fill_n(out, int64_t{rows} * head_dim, 0.0f);
  for (int32_t row = 0; row < rows; ++row) {
    double score = 0;
    for (int32_t c = 0; c < head_dim; ++c) {
      score += double{q[int64_t{row} * head_dim + c]} * mean[c];
    }
    mean_score[row] = static_cast<float>(score);
  }
  ForRowBlocks(rows, [&](auto count, int32_t row) HWY_ATTR {
    constexpr int kRows = decltype(count)::value;
    for (int32_t rank = 0; rank < head_dim; rank += 2 * kLanes) {
      VF acc[kRows][2];
      for (int m = 0; m < kRows; ++m) acc[m][0] = acc[m][1] = hn::Zero(d);
      for (int32_t c = 0; c < head_dim; ++c) {
        const auto* at = basis + int64_t{c} * head_dim + rank;
        const VF low = hn::PromoteTo(d, hn::LoadU(half, at));
        const VF high = hn::PromoteTo(d, hn::LoadU(half, at + kLanes));
        for (int m = 0; m < kRows; ++m) {
          const VF x = hn::Set(d, q[int64_t{row + m} * head_dim + c]);
          acc[m][0] = hn::MulAdd(x, low, acc[m][0]);
          acc[m][1] = hn::MulAdd(x, high, acc[m][1]);
        }
      }
      for (int m = 0; m < kRows; ++m) {
        float* at = out + int64_t{row + m} * head_dim + rank;
        hn::StoreU(acc[m][0], d, at);
        hn::StoreU(acc[m][1], d, at + kLanes);
      }
    }
  });
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn {

HWY_EXPORT(PageStatisticsImpl);
HWY_EXPORT(AddValueMeansImpl);
HWY_EXPORT(ValueMeanDistancesImpl);
HWY_EXPORT(RotateQueriesImpl);

void PageStatistics(const RotatedRows& rows, const ScoreParams& params, const KeyRange* visible,
                    const float* raw, float* lse, float* concentration) {
  HWY_DYNAMIC_DISPATCH(PageStatisticsImpl)(rows, params, visible, raw, lse, concentration);
}

void AddValueMeans(const PageMean* pages, int32_t num_pages, int32_t head_dim, const float* weights,
                   int32_t rows, float* acc) {
  HWY_DYNAMIC_DISPATCH(AddValueMeansImpl)(pages, num_pages, head_dim, weights, rows, acc);
}

void ValueMeanDistances(const PageMean& page, int32_t head_dim, const float* o, int32_t rows,
                        float* out) {
  HWY_DYNAMIC_DISPATCH(ValueMeanDistancesImpl)(page, head_dim, o, rows, out);
}

void RotateQueries(const uint16_t* query_basis, const float* mean, const float* q, int32_t rows,
                   int32_t head_dim, float* out, float* mean_score) {
  HWY_DYNAMIC_DISPATCH(RotateQueriesImpl)
  (query_basis, mean, q, rows, head_dim, out, mean_score);
}

}  // namespace adaattn
#endif  // HWY_ONCE

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

constexpr int32_t kMeansTogether = 8;

// The row's statistics from 64 raw scores of which none is masked, or all masked ones are -inf.
template <bool kCapped>
HWY_INLINE void RowStatistics(const ScoreMap& map, const float* HWY_RESTRICT raw,
                              const PageSums& out, int64_t at) {
  constexpr int kVectors = kPageTokens / kLanes;
  const F32 d;
  VF s[kVectors];
  VF top = hn::Set(d, -std::numeric_limits<float>::infinity());
  ADAATTN_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const VF x = hn::LoadU(d, raw + i * kLanes);
    // The scale is positive: without a cap -inf stays what it is.
    s[i] =
        kCapped ? MapMasked(map, x) : hn::MulAdd(x, hn::Set(d, map.scale), hn::Set(d, map.offset));
    top = hn::Max(top, s[i]);
  }
  const float max = HorizontalMax(top);
  out.max[at] = max;
  if (max == -std::numeric_limits<float>::infinity()) {
    out.sum[at] = out.squares[at] = 1.0f;
    return;
  }
  const VF shift = hn::Set(d, max);
  VF sum = hn::Zero(d), squares = hn::Zero(d);
  ADAATTN_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const VF p = ExpOfGap(hn::Sub(s[i], shift));
    sum = hn::Add(sum, p);
    squares = hn::MulAdd(p, p, squares);
  }
  out.sum[at] = HorizontalSum(sum);
  out.squares[at] = HorizontalSum(squares);
}

}  // namespace

void PageStatisticsImpl(const RotatedRows& rows, const ScoreParams& params, const KeyRange* visible,
                        const float* raw, const PageSums& out) {
  HWY_ALIGN float masked[kPageTokens];
  for (int32_t row = 0; row < rows.rows; ++row) {
    const ScoreMap map{params.softmax_scale, params.softmax_scale * rows.mean[row], params.softcap};
    const float* from = raw + int64_t{row} * kPageTokens;
    if (visible != nullptr && visible[row].end - visible[row].begin < kPageTokens) {
      std::copy_n(from, kPageTokens, masked);
      MaskOutside(static_cast<int>(visible[row].begin), static_cast<int>(visible[row].end), masked);
      from = masked;
    }
    if (params.softcap > 0) {
      RowStatistics<true>(map, from, out, row * out.stride);
    } else {
      RowStatistics<false>(map, from, out, row * out.stride);
    }
  }
}

// Without the page's scale.
HWY_INLINE VF LoadMean(const PageMean& page, int32_t c) {
  const F32 d;
  const hn::Rebind<int8_t, I32> narrow;
  return hn::ConvertTo(d, hn::PromoteTo(I32(), hn::LoadU(narrow, page.mean + c)));
}

// Eight pages at a time, so that acc is read and written once for them; fewer are filled up with
// pages of weight 0.
HWY_INLINE void AddPages(const PageMean* pages, int32_t head_dim, const float* weights,
                         int64_t stride, int32_t rows, float* acc) {
  constexpr int kHalf = kMeansTogether / 2;
  const F32 d;
  for (int32_t c = 0; c < head_dim; c += kLanes) {
    VF value[kMeansTogether];
    ADAATTN_UNROLL
    for (int p = 0; p < kMeansTogether; ++p) {
      value[p] = hn::Mul(LoadMean(pages[p], c), hn::Set(d, pages[p].summary.mean_scale));
    }
    for (int32_t row = 0; row < rows; ++row) {
      const float* weight = weights + row * stride;
      float* at = acc + int64_t{row} * head_dim + c;
      // Two sums: one would wait for itself.
      VF low = hn::LoadU(d, at), high = hn::Zero(d);
      ADAATTN_UNROLL
      for (int p = 0; p < kHalf; ++p) {
        low = hn::MulAdd(value[p], hn::Set(d, weight[p]), low);
        high = hn::MulAdd(value[kHalf + p], hn::Set(d, weight[kHalf + p]), high);
      }
      hn::StoreU(hn::Add(low, high), d, at);
    }
  }
}

void AddValueMeansImpl(const PageMean* pages, int32_t num_pages, int32_t head_dim,
                       const float* weights, int64_t stride, int32_t rows, float* acc) {
  int32_t page = 0;
  for (; page + kMeansTogether <= num_pages; page += kMeansTogether) {
    AddPages(pages + page, head_dim, weights + page, stride, rows, acc);
  }
  const int32_t rest = num_pages - page;
  if (rest == 0) return;
  PageMean padded[kMeansTogether];
  std::fill_n(padded, kMeansTogether, pages[page]);
  std::copy_n(pages + page, rest, padded);
  for (int32_t row = 0; row < rows; ++row) {
    HWY_ALIGN float own[kMeansTogether] = {};
    std::copy_n(weights + row * stride + page, rest, own);
    AddPages(padded, head_dim, own, 0, 1, acc + int64_t{row} * head_dim);
  }
}

// |mean|^2 - 2 mean.o + |o|^2: what rounding adds is of the order of 1e-7 of the squares.
void ValueMeanDistancesImpl(const PageMean& page, int32_t head_dim, const float* o,
                            const float* norms, int32_t rows, int64_t stride, float* out) {
  const F32 d;
  ForRowBlocks(rows, [&](auto count, int32_t row) HWY_ATTR {
    constexpr int kRows = decltype(count)::value;
    VF dot[kRows];
    VF square = hn::Zero(d);
    for (int m = 0; m < kRows; ++m) dot[m] = hn::Zero(d);
    const float* from = o + int64_t{row} * head_dim;
    for (int32_t c = 0; c < head_dim; c += kLanes) {
      const VF value = LoadMean(page, c);
      square = hn::MulAdd(value, value, square);
      for (int m = 0; m < kRows; ++m) {
        dot[m] = hn::MulAdd(value, hn::LoadU(d, from + m * head_dim + c), dot[m]);
      }
    }
    const float scale = page.summary.mean_scale;
    const float norm = scale * scale * HorizontalSum(square);
    for (int m = 0; m < kRows; ++m) {
      const float distance = norm - 2.0f * scale * HorizontalSum(dot[m]) + norms[row + m];
      out[(row + m) * stride] = std::max(distance, 0.0f);
    }
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
                    const float* raw, const PageSums& out) {
  HWY_DYNAMIC_DISPATCH(PageStatisticsImpl)(rows, params, visible, raw, out);
}

void AddValueMeans(const PageMean* pages, int32_t num_pages, int32_t head_dim, const float* weights,
                   int64_t stride, int32_t rows, float* acc) {
  HWY_DYNAMIC_DISPATCH(AddValueMeansImpl)(pages, num_pages, head_dim, weights, stride, rows, acc);
}

void ValueMeanDistances(const PageMean& page, int32_t head_dim, const float* o, const float* norms,
                        int32_t rows, int64_t stride, float* out) {
  HWY_DYNAMIC_DISPATCH(ValueMeanDistancesImpl)(page, head_dim, o, norms, rows, stride, out);
}

void RotateQueries(const uint16_t* query_basis, const float* mean, const float* q, int32_t rows,
                   int32_t head_dim, float* out, float* mean_score) {
  HWY_DYNAMIC_DISPATCH(RotateQueriesImpl)
  (query_basis, mean, q, rows, head_dim, out, mean_score);
}

}  // namespace adaattn
#endif  // HWY_ONCE

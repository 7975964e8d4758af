#include "kernels/cpu/select_rows.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/select_rows.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn {
namespace HWY_NAMESPACE {

void FinishRowImpl(const RowScans& row, int32_t count, float read_variance, float unread_variance,
                   bool corrected) {
  const F32 d;
  const VF most = hn::Set(d, kMaxScoreVariance);
  const VF half = hn::Set(d, corrected ? 0.5f : 0.0f);
  for (int32_t i = 0; i < count; i += kLanes) {
    const VF sum = hn::LoadU(d, row.sum + i);
    const VF lse = hn::Add(hn::LoadU(d, row.max + i), Log(sum));
    hn::StoreU(lse, d, row.lse + i);
    hn::StoreU(hn::Div(hn::LoadU(d, row.squares + i), hn::Mul(sum, sum)), d, row.concentration + i);
    const VF read = hn::LoadU(d, row.read + i);
    const VF unread = hn::Sub(hn::LoadU(d, row.total + i), read);
    const VF variance =
        hn::MulAdd(read, hn::Set(d, read_variance), hn::Mul(unread, hn::Set(d, unread_variance)));
    hn::StoreU(variance, d, row.variance + i);
    hn::StoreU(hn::MulAdd(hn::Min(variance, most), half, lse), d, row.log_mass + i);
  }
}

float LargestImpl(const float* x, int32_t count) {
  const F32 d;
  VF top = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int32_t i = 0; i < count; i += kLanes) top = hn::Max(top, hn::LoadU(d, x + i));
  return HorizontalMax(top);
}

float SquareDistanceImpl(const float* a, const float* b, int32_t count) {
  const F32 d;
  VF sum = hn::Zero(d);
  for (int32_t i = 0; i < count; i += kLanes) {
    VF x = hn::LoadU(d, a + i);
    if (b != nullptr) x = hn::Sub(x, hn::LoadU(d, b + i));
    sum = hn::MulAdd(x, x, sum);
  }
  return HorizontalSum(sum);
}

float ExpBelowImpl(const float* x, float max, int32_t count, float* out) {
  const F32 d;
  const VF shift = hn::Set(d, max);
  VF sum = hn::Zero(d);
  for (int32_t i = 0; i < count; i += kLanes) {
    const VF gap = hn::Sub(hn::LoadU(d, x + i), shift);
    const VF p = hn::IfThenZeroElse(hn::Lt(gap, hn::Set(d, -86.0f)), ExpOfGap(gap));
    hn::StoreU(p, d, out + i);
    sum = hn::Add(sum, p);
  }
  return HorizontalSum(sum);
}

void AddWeightedImpl(const float* const* vectors, const float* weights, int32_t num_vectors,
                     int32_t size, float* out) {
  const F32 d;
  for (int32_t c = 0; c < size; c += kLanes) {
    VF sum = hn::LoadU(d, out + c);
    for (int32_t i = 0; i < num_vectors; ++i) {
      sum = hn::MulAdd(hn::LoadU(d, vectors[i] + c), hn::Set(d, weights[i]), sum);
    }
    hn::StoreU(sum, d, out + c);
  }
}

void RaiseMarginsImpl(const float* lse, const float* variance, float z, float global_lse,
                      int32_t count, float* margins) {
  const F32 d;
  for (int32_t i = 0; i < count; i += kLanes) {
    const VF above = hn::Sub(hn::LoadU(d, lse + i), hn::Set(d, global_lse));
    const VF spread = hn::Sqrt(hn::LoadU(d, variance + i));
    const VF margin = hn::MulAdd(spread, hn::Set(d, z), above);
    hn::StoreU(hn::Max(margin, hn::LoadU(d, margins + i)), d, margins + i);
  }
}

MassSums ShareOutImpl(const RowScans& row, const float* masses, const RowMass& mass, int32_t count,
                      float* shares, float* page_shares) {
  const F32 d;
  const VF none = hn::Zero(d);
  VF entropy = none, sealed = none, square = none, token_square = none, variance = none;
  for (int32_t i = 0; i < count; i += kLanes) {
    const VF share = hn::Mul(hn::LoadU(d, masses + i), hn::Set(d, mass.scale));
    hn::StoreU(share, d, shares + i);
    hn::StoreU(hn::Max(share, hn::LoadU(d, page_shares + i)), d, page_shares + i);
    const VF depth = hn::Sub(hn::Set(d, mass.lse), hn::LoadU(d, row.log_mass + i));
    const VF term = hn::IfThenElseZero(hn::Gt(share, none), hn::Mul(share, depth));
    entropy = hn::Add(entropy, term);
    sealed = hn::Add(sealed, share);
    const VF share2 = hn::Mul(share, share);
    square = hn::Add(square, share2);
    token_square = hn::MulAdd(share2, hn::LoadU(d, row.concentration + i), token_square);
    const VF believed = hn::Min(hn::LoadU(d, row.variance + i), hn::Set(d, kMaxScoreVariance));
    variance = hn::MulAdd(share, believed, variance);
  }
  MassSums sums;
  sums.entropy = HorizontalSum(entropy);
  sums.sealed = HorizontalSum(sealed);
  sums.square = HorizontalSum(square);
  sums.token_square = HorizontalSum(token_square);
  sums.variance = HorizontalSum(variance);
  return sums;
}

// ErrorParts of error_model.h, in vectors.
void FillPartsRowImpl(const RowScans& row, const float* shares, const float* distance2,
                      const float* spread, const float* scale_rms, int32_t head_dim, int32_t count,
                      const PartsRow& out) {
  const F32 d;
  const VF dim = hn::Set(d, static_cast<float>(head_dim));
  for (int32_t i = 0; i < count; i += kLanes) {
    const VF share = hn::LoadU(d, shares + i);
    const VF pull = hn::Mul(share, hn::LoadU(d, row.concentration + i));
    const VF share2 = hn::Mul(share, pull);
    const VF width = hn::LoadU(d, spread + i);
    const VF spread2 = hn::Mul(width, width);
    const VF away = hn::Sub(hn::Set(d, 1.0f), pull);
    const VF far2 = hn::Add(spread2, hn::LoadU(d, distance2 + i));
    const VF score = hn::Mul(hn::Mul(share2, hn::LoadU(d, row.variance + i)), hn::Mul(away, away));
    const VF step = hn::LoadU(d, scale_rms + i);
    hn::StoreU(hn::Mul(share2, spread2), d, out.skipped + i);
    hn::StoreU(hn::Mul(score, far2), d, out.score + i);
    hn::StoreU(hn::Mul(hn::Mul(share2, dim), hn::Mul(step, step)), d, out.value + i);
  }
}

void AddPartsImpl(const PartsRow& parts, float weight, int32_t count, const PartsSum& sum) {
  const F32 d;
  const VF factor = hn::Set(d, weight);
  const auto add = [&](const float* from, float* to) HWY_ATTR {
    hn::StoreU(hn::MulAdd(factor, hn::LoadU(d, from), hn::LoadU(d, to)), d, to);
  };
  for (int32_t i = 0; i < count; i += kLanes) {
    add(parts.skipped + i, sum.parts.skipped + i);
    add(parts.score + i, sum.parts.score + i);
    add(parts.value + i, sum.parts.value + i);
  }
}

void TakeRootsImpl(int32_t count, const PartsSum& sum) {
  const F32 d;
  for (int32_t i = 0; i < count; i += kLanes) {
    hn::StoreU(hn::Sqrt(hn::LoadU(d, sum.parts.skipped + i)), d, sum.amplitude + i);
  }
}

ErrorTerms SumTermsImpl(const PartsRow& parts, const PartsRow& factors, int32_t count) {
  const F32 d;
  VF square = hn::Zero(d), amplitude = hn::Zero(d);
  for (int32_t i = 0; i < count; i += kLanes) {
    const VF skipped = hn::LoadU(d, parts.skipped + i);
    const VF skips = hn::LoadU(d, factors.skipped + i);
    square = hn::MulAdd(skipped, skips, square);
    square = hn::MulAdd(hn::LoadU(d, parts.score + i), hn::LoadU(d, factors.score + i), square);
    square = hn::MulAdd(hn::LoadU(d, parts.value + i), hn::LoadU(d, factors.value + i), square);
    amplitude = hn::MulAdd(hn::Sqrt(skipped), skips, amplitude);
  }
  return ErrorTerms{HorizontalSum(square), HorizontalSum(amplitude)};
}

// What each page's parts are multiplied by; num_above[i] -= 1 in each lane above rung i.
struct VectorFactors {
  VF skipped, score, value;
};
HWY_INLINE VectorFactors OnLadder(VF share, float theta, const TermFactors* rungs, VI* num_above) {
  const F32 d;
  VectorFactors of{hn::Set(d, rungs[0].skipped), hn::Set(d, rungs[0].score),
                   hn::Set(d, rungs[0].value)};
  float multiple = theta;
  ADAATTN_UNROLL
  for (int rung = 1; rung < kNumRungs; ++rung, multiple *= 4.0f) {
    const auto above = hn::Gt(share, hn::Set(d, multiple));
    of.skipped = hn::IfThenElse(above, hn::Set(d, rungs[rung].skipped), of.skipped);
    of.score = hn::IfThenElse(above, hn::Set(d, rungs[rung].score), of.score);
    of.value = hn::IfThenElse(above, hn::Set(d, rungs[rung].value), of.value);
    if (num_above == nullptr) continue;
    num_above[rung - 1] =
        hn::Add(num_above[rung - 1], hn::BitCast(I32(), hn::VecFromMask(d, above)));
  }
  return of;
}

ErrorTerms SumLadderImpl(const PartsSum& sum, const float* shares, float theta,
                         const TermFactors* rungs, int32_t count) {
  const F32 d;
  VF square = hn::Zero(d), amplitude = hn::Zero(d);
  for (int32_t i = 0; i < count; i += kLanes) {
    const VectorFactors of = OnLadder(hn::LoadU(d, shares + i), theta, rungs, nullptr);
    square = hn::MulAdd(hn::LoadU(d, sum.parts.skipped + i), of.skipped, square);
    square = hn::MulAdd(hn::LoadU(d, sum.parts.score + i), of.score, square);
    square = hn::MulAdd(hn::LoadU(d, sum.parts.value + i), of.value, square);
    amplitude = hn::MulAdd(hn::LoadU(d, sum.amplitude + i), of.skipped, amplitude);
  }
  return ErrorTerms{HorizontalSum(square), HorizontalSum(amplitude)};
}

ErrorTerms SumSkippedImpl(const PartsSum& sum, const float* shares, float theta, int32_t count) {
  const F32 d;
  VF square = hn::Zero(d), amplitude = hn::Zero(d);
  for (int32_t i = 0; i < count; i += kLanes) {
    const auto skips = hn::Le(hn::LoadU(d, shares + i), hn::Set(d, theta));
    square = hn::Add(square, hn::IfThenElseZero(skips, hn::LoadU(d, sum.parts.skipped + i)));
    amplitude = hn::Add(amplitude, hn::IfThenElseZero(skips, hn::LoadU(d, sum.amplitude + i)));
  }
  return ErrorTerms{HorizontalSum(square), HorizontalSum(amplitude)};
}

void FindRungsImpl(const float* shares, float theta, const TermFactors* rungs, int32_t count,
                   uint8_t* rung_of, const PartsRow& factors, int32_t* num_above) {
  const F32 d;
  const I32 di;
  VI totals[kNumRungs - 1];
  for (VI& total : totals) total = hn::Zero(di);
  for (int32_t i = 0; i < count; i += kLanes) {
    VI above[kNumRungs - 1];
    for (VI& one : above) one = hn::Zero(di);
    const VectorFactors of = OnLadder(hn::LoadU(d, shares + i), theta, rungs, above);
    VI rung = hn::Zero(di);
    for (int j = 0; j < kNumRungs - 1; ++j) {
      totals[j] = hn::Sub(totals[j], above[j]);
      rung = hn::Sub(rung, above[j]);
    }
    const hn::Rebind<uint8_t, I32> bytes;
    hn::StoreU(hn::DemoteTo(bytes, rung), bytes, rung_of + i);
    hn::StoreU(of.skipped, d, factors.skipped + i);
    hn::StoreU(of.score, d, factors.score + i);
    hn::StoreU(of.value, d, factors.value + i);
  }
  for (int j = 0; j < kNumRungs - 1; ++j) num_above[j] = hn::GetLane(hn::SumOfLanes(di, totals[j]));
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn {

HWY_EXPORT(FinishRowImpl);
HWY_EXPORT(LargestImpl);
HWY_EXPORT(SquareDistanceImpl);
HWY_EXPORT(ExpBelowImpl);
HWY_EXPORT(AddWeightedImpl);
HWY_EXPORT(RaiseMarginsImpl);
HWY_EXPORT(ShareOutImpl);
HWY_EXPORT(FillPartsRowImpl);
HWY_EXPORT(AddPartsImpl);
HWY_EXPORT(SumTermsImpl);
HWY_EXPORT(TakeRootsImpl);
HWY_EXPORT(SumLadderImpl);
HWY_EXPORT(SumSkippedImpl);
HWY_EXPORT(FindRungsImpl);

void FinishRow(const RowScans& row, int32_t count, float read_variance, float unread_variance,
               bool corrected) {
  HWY_DYNAMIC_DISPATCH(FinishRowImpl)(row, count, read_variance, unread_variance, corrected);
}

float Largest(const float* x, int32_t count) { return HWY_DYNAMIC_DISPATCH(LargestImpl)(x, count); }

float SquareDistance(const float* a, const float* b, int32_t count) {
  return HWY_DYNAMIC_DISPATCH(SquareDistanceImpl)(a, b, count);
}

float ExpBelow(const float* x, float max, int32_t count, float* out) {
  return HWY_DYNAMIC_DISPATCH(ExpBelowImpl)(x, max, count, out);
}

void AddWeighted(const float* const* vectors, const float* weights, int32_t num_vectors,
                 int32_t size, float* out) {
  HWY_DYNAMIC_DISPATCH(AddWeightedImpl)(vectors, weights, num_vectors, size, out);
}

void RaiseMargins(const float* lse, const float* variance, float z, float global_lse, int32_t count,
                  float* margins) {
  HWY_DYNAMIC_DISPATCH(RaiseMarginsImpl)(lse, variance, z, global_lse, count, margins);
}

MassSums ShareOut(const RowScans& row, const float* masses, const RowMass& mass, int32_t count,
                  float* shares, float* page_shares) {
  return HWY_DYNAMIC_DISPATCH(ShareOutImpl)(row, masses, mass, count, shares, page_shares);
}

void FillPartsRow(const RowScans& row, const float* shares, const float* distance2,
                  const float* spread, const float* scale_rms, int32_t head_dim, int32_t count,
                  const PartsRow& out) {
  HWY_DYNAMIC_DISPATCH(FillPartsRowImpl)
  (row, shares, distance2, spread, scale_rms, head_dim, count, out);
}

void AddParts(const PartsRow& parts, float weight, int32_t count, const PartsSum& sum) {
  HWY_DYNAMIC_DISPATCH(AddPartsImpl)(parts, weight, count, sum);
}

void TakeRoots(int32_t count, const PartsSum& sum) {
  HWY_DYNAMIC_DISPATCH(TakeRootsImpl)(count, sum);
}

ErrorTerms SumTerms(const PartsRow& parts, const PartsRow& factors, int32_t count) {
  return HWY_DYNAMIC_DISPATCH(SumTermsImpl)(parts, factors, count);
}

ErrorTerms SumLadder(const PartsSum& sum, const float* shares, float theta,
                     const TermFactors* rungs, int32_t count) {
  return HWY_DYNAMIC_DISPATCH(SumLadderImpl)(sum, shares, theta, rungs, count);
}

ErrorTerms SumSkipped(const PartsSum& sum, const float* shares, float theta, int32_t count) {
  return HWY_DYNAMIC_DISPATCH(SumSkippedImpl)(sum, shares, theta, count);
}

void FindRungs(const float* shares, float theta, const TermFactors* rungs, int32_t count,
               uint8_t* rung_of, const PartsRow& factors, int32_t* num_above) {
  HWY_DYNAMIC_DISPATCH(FindRungsImpl)(shares, theta, rungs, count, rung_of, factors, num_above);
}

}  // namespace adaattn
#endif  // HWY_ONCE

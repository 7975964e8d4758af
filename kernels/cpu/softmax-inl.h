// Softmax over the 64 scores of one page and one row. Compiled once per target.

#if defined(ADAATTN_KERNELS_CPU_SOFTMAX_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_KERNELS_CPU_SOFTMAX_INL_H_
#undef ADAATTN_KERNELS_CPU_SOFTMAX_INL_H_
#else
#define ADAATTN_KERNELS_CPU_SOFTMAX_INL_H_
#endif

#include <limits>

#include "kernels/cpu/simd-inl.h"
#include "kernels/shape.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn {
namespace HWY_NAMESPACE {

// From a raw sum to a score: s = cap(raw * scale + offset).
struct ScoreMap {
  float scale = 1;
  float offset = 0;
  float softcap = 0;  // 0: none
};

HWY_INLINE VF MapScore(const ScoreMap& map, VF raw) {
  const F32 d;
  const VF s = hn::MulAdd(raw, hn::Set(d, map.scale), hn::Set(d, map.offset));
  return map.softcap > 0 ? SoftCap(s, map.softcap) : s;
}

// Tokens outside [begin, end) of the page get a raw score that is -inf after any map: whatever
// stood there, NaN included, is gone.
HWY_INLINE void MaskOutside(int begin, int end, float* raw) {
  for (int t = 0; t < begin; ++t) raw[t] = -std::numeric_limits<float>::infinity();
  for (int t = end > begin ? end : begin; t < kPageTokens; ++t) {
    raw[t] = -std::numeric_limits<float>::infinity();
  }
}

// Masked raw scores stay -inf under a soft cap, which would otherwise make them -cap.
HWY_INLINE VF MapMasked(const ScoreMap& map, VF raw) {
  const F32 d;
  const VF lowest = hn::Set(d, -std::numeric_limits<float>::infinity());
  return hn::IfThenElse(hn::Eq(raw, lowest), lowest, MapScore(map, raw));
}

// Replaces 64 raw scores by exp(s - m), m the larger of *max and theirs; brings sum and moment (sum
// of p s; may be null) to m and adds this page. Returns what earlier accumulators are to be
// multiplied by.
HWY_INLINE float OnlineSoftmax(const ScoreMap& map, float* HWY_RESTRICT scores, float* max,
                               float* sum, float* moment) {
  const F32 d;
  VF top = hn::Set(d, *max);
  for (int t = 0; t < kPageTokens; t += kLanes) {
    const VF s = MapMasked(map, hn::LoadU(d, scores + t));
    hn::StoreU(s, d, scores + t);
    top = hn::Max(top, s);
  }
  const float new_max = HorizontalMax(top);
  if (new_max == -std::numeric_limits<float>::infinity()) {
    for (int t = 0; t < kPageTokens; ++t) scores[t] = 0.0f;
    return 1.0f;
  }
  const VF shift = hn::Set(d, new_max);
  VF page_sum = hn::Zero(d), page_moment = hn::Zero(d);
  for (int t = 0; t < kPageTokens; t += kLanes) {
    const VF s = hn::LoadU(d, scores + t);
    const VF p = Exp(hn::Sub(s, shift));
    hn::StoreU(p, d, scores + t);
    page_sum = hn::Add(page_sum, p);
    // -inf times 0 is NaN: a masked score counts as a finite one of weight 0.
    page_moment = hn::MulAdd(p, hn::Max(s, hn::Set(d, -1e30f)), page_moment);
  }
  const float alpha = std::exp(*max - new_max);
  *sum = *sum * alpha + HorizontalSum(page_sum);
  if (moment != nullptr) *moment = *moment * alpha + HorizontalSum(page_moment);
  *max = new_max;
  return alpha;
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn
HWY_AFTER_NAMESPACE();

#endif  // toggle

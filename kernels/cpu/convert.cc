#include "kernels/cpu/convert.h"

#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/convert.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn {
namespace HWY_NAMESPACE {
namespace {

constexpr float kBf16Max = 0x1.fep127f;

// kLanes elements in their natural order.
template <class T>
HWY_INLINE VF LoadInOrder(const T* at) {
  const F32 d;
  if constexpr (std::is_same<T, Bf16>::value) {
    const hn::Rebind<hwy::bfloat16_t, F32> narrow;
    return hn::PromoteTo(d, hn::LoadU(narrow, reinterpret_cast<const hwy::bfloat16_t*>(at)));
  } else if constexpr (std::is_same<T, Fp16>::value) {
    const hn::Rebind<hwy::float16_t, F32> narrow;
    return hn::PromoteTo(d, hn::LoadU(narrow, reinterpret_cast<const hwy::float16_t*>(at)));
  } else {
    return hn::LoadU(d, at);
  }
}

// NaN stays NaN: what should not be read must be seen when it is.
HWY_INLINE VF ClampTo(VF v, float limit) {
  const F32 d;
  const VF clamped = hn::Clamp(v, hn::Set(d, -limit), hn::Set(d, limit));
  return hn::IfThenElse(hn::IsNaN(v), v, clamped);
}

HWY_INLINE void StoreInOrder(VF v, float* at) { hn::StoreU(v, F32(), at); }

HWY_INLINE void StoreInOrder(VF v, Fp16* at) {
  const hn::Rebind<hwy::float16_t, F32> narrow;
  hn::StoreU(hn::DemoteTo(narrow, ClampTo(v, kFp16Max)), narrow,
             reinterpret_cast<hwy::float16_t*>(at));
}

HWY_INLINE void StoreInOrder(VF v, Bf16* at) {
  // To nearest, ties to even; Highway's own demotion truncates.
  const U32 d;
  const auto x = hn::BitCast(d, ClampTo(v, kBf16Max));
  const auto odd = hn::And(hn::ShiftRight<16>(x), hn::Set(d, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(x, hn::Add(odd, hn::Set(d, 0x7fffu))));
  const U16Half narrow;
  hn::StoreU(hn::DemoteTo(narrow, hn::BitCast(I32(), rounded)), narrow,
             reinterpret_cast<uint16_t*>(at));
}

HWY_INLINE void StoreInOrder(VF v, Fp8E4m3* at) {
  const F32 d;
  const U32 du;
  const VF clamped = ClampTo(v, kFp8E4m3Max);
  const VF magnitude = hn::Abs(clamped);
  const auto x = hn::BitCast(du, magnitude);
  const auto odd = hn::And(hn::ShiftRight<20>(x), hn::Set(du, 1u));
  const auto normal = hn::ShiftRight<20>(
      hn::Sub(hn::Add(x, hn::Add(odd, hn::Set(du, 0x7ffffu))), hn::Set(du, 0x3c000000u)));
  // 2^14 has the ulp 2^-9, the step of e4m3 subnormals: the addition rounds.
  const VF shifted = hn::Add(magnitude, hn::Set(d, 16384.0f));
  const auto subnormal = hn::Sub(hn::BitCast(du, shifted), hn::Set(du, 0x46800000u));
  const auto is_subnormal = hn::RebindMask(du, hn::Lt(magnitude, hn::Set(d, 0x1p-6f)));
  const auto sign = hn::ShiftLeft<7>(hn::ShiftRight<31>(hn::BitCast(du, clamped)));
  const auto code = hn::Or(sign, hn::IfThenElse(is_subnormal, subnormal, normal));
  const hn::Rebind<uint8_t, F32> narrow;
  hn::StoreU(hn::DemoteTo(narrow, hn::BitCast(I32(), code)), narrow,
             reinterpret_cast<uint8_t*>(at));
}

template <class T>
bool WidenTyped(const void* in, int64_t count, float* out, float most) {
  const F32 d;
  const VF limit = hn::Set(d, most);
  auto within = hn::Eq(limit, limit);
  for (int64_t i = 0; i < count; i += kLanes) {
    const VF v = LoadInOrder(static_cast<const T*>(in) + i);
    within = hn::And(within, hn::Le(hn::Abs(v), limit));  // False for NaN.
    hn::StoreU(v, d, out + i);
  }
  return hn::AllTrue(d, within);
}

template <class T>
void NarrowTyped(const float* in, float factor, int64_t count, void* out) {
  const VF scale = hn::Set(F32(), factor);
  for (int64_t i = 0; i < count; i += kLanes) {
    StoreInOrder(hn::Mul(hn::LoadU(F32(), in + i), scale), static_cast<T*>(out) + i);
  }
}

}  // namespace

bool ToFloatsImpl(DType type, const void* in, int64_t count, float* out, float most) {
  if (type == DType::kF32) return WidenTyped<float>(in, count, out, most);
  if (type == DType::kF16) return WidenTyped<Fp16>(in, count, out, most);
  return WidenTyped<Bf16>(in, count, out, most);
}

void FromFloatsImpl(DType type, const float* in, float factor, int64_t count, void* out) {
  if (type == DType::kF32) return NarrowTyped<float>(in, factor, count, out);
  if (type == DType::kF16) return NarrowTyped<Fp16>(in, factor, count, out);
  if (type == DType::kBf16) return NarrowTyped<Bf16>(in, factor, count, out);
  return NarrowTyped<Fp8E4m3>(in, factor, count, out);
}

void AddScaledImpl(const float* in, float factor, int64_t count, float* acc) {
  const F32 d;
  const VF scale = hn::Set(d, factor);
  for (int64_t i = 0; i < count; i += kLanes) {
    hn::StoreU(hn::MulAdd(scale, hn::LoadU(d, in + i), hn::LoadU(d, acc + i)), d, acc + i);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn {

HWY_EXPORT(ToFloatsImpl);
HWY_EXPORT(FromFloatsImpl);
HWY_EXPORT(AddScaledImpl);

bool ToFloats(DType type, const void* in, int64_t count, float* out, float most) {
  return HWY_DYNAMIC_DISPATCH(ToFloatsImpl)(type, in, count, out, most);
}

void FromFloats(DType type, const float* in, float factor, int64_t count, void* out) {
  HWY_DYNAMIC_DISPATCH(FromFloatsImpl)(type, in, factor, count, out);
}

void AddScaled(const float* in, float factor, int64_t count, float* acc) {
  HWY_DYNAMIC_DISPATCH(AddScaledImpl)(in, factor, count, acc);
}

}  // namespace adaattn
#endif  // HWY_ONCE

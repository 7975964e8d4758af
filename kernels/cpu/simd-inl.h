// Vector helpers that every CPU kernel shares. Compiled once per target: include it after
// hwy/highway.h, outside of any namespace.

#if defined(ADAATTN_KERNELS_CPU_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_KERNELS_CPU_SIMD_INL_H_
#undef ADAATTN_KERNELS_CPU_SIMD_INL_H_
#else
#define ADAATTN_KERNELS_CPU_SIMD_INL_H_
#endif

// Unrolls the next loop completely: accumulators in arrays stay in registers.
#ifndef ADAATTN_UNROLL
#if defined(__clang__)
#define ADAATTN_UNROLL _Pragma("unroll")
#else
#define ADAATTN_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/format/float_types.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, 8>;
using I32 = hn::RebindToSigned<F32>;
using U32 = hn::RebindToUnsigned<F32>;
using U16Half = hn::Rebind<uint16_t, F32>;
using VF = hn::Vec<F32>;
using VI = hn::Vec<I32>;
inline constexpr int kLanes = static_cast<int>(hn::MaxLanes(F32()));

// Loads 2 * kLanes neighbouring elements as two vectors of floats. Which elements go where is the
// type's own affair (kInterleaved): a sum over all of them does not care as long as its other
// factor was permuted alike, and accumulators are put in order once at the end.
template <class T>
struct Elements;

template <>
struct Elements<float> {
  static constexpr bool kInterleaved = false;
  static HWY_INLINE void Load(const float* at, VF& a, VF& b) {
    a = hn::LoadU(F32(), at);
    b = hn::LoadU(F32(), at + kLanes);
  }
};

template <>
struct Elements<Bf16> {
  // A pair in one 32-bit lane is split by a shift and a mask: no shuffle.
  static constexpr bool kInterleaved = true;
  static HWY_INLINE void Load(const Bf16* at, VF& a, VF& b) {
    const auto raw = hn::LoadU(U32(), reinterpret_cast<const uint32_t*>(at));
    a = hn::BitCast(F32(), hn::ShiftLeft<16>(raw));
    b = hn::BitCast(F32(), hn::And(raw, hn::Set(U32(), 0xffff0000u)));
  }
};

template <>
struct Elements<Fp16> {
  static constexpr bool kInterleaved = false;
  static HWY_INLINE void Load(const Fp16* at, VF& a, VF& b) {
    const hn::Rebind<hwy::float16_t, F32> half;
    const auto* halves = reinterpret_cast<const hwy::float16_t*>(at);
    a = hn::PromoteTo(F32(), hn::LoadU(half, halves));
    b = hn::PromoteTo(F32(), hn::LoadU(half, halves + kLanes));
  }
};

// e4m3 read as FP16 of 2^-8 of its value: kScale makes up for it. Subnormals come out right, NaN
// does not (append never writes one).
template <>
struct Elements<Fp8E4m3> {
  static constexpr bool kInterleaved = false;
  static HWY_INLINE VF LoadOne(const uint8_t* at) {
    const U16Half wide;
    const hn::Rebind<int16_t, F32> wide_signed;
    const auto raw = hn::PromoteTo(wide, hn::LoadU(hn::Rebind<uint8_t, F32>(), at));
    const auto shifted = hn::ShiftRight<1>(hn::BitCast(wide_signed, hn::ShiftLeft<8>(raw)));
    const auto bits = hn::And(hn::BitCast(wide, shifted), hn::Set(wide, uint16_t{0xbf80}));
    return hn::PromoteTo(F32(), hn::BitCast(hn::Rebind<hwy::float16_t, F32>(), bits));
  }
  static HWY_INLINE void Load(const Fp8E4m3* at, VF& a, VF& b) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(at);
    a = LoadOne(bytes);
    b = LoadOne(bytes + kLanes);
  }
};

// exp(x) for x <= 88 to about 1 ulp; exactly 0 below -87 and for -inf. NaN stays no number.
HWY_INLINE VF Exp(VF x) {
  const F32 d;
  const I32 di;
  const VF n = hn::Round(hn::Mul(x, hn::Set(d, 1.44269504088896341f)));
  const VF clamped = hn::Max(n, hn::Set(d, -126.0f));
  VF r = hn::NegMulAdd(clamped, hn::Set(d, 0.693145751953125f), x);
  r = hn::NegMulAdd(clamped, hn::Set(d, 1.42860682030941723e-6f), r);
  VF p = hn::Set(d, 1.9875691500e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1f));
  p = hn::MulAdd(hn::Mul(p, r), r, hn::Add(r, hn::Set(d, 1.0f)));
  const auto exponent = hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, clamped), hn::Set(di, 127)));
  const VF result = hn::Mul(p, hn::BitCast(d, exponent));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.0f)), result);
}

// exp(x) for x <= 0 to about 3e-7 of it, in two thirds of Exp's instructions. Below -86 it is
// exp(-86): next to an item of weight 1 as good as nothing.
HWY_INLINE VF ExpOfGap(VF x) {
  const F32 d;
  const I32 di;
  const VF clamped = hn::Max(x, hn::Set(d, -86.0f));
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the lowest bits.
  const VF magic = hn::Set(d, 12582912.0f);
  const VF shifted = hn::MulAdd(clamped, hn::Set(d, 1.44269504088896341f), magic);
  const VF r = hn::NegMulAdd(hn::Sub(shifted, magic), hn::Set(d, 0.693147182464599609f), clamped);
  VF p = hn::Set(d, 1.3981999507e-3f);
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.0f));
  const VI power = hn::ShiftLeft<23>(hn::BitCast(di, shifted));
  return hn::BitCast(d, hn::Add(hn::BitCast(di, p), power));
}

// ln(x) to about 1e-7 absolute and relative, for normal positive x.
HWY_INLINE VF Log(VF x) {
  const F32 d;
  const I32 di;
  const VI bits = hn::BitCast(di, x);
  // Octaves from the square root of a half, so that m - 1 stays small on both sides.
  const VI octave = hn::ShiftRight<23>(hn::Sub(bits, hn::Set(di, 0x3f3504f3)));
  const VF m = hn::Sub(hn::BitCast(d, hn::Sub(bits, hn::ShiftLeft<23>(octave))), hn::Set(d, 1.0f));
  const VF n = hn::ConvertTo(d, octave);
  VF p = hn::Set(d, 7.0376836292e-2f);
  p = hn::MulAdd(p, m, hn::Set(d, -1.1514610310e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, 1.1676998740e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, -1.2420140846e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, 1.4249322787e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, -1.6668057665e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, 2.0000714765e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, -2.4999993993e-1f));
  p = hn::MulAdd(p, m, hn::Set(d, 3.3333331174e-1f));
  const VF square = hn::Mul(m, m);
  p = hn::MulAdd(hn::Mul(p, m), square, hn::NegMulAdd(square, hn::Set(d, 0.5f), m));
  return hn::MulAdd(n, hn::Set(d, 0.693147180559945309f), p);
}

// cap * tanh(s / cap). The absolute error is a few ulps of cap, which is what a score needs.
HWY_INLINE VF SoftCap(VF s, float cap) {
  const F32 d;
  const VF one = hn::Set(d, 1.0f);
  const VF x = hn::Min(hn::Abs(hn::Mul(s, hn::Set(d, 2.0f / cap))), hn::Set(d, 40.0f));
  const VF tail = Exp(hn::Neg(x));
  const VF t = hn::Div(hn::Sub(one, tail), hn::Add(one, tail));
  return hn::CopySign(hn::Mul(t, hn::Set(d, cap)), s);
}

// Asks for the cache lines of [at, at + bytes).
HWY_INLINE void PrefetchRange(const void* at, int64_t bytes) {
  constexpr int64_t kLineBytes = 64;
  const auto* first = static_cast<const uint8_t*>(at);
  for (int64_t i = 0; i < bytes; i += kLineBytes) hwy::Prefetch(first + i);
}

HWY_INLINE float HorizontalSum(VF v) { return hn::GetLane(hn::SumOfLanes(F32(), v)); }
HWY_INLINE float HorizontalMax(VF v) { return hn::GetLane(hn::MaxOfLanes(F32(), v)); }

// One vector [sum a, sum b, sum c, sum d] repeated by 128-bit block, each block a part of the sum.
HWY_INLINE VF SumBlocks(VF a, VF b, VF c, VF e) {
  const F32 d;
  const hn::Repartition<uint64_t, F32> d64;
  const VF ab = hn::Add(hn::InterleaveLower(d, a, b), hn::InterleaveUpper(d, a, b));
  const VF ce = hn::Add(hn::InterleaveLower(d, c, e), hn::InterleaveUpper(d, c, e));
  const auto low = hn::InterleaveLower(d64, hn::BitCast(d64, ab), hn::BitCast(d64, ce));
  const auto high = hn::InterleaveUpper(d64, hn::BitCast(d64, ab), hn::BitCast(d64, ce));
  return hn::Add(hn::BitCast(d, low), hn::BitCast(d, high));
}

// out[i] = sum of the kLanes floats at vectors + i * kLanes, for i in [0, 8).
HWY_INLINE void SumEight(const float* vectors, float* out) {
  const F32 d;
  const auto at = [&](int i) HWY_ATTR { return hn::Load(d, vectors + i * kLanes); };
  const VF low = SumBlocks(at(0), at(1), at(2), at(3));
  const VF high = SumBlocks(at(4), at(5), at(6), at(7));
  if constexpr (kLanes == 8) {
    hn::StoreU(hn::Add(hn::ConcatLowerLower(d, high, low), hn::ConcatUpperUpper(d, high, low)), d,
               out);
  } else {
    static_assert(kLanes == 8 || kLanes == 4, "SumBlocks works on 128-bit blocks");
    hn::StoreU(low, d, out);
    hn::StoreU(high, d, out + 4);
  }
}

// Rows that share one pass over a page: six sums beside the operands fill 16 registers.
inline constexpr int kMaxBlockRows = 6;

// Calls run(integral_constant rows, first row) for blocks of at most six rows, evenly sized.
template <class Run>
HWY_INLINE void ForRowBlocks(int32_t rows, const Run& run) {
  const int32_t blocks = (rows + kMaxBlockRows - 1) / kMaxBlockRows;
  for (int32_t block = 0, row = 0; block < blocks; ++block) {
    const int32_t count = rows / blocks + (block < rows % blocks ? 1 : 0);
    switch (count) {
      case 1:
        run(std::integral_constant<int, 1>(), row);
        break;
      case 2:
        run(std::integral_constant<int, 2>(), row);
        break;
      case 3:
        run(std::integral_constant<int, 3>(), row);
        break;
      case 4:
        run(std::integral_constant<int, 4>(), row);
        break;
      case 5:
        run(std::integral_constant<int, 5>(), row);
        break;
      default:
        run(std::integral_constant<int, 6>(), row);
        break;
    }
    row += count;
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn
HWY_AFTER_NAMESPACE();

#endif  // toggle

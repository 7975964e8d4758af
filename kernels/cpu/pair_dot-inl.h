// Dot products of packed codes with pairs of 16-bit weights. Compiled once per target.

#if defined(ADAATTN_KERNELS_CPU_PAIR_DOT_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef ADAATTN_KERNELS_CPU_PAIR_DOT_INL_H_
#undef ADAATTN_KERNELS_CPU_PAIR_DOT_INL_H_
#else
#define ADAATTN_KERNELS_CPU_PAIR_DOT_INL_H_
#endif

#include <cstddef>
#include <cstring>

#include "kernels/cpu/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn {
namespace HWY_NAMESPACE {

using I16 = hn::Repartition<int16_t, I32>;
using U16 = hn::Repartition<uint16_t, I32>;
using VI16 = hn::Vec<I16>;
using VU16 = hn::Vec<U16>;

// sum[i] + a[2i] b[2i] + a[2i+1] b[2i+1].
HWY_INLINE VI PairDot(VI16 a, VI16 b, VI sum) {
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4
  // One instruction; elsewhere Highway leaves open which lane gets which product.
  VI unused = hn::Zero(I32());
  return hn::ReorderWidenMulAccumulate(I32(), a, b, sum, unused);
#else
  const I32 d;
  const VI a32 = hn::BitCast(d, a), b32 = hn::BitCast(d, b);
  const auto even = [](VI v) HWY_ATTR { return hn::ShiftRight<16>(hn::ShiftLeft<16>(v)); };
  const VI low = hn::Mul(even(a32), even(b32));
  const VI high = hn::Mul(hn::ShiftRight<16>(a32), hn::ShiftRight<16>(b32));
  return hn::Add(sum, hn::Add(low, high));
#endif
}

HWY_INLINE VU16 LoadWords(const std::byte* at) {
  return hn::BitCast(U16(), hn::LoadU(U32(), reinterpret_cast<const uint32_t*>(at)));
}

// Two neighbouring weights in every lane.
HWY_INLINE VI16 BroadcastPair(const int16_t* at) {
  int32_t pair;
  std::memcpy(&pair, at, sizeof(pair));
  return hn::BitCast(I16(), hn::Set(I32(), pair));
}

template <int kShift>
HWY_INLINE VI16 Field(VU16 words, uint16_t mask) {
  const U16 d;
  if constexpr (kShift == 0) {
    return hn::BitCast(I16(), hn::And(words, hn::Set(d, mask)));
  } else {
    return hn::BitCast(I16(), hn::And(hn::ShiftRight<kShift>(words), hn::Set(d, mask)));
  }
}

// Four pairs of nibbles, bit 4j of each half word.
HWY_INLINE void UnpackNibbles(VU16 words, VI16& a, VI16& b, VI16& c, VI16& e) {
  a = Field<0>(words, 15);
  b = Field<4>(words, 15);
  c = Field<8>(words, 15);
  e = hn::BitCast(I16(), hn::ShiftRight<12>(words));
}

// Nibbles of the even and of the odd pairs from a high and a low 2-bit plane.
HWY_INLINE void JoinPlanes(VU16 high, VU16 low, VU16& even, VU16& odd) {
  const U16 d;
  const VU16 m = hn::Set(d, uint16_t{0x3333});
  even = hn::Or(hn::ShiftLeft<2>(hn::And(high, m)), hn::And(low, m));
  odd = hn::Or(hn::AndNot(m, high), hn::And(hn::ShiftRight<2>(low), m));
}

// Eight pairs in order from 1 to 4 planes, most significant first: codes of 2, 4, 6 or 8 bits.
template <int kBits>
struct Unpack;

template <>
struct Unpack<2> {
  static HWY_INLINE void Run(const VU16* planes, VI16* codes) {
    codes[0] = Field<0>(planes[0], 3);
    codes[1] = Field<2>(planes[0], 3);
    codes[2] = Field<4>(planes[0], 3);
    codes[3] = Field<6>(planes[0], 3);
    codes[4] = Field<8>(planes[0], 3);
    codes[5] = Field<10>(planes[0], 3);
    codes[6] = Field<12>(planes[0], 3);
    codes[7] = hn::BitCast(I16(), hn::ShiftRight<14>(planes[0]));
  }
};

template <>
struct Unpack<4> {
  static HWY_INLINE void Run(const VU16* planes, VI16* codes) {
    VU16 even, odd;
    JoinPlanes(planes[0], planes[1], even, odd);
    UnpackNibbles(even, codes[0], codes[2], codes[4], codes[6]);
    UnpackNibbles(odd, codes[1], codes[3], codes[5], codes[7]);
  }
};

// Bytes of `high` nibbles and `low` fields (of kLowBits): pairs j and j + 4 of one word.
template <int kLowBits>
HWY_INLINE void UnpackBytes(VU16 high, VU16 low, VI16& a, VI16& b, VI16& c, VI16& e) {
  const U16 d;
  const VU16 m = hn::Set(d, uint16_t{0x0f0f});
  const VU16 first = hn::Or(hn::ShiftLeft<kLowBits>(hn::And(high, m)), hn::And(low, m));
  const VU16 second = hn::Or(hn::ShiftLeft<kLowBits>(hn::And(hn::ShiftRight<4>(high), m)),
                             hn::And(hn::ShiftRight<4>(low), m));
  a = Field<0>(first, 255);
  b = Field<0>(second, 255);
  c = hn::BitCast(I16(), hn::ShiftRight<8>(first));
  e = hn::BitCast(I16(), hn::ShiftRight<8>(second));
}

template <>
struct Unpack<6> {
  static HWY_INLINE void Run(const VU16* planes, VI16* codes) {
    const VU16 m = hn::Set(U16(), uint16_t{0x3333});
    VU16 even, odd;
    JoinPlanes(planes[0], planes[1], even, odd);
    const VU16 low_even = hn::And(planes[2], m);
    const VU16 low_odd = hn::And(hn::ShiftRight<2>(planes[2]), m);
    UnpackBytes<2>(even, low_even, codes[0], codes[2], codes[4], codes[6]);
    UnpackBytes<2>(odd, low_odd, codes[1], codes[3], codes[5], codes[7]);
  }
};

template <>
struct Unpack<8> {
  static HWY_INLINE void Run(const VU16* planes, VI16* codes) {
    VU16 even, odd, low_even, low_odd;
    JoinPlanes(planes[0], planes[1], even, odd);
    JoinPlanes(planes[2], planes[3], low_even, low_odd);
    UnpackBytes<4>(even, low_even, codes[0], codes[2], codes[4], codes[6]);
    UnpackBytes<4>(odd, low_odd, codes[1], codes[3], codes[5], codes[7]);
  }
};

// acc[m] += codes . weights[m * kStride ..], kPairs pairs.
template <int kRows, int kPairs, int kStride>
HWY_INLINE void MultiplyPairs(const VI16* codes, const int16_t* HWY_RESTRICT weights, VI* acc) {
  ADAATTN_UNROLL
  for (int j = 0; j < kPairs; ++j) {
    ADAATTN_UNROLL
    for (int m = 0; m < kRows; ++m) {
      acc[m] = PairDot(codes[j], BroadcastPair(weights + m * kStride + 2 * j), acc[m]);
#if HWY_COMPILER_GCC && (HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4)
      // Keeps the sums in source order: the compiler would gather all products first and spill.
      asm volatile("" : "+x"(acc[m].raw));
#endif
    }
  }
}

// (2 acc - levels * sum) * step as floats: codes count half steps from the middle of their range.
HWY_INLINE VF CenteredSum(VI acc, int32_t levels, int32_t sum, float step) {
  const VI twice = hn::ShiftLeft<1>(acc);
  const VI centered = hn::Sub(twice, hn::Set(I32(), levels * sum));
  return hn::Mul(hn::ConvertTo(F32(), centered), hn::Set(F32(), step));
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn
HWY_AFTER_NAMESPACE();

#endif  // toggle

// s[t] = score_scale * q.k[t], capped;  online softmax page by page;  acc = sum_t p[t] v[t].
// Rows come in blocks of up to six, so that one K or V vector feeds six FMAs: 6 x 2 accumulators
// fill the 16 registers of AVX2 together with the operands.

#include "kernels/cpu/dense_attend.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/dense_attend.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/softmax-inl.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn {
namespace HWY_NAMESPACE {
namespace {

// Tokens whose sums are kept in registers at a time.
constexpr int TokensInFlight(int rows) { return rows >= 4 ? 2 : rows == 1 ? 8 : 4; }

// Scores of 8 tokens: s[m * 64 + i] = q[m].k[i], unscaled.
template <int kRows, class T>
HWY_INLINE void ScoreEight(const float* HWY_RESTRICT q, const T* HWY_RESTRICT k, int32_t head_dim,
                           float* HWY_RESTRICT s) {
  constexpr int kTokens = TokensInFlight(kRows);
  const F32 d;
  HWY_ALIGN float sums[kRows * 8 * kLanes];
  for (int base = 0; base < 8; base += kTokens) {
    VF acc[kRows][kTokens];
    for (int m = 0; m < kRows; ++m) {
      for (int t = 0; t < kTokens; ++t) acc[m][t] = hn::Zero(d);
    }
    for (int32_t c = 0; c < head_dim; c += 2 * kLanes) {
      VF even[kTokens], odd[kTokens];
      for (int t = 0; t < kTokens; ++t) {
        Elements<T>::Load(k + (base + t) * head_dim + c, even[t], odd[t]);
      }
      for (int m = 0; m < kRows; ++m) {
        const VF q0 = hn::LoadU(d, q + m * head_dim + c);
        for (int t = 0; t < kTokens; ++t) acc[m][t] = hn::MulAdd(q0, even[t], acc[m][t]);
      }
      for (int m = 0; m < kRows; ++m) {
        const VF q1 = hn::LoadU(d, q + m * head_dim + c + kLanes);
        for (int t = 0; t < kTokens; ++t) acc[m][t] = hn::MulAdd(q1, odd[t], acc[m][t]);
      }
    }
    for (int m = 0; m < kRows; ++m) {
      for (int t = 0; t < kTokens; ++t) {
        hn::Store(acc[m][t], d, sums + (m * 8 + base + t) * kLanes);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) SumEight(sums + m * 8 * kLanes, s + m * kPageTokens);
}

// acc[m][c..] = acc[m][c..] * alpha[m] + sum over tokens [t0, t1) of p[m][t] v[t][c..].
template <int kRows, int kPairs, class T>
HWY_INLINE void AccumulateColumns(const float* HWY_RESTRICT p, const float* HWY_RESTRICT alpha,
                                  const T* HWY_RESTRICT v, int32_t head_dim, int t0, int t1,
                                  float* HWY_RESTRICT acc) {
  const F32 d;
  VF sum[kRows][2 * kPairs];
  for (int m = 0; m < kRows; ++m) {
    const VF a = hn::Set(d, alpha[m]);
    for (int i = 0; i < 2 * kPairs; ++i) {
      sum[m][i] = hn::Mul(a, hn::LoadU(d, acc + m * head_dim + i * kLanes));
    }
  }
  for (int t = t0; t < t1; ++t) {
    VF x[2 * kPairs];
    for (int i = 0; i < kPairs; ++i) {
      Elements<T>::Load(v + t * head_dim + 2 * i * kLanes, x[2 * i], x[2 * i + 1]);
    }
    for (int m = 0; m < kRows; ++m) {
      const VF weight = hn::Set(d, p[m * kPageTokens + t]);
      for (int i = 0; i < 2 * kPairs; ++i) sum[m][i] = hn::MulAdd(weight, x[i], sum[m][i]);
    }
  }
  for (int m = 0; m < kRows; ++m) {
    for (int i = 0; i < 2 * kPairs; ++i) {
      hn::StoreU(sum[m][i], d, acc + m * head_dim + i * kLanes);
    }
  }
}

template <int kRows, class T>
HWY_INLINE void AccumulateValues(const float* p, const float* alpha, const T* v, int32_t head_dim,
                                 int t0, int t1, float* acc) {
  constexpr int kPairs = kRows == 1 ? 4 : kRows <= 3 ? 2 : 1;
  int32_t c = 0;
  for (; c + 2 * kPairs * kLanes <= head_dim; c += 2 * kPairs * kLanes) {
    AccumulateColumns<kRows, kPairs>(p, alpha, v + c, head_dim, t0, t1, acc + c);
  }
  for (; c < head_dim; c += 2 * kLanes) {
    AccumulateColumns<kRows, 1>(p, alpha, v + c, head_dim, t0, t1, acc + c);
  }
}

// What the rows of a block have in common on one page.
struct PageView {
  int64_t position = 0;  // of the page's first token
  int t0 = 0;            // tokens of the page that are read
  int t1 = 0;
  const void* next_keys = nullptr;  // of the next page, to be asked for; null: there is none
};

template <int kRows, class T>
void AttendBlock(const DenseWork& work, const PageView& page, int row, const T* k, const T* v,
                 const float* q, float* scores, const PartialRows& out) {
  const int32_t head_dim = work.head_dim;
  const int64_t row_bytes = int64_t{head_dim} * static_cast<int64_t>(sizeof(T));
  for (int t = page.t0 & ~7; t < page.t1; t += 8) {
    if (row == 0) PrefetchRange(v + t * head_dim, 8 * row_bytes);
    ScoreEight<kRows>(q, k + t * head_dim, head_dim, scores + t);
  }
  float alpha[kRows];
  for (int m = 0; m < kRows; ++m) {
    const KeyRange& range = work.ranges[(row + m) / work.rows_per_range];
    const auto local = [&](int64_t position) {
      return static_cast<int>(std::clamp<int64_t>(position - page.position, page.t0, page.t1));
    };
    float* s = scores + m * kPageTokens;
    MaskOutside(local(range.begin), local(range.end), s);
    const ScoreMap map{work.score_scale, 0.0f, work.softcap};
    alpha[m] = OnlineSoftmax(map, s, &out.max[row + m], &out.sum[row + m],
                             out.moment == nullptr ? nullptr : &out.moment[row + m]);
  }
  if (row == 0 && page.next_keys != nullptr) PrefetchRange(page.next_keys, 8 * row_bytes);
  AccumulateValues<kRows>(scores, alpha, v, head_dim, page.t0, page.t1,
                          out.acc + int64_t{row} * head_dim);
}

template <class T>
using BlockFunction = void (*)(const DenseWork&, const PageView&, int, const T*, const T*,
                               const float*, float*, const PartialRows&);

// q in the order in which Elements<T> delivers k.
template <class T>
void PermuteRows(const float* in, int64_t count, float* out) {
  const F32 d;
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    VF a = hn::LoadU(d, in + i), b = hn::LoadU(d, in + i + kLanes);
    if constexpr (Elements<T>::kInterleaved) {
      const VF even = hn::ConcatEven(d, b, a);
      b = hn::ConcatOdd(d, b, a);
      a = even;
    }
    hn::StoreU(a, d, out + i);
    hn::StoreU(b, d, out + i + kLanes);
  }
}

// The inverse, in place.
template <class T>
void RestoreRows(int64_t count, float* data) {
  if constexpr (Elements<T>::kInterleaved) {
    const F32 d;
    HWY_ALIGN float mixed[2 * kLanes];
    for (int64_t i = 0; i < count; i += 2 * kLanes) {
      hn::StoreInterleaved2(hn::LoadU(d, data + i), hn::LoadU(d, data + i + kLanes), d, mixed);
      std::copy(mixed, mixed + 2 * kLanes, data + i);
    }
  }
}

template <class T>
int64_t AttendTyped(const DenseWork& work, DenseScratch* scratch, const PartialRows& out) {
  static constexpr BlockFunction<T> kBlocks[kMaxBlockRows] = {AttendBlock<1, T>, AttendBlock<2, T>,
                                                              AttendBlock<3, T>, AttendBlock<4, T>,
                                                              AttendBlock<5, T>, AttendBlock<6, T>};
  const int32_t rows = work.rows, head_dim = work.head_dim;
  const int64_t size = int64_t{rows} * head_dim;
  float* q = scratch->Get(size + kMaxBlockRows * kPageTokens);
  float* scores = q + size;
  PermuteRows<T>(work.q, size, q);
  std::fill(out.max, out.max + rows, -std::numeric_limits<float>::infinity());
  std::fill(out.sum, out.sum + rows, 0.0f);
  if (out.moment != nullptr) std::fill(out.moment, out.moment + rows, 0.0f);
  std::fill(out.acc, out.acc + size, 0.0f);

  int64_t bytes = 0;
  const int blocks = (rows + kMaxBlockRows - 1) / kMaxBlockRows;
  const int64_t first = work.begin / kPageTokens;
  for (int64_t index = first; index * kPageTokens < work.end; ++index) {
    PageView page;
    page.position = index * kPageTokens;
    page.t0 = static_cast<int>(std::max<int64_t>(work.begin - page.position, 0));
    page.t1 = static_cast<int>(std::min<int64_t>(work.end - page.position, kPageTokens));
    const std::byte* base = work.pool + PageOffset(work.pages[index]);
    const T* k = reinterpret_cast<const T*>(base + work.key_offset);
    if (page.position + kPageTokens < work.end) {
      page.next_keys = work.pool + PageOffset(work.pages[index + 1]) + work.key_offset;
    }
    const T* v = reinterpret_cast<const T*>(base + work.value_offset);
    bytes += int64_t{page.t1 - page.t0} * head_dim * static_cast<int64_t>(sizeof(T));
    for (int block = 0, row = 0; block < blocks; ++block) {
      const int count = rows / blocks + (block < rows % blocks ? 1 : 0);
      kBlocks[count - 1](work, page, row, k, v, q + int64_t{row} * head_dim, scores, out);
      row += count;
    }
  }
  RestoreRows<T>(size, out.acc);
  return bytes;
}

}  // namespace

int64_t AttendDenseImpl(const DenseWork& work, DenseScratch* scratch, const PartialRows& out) {
  switch (work.type) {
    case DType::kF32:
      return AttendTyped<float>(work, scratch, out);
    case DType::kF16:
      return AttendTyped<Fp16>(work, scratch, out);
    case DType::kBf16:
      return AttendTyped<Bf16>(work, scratch, out);
    case DType::kF8E4m3:
      return AttendTyped<Fp8E4m3>(work, scratch, out);
  }
  return 0;
}

const char* TargetNameImpl() { return hwy::TargetName(HWY_TARGET); }

}  // namespace HWY_NAMESPACE
}  // namespace adaattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn {

HWY_EXPORT(AttendDenseImpl);
HWY_EXPORT(TargetNameImpl);

int64_t AttendDense(const DenseWork& work, DenseScratch* scratch, const PartialRows& out) {
  DenseWork scaled = work;
  if (work.type == DType::kF8E4m3) scaled.score_scale *= 256.0f;
  return HWY_DYNAMIC_DISPATCH(AttendDenseImpl)(scaled, scratch, out);
}

const char* CpuKernelTarget() { return HWY_DYNAMIC_DISPATCH(TargetNameImpl)(); }

}  // namespace adaattn
#endif  // HWY_ONCE

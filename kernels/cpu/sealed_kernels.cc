#include "kernels/cpu/sealed_kernels.h"

#include <algorithm>
#include <limits>

#include "kernels/cpu/simd_targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/sealed_kernels.cc"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "kernels/cpu/pair_dot-inl.h"
#include "kernels/cpu/simd-inl.h"
#include "kernels/cpu/softmax-inl.h"
#include "kernels/format/nested_code.h"

HWY_BEFORE_NAMESPACE();
namespace adaattn {
namespace HWY_NAMESPACE {
namespace {

constexpr float kMaxWeight = 32767.0f;

// RangeFromScale of kLanes scale bytes.
HWY_INLINE VF LoadRanges(const uint8_t* at) {
  const I32 d;
  const VI scale = hn::PromoteTo(d, hn::LoadU(hn::Rebind<uint8_t, I32>(), at));
  const VI exponent =
      hn::ShiftLeft<23>(hn::Add(hn::ShiftRight<2>(scale), hn::Set(d, 127 - kRangeOffset / 4)));
  const VI quarter = hn::And(scale, hn::Set(d, 3));
  const auto mantissa = [&](int q) HWY_ATTR {
    return hn::IfThenElseZero(hn::Eq(quarter, hn::Set(d, q)),
                              hn::Set(d, static_cast<int32_t>(internal::QuarterOctaveMantissa(q))));
  };
  const VI bits = hn::Or(hn::Or(exponent, mantissa(1)), hn::Or(mantissa(2), mantissa(3)));
  return hn::BitCast(F32(), bits);
}

// What weights are worth, and their sum over a range.
struct QuantizedRow {
  float step = 0;
  int32_t sum = 0;
};

// Rounds `count` products to 16 bits relative to the largest magnitude.
HWY_INLINE QuantizedRow QuantizeWeights(const float* HWY_RESTRICT products, float max_abs,
                                        int32_t count, int16_t* HWY_RESTRICT weights) {
  const F32 d;
  const I32 di;
  const hn::Rebind<int16_t, F32> narrow;
  // A range that underflows the inverse carries no weight worth having.
  const bool empty = !(max_abs > 1e-30f);
  const VF inverse = hn::Set(d, empty ? 0.0f : kMaxWeight / max_abs);
  VI sum = hn::Zero(di);
  for (int32_t c = 0; c < count; c += kLanes) {
    const VI rounded = hn::NearestInt(hn::Mul(hn::LoadU(d, products + c), inverse));
    hn::StoreU(hn::DemoteTo(narrow, rounded), narrow, weights + c);
    sum = hn::Add(sum, rounded);
  }
  return {empty ? 0.0f : max_abs * (1.0f / kMaxWeight), hn::GetLane(hn::SumOfLanes(di, sum))};
}

// Weights q_c r_c of all rows in channels [begin, end).
void PrepareKeyWeights(const SealedPage& page, const RotatedRows& rows, int32_t begin, int32_t end,
                       SealedScratch* scratch, const RowEnergy* energy) {
  const F32 d;
  const int32_t head_dim = rows.head_dim;
  const uint8_t* const scales = page.key_scales();
  HWY_ALIGN float ranges[256];
  HWY_ALIGN float products[256];
  const int32_t needed = energy == nullptr ? end : head_dim;
  for (int32_t c = begin; c < needed; c += kLanes) {
    hn::Store(LoadRanges(scales + c), d, ranges + c);
  }
  for (int32_t row = 0; row < rows.rows; ++row) {
    const float* q = rows.q + int64_t{row} * head_dim;
    int16_t* weights = scratch->weights() + int64_t{row} * kKeyWeightStride;
    VF max = hn::Zero(d), read = hn::Zero(d), unread = hn::Zero(d);
    for (int32_t c = begin; c < end; c += kLanes) {
      const VF product = hn::Mul(hn::LoadU(d, q + c), hn::Load(d, ranges + c));
      hn::Store(product, d, products + c);
      max = hn::Max(max, hn::Abs(product));
      read = hn::MulAdd(product, product, read);
    }
    for (int32_t c = end; c < needed; c += kLanes) {
      const VF product = hn::Mul(hn::LoadU(d, q + c), hn::Load(d, ranges + c));
      unread = hn::MulAdd(product, product, unread);
    }
    const QuantizedRow quantized =
        QuantizeWeights(products + begin, HorizontalMax(max), end - begin, weights + begin);
    scratch->steps()[row] = quantized.step;
    scratch->sums()[row] = quantized.sum;
    if (energy == nullptr) continue;
    energy->read[row] = HorizontalSum(read);
    energy->total[row] = energy->read[row] + (end < head_dim ? HorizontalSum(unread) : 0.0f);
  }
}

// What a block of rows multiplies: weights and what they are worth.
struct WeightBlock {
  const int16_t* weights = nullptr;  // of the block's first row
  const float* steps = nullptr;
  const int32_t* sums = nullptr;
};

// `next` as ScanKeys says: two of its lines for two of the page's, read in the same order.
template <int kRows>
void ScanBlock(const SealedPage& page, const std::byte* next, const WeightBlock& block,
               int32_t tile_begin, int32_t tile_end, float* HWY_RESTRICT raw) {
  const F32 d;
  const int64_t* const tiles = page.at->key_tiles;
  for (int t = 0; t < kPageTokens; t += kLanes) {
    VI acc[kRows];
    for (int m = 0; m < kRows; ++m) acc[m] = hn::Zero(I32());
    for (int32_t tile = tile_begin; tile < tile_end; ++tile) {
      const std::byte* words = page.base + tiles[tile] + 4 * t;
      const int16_t* weights = block.weights + tile * kTileChannels;
      hwy::Prefetch(next + tiles[tile] + 8 * t);
      // Four pairs at a time: with six sums they still fit the registers.
      VI16 codes[4];
      UnpackNibbles(LoadWords(words), codes[0], codes[1], codes[2], codes[3]);
      MultiplyPairs<kRows, 4, kKeyWeightStride>(codes, weights, acc);
      UnpackNibbles(LoadWords(words + 4 * kPageTokens), codes[0], codes[1], codes[2], codes[3]);
      MultiplyPairs<kRows, 4, kKeyWeightStride>(codes, weights + 8, acc);
    }
    for (int m = 0; m < kRows; ++m) {
      float* at = raw + m * kPageTokens + t;
      VF sum = CenteredSum(acc[m], 15, block.sums[m], block.steps[m] / 16);
      if (tile_begin > 0) sum = hn::Add(sum, hn::LoadU(d, at));
      hn::StoreU(sum, d, at);
    }
  }
}

template <int kRows, int kPlanes>
void RefineBlock(const SealedPage& page, const WeightBlock& block, int32_t num_tiles,
                 float* HWY_RESTRICT raw) {
  constexpr int kBits = 2 * kPlanes;
  const F32 d;
  for (int t = 0; t < kPageTokens; t += kLanes) {
    VI acc[kRows];
    for (int m = 0; m < kRows; ++m) acc[m] = hn::Zero(I32());
    for (int32_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t offset = int64_t{tile} * kPlaneTileBytes + 4 * t;
      VU16 planes[kPlanes];
      for (int p = 0; p < kPlanes; ++p)
        planes[p] = LoadWords(page.base + page.at->key_fine[p] + offset);
      VI16 codes[8];
      Unpack<kBits>::Run(planes, codes);
      MultiplyPairs<kRows, 8, kKeyWeightStride>(codes, block.weights + tile * kTileChannels, acc);
    }
    for (int m = 0; m < kRows; ++m) {
      float* at = raw + m * kPageTokens + t;
      const float step = block.steps[m] / static_cast<float>(16 << kBits);
      const VF sum = CenteredSum(acc[m], (1 << kBits) - 1, block.sums[m], step);
      hn::StoreU(hn::Add(sum, hn::LoadU(d, at)), d, at);
    }
  }
}

// acc[m][channels of one tile] += sum_t p r x_b.
template <int kRows, int kBits>
void ValueTile(const SealedPage& page, const WeightBlock& block, int32_t tile, int32_t head_dim,
               float* HWY_RESTRICT out) {
  constexpr int kPlanes = kBits / 2;
  const F32 d;
  for (int c = 0; c < kTileChannels; c += kLanes) {
    VI acc[kRows];
    for (int m = 0; m < kRows; ++m) acc[m] = hn::Zero(I32());
    for (int tokens = 0; tokens < kPageTokens; tokens += 16) {
      const int64_t offset = int64_t{tile} * kPlaneTileBytes + 4 * (tokens + c);
      VU16 planes[kPlanes];
      for (int p = 0; p < kPlanes; ++p)
        planes[p] = LoadWords(page.base + page.at->value_plane[p] + offset);
      VI16 codes[8];
      Unpack<kBits>::Run(planes, codes);
      MultiplyPairs<kRows, 8, kPageTokens>(codes, block.weights + tokens, acc);
    }
    for (int m = 0; m < kRows; ++m) {
      float* at = out + int64_t{m} * head_dim + tile * kTileChannels + c;
      const float step = block.steps[m] / static_cast<float>(1 << kBits);
      const VF sum = CenteredSum(acc[m], (1 << kBits) - 1, block.sums[m], step);
      hn::StoreU(hn::Add(sum, hn::LoadU(d, at)), d, at);
    }
  }
}

WeightBlock KeyBlock(SealedScratch* scratch, int32_t row) {
  return {scratch->weights() + int64_t{row} * kKeyWeightStride, scratch->steps() + row,
          scratch->sums() + row};
}

// p r of one group of channels, as 16-bit weights [rows, 64].
void PrepareValueWeights(const SealedPage& page, int32_t rows, int32_t groups, int32_t group,
                         SealedScratch* scratch) {
  const F32 d;
  HWY_ALIGN float ranges[kPageTokens];
  HWY_ALIGN float products[kPageTokens];
  HWY_ALIGN uint8_t scales[kPageTokens];
  const uint8_t* const from = page.value_scales();
  for (int t = 0; t < kPageTokens; ++t) scales[t] = from[t * groups + group];
  for (int t = 0; t < kPageTokens; t += kLanes) hn::Store(LoadRanges(scales + t), d, ranges + t);
  for (int32_t row = 0; row < rows; ++row) {
    const float* p = scratch->p() + int64_t{row} * kPageTokens;
    int16_t* weights = scratch->weights() + int64_t{row} * kPageTokens;
    VF max = hn::Zero(d);
    for (int t = 0; t < kPageTokens; t += kLanes) {
      const VF product = hn::Mul(hn::LoadU(d, p + t), hn::Load(d, ranges + t));
      hn::Store(product, d, products + t);
      max = hn::Max(max, product);
    }
    const QuantizedRow quantized =
        QuantizeWeights(products, HorizontalMax(max), kPageTokens, weights);
    scratch->steps()[row] = quantized.step;
    scratch->sums()[row] = quantized.sum;
  }
}

template <int kBits>
void AccumulateSealedValues(const SealedPage& page, int32_t rows, int32_t head_dim,
                            SealedScratch* scratch, float* acc) {
  const int32_t groups = ValueGroups(head_dim);
  const int32_t tiles = head_dim / groups / kTileChannels;
  for (int32_t group = 0; group < groups; ++group) {
    PrepareValueWeights(page, rows, groups, group, scratch);
    ForRowBlocks(rows, [&](auto count, int32_t row) HWY_ATTR {
      const WeightBlock block = {scratch->weights() + int64_t{row} * kPageTokens,
                                 scratch->steps() + row, scratch->sums() + row};
      for (int32_t tile = group * tiles; tile < (group + 1) * tiles; ++tile) {
        ValueTile<decltype(count)::value, kBits>(page, block, tile, head_dim,
                                                 acc + int64_t{row} * head_dim);
      }
    });
  }
}

}  // namespace

void ScanKeysImpl(const SealedPage& page, const SealedPage& next, const RotatedRows& rows,
                  int32_t chunk_begin, int32_t chunk_end, SealedScratch* scratch, float* raw,
                  const RowEnergy& energy) {
  const int32_t head_dim = rows.head_dim;
  const int32_t begin = ChunkedRank(head_dim, chunk_begin), end = ChunkedRank(head_dim, chunk_end);
  PrefetchRange(next.key_scales(), head_dim);
  PrefetchRange(next.base + next.at->value_summary,
                static_cast<int64_t>(sizeof(ValueSummary)) + head_dim);
  PrepareKeyWeights(page, rows, begin, end, scratch, begin == 0 ? &energy : nullptr);
  ForRowBlocks(rows.rows, [&](auto count, int32_t row) HWY_ATTR {
    ScanBlock<decltype(count)::value>(page, row == 0 ? next.base : page.base,
                                      KeyBlock(scratch, row), begin / kTileChannels,
                                      end / kTileChannels, raw + int64_t{row} * kPageTokens);
  });
}

void RefineKeysImpl(const SealedPage& page, const RotatedRows& rows, int32_t bits, int32_t chunks,
                    SealedScratch* scratch, float* raw) {
  const int32_t rank = ChunkedRank(rows.head_dim, chunks), tiles = rank / kTileChannels;
  PrepareKeyWeights(page, rows, 0, rank, scratch, nullptr);
  ForRowBlocks(rows.rows, [&](auto count, int32_t row) HWY_ATTR {
    const WeightBlock block = KeyBlock(scratch, row);
    float* at = raw + int64_t{row} * kPageTokens;
    if (bits == 6) {
      RefineBlock<decltype(count)::value, 1>(page, block, tiles, at);
    } else {
      RefineBlock<decltype(count)::value, 2>(page, block, tiles, at);
    }
  });
}

void AttendSealedPageImpl(const SealedPage& page, const RotatedRows& rows,
                          const ScoreParams& params, const KeyRange* visible, const float* raw,
                          int32_t bits, SealedScratch* scratch, const PartialRows& state) {
  const int32_t head_dim = rows.head_dim;
  for (int32_t row = 0; row < rows.rows; ++row) {
    float* p = scratch->p() + int64_t{row} * kPageTokens;
    std::copy_n(raw + int64_t{row} * kPageTokens, kPageTokens, p);
    if (visible != nullptr) {
      MaskOutside(static_cast<int>(visible[row].begin), static_cast<int>(visible[row].end), p);
    }
    const ScoreMap map{params.softmax_scale, params.softmax_scale * rows.mean[row], params.softcap};
    const float alpha = OnlineSoftmax(map, p, &state.max[row], &state.sum[row], nullptr);
    if (alpha == 1.0f) continue;
    float* acc = state.acc + int64_t{row} * head_dim;
    for (int32_t c = 0; c < head_dim; ++c) acc[c] *= alpha;
  }
  switch (bits) {
    case 2:
      return AccumulateSealedValues<2>(page, rows.rows, head_dim, scratch, state.acc);
    case 4:
      return AccumulateSealedValues<4>(page, rows.rows, head_dim, scratch, state.acc);
    case 6:
      return AccumulateSealedValues<6>(page, rows.rows, head_dim, scratch, state.acc);
    default:
      return AccumulateSealedValues<8>(page, rows.rows, head_dim, scratch, state.acc);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace adaattn
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace adaattn {

HWY_EXPORT(ScanKeysImpl);
HWY_EXPORT(RefineKeysImpl);
HWY_EXPORT(AttendSealedPageImpl);

SealedSections FindSections(const PageLayout& layout, int32_t head_dim, int32_t kv_head) {
  const auto at = [&](const PageLayout::Section& section) {
    return section.offset + kv_head * section.bytes;
  };
  SealedSections sections;
  sections.key_scales = at(layout.key_scales);
  const int32_t chunk_tiles = ChunkChannels(head_dim) / kTileChannels;
  for (int32_t tile = 0; tile < head_dim / kTileChannels; ++tile) {
    sections.key_tiles[tile] =
        at(layout.key_base[tile / chunk_tiles]) + tile % chunk_tiles * int64_t{kKeyTileBytes};
  }
  for (int32_t p = 0; p < 2; ++p) sections.key_fine[p] = at(layout.key_fine[p]);
  sections.value_summary = at(layout.value_summary);
  sections.value_scales = at(layout.value_scales);
  for (int32_t p = 0; p < 4; ++p) sections.value_plane[p] = at(layout.value_plane[p]);
  return sections;
}

void PrefetchAttended(const SealedPage& page, int32_t head_dim, int32_t key_bits,
                      int32_t value_bits) {
  constexpr int32_t kLineBytes = 64;
  const int64_t plane = int64_t{head_dim} / kTileChannels * kPlaneTileBytes;
  const auto ask = [&](int64_t section, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += kLineBytes) hwy::Prefetch(page.base + section + i);
  };
  for (int32_t p = 0; p < (key_bits - 4) / 2; ++p) ask(page.at->key_fine[p], plane);
  ask(page.at->value_scales, int64_t{kPageTokens} * ValueGroups(head_dim));
  for (int32_t p = 0; p < value_bits / 2; ++p) ask(page.at->value_plane[p], plane);
}

void SealedScratch::Reserve(int32_t rows) {
  if (rows <= rows_) return;
  weights_ = hwy::AllocateAligned<int16_t>(static_cast<size_t>(rows) * kKeyWeightStride);
  p_ = hwy::AllocateAligned<float>(static_cast<size_t>(rows) * kPageTokens);
  floats_.resize(static_cast<size_t>(rows));
  sums_.resize(static_cast<size_t>(rows));
  rows_ = rows;
}

void ScanKeys(const SealedPage& page, const SealedPage& next, const RotatedRows& rows,
              int32_t chunk_begin, int32_t chunk_end, SealedScratch* scratch, float* raw,
              const RowEnergy& energy) {
  scratch->Reserve(rows.rows);
  HWY_DYNAMIC_DISPATCH(ScanKeysImpl)
  (page, next, rows, chunk_begin, chunk_end, scratch, raw, energy);
}

void RefineKeys(const SealedPage& page, const RotatedRows& rows, int32_t bits, int32_t chunks,
                SealedScratch* scratch, float* raw) {
  scratch->Reserve(rows.rows);
  HWY_DYNAMIC_DISPATCH(RefineKeysImpl)(page, rows, bits, chunks, scratch, raw);
}

void AttendSealedPage(const SealedPage& page, const RotatedRows& rows, const ScoreParams& params,
                      const KeyRange* visible, const float* raw, int32_t bits,
                      SealedScratch* scratch, const PartialRows& state) {
  scratch->Reserve(rows.rows);
  HWY_DYNAMIC_DISPATCH(AttendSealedPageImpl)
  (page, rows, params, visible, raw, bits, scratch, state);
}

}  // namespace adaattn
#endif  // HWY_ONCE

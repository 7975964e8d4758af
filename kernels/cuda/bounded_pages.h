#ifndef ADAATTN_KERNELS_CUDA_BOUNDED_PAGES_H_
#define ADAATTN_KERNELS_CUDA_BOUNDED_PAGES_H_

// Pages as a bounded step reads them: one CTA a page, whole tiles in shared memory.
//
// Written against a Team, the threads that work on a head, and compiled for the host, too, where a
// team is one thread: so tests run the very algorithm without a device.
//   cta, num_ctas; thread, num_threads (of a CTA); warp, num_warps (of a CTA); lane, kLanes
//   SyncCta(), Sync()       all threads of the CTA, of the team; writes before are seen after
//   SyncWarp()
//   Sum(x), Max(x)          over the lanes of a warp
//   Add(counter, x)

#include "kernels/cuda/bounded.h"
#include "kernels/format/planes.h"
#include "kernels/policy/ladder.h"

namespace adaattn {

// A CTA's shared memory, before its tile of [64] rows of head_dim + 1 floats.
struct BoundedShared {
  float weights[kBoundedMaxColumns][kPageTokens];  // of a page's tokens, by column
  float ranges[256];
  PageLayout layout;
  BoundedWorkspace workspace;
  BoundedSequence sequence;
  ADAATTN_HD float* tile() { return reinterpret_cast<float*>(this + 1); }
};
ADAATTN_HD constexpr int64_t BoundedSharedBytes(int32_t head_dim) {
  return static_cast<int64_t>(sizeof(BoundedShared)) + int64_t{kPageTokens} * (head_dim + 1) * 4;
}

// The pages of a sequence that some row sees: sealed ones, then dense ones.
struct BoundedRange {
  int32_t first_sealed = 0;
  int32_t num_sealed = 0;
  int32_t dense_begin = 0;  // tokens
  int32_t dense_end = 0;
  int32_t num_pages = 0;

  ADAATTN_HD int32_t first_dense() const { return dense_begin / kPageTokens; }
};

// Keys that a row sees.
struct RowRange {
  int32_t begin = 0;
  int32_t end = 0;
};
ADAATTN_HD RowRange RowKeys(const BoundedSequence& s, int32_t row) {
  const int32_t position = s.q_start + row;
  RowRange range;
  range.end = position + 1 < s.kv_len ? position + 1 : s.kv_len;
  range.begin = s.window > 0 && position + 1 > s.window ? position + 1 - s.window : 0;
  if (range.begin > range.end) range.begin = range.end;
  return range;
}

ADAATTN_HD BoundedRange SeenPages(const BoundedSequence& s) {
  int32_t begin = s.kv_len, end = 0;
  for (int32_t row = 0; row < s.q_len; ++row) {
    const RowRange keys = RowKeys(s, row);
    if (keys.begin >= keys.end) continue;
    begin = keys.begin < begin ? keys.begin : begin;
    end = keys.end > end ? keys.end : end;
  }
  BoundedRange range;
  const int32_t sealed = s.num_sealed * kPageTokens, sealed_end = end < sealed ? end : sealed;
  if (begin < sealed_end) {
    range.first_sealed = begin / kPageTokens;
    range.num_sealed = (sealed_end - 1) / kPageTokens + 1 - range.first_sealed;
  }
  range.dense_begin = begin > sealed ? begin : sealed;
  range.dense_end = end > range.dense_begin ? end : range.dense_begin;
  range.num_pages = range.num_sealed;
  if (range.dense_end > range.dense_begin) {
    range.num_pages += (range.dense_end - 1) / kPageTokens + 1 - range.first_dense();
  }
  return range;
}

// A score as the softmax takes it; -inf stays: the row does not see the token.
ADAATTN_HD double CapScore(float raw, float softcap) {
  const double s = raw;
  return softcap > 0 && s > -HUGE_VAL ? softcap * tanh(s / softcap) : s;
}

// exp(a - b); 0 where a is -inf.
ADAATTN_HD double MassRatio(double a, double b) { return a > -HUGE_VAL ? exp(a - b) : 0; }

// Channel `channel` of the block Hadamard transform (format/hadamard.h) of `vector`, by definition.
ADAATTN_HD double HadamardChannel(const double* vector, int32_t head_dim, int32_t channel) {
  const bool whole = (head_dim & (head_dim - 1)) == 0;
  const int32_t first = whole ? head_dim : 64;
  const int32_t begin = channel < first ? 0 : first, size = begin == 0 ? first : head_dim - first;
  double sum = 0;
  for (int32_t i = 0; i < size; ++i) {
    auto bits = static_cast<uint32_t>(i & (channel - begin));
    bits ^= bits >> 8;
    bits ^= bits >> 4;
    bits ^= bits >> 2;
    bits ^= bits >> 1;
    sum += (bits & 1u) != 0 ? -vector[begin + i] : vector[begin + i];
  }
  return sum / sqrt(static_cast<double>(size));
}

// One sealed page's part of one kv head.
struct SealedPart {
  const std::byte* page;
  const PageLayout* layout;
  int32_t head, head_dim;

  ADAATTN_HD const std::byte* At(const PageLayout::Section& section) const {
    return page + section.offset + head * section.bytes;
  }
  ADAATTN_HD uint8_t key_scale(int32_t channel) const {
    return static_cast<uint8_t>(At(layout->key_scales)[channel]);
  }
  ADAATTN_HD uint8_t value_scale(int32_t token, int32_t group) const {
    return static_cast<uint8_t>(At(layout->value_scales)[token * ValueGroups(head_dim) + group]);
  }
  ADAATTN_HD ValueSummary summary() const {
    ValueSummary summary;
    memcpy(&summary, At(layout->value_summary), sizeof(summary));
    return summary;
  }
  ADAATTN_HD double Mean(float mean_scale, int32_t channel) const {
    const auto* mean =
        reinterpret_cast<const int8_t*>(At(layout->value_summary) + sizeof(ValueSummary));
    return static_cast<double>(mean_scale) * mean[channel];
  }
  ADAATTN_HD static uint32_t Field(const std::byte* tile, BitPosition at, uint32_t mask) {
    return static_cast<uint32_t>(tile[at.byte]) >> at.shift & mask;
  }
  // One channel of the keys' first four bits, and of the bits after them, as many as are stored.
  struct KeyNibbles {
    const std::byte* tile;
    int32_t channel;  // in the tile
    ADAATTN_HD uint32_t operator()(int32_t token) const {
      return Field(tile, KeyNibblePosition(TileOrder::kMma, token, channel), 15u);
    }
  };
  ADAATTN_HD KeyNibbles NibblesOf(int32_t channel) const {
    const int32_t chunk = channel / ChunkChannels(head_dim);
    return {At(layout->key_base[chunk]) +
                channel % ChunkChannels(head_dim) / kTileChannels * kKeyTileBytes,
            channel % kTileChannels};
  }
  struct KeyFines {
    const std::byte *first, *second;
    int32_t num_planes, channel;
    ADAATTN_HD uint32_t operator()(int32_t token) const {
      const BitPosition at = KeyFinePosition(TileOrder::kMma, token, channel);
      const uint32_t high = Field(first, at, 3u), low = Field(second, at, 3u);
      return num_planes > 1 ? high << 2 | low : high;
    }
  };
  ADAATTN_HD KeyFines FinesOf(int32_t channel) const {
    const int32_t num_planes = (layout->stored_bits - kScanBits) / 2;
    const int32_t tile = channel / kTileChannels * kPlaneTileBytes;
    return {At(layout->key_fine[0]) + tile, At(layout->key_fine[num_planes - 1]) + tile, num_planes,
            channel % kTileChannels};
  }
  // One channel of the values' first `num_planes` planes.
  struct ValueCodes {
    const std::byte* first;
    int32_t to_next;  // bytes from plane to plane
    int32_t num_planes, channel;
    ADAATTN_HD uint32_t operator()(int32_t token) const {
      const BitPosition at = ValuePlanePosition(TileOrder::kMma, token, channel);
      uint32_t code = 0;
      ADAATTN_UNROLL
      for (int32_t plane = 0; plane < 4; ++plane) {  // without a branch: the last one again
        const int32_t held = plane < num_planes ? plane : num_planes - 1;
        const uint32_t field = Field(first + held * to_next, at, 3u);
        code = plane < num_planes ? code << 2 | field : code;
      }
      return code;
    }
  };
  ADAATTN_HD ValueCodes ValuesOf(int32_t channel, int32_t num_planes) const {
    const PageLayout::Section* planes = layout->value_plane;
    const int64_t to_next = num_planes > 1 ? planes[1].offset - planes[0].offset : 0;
    return {At(planes[0]) + channel / kTileChannels * kPlaneTileBytes,
            static_cast<int32_t>(to_next), num_planes, channel % kTileChannels};
  }
  // A value at `bits`.
  ADAATTN_HD float Value(int32_t token, int32_t channel, int32_t bits) const {
    const int32_t width = head_dim / ValueGroups(head_dim);
    return DecodeNested(ValuesOf(channel, bits / 2)(token), bits,
                        RangeFromScale(value_scale(token, channel / width)));
  }
};

// tile[token][channel] of all tokens of a page by the CTA; channel_of(channel) gives a function of
// the token. Several elements are on their way at a time, without a branch: each is some reads that
// wait for memory.
template <class Team, class ChannelOf>
ADAATTN_HD void FillTile(const Team& team, int32_t head_dim, float* tile,
                         const ChannelOf& channel_of) {
  constexpr int32_t kAtOnce = 8;
  const int32_t step = team.num_threads;
  team.SyncCta();
  if (step % head_dim == 0) {  // a thread keeps to its channel
    const int32_t channel = team.thread % head_dim, apart = step / head_dim;
    const auto element = channel_of(channel);
    for (int32_t first = team.thread / head_dim; first < kPageTokens; first += kAtOnce * apart) {
      float x[kAtOnce];
      const auto token = [&](int32_t i) {  // beyond the last one, that once more
        return first + i * apart < kPageTokens ? first + i * apart : kPageTokens - 1;
      };
      ADAATTN_UNROLL
      for (int32_t i = 0; i < kAtOnce; ++i) x[i] = element(token(i));
      ADAATTN_UNROLL
      for (int32_t i = 0; i < kAtOnce; ++i) {
        if (first + i * apart < kPageTokens) tile[token(i) * (head_dim + 1) + channel] = x[i];
      }
    }
  } else {
    for (int32_t i = team.thread; i < kPageTokens * head_dim; i += step) {
      const int32_t token = i / head_dim, channel = i % head_dim;
      tile[token * (head_dim + 1) + channel] = channel_of(channel)(token);
    }
  }
  team.SyncCta();
}

// The same of tokens [begin, end) of a dense page's keys or values [64, head_dim], 0 elsewhere.
template <class Team>
ADAATTN_HD void FillTokens(const Team& team, int32_t head_dim, float* tile, const std::byte* data,
                           DType type, RowRange tokens) {
  const auto fill = [&](const auto& read) {
    FillTile(team, head_dim, tile, [&](int32_t channel) {
      return [&, channel](int32_t token) {
        const float x = read(token * head_dim + channel);  // a page has room for all of them
        return token >= tokens.begin && token < tokens.end ? x : 0.0f;
      };
    });
  };
  switch (type) {  // once, not for every element
    case DType::kF16:
      fill([data](int32_t i) { return ReadElement(data, DType::kF16, i); });
      return;
    case DType::kBf16:
      fill([data](int32_t i) { return ReadElement(data, DType::kBf16, i); });
      return;
    default:
      fill([data, type](int32_t i) { return ReadElement(data, type, i); });
  }
}

// The largest L2 norm among tokens [begin, end) of the tile, by every warp.
template <class Team>
ADAATTN_HD double LargestNorm(const Team& team, int32_t head_dim, const float* tile, int32_t begin,
                              int32_t end) {
  double most = 0;
  for (int32_t token = begin + team.lane; token < end; token += Team::kLanes) {
    const float* row = tile + token * (head_dim + 1);
    double sums[4] = {};  // shorter chains
    for (int32_t c = 0; c < head_dim; c += 4) {
      ADAATTN_UNROLL
      for (int32_t i = 0; i < 4; ++i) {
        const double x = row[c + i];
        sums[i] += x * x;
      }
    }
    const double squares = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    most = squares > most ? squares : most;
  }
  return sqrt(team.Max(most));
}

// Sums that share a score's products.
inline constexpr int32_t kDotSums = 4;

// q.k of a column and a token of the tile, products summed in FP32. `query`: 16-byte aligned.
ADAATTN_HD float TileDot(const float* query, const float* tile, int32_t head_dim, int32_t token) {
  const float* row = tile + token * (head_dim + 1);
  float sums[kDotSums] = {};
  for (int32_t c = 0; c < head_dim; c += kDotSums) {
    float q[kDotSums];
    memcpy(q, __builtin_assume_aligned(query + c, 16), sizeof(q));
    ADAATTN_UNROLL
    for (int32_t i = 0; i < kDotSums; ++i) sums[i] = fmaf(q[i], row[c + i], sums[i]);
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// sums[column][channel] += sum over tokens weights[column][token] tile[token][channel], a page at a
// time in FP32; each element has one thread.
template <class Team>
ADAATTN_HD void AddWeightedValues(const Team& team, int32_t head_dim, int32_t columns,
                                  const float (*weights)[kPageTokens], const float* tile,
                                  double factor, double* sums) {
  for (int32_t i = team.thread; i < columns * head_dim; i += team.num_threads) {
    const int32_t column = i / head_dim, channel = i % head_dim;
    float sum = 0;
    for (int32_t token = 0; token < kPageTokens; ++token) {
      sum = fmaf(weights[column][token], tile[token * (head_dim + 1) + channel], sum);
    }
    sums[i] += factor * sum;
  }
}

// What a page's scores amount to for one row.
struct ScoreSums {
  double max = -HUGE_VAL;
  double sum = 0;      // of exp(s - max)
  double squares = 0;  // of its squares

  ADAATTN_HD double lse() const { return sum > 0 ? max + log(sum) : -HUGE_VAL; }
};

// By a warp; `raw` [64].
template <class Team>
ADAATTN_HD ScoreSums SumScores(const Team& team, const float* raw, float softcap) {
  ScoreSums sums;
  for (int32_t token = team.lane; token < kPageTokens; token += Team::kLanes) {
    const double s = CapScore(raw[token], softcap);
    sums.max = s > sums.max ? s : sums.max;
  }
  sums.max = team.Max(sums.max);
  if (sums.max == -HUGE_VAL) return sums;
  for (int32_t token = team.lane; token < kPageTokens; token += Team::kLanes) {
    const double p = exp(CapScore(raw[token], softcap) - sums.max);
    sums.sum += p;
    sums.squares += p * p;
  }
  sums.sum = team.Sum(sums.sum);
  sums.squares = team.Sum(sums.squares);
  return sums;
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_BOUNDED_PAGES_H_

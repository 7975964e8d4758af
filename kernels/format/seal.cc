#include "kernels/format/seal.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/format/hadamard.h"
#include "kernels/format/nested_code.h"

namespace adaattn {
namespace {

constexpr size_t kPage = kPageTokens;

std::byte* At(const SealedHead& head, const PageLayout::Section& section, std::byte* page) {
  return page + section.offset + head.kv_head * section.bytes;
}
const std::byte* At(const SealedHead& head, const PageLayout::Section& section,
                    const std::byte* page) {
  return page + section.offset + head.kv_head * section.bytes;
}
void Clear(const SealedHead& head, const PageLayout::Section& section, std::byte* page) {
  std::memset(At(head, section, page), 0, static_cast<size_t>(section.bytes));
}
void PutBits(std::byte* tile, BitPosition at, uint32_t value) {
  tile[at.byte] |= static_cast<std::byte>(value << at.shift);
}
uint32_t GetBits(const std::byte* tile, BitPosition at, uint32_t mask) {
  return (static_cast<uint32_t>(tile[at.byte]) >> at.shift) & mask;
}

// The nibble tile of `channel`, and the first channel of its rank chunk's section.
struct NibbleTile {
  int32_t chunk = 0;
  int64_t offset = 0;  // of the tile, from the start of the head's part of the section
};
NibbleTile NibbleTileOf(int32_t head_dim, int32_t channel) {
  const int32_t chunk = channel / ChunkChannels(head_dim);
  const int32_t tile = (channel - ChunkedRank(head_dim, chunk)) / kTileChannels;
  return NibbleTile{chunk, int64_t{tile} * kKeyTileBytes};
}
int64_t PlaneTileOffset(int32_t channel) {
  return int64_t{channel / kTileChannels} * kPlaneTileBytes;
}

void PutKeyCode(const SealedHead& head, int32_t token, int32_t channel, uint32_t code,
                std::byte* page) {
  const NibbleTile tile = NibbleTileOf(head.head_dim, channel);
  const int32_t c = channel % kTileChannels;
  PutBits(At(head, head.layout.key_base[tile.chunk], page) + tile.offset,
          KeyNibblePosition(head.order, token, c), code >> 4);
  for (int32_t p = 0; p < (head.layout.stored_bits - 4) / 2; ++p) {
    PutBits(At(head, head.layout.key_fine[p], page) + PlaneTileOffset(channel),
            KeyFinePosition(head.order, token, c), (code >> (2 - 2 * p)) & 3u);
  }
}

void SealKeys(const SealedHead& head, const std::vector<float>& rotated, std::byte* page) {
  const int32_t d = head.head_dim;
  for (int32_t c = 0; c < head.layout.num_chunks; ++c) Clear(head, head.layout.key_base[c], page);
  for (int32_t p = 0; p < (head.layout.stored_bits - 4) / 2; ++p) {
    Clear(head, head.layout.key_fine[p], page);
  }
  std::byte* const scales = At(head, head.layout.key_scales, page);
  for (int32_t channel = 0; channel < d; ++channel) {
    const float* const column = rotated.data() + channel;  // of tokens d apart
    float max_abs = 0.0f;
    for (int64_t t = 0; t < kPageTokens; ++t) max_abs = std::max(max_abs, std::abs(column[t * d]));
    const uint8_t scale = ScaleFromMax(max_abs);
    scales[channel] = static_cast<std::byte>(scale);
    const float range = RangeFromScale(scale);
    for (int32_t t = 0; t < kPageTokens; ++t) {
      PutKeyCode(head, t, channel, EncodeNested(column[int64_t{t} * d], range), page);
    }
  }
}

// Writes summary and mean of `rotated` [64, head_dim]; scale_rms is filled in already.
void SealValueSummary(const SealedHead& head, const std::vector<float>& rotated,
                      const ValueFactors& factors, ValueSummary summary, std::byte* page) {
  const auto d = static_cast<size_t>(head.head_dim);
  std::vector<double> mean(d, 0.0);
  for (size_t i = 0; i < rotated.size(); ++i) mean[i % d] += rotated[i] / double{kPageTokens};
  double max_abs = 0.0;
  for (const double value : mean) max_abs = std::max(max_abs, std::abs(value));
  summary.mean_scale = static_cast<float>(max_abs / 127.0);
  std::byte* const section = At(head, head.layout.value_summary, page);
  std::vector<float> stored(d, 0.0f);
  for (size_t c = 0; c < d; ++c) {
    const double steps = summary.mean_scale > 0.0f ? mean[c] / summary.mean_scale : 0.0;
    const auto rounded = static_cast<int8_t>(std::clamp(std::nearbyint(steps), -127.0, 127.0));
    section[sizeof(ValueSummary) + c] = static_cast<std::byte>(rounded);
    stored[c] = static_cast<float>(rounded) * summary.mean_scale;
  }
  double total = 0.0, largest = 0.0;
  for (size_t t = 0; t < kPage; ++t) {
    double distance2 = 0.0;
    for (size_t c = 0; c < d; ++c) {
      const double off = double{rotated[t * d + c]} - stored[c];
      distance2 += off * off;
    }
    total += distance2;
    largest = std::max(largest, distance2);
  }
  summary.spread = factors.spread * static_cast<float>(std::sqrt(total / double{kPageTokens}));
  summary.radius = static_cast<float>(std::sqrt(largest));
  std::memcpy(section, &summary, sizeof(summary));
}

void SealValues(const SealedHead& head, const ValueFactors& factors, const float* values,
                std::byte* page) {
  const int32_t d = head.head_dim, groups = ValueGroups(d), width = d / groups;
  const int32_t num_planes = head.layout.stored_bits / 2;
  for (int32_t p = 0; p < num_planes; ++p) Clear(head, head.layout.value_plane[p], page);
  std::vector<float> rotated(values, values + kPage * static_cast<size_t>(d));
  std::byte* const scales = At(head, head.layout.value_scales, page);
  double range2 = 0.0;
  for (int32_t t = 0; t < kPageTokens; ++t) {
    float* const token = rotated.data() + int64_t{t} * d;
    RotateHadamard(token, d);
    for (int32_t g = 0; g < groups; ++g) {
      float max_abs = 0.0f;
      for (int32_t c = g * width; c < (g + 1) * width; ++c) {
        max_abs = std::max(max_abs, std::abs(token[c]));
      }
      const uint8_t scale = ScaleFromMax(max_abs);
      scales[t * groups + g] = static_cast<std::byte>(scale);
      const float range = RangeFromScale(scale);
      range2 += double{range} * range;
      for (int32_t c = g * width; c < (g + 1) * width; ++c) {
        const uint32_t code = EncodeNested(token[c], range);
        const BitPosition at = ValuePlanePosition(head.order, t, c % kTileChannels);
        for (int32_t p = 0; p < num_planes; ++p) {
          PutBits(At(head, head.layout.value_plane[p], page) + PlaneTileOffset(c), at,
                  (code >> (6 - 2 * p)) & 3u);
        }
      }
    }
  }
  ValueSummary summary{};
  summary.scale_rms =
      factors.rounding * static_cast<float>(std::sqrt(range2 / (double{kPageTokens} * groups)));
  SealValueSummary(head, rotated, factors, summary, page);
}

}  // namespace

float SealHead(const SealedHead& head, const BasisView& basis, const float* keys,
               const float* values, std::byte* page) {
  const int32_t d = head.head_dim;
  std::vector<float> rotated(kPage * static_cast<size_t>(d));
  for (int32_t t = 0; t < kPageTokens; ++t) {
    RotateKey(basis, d, keys + int64_t{t} * d, rotated.data() + int64_t{t} * d);
  }
  SealKeys(head, rotated, page);
  SealValues(head, *basis.value_factors, values, page);
  return DriftRatio(basis, d, rotated);
}

void DecodeRotatedKeys(const SealedHead& head, const std::byte* page, int32_t bits, int32_t chunks,
                       float* out) {
  const int32_t d = head.head_dim, rank = ChunkedRank(d, chunks);
  const uint8_t* const scales = KeyScales(head, page);
  std::fill_n(out, int64_t{kPageTokens} * d, 0.0f);
  for (int32_t channel = 0; channel < rank; ++channel) {
    const float range = RangeFromScale(scales[channel]);
    const NibbleTile tile = NibbleTileOf(d, channel);
    const std::byte* const nibbles = At(head, head.layout.key_base[tile.chunk], page) + tile.offset;
    const int32_t c = channel % kTileChannels;
    for (int32_t t = 0; t < kPageTokens; ++t) {
      uint32_t prefix = GetBits(nibbles, KeyNibblePosition(head.order, t, c), 15u);
      for (int32_t p = 0; p < (bits - 4) / 2; ++p) {
        const std::byte* const plane =
            At(head, head.layout.key_fine[p], page) + PlaneTileOffset(channel);
        prefix = prefix << 2 | GetBits(plane, KeyFinePosition(head.order, t, c), 3u);
      }
      out[int64_t{t} * d + channel] = DecodeNested(prefix, bits, range);
    }
  }
}

namespace {
// Decodes one token's value, [head_dim], at `bits` >= 2.
void DecodeValueToken(const SealedHead& head, const std::byte* page, int32_t token, int32_t bits,
                      float* out) {
  const int32_t d = head.head_dim, groups = ValueGroups(d), width = d / groups;
  const uint8_t* const scales = ValueScales(head, page) + token * groups;
  const std::byte* planes[4];
  for (int32_t p = 0; p < bits / 2; ++p) planes[p] = At(head, head.layout.value_plane[p], page);
  BitPosition positions[kTileChannels];
  for (int32_t c = 0; c < kTileChannels; ++c) {
    positions[c] = ValuePlanePosition(head.order, token, c);
  }
  for (int32_t begin = 0; begin < d; begin += width) {
    const float range = RangeFromScale(scales[begin / width]);
    for (int32_t c = begin; c < begin + width; ++c) {
      const BitPosition at = positions[c % kTileChannels];
      uint32_t prefix = 0;
      for (int32_t p = 0; p < bits / 2; ++p) {
        prefix = prefix << 2 | GetBits(planes[p] + PlaneTileOffset(c), at, 3u);
      }
      out[c] = DecodeNested(prefix, bits, range);
    }
  }
}
}  // namespace

void DecodeRotatedValues(const SealedHead& head, const std::byte* page, int32_t bits, float* out) {
  const int32_t d = head.head_dim;
  if (bits == 0) {
    const float mean_scale = ReadValueSummary(head, page).mean_scale;
    const int8_t* const mean = ValueMean(head, page);
    for (int64_t i = 0; i < int64_t{kPageTokens} * d; ++i) {
      out[i] = static_cast<float>(mean[i % d]) * mean_scale;
    }
    return;
  }
  for (int32_t t = 0; t < kPageTokens; ++t) {
    DecodeValueToken(head, page, t, bits, out + int64_t{t} * d);
  }
}

float DecodeFirstRotatedValue(const SealedHead& head, const std::byte* page, int32_t bits,
                              float* out) {
  const int32_t groups = ValueGroups(head.head_dim);
  DecodeValueToken(head, page, 0, bits, out);
  double range2 = 0.0;
  for (int32_t g = 0; g < groups; ++g) {
    const double range = RangeFromScale(ValueScales(head, page)[g]);
    range2 += range * range;
  }
  return static_cast<float>(std::sqrt(range2 / groups));
}

void DecodeKeys(const SealedHead& head, const BasisView& basis, const std::byte* page, int32_t bits,
                int32_t chunks, float* out) {
  const int32_t d = head.head_dim;
  std::vector<float> rotated(kPage * static_cast<size_t>(d));
  DecodeRotatedKeys(head, page, bits, chunks, rotated.data());
  for (int32_t t = 0; t < kPageTokens; ++t) {
    RestoreKey(basis, d, rotated.data() + int64_t{t} * d, out + int64_t{t} * d);
  }
}

void DecodeValues(const SealedHead& head, const std::byte* page, int32_t bits, float* out) {
  DecodeRotatedValues(head, page, bits, out);
  for (int32_t t = 0; t < kPageTokens; ++t) {
    RotateHadamard(out + int64_t{t} * head.head_dim, head.head_dim);
  }
}

const uint8_t* KeyScales(const SealedHead& head, const std::byte* page) {
  return reinterpret_cast<const uint8_t*>(At(head, head.layout.key_scales, page));
}

const uint8_t* ValueScales(const SealedHead& head, const std::byte* page) {
  return reinterpret_cast<const uint8_t*>(At(head, head.layout.value_scales, page));
}

ValueSummary ReadValueSummary(const SealedHead& head, const std::byte* page) {
  ValueSummary summary;
  std::memcpy(&summary, At(head, head.layout.value_summary, page), sizeof(summary));
  return summary;
}

const int8_t* ValueMean(const SealedHead& head, const std::byte* page) {
  return reinterpret_cast<const int8_t*>(At(head, head.layout.value_summary, page) +
                                         sizeof(ValueSummary));
}

}  // namespace adaattn

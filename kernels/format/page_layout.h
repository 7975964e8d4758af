#ifndef ADAATTN_KERNELS_FORMAT_PAGE_LAYOUT_H_
#define ADAATTN_KERNELS_FORMAT_PAGE_LAYOUT_H_

#include <cstdint>

#include "kernels/host_device.h"
#include "kernels/shape.h"

namespace adaattn {

// Where the parts of a page lie. One PageId names the pages of *all* kv heads of one layer for the
// same 64 tokens: they open, seal and go together, and keeping the same part of neighbouring heads
// adjacent turns many small reads into few long ones.
//
// A page id is a byte offset into the pool, in units of kPageAlignment: 32 bits reach 1 TiB.
enum class PageId : uint32_t {};
inline constexpr PageId kNoPage{0xffffffffu};
inline constexpr int64_t kPageAlignment = 256;

ADAATTN_HD constexpr int64_t PageOffset(PageId id) {
  return static_cast<int64_t>(static_cast<uint32_t>(id)) * kPageAlignment;
}
ADAATTN_HD constexpr int64_t AlignPage(int64_t bytes) {
  return (bytes + kPageAlignment - 1) / kPageAlignment * kPageAlignment;
}

// --- Dense pages: K [num_kv_heads, 64, head_dim], then V likewise, in DenseDType(format).
// ---------

ADAATTN_HD constexpr int64_t DenseHeadBytes(int32_t head_dim, DType type) {
  return int64_t{kPageTokens} * head_dim * DTypeBytes(type);
}
ADAATTN_HD constexpr int64_t DenseKeyOffset(int32_t kv_head, int32_t head_dim, DType type) {
  return kv_head * DenseHeadBytes(head_dim, type);
}
ADAATTN_HD constexpr int64_t DenseValueOffset(const AttentionShape& shape, int32_t kv_head,
                                              DType type) {
  return (shape.num_kv_heads + kv_head) * DenseHeadBytes(shape.head_dim, type);
}
ADAATTN_HD constexpr int64_t DensePageBytes(const AttentionShape& shape, DType type) {
  return AlignPage(2 * shape.num_kv_heads * DenseHeadBytes(shape.head_dim, type));
}

// --- Sealed pages ------------------------------------------------------------------------------
//
// Channels are cut into tiles of 16 (one MMA k-step) and tiles into rank chunks: about a quarter of
// the channels, the unit in which a key scan may stop early. head_dim 64, 80, 96, 128, 256 give
// 4, 3, 3, 4, 4 chunks of at most 16, 32, 32, 32, 64 channels.
//
// Keys store their first 4 bits as one plane of nibbles, chunk by chunk (4 bits of the leading
// half of the rank measured better than 2 bits of all of it, and nibbles unpack in half the
// instructions), then two 2-bit planes. Values store four 2-bit planes. Within a plane tiles come
// in channel order; the order inside a tile is the backend's (format/planes.h).
inline constexpr int32_t kTileChannels = 16;
inline constexpr int32_t kMaxRankChunks = 4;
inline constexpr int32_t kValueGroupChannels = 64;  // channels that share one value scale

ADAATTN_HD constexpr int32_t ChunkChannels(int32_t head_dim) {
  return head_dim <= 64 ? 16 : head_dim <= 128 ? 32 : 64;
}
ADAATTN_HD constexpr int32_t NumRankChunks(int32_t head_dim) {
  return (head_dim + ChunkChannels(head_dim) - 1) / ChunkChannels(head_dim);
}
// Leading channels covered by `chunks` rank chunks: head_dim 80 gives 32, 64, 80.
ADAATTN_HD constexpr int32_t ChunkedRank(int32_t head_dim, int32_t chunks) {
  const int32_t rank = chunks * ChunkChannels(head_dim);
  return rank < head_dim ? rank : head_dim;
}
// The fewest chunks that cover `rank` channels.
ADAATTN_HD constexpr int32_t ChunksForRank(int32_t head_dim, int32_t rank) {
  const int32_t chunks = (rank + ChunkChannels(head_dim) - 1) / ChunkChannels(head_dim);
  const int32_t most = NumRankChunks(head_dim);
  return chunks < 1 ? 1 : chunks > most ? most : chunks;
}
// Value scales of one token: head_dim / 64 where that is whole, else 1.
ADAATTN_HD constexpr int32_t ValueGroups(int32_t head_dim) {
  return head_dim % kValueGroupChannels == 0 ? head_dim / kValueGroupChannels : 1;
}

// What is known of a page's values besides their planes; 16 bytes before the value mean.
struct ValueSummary {
  float mean_scale;  // the int8 mean vector times this is the mean, in the rotated frame
  float spread;      // sqrt(mean over tokens |v - mean|^2), after rounding the mean,
                     // times ValueFactors::spread
  float radius;      // max over tokens |v - mean|
  float scale_rms;   // sqrt(mean of r^2 over tokens and groups), the codes' mean step size,
                     // times ValueFactors::rounding
};
static_assert(sizeof(ValueSummary) == 16, "the page layout counts on it");

// The sections of a sealed page, in the order of their bytes. Each is [num_kv_heads][section_bytes]
// without gaps, so the head's part of a section starts at offset + kv_head * bytes.
struct PageLayout {
  struct Section {
    int64_t offset = 0;  // from the start of the page
    int64_t bytes = 0;   // of one kv head
  };
  Section key_scales;                // [head_dim] u8: a channel's range, quarter octaves
  Section value_summary;             // ValueSummary, then int8 mean [head_dim]
  Section key_base[kMaxRankChunks];  // 4 bits: tiles of one rank chunk, 512 bytes a tile
  Section key_fine[2];               // bits 5-6 and 7-8: all tiles, 256 bytes a tile
  Section value_scales;              // [64, ValueGroups] u8: a token's range by group
  Section value_plane[4];            // 2 bits each: all tiles, 256 bytes a tile
  int64_t page_bytes = 0;            // of all heads, aligned; the pool's allocation unit
  int32_t num_chunks = 0;
  int32_t stored_bits = 8;
};

inline constexpr int32_t kKeyTileBytes = kPageTokens * kTileChannels / 2;    // 4 bits
inline constexpr int32_t kPlaneTileBytes = kPageTokens * kTileChannels / 4;  // 2 bits

// The layout of a sealed page with `stored_bits` (8, 6 or 4) kept of K and of V.
ADAATTN_HD constexpr PageLayout MakePageLayout(const AttentionShape& shape, int32_t stored_bits) {
  PageLayout layout;
  const int32_t d = shape.head_dim, heads = shape.num_kv_heads;
  int64_t end = 0;
  auto add = [&end, heads](PageLayout::Section& section, int64_t bytes) {
    section.offset = end;
    section.bytes = bytes;
    end += bytes * heads;
  };
  layout.num_chunks = NumRankChunks(d);
  layout.stored_bits = stored_bits;
  add(layout.key_scales, d);
  add(layout.value_summary, static_cast<int64_t>(sizeof(ValueSummary)) + d);
  for (int32_t c = 0; c < layout.num_chunks; ++c) {
    const int32_t channels = ChunkedRank(d, c + 1) - ChunkedRank(d, c);
    add(layout.key_base[c], channels / kTileChannels * kKeyTileBytes);
  }
  const int64_t plane = int64_t{d} / kTileChannels * kPlaneTileBytes;
  for (int32_t p = 0; p < (stored_bits - 4) / 2; ++p) add(layout.key_fine[p], plane);
  add(layout.value_scales, int64_t{kPageTokens} * ValueGroups(d));
  for (int32_t p = 0; p < stored_bits / 2; ++p) add(layout.value_plane[p], plane);
  layout.page_bytes = AlignPage(end);
  return layout;
}

// Bytes of one kv head that a read of `bits` (4, 6, 8) of the leading `chunks` chunks loads,
// scales included (all of them: the unread channels' ranges enter the error model).
ADAATTN_HD constexpr int64_t KeyReadBytes(int32_t head_dim, int32_t bits, int32_t chunks) {
  return head_dim + int64_t{ChunkedRank(head_dim, chunks)} * kPageTokens * bits / 8;
}
// Bytes that a read of `bits` (0, 2, 4, 6, 8) of one head's values loads: the summary always, the
// scales when any plane is read.
ADAATTN_HD constexpr int64_t ValueReadBytes(int32_t head_dim, int32_t bits) {
  const int64_t summary = static_cast<int64_t>(sizeof(ValueSummary)) + head_dim;
  if (bits == 0) return summary;
  return summary + int64_t{kPageTokens} * ValueGroups(head_dim) +
         int64_t{head_dim} * kPageTokens * bits / 8;
}

// --- Bases: one block of the pool holds those of all kv heads of one layer -----------------------
//
// Scores are q.k = (q Q).((k - mu) K) + q.mu with Q the basis rounded to FP16 and K = Q^-T of that
// very matrix, so that the rounding cancels.
//
// A block also says how far the head's values were seen to err (policy/value_factors.h).
struct ValueFactors {
  float spread = 1;    // where a page's mean stands in for them, over what the error model says
  float rounding = 1;  // likewise where their codes are read
};
struct BasisLayout {
  int64_t mean = 0;         // f32 [head_dim]: mu
  int64_t query_basis = 0;  // f16 [head_dim, head_dim]: Q, row = input channel, column = rank
  int64_t key_basis = 0;    // f32 [head_dim, head_dim]: K, likewise
  int64_t energy = 0;       // f32 [head_dim]: mean square of the fitted keys by rank, for drift
  int64_t factors = 0;      // ValueFactors, then 8 bytes that nothing reads
  int64_t head_bytes = 0;   // from one kv head's block to the next
  int64_t block_bytes = 0;  // of all heads, aligned
};

ADAATTN_HD constexpr BasisLayout MakeBasisLayout(const AttentionShape& shape) {
  BasisLayout layout;
  const int64_t d = shape.head_dim;
  layout.mean = 0;
  layout.query_basis = layout.mean + 4 * d;
  layout.key_basis = layout.query_basis + 2 * d * d;
  layout.energy = layout.key_basis + 4 * d * d;
  layout.factors = layout.energy + 4 * d;
  layout.head_bytes = layout.factors + 16;
  layout.block_bytes = AlignPage(layout.head_bytes * shape.num_kv_heads);
  return layout;
}

// Bytes of one basis that a step reads for one kv head: Q and mu.
ADAATTN_HD constexpr int64_t BasisReadBytes(int32_t head_dim) {
  return 2 * int64_t{head_dim} * head_dim + 4 * int64_t{head_dim};
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_FORMAT_PAGE_LAYOUT_H_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_WORKSPACE_H_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_WORKSPACE_H_

// What the kernels of a progressive step leave for one another, and where.
//
// Columns: the rows of q that one kv head serves, column = row * group_size + q head of the group,
// padded to a multiple of 8 (an MMA's N). Scores and log masses are in units of log2.

#include <cstdint>

#include "kernels/cuda/progressive.h"
#include "kernels/format/page_layout.h"

namespace adaattn {

inline constexpr int32_t kTileColumns = 8;   // columns of one MMA
inline constexpr int32_t kMaxColumns = 128;  // group size 16, q_len 8
inline constexpr int32_t kFewColumns = 4;    // one row of a group of four, the usual step

// Shapes of the CTAs, which the plan has to know.
inline constexpr int32_t kScanWarps = 8;    // and one that fetches
inline constexpr int32_t kChunkPages = 64;  // of one select CTA; four threads decide each
// Warps that attend on a multiprocessor, a quarter of which holds four of 128 registers: each takes
// a group of values, and as many as there are groups share a slot.
inline constexpr int32_t kMaxAttendWarps = 16;
ADAATTN_HD constexpr int32_t AttendWarps(int32_t head_dim) {
  return head_dim / ValueGroups(head_dim) > 64 ? 8 : kMaxAttendWarps;
}
ADAATTN_HD constexpr int32_t AttendSlots(int32_t head_dim) {
  return AttendWarps(head_dim) / ValueGroups(head_dim);
}
// A concluding CTA has all of them. Attend's CTAs have half: one can begin before the launch in
// front has left the whole multiprocessor.
inline constexpr int32_t kAttendCtasPerSm = 2;
ADAATTN_HD constexpr int32_t ScanCtasPerSm(int32_t head_dim) { return head_dim <= 128 ? 2 : 1; }

// Pages that a scan CTA takes at a time: its warps hold one kv head each.
ADAATTN_HD constexpr int32_t ScanPlaces(int32_t num_kv_heads) {
  return num_kv_heads >= kScanWarps ? 1 : kScanWarps / num_kv_heads;
}

// Log mass of one page for one column, as far as its keys have been read.
struct PageStats {
  float max;            // largest score, before the soft cap; where scores are stored
  float lse;            // log2 sum of exp2, after the soft cap
  float variance;       // of a score's rounding error, nats squared
  float concentration;  // sum of squares of exp2 over the square of their sum; 0 of an empty sum.
                        // Its sign says that the second stage opened the page
};
static_assert(sizeof(PageStats) == 16, "stored with one instruction");

// A chunk's sums for one column, beside its vectors. The error terms are those of
// policy/error_model.h with o left open: E|do|^2 = mean_squares - 2 o.weighted_mean + |o|^2 weight
// + rest, where weighted_mean is a vector, and what skipping loses together, kCoherence
// amplitude^2.
struct ChunkState {
  float mass;          // of skipped pages, relative to the estimated LSE
  float entropy;       // -sum share log share, nats
  float weight;        // sum of w^2 var_s
  float mean_squares;  // sum of w^2 var_s |mean|^2
  float rest;          // sum of w^2 c
  float amplitude;     // sum of skipped pages' amplitudes
};
// The vectors of a chunk and column, in the Hadamard frame, relative to the estimated LSE.
enum ChunkVector : int {
  kSkipped = 0,       // shares times means of skipped pages
  kWeightedMean = 1,  // sum of w^2 var_s mean
  kAttended = 2,      // shares times means of attended pages: with kSkipped the error model's o
  kNumChunkVectors = 3
};

// An attended page: its number, what of it is read, its basis.
struct PackedPage {
  int page, value_planes, fine_planes, key_chunks, basis_run;
};
ADAATTN_HD constexpr uint32_t PackPage(const PackedPage& x) {
  return static_cast<uint32_t>(x.page) | static_cast<uint32_t>(x.value_planes) << 21 |
         static_cast<uint32_t>(x.fine_planes) << 24 | static_cast<uint32_t>(x.key_chunks) << 26 |
         static_cast<uint32_t>(x.basis_run) << 29;
}
ADAATTN_HD constexpr PackedPage UnpackPage(uint32_t x) {
  return PackedPage{static_cast<int>(x & 0x1fffffu), static_cast<int>(x >> 21 & 7u),
                    static_cast<int>(x >> 24 & 3u), static_cast<int>(x >> 26 & 7u),
                    static_cast<int>(x >> 29)};
}

// What select says of it to attend.
struct ListedPage {
  uint32_t id;
  uint32_t packed;  // PackPage
  int32_t head_index;
  int16_t columns;  // of the sequence
  int16_t head;     // likewise
};
static_assert(sizeof(ListedPage) == 16, "moved with one instruction");
// Its columns in a tile of kTileColumns.
ADAATTN_HD constexpr int32_t TileColumns(const ListedPage& page, int32_t tile) {
  const int32_t left = page.columns - tile * kTileColumns;
  return left < 0 ? 0 : left < kTileColumns ? left : kTileColumns;
}

// What it costs attend, in units of the time that refining keys takes: two for any page, one for
// refined keys, one for a second pair of value planes; bytes matter less (docs/kernels.md).
ADAATTN_HD constexpr int32_t AttendCost(const PackedPage& page) {
  return 2 + (page.fine_planes > 0 ? 1 : 0) + (page.value_planes > 2 ? 1 : 0);
}
inline constexpr int32_t kMaxAttendCost = 4;

// The list of a chunk.
struct ChunkList {
  int32_t pages;
  int32_t cost;  // of all of them
};
static_assert(sizeof(ChunkList) == 8, "moved with one instruction");

// Byte offsets into the workspace. Row-major, outermost first; H kv heads, S sequences, C columns.
struct ProgressiveWorkspace {
  int64_t query = 0;       // uint2 [S, H, bases, C / 8, tiles, 32]: q / unit, B fragments of halves
  int64_t query_unit = 0;  // float [S, H, bases, C / 8]: a power of two above every |q|
  int64_t query_mean = 0;  // float [S, H, bases, C]: q.mu
  int64_t stats = 0;       // PageStats [S, H, pages, C]
  int64_t scores = 0;      // uint4 [S, H, pages, C / 8, 2, 32]: half2 scores minus max, B fragments
  int64_t scan_lse = 0;    // float [scan runs, places, H, C]: estimated log mass
  int64_t refined_lse = 0;  // likewise, after the second stage
  int64_t dense_lse = 0;    // float [S, H, C]
  int64_t dense_out = 0;    // float [S, H, C, D]
  int64_t dense_score = 0;  // float [S, H, C]: mean score of the dense tokens, log2 units
  int64_t global_lse = 0;   // float [S, H, C]: what all sums are relative to
  int64_t vectors = 0;      // float [S, H, chunks, C, kNumChunkVectors, D]
  int64_t state = 0;        // ChunkState [S, H, chunks, C]
  int64_t extents = 0;      // ChunkList [S, H, chunks]
  int64_t lists = 0;        // ListedPage [S, H, chunks, kChunkPages], in order of the pages
  int64_t spans = 0;        // int2 [S, H]: the attend slots that have pages of the head
  int64_t partial = 0;      // float [attend slots + S H, C, D]: of attended pages
  int64_t mass = 0;         // float [attend slots + S H, C]: likewise
  int64_t reference = 0;    // float [attend slots + S H, C]: both are relative to 2^this and L;
                            // -inf: the slot has no page
  int64_t figures = 0;      // float2 [S, H, C]: predicted square relative error, entropy
  int64_t merged = 0;       // int32_t [S, H]: columns that are done
  int64_t taken = 0;        // int32_t: items of the scan taken beyond each CTA's first
  int64_t bytes = 0;
  int32_t columns = 0;
  int32_t scan_runs = 0;
  int32_t chunks = 0;  // of the longest sequence
  int32_t attend_ctas = 0;
};

ADAATTN_HD constexpr int32_t CeilDiv(int32_t a, int32_t b) { return (a + b - 1) / b; }

ADAATTN_HD ProgressiveWorkspace MakeProgressiveWorkspace(const ProgressiveParams& p) {
  ProgressiveWorkspace w;
  const int32_t d = p.shape.head_dim;
  w.columns = CeilDiv(p.shape.group_size() * p.max_q_len, kTileColumns) * kTileColumns;
  w.scan_runs = NumScanRuns(p);
  w.chunks = CeilDiv(p.max_sealed, kChunkPages);
  w.attend_ctas = kAttendCtasPerSm * p.num_sms;
  const int64_t heads = static_cast<int64_t>(p.num_sequences) * p.shape.num_kv_heads;
  int64_t end = 0;
  auto add = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += AlignPage(bytes);
    return begin;
  };
  w.query = add(heads * kMaxDeviceBasisRuns * w.columns * d * 2);
  w.query_unit = add(heads * kMaxDeviceBasisRuns * w.columns / kTileColumns * 4);
  w.query_mean = add(heads * kMaxDeviceBasisRuns * w.columns * 4);
  w.stats = add(heads * p.max_sealed * w.columns * static_cast<int64_t>(sizeof(PageStats)));
  w.scores = add(heads * p.max_sealed * w.columns * kPageTokens * 2);
  const int64_t masses = int64_t{w.scan_runs} * ScanPlaces(p.shape.num_kv_heads) *
                         p.shape.num_kv_heads * w.columns * 4;
  w.scan_lse = add(masses);
  w.refined_lse = add(p.two_stage ? masses : 0);
  w.dense_lse = add(heads * w.columns * 4);
  w.dense_out = add(heads * w.columns * d * 4);
  w.dense_score = add(heads * w.columns * 4);
  w.global_lse = add(heads * w.columns * 4);
  const int64_t chunks = heads * w.chunks, slots = p.num_sms * AttendSlots(d) + heads;
  w.vectors = add(chunks * w.columns * kNumChunkVectors * d * 4);
  w.state = add(chunks * w.columns * static_cast<int64_t>(sizeof(ChunkState)));
  w.extents = add(chunks * static_cast<int64_t>(sizeof(ChunkList)));
  w.lists = add(chunks * kChunkPages * static_cast<int64_t>(sizeof(ListedPage)));
  w.spans = add(heads * 8);
  w.partial = add(slots * w.columns * d * 4);
  w.mass = add(slots * w.columns * 4);
  w.reference = add(slots * w.columns * 4);
  w.figures = add(heads * w.columns * 8);
  w.merged = add(heads * 4);
  w.taken = add(4);
  w.bytes = end;
  return w;
}

// The q heads of a kv head: column c is head c % size of row c / size.
struct QueryGroup {
  int32_t size = 1;
  int32_t factor = (1 << 16) + 1;  // 2^16 / size, rounded up or one more

  ADAATTN_HD constexpr QueryGroup() = default;
  ADAATTN_HD constexpr explicit QueryGroup(int32_t heads)
      : size(heads), factor((1 << 16) / heads + 1) {}

  // Without a division, of which the device has none: exact up to kMaxColumns.
  ADAATTN_HD constexpr int32_t Row(int32_t column) const { return column * factor >> 16; }
  ADAATTN_HD constexpr int32_t Head(int32_t column) const { return column - Row(column) * size; }
};

// What the kernels get: everything that depends on shapes alone is worked out once, on the host.
struct ProgressiveArgs : ProgressiveParams {
  bool rehearse_scan = false;
  // Prepare counts rotated queries, which the scan's copies wait for; always so if it is early.
  bool count_rotated = false;
  QueryGroup group;
  int32_t scan_places = 1;  // ScanPlaces
  PageLayout layout;
  ProgressiveWorkspace work;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_WORKSPACE_H_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

// Attend: depths from the global LSE, then the values.
//   out = sum over attended tokens exp2(s - L) x_b(v) + sum over skipped pages share * mean
//   x_b(code) r = (sum_i m_i 4^-i / 2 + 2^-b - 1) r         m_i: 2-bit plane i, most significant
//   first
// L is the estimated global LSE, the same for every CTA of a head, so partial results just add up.
//
// A CTA takes a chunk of one head's pages: a thread decides each page, then every warp takes
// attended pages in turn (planes arrive by asynchronous copies one page ahead), then all threads
// add the means of the skipped ones. Values enter the MMA transposed: channels are its M, tokens
// its K, columns its N; 2-bit fields enter in place as FP16 subnormals, and the powers of 4 that
// their places add are taken out of B (fields of token + 8) and of the sums (channels + 8). grid
// (attend_chunks, num_kv_heads, num_sequences).

#include "kernels/cuda/progressive_scan.cuh"
#include "kernels/policy/error_model.h"

namespace adaattn {

inline constexpr int kAttendWarps = 4;
inline constexpr int kAttendThreads = kAttendWarps * 32;
inline constexpr int kMaxAttendChunk = kAttendThreads;  // pages: one thread decides each

template <class Traits>
struct AttendShared {
  static constexpr int kD = Traits::kHeadDim;
  static constexpr int kPlaneBytes = Traits::kTiles * kPlaneTileBytes;
  static constexpr int kScaleBytes = kPageTokens * Traits::kValueGroups;
  static constexpr int kSummaryBytes = static_cast<int>(sizeof(ValueSummary)) + kD;
  // What a page brings in: value scales, value planes, and for finer keys their scales and planes.
  static constexpr int kMaxPageBytes = kScaleBytes + 4 * kPlaneBytes + kD + 2 * kPlaneBytes;
  struct Warp {
    alignas(16) std::byte pages[kMaxPageBytes];  // as many attended pages as fit
    alignas(16) float ranges[kD];                // of channels, spread for the MMA
    alignas(16) float token_ranges[kPageTokens * Traits::kValueGroups];
  };
  Warp warps[kAttendWarps];
  alignas(16) std::byte summaries[kMaxAttendChunk][kSummaryBytes];
  float lse[kTileColumns];  // L
  float lse_parts[kAttendThreads / kTileColumns][kTileColumns];
  uint32_t base[kMaxAttendChunk];  // page ids, by position in the chunk
  uint8_t key_bits[kMaxAttendChunk], key_chunks[kMaxAttendChunk], value_bits[kMaxAttendChunk];
  alignas(16) float skipped[kMaxAttendChunk][kTileColumns];  // share of a skipped page, else 0
  alignas(16) float weight[kMaxAttendChunk][kTileColumns];   // w^2 var_s
  int list[kMaxAttendChunk];                                 // attended pages, in order
  int warp_count[kAttendWarps];
  int key_pages[kNumKeyDepths], value_pages[kNumValueDepths];
  float state[kAttendWarps][kTileColumns][4];  // mass, entropy, weight, rest by warp
  float mean_squares[kAttendWarps][kTileColumns];
  // The warps' parts overlay their partial outputs [columns][D] once the pages are done with.
  static_assert(sizeof(Warp) >= kTileColumns * kD * sizeof(float), "partial outputs fit");
};

// One attended page in a warp's shared memory.
template <class Traits>
struct AttendedPage {
  using Shared = AttendShared<Traits>;
  const std::byte* value_scales;
  const std::byte* value_planes;  // one after the other
  const std::byte* key_scales;
  const std::byte* key_fine;  // one after the other, kPlaneBytes apart

  __device__ __forceinline__ AttendedPage(const std::byte* data, int value_bits)
      : value_scales(data),
        value_planes(data + Shared::kScaleBytes),
        key_scales(value_planes + value_bits / 2 * Shared::kPlaneBytes),
        key_fine(key_scales + Traits::kHeadDim) {}
  static __device__ __forceinline__ int Bytes(int value_bits, int key_bits) {
    const int fine = (key_bits - 4) / 2;
    return Shared::kScaleBytes + value_bits / 2 * Shared::kPlaneBytes +
           (fine > 0 ? Traits::kHeadDim + fine * Shared::kPlaneBytes : 0);
  }
};

// Scores of a page refined by `planes` 2-bit planes of its keys: what to add to the packed scores,
// in their layout. x_6 - x_4 = (m - 1.5) / 32, x_8 - x_6 = (m' - 1.5) / 128.
template <class Traits>
__device__ __forceinline__ void RefineScores(const std::byte* fine, const float* ranges,
                                             const float4* query, int planes, int tiles, int lane,
                                             uint32_t (&packed)[8]) {
  const uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x4c004c00u, 0x4c004c00u};  // 1, 1, 16, 16
  float sums[4][4] = {}, ones[4] = {};
#pragma unroll 2
  for (int k = 0; k < tiles; ++k) {
    const float4 q = query[k * 32 + lane];
    const float4 range = reinterpret_cast<const float4*>(ranges)[k * 4 + lane % 4];
    uint32_t b0 = PackPair<__half>(q.x * range.x, q.y * range.y);
    uint32_t b1 = PackPair<__half>(q.z * range.z * 0.0625f, q.w * range.w * 0.0625f);
    Mma16x8x16<__half>(ones, kOnes, b0, b1);
    for (int plane = 0; plane < planes; ++plane) {
      const uint2 words = reinterpret_cast<const uint2*>(
          fine + plane * AttendShared<Traits>::kPlaneBytes)[k * 32 + lane];
      const uint32_t word[4] = {words.x, words.x >> 8, words.y, words.y >> 8};
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const uint32_t a[4] = {word[t] & 0x00030003u, word[t] & 0x000c000cu, word[t] & 0x00300030u,
                               word[t] & 0x00c000c0u};
        Mma16x8x16<__half>(sums[t], a, b0, b1);
      }
      b0 = MultiplyHalves(b0, 0x34003400u);  // 1/4
      b1 = MultiplyHalves(b1, 0x34003400u);
    }
  }
  const float offset = planes == 2 ? 1.5f / 32 + 1.5f / 128 : 1.5f / 32;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float unit = half == 0 ? 524288.0f : 131072.0f;  // 2^24 / 32, and / 4 for rows 8..15
      const float x = fmaf(sums[t][2 * half], unit, -offset * ones[0]);
      const float y = fmaf(sums[t][2 * half + 1], unit, -offset * ones[1]);
      const uint32_t delta = Transpose8x8(PackPair<__half>(x, y));
      const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&packed[2 * t + half]),
                                  *reinterpret_cast<const __half2*>(&delta));
      packed[2 * t + half] = *reinterpret_cast<const uint32_t*>(&sum);
    }
  }
}

// Adds one page's values to out[tile] (channels 16 tile + lane / 4 and + 8, columns 2 (lane % 4)
// and
// + 1), weighted by probability[i] (tokens of packed scores) times exp2(`log_weight`) of the
// column.
template <class Traits>
__device__ __forceinline__ void AddValues(const std::byte* planes, const float* token_ranges,
                                          int bits, const float2 (&probability)[8],
                                          const float (&weight)[2], int lane,
                                          float (&out)[Traits::kTiles][4]) {
  const uint32_t kOnes[4] = {0x3c003c00u, 0x3c003c00u, 0x4c004c00u, 0x4c004c00u};
  const float offset = 1.0f / static_cast<float>(1 << bits) - 1.0f;
#pragma unroll
  for (int group = 0; group < Traits::kValueGroups; ++group) {
    uint32_t b[4][2];
    float ones[4] = {};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 range = *reinterpret_cast<const float2*>(token_ranges + group * kPageTokens +
                                                              16 * t + 8 * half + lane % 4 * 2);
        const float scale = half == 0 ? 1.0f : 0.0625f;
        b[t][half] = PackPair<__half>(probability[2 * t + half].x * range.x * scale,
                                      probability[2 * t + half].y * range.y * scale);
      }
      Mma16x8x16<__half>(ones, kOnes, b[t][0], b[t][1]);
    }
    float sums[Traits::kTilesPerGroup][4];
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][e] = 0;
    }
    for (int plane = 0; plane < bits / 2; ++plane) {
#pragma unroll
      for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
        const uint2 words = reinterpret_cast<const uint2*>(
            planes +
            plane * AttendShared<Traits>::kPlaneBytes)[(group * Traits::kTilesPerGroup + i) * 32 +
                                                       lane];
        const uint32_t word[4] = {words.x, words.x >> 8, words.y, words.y >> 8};
#pragma unroll
        for (int t = 0; t < 4; ++t) {
          const uint32_t a[4] = {word[t] & 0x00030003u, word[t] & 0x000c000cu,
                                 word[t] & 0x00300030u, word[t] & 0x00c000c0u};
          Mma16x8x16<__half>(sums[i], a, b[t][0], b[t][1]);
        }
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        b[t][0] = MultiplyHalves(b[t][0], 0x34003400u);
        b[t][1] = MultiplyHalves(b[t][1], 0x34003400u);
      }
    }
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float unit = e < 2 ? 8388608.0f : 2097152.0f;  // 2^24 / 2, and / 4 for channels + 8
        float& target = out[group * Traits::kTilesPerGroup + i][e];
        target = fmaf(weight[e % 2], fmaf(sums[i][e], unit, offset * ones[e % 2]), target);
      }
    }
  }
}

// The head's estimated LSE of every column, from the chunks' and the dense tail's.
template <class Traits>
__device__ __forceinline__ void GlobalLse(const ProgressiveArgs& p, const ProgressiveWorkspace& w,
                                          int64_t head_index, AttendShared<Traits>& shared) {
  const int column = threadIdx.x % kTileColumns, part = threadIdx.x / kTileColumns;
  constexpr int kParts = kAttendThreads / kTileColumns;
  const float* chunks = reinterpret_cast<const float*>(p.workspace + w.scan_lse) +
                        head_index * w.scan_chunks * w.columns;
  float lse = -INFINITY;
  for (int i = part; i < w.scan_chunks; i += kParts) {
    lse = AddLog2(lse, chunks[i * w.columns + column]);
  }
  shared.lse_parts[part][column] = lse;
  __syncthreads();
  if (part == 0) {
    lse =
        reinterpret_cast<const float*>(p.workspace + w.dense_lse)[head_index * w.columns + column];
    for (int i = 0; i < kParts; ++i) lse = AddLog2(lse, shared.lse_parts[i][column]);
    shared.lse[column] = lse;
    if (blockIdx.x == 0) {
      reinterpret_cast<float*>(p.workspace + w.global_lse)[head_index * w.columns + column] = lse;
    }
  }
  __syncthreads();
}

// Decides page begin + threadIdx.x: depth, list of attended pages, weights of the means, counts.
template <class Traits>
__device__ __forceinline__ void DecidePages(const ProgressiveArgs& p, const ProgressiveWorkspace& w,
                                            const ProgressiveSequence& from, const SequenceView& s,
                                            int64_t head_index, float theta, int begin, int end,
                                            AttendShared<Traits>& shared) {
  constexpr int kD = Traits::kHeadDim;
  const int local = threadIdx.x, page = begin + local, lane = local % 32, warp = local / 32;
  const int columns = p.shape.group_size() * s.q_len;
  float entropy[kTileColumns] = {}, weight[kTileColumns] = {}, rest[kTileColumns] = {};
  float mass[kTileColumns] = {};
  PageDepth depth;
  Visibility visibility = Visibility::kNone;
  if (page < end) visibility = PageVisibility(s, page);
  if (visibility != Visibility::kNone) {
    const float4* stats = reinterpret_cast<const float4*>(p.workspace + w.stats) +
                          (head_index * p.max_sealed + page) * w.columns;
    const auto summary = *reinterpret_cast<const ValueSummary*>(shared.summaries[local]);
    float share_of[kTileColumns], share = 0;
    float4 stat[kTileColumns];
    bool opened = CoarseChunks(from.decision, kD) == 0;
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
      share_of[n] = 0;
      if (n >= columns) continue;
      stat[n] = stats[n];
      // A negative `squares` marks a page that the refine kernel opened.
      opened |= stat[n].w < 0;
      const PageStats page_stats{stat[n].x, stat[n].y, stat[n].z, stat[n].w};
      const float mass2 = EstimatedLog2Mass(page_stats);
      share_of[n] = mass2 == -INFINITY ? 0.0f : Exp2(mass2 - shared.lse[n]);
      share = fmaxf(share, share_of[n]);
      entropy[n] = share_of[n] > 0 ? share_of[n] * kLn2 * (shared.lse[n] - mass2) : 0.0f;
    }
    if (from.decision.policy == Policy::kFullDepth) {
      depth = FullDepth(kD, p.stored_bits);
    } else if (from.decision.policy == Policy::kStatic) {
      depth = StaticDepth(from.decision, kD, p.stored_bits);
    } else {
      depth = LadderDepth(from.decision, theta, share,
                          PageFacts{page == 0, visibility == Visibility::kPart, opened}, kD,
                          p.stored_bits);
    }
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
      float skipped = 0;
      if (n < columns) {
        if (depth.value_bits == 0) {
          mass[n] = share_of[n];
          weight[n] = share_of[n] * share_of[n] * stat[n].z;
          rest[n] = share_of[n] * share_of[n] * summary.spread * summary.spread;
          skipped = share_of[n];
        } else {
          const float variance = ScoreVarianceAt(stat[n].z, depth.key.bits);
          const float peak = Exp2(SoftCap(stat[n].x, s.softcap) - shared.lse[n]);
          const float squares = stat[n].x == -INFINITY ? 0 : peak * peak * fabsf(stat[n].w);
          weight[n] = squares * variance;
          rest[n] = squares * (variance * summary.spread * summary.spread +
                               kD * CodeVariance(summary.scale_rms, depth.value_bits));
        }
      }
      shared.skipped[local][n] = skipped;
      shared.weight[local][n] = weight[n];
    }
    shared.key_bits[local] = depth.key.bits;
    shared.key_chunks[local] = depth.key.chunks;
    shared.value_bits[local] = depth.value_bits;
    atomicAdd(&shared.key_pages[KeyDepthIndex(depth.key.bits, depth.key.chunks)], 1);
    atomicAdd(&shared.value_pages[depth.value_bits / 2], 1);
  } else {
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) shared.skipped[local][n] = shared.weight[local][n] = 0;
  }
  // Attended pages in order, whatever the thread timing: sums stay reproducible.
  const uint32_t attended = __ballot_sync(0xffffffffu, depth.value_bits > 0);
  if (lane == 0) shared.warp_count[warp] = __popc(attended);
  __syncthreads();
  if (depth.value_bits > 0) {
    int at = __popc(attended & ((1u << lane) - 1));
    for (int i = 0; i < warp; ++i) at += shared.warp_count[i];
    shared.list[at] = local;
  }
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) {
    float values[4] = {mass[n], entropy[n], weight[n], rest[n]};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        values[i] += __shfl_xor_sync(0xffffffffu, values[i], step);
      }
      if (lane == 0) shared.state[warp][n][i] = values[i];
    }
  }
  __syncthreads();
}

// Attends one page whose bytes have arrived.
template <class Traits>
__device__ __forceinline__ void AttendPage(const ProgressiveArgs& p, const SequenceView& s,
                                           int64_t head_index, int page, int local,
                                           const AttendedPage<Traits>& data, uint32_t (&packed)[8],
                                           float max, int lane, AttendShared<Traits>& shared,
                                           typename AttendShared<Traits>::Warp& mine,
                                           float (&out)[Traits::kTiles][4], float* mass) {
  using Shared = AttendShared<Traits>;
  constexpr int kChunkTiles = ChunkChannels(Traits::kHeadDim) / kTileChannels;
  if (const int fine = (shared.key_bits[local] - 4) / 2; fine > 0) {
    SpreadKeyRanges<Traits>(data.key_scales, mine.ranges, lane);
    __syncwarp();
    const float4* query =
        reinterpret_cast<const float4*>(p.workspace + p.work.query) +
        (head_index * kMaxDeviceBasisRuns + BasisOfPage(s, page)) * Traits::kTiles * 32;
    RefineScores<Traits>(data.key_fine, mine.ranges, query, fine,
                         min(shared.key_chunks[local] * kChunkTiles, Traits::kTiles), lane, packed);
  }
  // Token ranges relative to the page's largest, so that probability times range fits FP16.
  uint32_t top = 0;
  const auto* scales = reinterpret_cast<const uint8_t*>(data.value_scales);
#pragma unroll
  for (int i = lane; i < Shared::kScaleBytes; i += 32) top = umax(top, scales[i]);
  top = __reduce_max_sync(0xffffffffu, top);
#pragma unroll
  for (int i = lane; i < Shared::kScaleBytes; i += 32) {
    mine.token_ranges[i % Traits::kValueGroups * kPageTokens + i / Traits::kValueGroups] =
        Exp2(0.25f * (static_cast<float>(scales[i]) - static_cast<float>(top)));
  }
  __syncwarp();
  float2 probability[8];
  const float base = SoftCap(max, s.softcap);
  const bool cap = s.softcap != 0;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float2 y = HalvesToFloats(packed[i]);
    probability[i].x = cap ? Exp2(SoftCap(y.x + max, s.softcap) - base) : Exp2(y.x);
    probability[i].y = cap ? Exp2(SoftCap(y.y + max, s.softcap) - base) : Exp2(y.y);
    if (max == -INFINITY) probability[i] = make_float2(0, 0);
    sum += probability[i].x + probability[i].y;
  }
  const float weight = max == -INFINITY ? 0.0f : Exp2(base - shared.lse[lane / 4]);
  *mass += QuadSum(sum) * weight;
  const float scaled = weight * RangeOf(top);
  const float weights[2] = {__shfl_sync(0xffffffffu, scaled, lane % 4 * 8),
                            __shfl_sync(0xffffffffu, scaled, lane % 4 * 8 + 4)};
  AddValues<Traits>(data.value_planes, mine.token_ranges, shared.value_bits[local], probability,
                    weights, lane, out);
  __syncwarp();
}

// Attends a warp's share of the listed pages, as many at a time as its shared memory holds, and
// leaves its sums in out and mass (column lane / 4).
template <class Traits>
__device__ __forceinline__ void AttendPages(const ProgressiveArgs& p, const SequenceView& s,
                                            int64_t head_index, int begin, int count, int warp,
                                            int lane, AttendShared<Traits>& shared,
                                            float (&out)[Traits::kTiles][4], float* mass) {
  using Shared = AttendShared<Traits>;
  using Page = AttendedPage<Traits>;
  const ProgressiveWorkspace& w = p.work;
  const int head = static_cast<int>(head_index % p.shape.num_kv_heads);
  typename Shared::Warp& mine = shared.warps[warp];
  constexpr int kChunkTiles = ChunkChannels(Traits::kHeadDim) / kTileChannels;
  int64_t key_bytes = 0, value_bytes = 0;
  auto fetch = [&](int local, std::byte* target) {
    const std::byte* base = p.pool + static_cast<int64_t>(shared.base[local]) * kPageAlignment;
    const int planes = shared.value_bits[local] / 2, fine = (shared.key_bits[local] - 4) / 2;
    auto copy = [&](const std::byte* to, const PageLayout::Section& from, int bytes) {
      WarpCopyAsync(const_cast<std::byte*>(to), base + from.offset + head * from.bytes, bytes,
                    lane);
    };
    const Page page(target, 2 * planes);
    copy(page.value_scales, p.layout.value_scales, Shared::kScaleBytes);
    for (int i = 0; i < planes; ++i) {
      copy(page.value_planes + i * Shared::kPlaneBytes, p.layout.value_plane[i],
           Shared::kPlaneBytes);
    }
    const int fine_bytes =
        min(shared.key_chunks[local] * kChunkTiles, Traits::kTiles) * kPlaneTileBytes;
    if (fine > 0) copy(page.key_scales, p.layout.key_scales, Traits::kHeadDim);
    for (int i = 0; i < fine; ++i) {
      copy(page.key_fine + i * Shared::kPlaneBytes, p.layout.key_fine[i], fine_bytes);
    }
    key_bytes += fine * fine_bytes;
    value_bytes += Shared::kScaleBytes + planes * Shared::kPlaneBytes;
  };
  for (int item = warp; item < count;) {
    int bytes = 0, next = item;
    while (next < count) {
      const int local = shared.list[next];
      const int more = Page::Bytes(shared.value_bits[local], shared.key_bits[local]);
      if (bytes + more > Shared::kMaxPageBytes) break;
      fetch(local, mine.pages + bytes);
      bytes += more;
      next += kAttendWarps;
    }
    CommitCopies();
    bytes = 0;
    bool waited = false;
    for (; item < next; item += kAttendWarps) {
      const int local = shared.list[item], page = begin + local;
      const int64_t page_index = head_index * p.max_sealed + page;
      uint4 low = make_uint4(0, 0, 0, 0), high = low;
      float max = -INFINITY;
      if (lane / 4 < p.shape.group_size() * s.q_len) {
        const uint4* scores =
            reinterpret_cast<const uint4*>(p.workspace + w.scores) + page_index * 64 + lane;
        low = scores[0];
        high = scores[32];
        max = reinterpret_cast<const float4*>(p.workspace +
                                              w.stats)[page_index * w.columns + lane / 4]
                  .x;
      }
      if (!waited) {
        WaitCopies<0>();
        __syncwarp();
        waited = true;
      }
      uint32_t packed[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      AttendPage<Traits>(p, s, head_index, page, local,
                         Page(mine.pages + bytes, shared.value_bits[local]), packed, max, lane,
                         shared, mine, out, mass);
      bytes += Page::Bytes(shared.value_bits[local], shared.key_bits[local]);
    }
  }
  if (lane == 0 && key_bytes + value_bytes > 0) {
    AddBytes(&p.decisions[head_index].key_bytes, key_bytes);
    AddBytes(&p.decisions[head_index].value_bytes, value_bytes);
  }
}

// Adds the means of the skipped pages to the warps' partial outputs and writes the CTA's sums; a
// thread a channel. squares[n]: this thread's part of sum w^2 var_s mean^2.
template <class Traits>
__device__ __forceinline__ void AddMeans(const ProgressiveArgs& p, int pages,
                                         const AttendShared<Traits>& shared, float* partial,
                                         float (&squares)[kTileColumns]) {
  constexpr int kD = Traits::kHeadDim;
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) squares[n] = 0;
  for (int channel = threadIdx.x; channel < kD; channel += kAttendThreads) {
    float sum[kTileColumns] = {}, weighted[kTileColumns] = {};
#pragma unroll 4
    for (int i = 0; i < pages; ++i) {
      const float scale = reinterpret_cast<const ValueSummary*>(shared.summaries[i])->mean_scale;
      const auto* mean =
          reinterpret_cast<const int8_t*>(shared.summaries[i] + sizeof(ValueSummary));
      const float x = scale * static_cast<float>(mean[channel]);
#pragma unroll
      for (int half = 0; half < kTileColumns; half += 4) {
        if (half >= p.shape.group_size() * p.max_q_len) break;
        const float4 skipped = *reinterpret_cast<const float4*>(&shared.skipped[i][half]);
        const float4 weight = *reinterpret_cast<const float4*>(&shared.weight[i][half]);
        const float share[4] = {skipped.x, skipped.y, skipped.z, skipped.w};
        const float error[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          sum[half + n] = fmaf(share[n], x, sum[half + n]);
          const float term = error[n] * x;
          weighted[half + n] += term;
          squares[half + n] = fmaf(term, x, squares[half + n]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kTileColumns; ++n) {
      for (int i = 0; i < kAttendWarps; ++i) {
        sum[n] += reinterpret_cast<const float*>(&shared.warps[i])[n * kD + channel];
      }
      partial[(2 * n) * kD + channel] = sum[n];
      partial[(2 * n + 1) * kD + channel] = weighted[n];
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(kAttendThreads)
    ProgressiveAttendKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim;
  using Shared = AttendShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const int chunk = blockIdx.x, head = blockIdx.y, sequence = blockIdx.z;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = chunk * p.attend_chunk, end = min(begin + p.attend_chunk, from.num_sealed);
  // Summaries depend on no earlier kernel: they arrive while the scan ends.
  const int pages = max(end - begin, 0);
  if (threadIdx.x < pages)
    shared.base[threadIdx.x] = p.table[from.table_begin + begin + threadIdx.x];
  if (threadIdx.x < kNumKeyDepths) shared.key_pages[threadIdx.x] = 0;
  if (threadIdx.x < kNumValueDepths) shared.value_pages[threadIdx.x] = 0;
  __syncthreads();
  const PageLayout::Section& section = p.layout.value_summary;
  constexpr int kPieces = Shared::kSummaryBytes / 16;
  for (int i = threadIdx.x; i < pages * kPieces; i += kAttendThreads) {
    CopyAsync16(shared.summaries[i / kPieces] + i % kPieces * 16,
                p.pool + static_cast<int64_t>(shared.base[i / kPieces]) * kPageAlignment +
                    section.offset + head * section.bytes + i % kPieces * 16);
  }
  CommitCopies();
  WaitForDependencies();
  LaunchDependents();
  const int64_t slot = head_index * w.attend_chunks + chunk;
  GlobalLse<Traits>(p, w, head_index, shared);
  const float theta = from.decision.policy == Policy::kBudget
                          ? reinterpret_cast<const float*>(p.workspace + w.theta)[head_index]
                          : from.decision.theta;
  WaitCopies<0>();
  __syncthreads();
  DecidePages<Traits>(p, w, from, s, head_index, theta, begin, end, shared);
  int count = 0;
#pragma unroll
  for (int i = 0; i < kAttendWarps; ++i) count += shared.warp_count[i];

  float out[Traits::kTiles][4];
#pragma unroll
  for (int i = 0; i < Traits::kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) out[i][e] = 0;
  }
  float mass = 0;
  AttendPages<Traits>(p, s, head_index, begin, count, warp, lane, shared, out, &mass);
  if (lane % 4 == 0) shared.state[warp][lane / 4][0] += mass;
  __syncthreads();  // every warp is done with its stages: they become partial outputs
#pragma unroll
  for (int i = 0; i < Traits::kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = lane % 4 * 2 + e % 2, channel = 16 * i + lane / 4 + (e >= 2 ? 8 : 0);
      reinterpret_cast<float*>(&shared.warps[warp])[column * kD + channel] = out[i][e];
    }
  }
  __syncthreads();

  float* partial = reinterpret_cast<float*>(p.workspace + w.partial) + slot * w.columns * 2 * kD;
  float squares[kTileColumns];
  AddMeans<Traits>(p, pages, shared, partial, squares);
#pragma unroll
  for (int n = 0; n < kTileColumns; ++n) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      squares[n] += __shfl_xor_sync(0xffffffffu, squares[n], step);
    }
    if (lane == 0) shared.mean_squares[warp][n] = squares[n];
  }
  __syncthreads();
  if (threadIdx.x < kTileColumns) {
    const int n = threadIdx.x;
    AttendState state{};
    for (int i = 0; i < kAttendWarps; ++i) {
      state.mass += shared.state[i][n][0];
      state.entropy += shared.state[i][n][1];
      state.weight += shared.state[i][n][2];
      state.rest += shared.state[i][n][3];
      state.mean_squares += shared.mean_squares[i][n];
    }
    reinterpret_cast<AttendState*>(p.workspace + w.state)[slot * w.columns + n] = state;
  }
  HeadDecision& decision = p.decisions[head_index];
  if (threadIdx.x < kNumKeyDepths && shared.key_pages[threadIdx.x] > 0) {
    atomicAdd(&decision.key_pages[threadIdx.x], shared.key_pages[threadIdx.x]);
  }
  if (threadIdx.x < kNumValueDepths && shared.value_pages[threadIdx.x] > 0) {
    atomicAdd(&decision.value_pages[threadIdx.x], shared.value_pages[threadIdx.x]);
  }
  if (threadIdx.x == 0) {
    int read = 0;
    for (int i = 0; i < kNumValueDepths; ++i) read += shared.value_pages[i];
    AddBytes(&decision.value_bytes, static_cast<int64_t>(read) * Shared::kSummaryBytes);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

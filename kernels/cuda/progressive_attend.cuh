#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

// Attend: the values of the pages that select listed, and their keys' finer planes.
//   out = sum over attended tokens exp2(s - L) x_b(v)
//   x_b(code) r = (sum_i m_i 4^-i / 2 + 2^-b - 1) r         m_i: 2-bit plane i, most significant
//   first
// L is the estimated global LSE, the same for every unit of a head, so partial results just add up.
//
// A CTA takes a unit of up to kUnitPages pages, whichever head they are of, a warp a page: all that
// it needs of the page is brought by bulk copies at once. The warps' sums become one partial
// output. Values enter the MMA transposed: channels are its M, tokens its K, columns its N; 2-bit
// fields enter in place as FP16 subnormals, and the powers of 4 that their places add are taken out
// of B (fields of token + 8) and of the sums (channels + 8). grid: as many CTAs as the device
// holds; further column tiles find the planes in L2.

#include "kernels/cuda/progressive_values.cuh"

namespace adaattn {

inline constexpr int kAttendThreads = kUnitPages * 32;
ADAATTN_HD constexpr int32_t AttendCtasPerSm(int32_t head_dim) { return head_dim <= 128 ? 4 : 2; }

// What of an attended page is copied, in the order in which it stands in a warp's buffer.
enum AttendPart : int {
  kScoresLow = 0,
  kScoresHigh = 1,
  kValueScales = 2,
  kValuePlane = 3,  // 3..6
  kKeyScales = 7,
  kKeyFine = 8,  // 8, 9
  kNumAttendParts = 10
};

// A warp's buffer for one page.
template <class Traits>
struct AttendBuffer {
  static constexpr int kScoreBytes = kPageTokens * kTileColumns;  // half of them
  static constexpr int kValues = 2 * kScoreBytes;
  static constexpr int kFixedBytes = kValues + Traits::kValueScaleBytes;
  static constexpr int kBytes = kFixedBytes + 6 * Traits::kPlaneBytes + Traits::kHeadDim;
  static constexpr int kSumBytes = Traits::kTiles * 32 * 16;  // the warp's sums, once it is done
  static_assert(kBytes >= kSumBytes, "sums take the place of the page");
  __host__ __device__ static constexpr int Keys(const PackedPage& page) {
    return kFixedBytes + page.value_planes * Traits::kPlaneBytes;
  }
};

template <class Traits>
struct AttendShared {
  struct Warp {
    alignas(16) std::byte page[AttendBuffer<Traits>::kBytes];
    alignas(16) __half ranges[Traits::kHeadDim];  // of channels, spread for the MMA
    // Of tokens, relative to the page's largest; a 16th of it for rows 8..15 of an MMA's K.
    alignas(16) float token_ranges[kPageTokens * Traits::kValueGroups];
    float mass[kTileColumns];
    alignas(8) uint64_t barrier;
  };
  Warp warps[kUnitPages];
};

// The packed scores of a page and the maximum that they are relative to, column lane / 4.
struct PageScores {
  uint32_t packed[8];
  float max;
};

// Spreads the scale bytes [64][groups] of a page's tokens over ranges [groups][64], relative to the
// largest, which it returns as its byte.
template <class Traits>
__device__ __forceinline__ uint32_t SpreadTokenRanges(const std::byte* scales, float* ranges,
                                                      int lane) {
  constexpr int kGroups = Traits::kValueGroups, kWords = Traits::kValueScaleBytes / 4;
  constexpr int kEach = (kWords + 31) / 32;
  uint32_t codes[kEach], top = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + 32 * i;
    codes[i] = at < kWords ? reinterpret_cast<const uint32_t*>(scales)[at] : 0;
    top = __vmaxu4(top, codes[i]);
  }
  top = __vmaxu4(top, top >> 16);
  top = __reduce_max_sync(0xffffffffu, max(top & 255u, top >> 8 & 255u));
  // A byte under 0x4b000000 is 2^23 more than itself; the product and the sum below are exact.
  const float base = -2097152.0f - 0.25f * static_cast<float>(top);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + 32 * i;
    if (at >= kWords) break;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int token = (4 * at + j) / kGroups, group = (4 * at + j) % kGroups;
      const float code = __uint_as_float(__byte_perm(codes[i], 0x4b000000u, 0x7440u + j));
      ranges[group * kPageTokens + token] =
          Exp2(fmaf(code, 0.25f, (token & 8) == 0 ? base : base - 4.0f));
    }
  }
  return top;
}

// Adds one page whose value scales and planes stand at `data`.
template <class Traits>
__device__ __forceinline__ void AttendValues(float softcap, const std::byte* data, int value_bits,
                                             const PageScores& scores, float lse, int lane,
                                             float* token_ranges, float (&out)[Traits::kTiles][4],
                                             float* mass) {
  const uint32_t top = SpreadTokenRanges<Traits>(data, token_ranges, lane);
  __syncwarp();
  float2 probability[8];
  const float base = SoftCap<Traits>(scores.max, softcap);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float2 y = HalvesToFloats(scores.packed[i]);
    if (softcap != 0) {
      y.x = SoftCap<Traits>(y.x + scores.max, softcap) - base;
      y.y = SoftCap<Traits>(y.y + scores.max, softcap) - base;
    }
    probability[i] =
        scores.max == -INFINITY ? make_float2(0, 0) : make_float2(Exp2(y.x), Exp2(y.y));
    sum += probability[i].x + probability[i].y;
  }
  const float weight = scores.max == -INFINITY ? 0.0f : Exp2(base - lse);
  *mass = QuadSum(sum) * weight;
  const float scaled = weight * RangeOf(top);
  const float weights[2] = {__shfl_sync(0xffffffffu, scaled, lane % 4 * 8),
                            __shfl_sync(0xffffffffu, scaled, lane % 4 * 8 + 4)};
  AddValues<Traits>(data + Traits::kValueScaleBytes, token_ranges, value_bits, probability, weights,
                    lane, out);
}

// One page for one tile of columns, by a warp.
template <class Traits>
struct PageAttender {
  using Buffer = AttendBuffer<Traits>;
  const ProgressiveArgs& p;
  typename AttendShared<Traits>::Warp& mine;
  int lane;
  // The part that this lane copies: where in a page's memory, how much of it.
  uint32_t part_offset = 0, part_bytes = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ PageAttender(const ProgressiveArgs& args,
                                          typename AttendShared<Traits>::Warp& warp, int lane_index)
      : p(args), mine(warp), lane(lane_index) {
    PageLayout::Section part;
    if (lane == kValueScales) part = p.layout.value_scales;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (lane == kValuePlane + i) part = p.layout.value_plane[i];
    }
    if (lane == kKeyScales) part = p.layout.key_scales;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (lane == kKeyFine + i) part = p.layout.key_fine[i];
    }
    part_offset = static_cast<uint32_t>(part.offset);
    part_bytes = static_cast<uint32_t>(part.bytes);
  }

  __device__ __forceinline__ static int KeyTiles(const PackedPage& page) {
    return min(page.key_chunks * Traits::kChunkTiles, Traits::kTiles);
  }
  __device__ __forceinline__ static uint32_t KeyBytes(const PackedPage& page) {
    return page.fine_planes * KeyTiles(page) * kPlaneTileBytes;
  }
  __device__ __forceinline__ static uint32_t ValueBytes(const PackedPage& page) {
    return Traits::kValueScaleBytes + page.value_planes * Traits::kPlaneBytes;
  }

  // Starts the copies of a page; a lane a part. `columns`: of the tile.
  __device__ __forceinline__ void Fetch(const PackedPage& page, uint32_t id, int64_t page_index,
                                        int head, int column_tile, int columns) const {
    // Scores that exist: a lane's 16 bytes for each of the 4 lanes of a column, twice.
    const uint32_t score_bytes = columns * (Buffer::kScoreBytes / kTileColumns);
    const uint32_t barrier = SharedAddress(&mine.barrier);
    if (lane == 0) {
      ArriveExpectBytes(barrier, 2 * score_bytes + ValueBytes(page) + KeyBytes(page) +
                                     (page.fine_planes > 0 ? Traits::kHeadDim : 0));
    }
    __syncwarp();
    const int keys = Buffer::Keys(page);
    const std::byte* from =
        p.pool + static_cast<int64_t>(id) * kPageAlignment + part_offset + head * part_bytes;
    uint32_t bytes = part_bytes;
    int target = Buffer::kValues;
    bool wanted = true;
    if (lane < kValueScales) {
      const int64_t tile = page_index * (p.work.columns / kTileColumns) + column_tile;
      from = p.workspace + p.work.scores + (2 * tile + lane) * Buffer::kScoreBytes;
      target = lane * Buffer::kScoreBytes;
      bytes = score_bytes;
    } else if (lane >= kKeyFine) {
      target = keys + Traits::kHeadDim + (lane - kKeyFine) * Traits::kPlaneBytes;
      bytes = static_cast<uint32_t>(KeyTiles(page) * kPlaneTileBytes);
      wanted = lane - kKeyFine < page.fine_planes;
    } else if (lane == kKeyScales) {
      target = keys;
      wanted = page.fine_planes > 0;
    } else if (lane >= kValuePlane) {
      target = Buffer::kFixedBytes + (lane - kValuePlane) * Traits::kPlaneBytes;
      wanted = lane - kValuePlane < page.value_planes;
    }
    if (wanted && lane < kNumAttendParts) {
      BulkCopy(SharedAddress(mine.page + target), from, bytes, barrier);
    }
  }

  // The sums of the page that has been fetched; `max` is its largest score in column lane / 4.
  __device__ __forceinline__ void Attend(const PackedPage& page, int64_t head_index,
                                         int column_tile, int columns, float softcap, float max,
                                         float lse, float (&out)[Traits::kTiles][4], float* mass) {
    const std::byte* data = mine.page;
    WaitBarrier(SharedAddress(&mine.barrier), parity);
    parity ^= 1;
    PageScores scores;
    uint4 low = make_uint4(0, 0, 0, 0), high = low;
    scores.max = -INFINITY;
    if (lane / 4 < columns) {
      low = reinterpret_cast<const uint4*>(data)[lane];
      high = reinterpret_cast<const uint4*>(data + Buffer::kScoreBytes)[lane];
      scores.max = max;
    }
    const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) scores.packed[i] = words[i];
    if (page.fine_planes > 0) {
      const std::byte* keys = data + Buffer::Keys(page);
      const float top = SpreadKeyRanges<Traits>(keys, mine.ranges, lane);
      __syncwarp();
      const QueryFragments<Traits> query(p, head_index, page.basis_run, column_tile);
      RefineScores<Traits>(keys + Traits::kHeadDim, mine.ranges, query.halves, query.unit * top,
                           page.fine_planes, KeyTiles(page), lane, scores.packed);
    }
    AttendValues<Traits>(softcap, data + Buffer::kValues, 2 * page.value_planes, scores, lse, lane,
                         mine.token_ranges, out, mass);
  }
};

// Adds up the warps' sums, which stand in the place of their pages, as the unit's partial output.
template <class Traits>
__device__ __forceinline__ void StoreUnit(const ProgressiveArgs& p, int slot, int pages,
                                          int column_tile, int columns,
                                          const AttendShared<Traits>& shared) {
  const int tiles = p.work.columns / kTileColumns;
  auto* partial = reinterpret_cast<float4*>(p.workspace + p.work.partial) +
                  (int64_t{slot} * tiles + column_tile) * Traits::kTiles * 32;
#pragma unroll
  for (int at = threadIdx.x; at < Traits::kTiles * 32; at += kAttendThreads) {
    if (at % 4 * 2 >= columns) continue;
    float4 sum = reinterpret_cast<const float4*>(shared.warps[0].page)[at];
#pragma unroll
    for (int i = 1; i < kUnitPages; ++i) {
      if (i >= pages) break;
      const float4 x = reinterpret_cast<const float4*>(shared.warps[i].page)[at];
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    partial[at] = sum;
  }
  if (threadIdx.x < kTileColumns) {
    float mass = shared.warps[0].mass[threadIdx.x];
    for (int i = 1; i < pages; ++i) mass += shared.warps[i].mass[threadIdx.x];
    reinterpret_cast<float*>(
        p.workspace +
        p.work.mass)[int64_t{slot} * p.work.columns + column_tile * kTileColumns + threadIdx.x] =
        mass;
  }
}

// One unit for one tile of columns; `word`: word `lane` of the unit, in every warp.
template <class Traits>
__device__ __forceinline__ void AttendUnitPages(const ProgressiveArgs& p, uint32_t word, int tile,
                                                PageAttender<Traits>& attender,
                                                AttendShared<Traits>& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int head_index = __shfl_sync(0xffffffffu, word, 0);
  const int slot = __shfl_sync(0xffffffffu, word, 1), count = __shfl_sync(0xffffffffu, word, 2);
  const int columns =
      min(static_cast<int>(__shfl_sync(0xffffffffu, word, 3)) - tile * kTileColumns, kTileColumns);
  if (columns <= 0) return;
  if (warp < count) {
    const uint32_t id = __shfl_sync(0xffffffffu, word, 4 + warp);
    const PackedPage page = UnpackPage(__shfl_sync(0xffffffffu, word, 4 + kUnitPages + warp));
    const int64_t page_index = int64_t{head_index} * p.max_sealed + page.page;
    attender.Fetch(page, id, page_index, head_index % p.shape.num_kv_heads, tile, columns);
    const int column = tile * kTileColumns + lane / 4;
    const float lse = reinterpret_cast<const float*>(
        p.workspace + p.work.global_lse)[int64_t{head_index} * p.work.columns + column];
    const float max = PageStatsOf(p, head_index, page.page)[column].x;
    float softcap = 0;
    if constexpr (Traits::kSoftCap) {
      softcap = p.sequences[head_index / p.shape.num_kv_heads].softcap;
    }
    float out[Traits::kTiles][4], mass = 0;
#pragma unroll
    for (int i = 0; i < Traits::kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] = 0;
    }
    attender.Attend(page, head_index, tile, columns, softcap, max, lse, out, &mass);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Traits::kTiles; ++i) {
      reinterpret_cast<float4*>(shared.warps[warp].page)[i * 32 + lane] =
          make_float4(out[i][0], out[i][1], out[i][2], out[i][3]);
    }
    if (lane % 4 == 0) shared.warps[warp].mass[lane / 4] = mass;
    if (tile == 0 && lane == 0) {
      HeadDecision& decision = p.decisions[head_index];
      if (page.fine_planes > 0) AddBytes(&decision.key_bytes, attender.KeyBytes(page));
      AddBytes(&decision.value_bytes, attender.ValueBytes(page));
    }
  }
  __syncthreads();
  StoreUnit<Traits>(p, slot, count, tile, columns, shared);
  FenceAsyncShared();
  __syncthreads();
}

template <class Traits>
__global__ void __launch_bounds__(kAttendThreads, AttendCtasPerSm(Traits::kHeadDim))
    ProgressiveAttendKernel(const __grid_constant__ ProgressiveArgs p) {
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<AttendShared<Traits>*>(shared_bytes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto& mine = shared.warps[warp];
  if (lane == 0) {
    InitBarrier(SharedAddress(&mine.barrier), 1);
    FenceBarrierInit();
  }
  __syncwarp();
  PageAttender<Traits> attender(p, mine, lane);
  constexpr int kWords = sizeof(AttendUnit) / 4;
  const auto* units = reinterpret_cast<const uint32_t*>(p.workspace + p.work.units) + lane;
  const int tiles = p.work.columns / kTileColumns;
  const int most = p.num_sequences * p.shape.num_kv_heads * p.work.chunks * kSelectUnits * tiles;
  WaitForDependencies();
  LaunchDependents();
  // The next unit's words come while this one is attended, whether there is one or not.
  const auto load = [&](int i) {
    return lane < kWords && i < most ? units[int64_t{i / tiles} * kWords] : 0;
  };
  int i = blockIdx.x;
  uint32_t word = load(i);
  const int count = *reinterpret_cast<const int32_t*>(p.workspace + p.work.num_units) * tiles;
  for (; i < count; i += gridDim.x) {
    const uint32_t next = load(i + gridDim.x);
    AttendUnitPages<Traits>(p, word, i % tiles, attender, shared);
    word = next;
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

// Attend: the values of the pages that select listed, and their keys' finer planes.
//   out = sum over attended tokens exp2(s - L) x_b(v)
//   x_b(code) r = (sum_i m_i 4^-i / 2 + 2^-b - 1) r         m_i: 2-bit plane i, most significant
//   first
// L is the estimated global LSE, the same for every unit of a head, so partial results just add up.
//
// A warp takes a unit of up to kUnitPages pages, whichever head they are of, has all that it needs
// of them (or as much as its buffer holds) brought by bulk copies at once, and leaves one partial
// output. Values enter the MMA transposed: channels are its M, tokens its K, columns its N; 2-bit
// fields enter in place as FP16 subnormals, and the powers of 4 that their places add are taken out
// of B (fields of token + 8) and of the sums (channels + 8).
// grid: as many CTAs as the device holds; further column tiles find the planes in L2.

#include "kernels/cuda/progressive_values.cuh"

namespace adaattn {

inline constexpr int kAttendWarps = 4;
inline constexpr int kAttendThreads = kAttendWarps * 32;
ADAATTN_HD constexpr int32_t AttendCtasPerSm(int32_t head_dim) {
  return head_dim <= 96 ? 4 : head_dim <= 128 ? 3 : 2;
}

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

template <class Traits>
struct AttendBuffer {
  static constexpr int kScoreBytes = kPageTokens * kTileColumns;  // half of them
  static constexpr int kValues = 2 * kScoreBytes;
  static constexpr int kFixedBytes = kValues + Traits::kValueScaleBytes;
  static constexpr int kMostBytes = kFixedBytes + 6 * Traits::kPlaneBytes + Traits::kHeadDim;
  static constexpr int kUsualBytes = kUnitPages * (kFixedBytes + Traits::kPlaneBytes);
  // Any single page, or a unit of pages at 2 bits; where there is room, a few deeper ones too.
  static constexpr int kBytes = Traits::kHeadDim == 128    ? 16384
                                : kMostBytes > kUsualBytes ? kMostBytes
                                                           : kUsualBytes;
  static_assert(kBytes >= kMostBytes && kBytes >= kUsualBytes, "at least one page at a time");
  __host__ __device__ static constexpr int PageBytes(const PackedPage& page) {
    return kFixedBytes + (page.value_planes + page.fine_planes) * Traits::kPlaneBytes +
           (page.fine_planes > 0 ? Traits::kHeadDim : 0);
  }
};

template <class Traits>
struct AttendShared {
  struct Warp {
    alignas(16) std::byte pages[AttendBuffer<Traits>::kBytes];
    alignas(16) __half ranges[Traits::kHeadDim];  // of channels, spread for the MMA
    alignas(16) float token_ranges[kPageTokens * Traits::kValueGroups];
    alignas(8) uint64_t barrier;
  };
  Warp warps[kAttendWarps];
};

// The packed scores of a page and the maximum that they are relative to, column lane / 4.
struct PageScores {
  uint32_t packed[8];
  float max;
};

// Adds one page whose value scales and planes stand at `data`.
template <class Traits>
__device__ __forceinline__ void AttendValues(float softcap, const std::byte* data, int value_bits,
                                             const PageScores& scores, float lse, int lane,
                                             typename AttendShared<Traits>::Warp& mine,
                                             float (&out)[Traits::kTiles][4], float* mass) {
  // Token ranges relative to the page's largest, so that probability times range fits FP16.
  uint32_t top = 0;
  const auto* scales = reinterpret_cast<const uint8_t*>(data);
#pragma unroll
  for (int i = lane; i < Traits::kValueScaleBytes; i += 32) top = umax(top, scales[i]);
  top = __reduce_max_sync(0xffffffffu, top);
#pragma unroll
  for (int i = lane; i < Traits::kValueScaleBytes; i += 32) {
    mine.token_ranges[i % Traits::kValueGroups * kPageTokens + i / Traits::kValueGroups] =
        Exp2(0.25f * (static_cast<float>(scales[i]) - static_cast<float>(top)));
  }
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
  *mass += QuadSum(sum) * weight;
  const float scaled = weight * RangeOf(top);
  const float weights[2] = {__shfl_sync(0xffffffffu, scaled, lane % 4 * 8),
                            __shfl_sync(0xffffffffu, scaled, lane % 4 * 8 + 4)};
  AddValues<Traits>(data + Traits::kValueScaleBytes, mine.token_ranges, value_bits, probability,
                    weights, lane, out);
  __syncwarp();
}

// One unit for one tile of columns.
template <class Traits>
struct UnitAttender {
  using Buffer = AttendBuffer<Traits>;
  const ProgressiveArgs& p;
  typename AttendShared<Traits>::Warp& mine;
  int lane;
  uint32_t parity = 0;
  // The part that this lane copies: where in a page's memory, how much of it.
  uint32_t part_offset = 0, part_bytes = 0;
  // The unit.
  int64_t head_index = 0;
  int head = 0, column_tile = 0, columns = 0;  // columns: of the tile
  float softcap = 0;

  __device__ __forceinline__ UnitAttender(const ProgressiveArgs& args,
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

  __device__ __forceinline__ int KeyTiles(const PackedPage& page) const {
    return min(page.key_chunks * Traits::kChunkTiles, Traits::kTiles);
  }
  // Bytes of scores that exist: a lane's 16 for each of its 4 lanes a column, twice.
  __device__ __forceinline__ uint32_t ScoreBytes() const {
    return static_cast<uint32_t>(columns) * (Buffer::kScoreBytes / kTileColumns);
  }
  __device__ __forceinline__ uint32_t KeyBytes(const PackedPage& page) const {
    return page.fine_planes * KeyTiles(page) * kPlaneTileBytes;
  }
  __device__ __forceinline__ uint32_t ValueBytes(const PackedPage& page) const {
    return Traits::kValueScaleBytes + page.value_planes * Traits::kPlaneBytes;
  }
  __device__ __forceinline__ uint32_t CopiedBytes(const PackedPage& page) const {
    return 2 * ScoreBytes() + ValueBytes(page) + KeyBytes(page) +
           (page.fine_planes > 0 ? Traits::kHeadDim : 0);
  }

  // Starts the copies of one page to `at` of the buffer; a lane a part.
  __device__ __forceinline__ void Fetch(const PackedPage& page, uint32_t id, int at) const {
    const int plane = lane - kValuePlane, fine = lane - kKeyFine;
    const int keys = Buffer::kFixedBytes + page.value_planes * Traits::kPlaneBytes;
    const std::byte* from =
        p.pool + static_cast<int64_t>(id) * kPageAlignment + part_offset + head * part_bytes;
    uint32_t bytes = part_bytes;
    int target = 0;
    bool wanted = true;
    if (lane < kValueScales) {
      const int64_t tile =
          (head_index * p.max_sealed + page.page) * (p.work.columns / kTileColumns) + column_tile;
      from = p.workspace + p.work.scores + (2 * tile + lane) * Buffer::kScoreBytes;
      target = lane * Buffer::kScoreBytes;
      bytes = ScoreBytes();
    } else if (lane == kValueScales) {
      target = Buffer::kValues;
    } else if (lane < kKeyScales) {
      target = Buffer::kFixedBytes + plane * Traits::kPlaneBytes;
      wanted = plane < page.value_planes;
    } else if (lane == kKeyScales) {
      target = keys;
      wanted = page.fine_planes > 0;
    } else {
      target = keys + Traits::kHeadDim + fine * Traits::kPlaneBytes;
      bytes = static_cast<uint32_t>(KeyTiles(page) * kPlaneTileBytes);
      wanted = fine < page.fine_planes;
    }
    if (wanted && lane < kNumAttendParts) {
      BulkCopy(SharedAddress(mine.pages + at + target), from, bytes, SharedAddress(&mine.barrier));
    }
  }

  // Adds a page that has arrived at `data`; `max` is its largest score in column lane / 4.
  __device__ __forceinline__ void Attend(const PackedPage& page, const std::byte* data, float max,
                                         float lse, float (&out)[Traits::kTiles][4], float* mass) {
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
      const std::byte* keys = data + Buffer::kFixedBytes + page.value_planes * Traits::kPlaneBytes;
      const float top = SpreadKeyRanges<Traits>(keys, mine.ranges, lane);
      __syncwarp();
      const QueryFragments<Traits> query(p, head_index, page.basis_run, column_tile);
      RefineScores<Traits>(keys + Traits::kHeadDim, mine.ranges, query.halves, query.unit * top,
                           page.fine_planes, KeyTiles(page), lane, scores.packed);
      __syncwarp();
    }
    AttendValues<Traits>(softcap, data + Buffer::kValues, 2 * page.value_planes, scores, lse, lane,
                         mine, out, mass);
  }

  __device__ __forceinline__ void Store(int64_t slot, const float (&out)[Traits::kTiles][4],
                                        float mass) const {
    const int tiles = p.work.columns / kTileColumns;
    auto* partial = reinterpret_cast<float4*>(p.workspace + p.work.partial) +
                    (slot * tiles + column_tile) * Traits::kTiles * 32 + lane;
    if (lane % 4 * 2 < columns) {
#pragma unroll
      for (int i = 0; i < Traits::kTiles; ++i) {
        partial[i * 32] = make_float4(out[i][0], out[i][1], out[i][2], out[i][3]);
      }
    }
    if (lane % 4 == 0) {
      reinterpret_cast<float*>(
          p.workspace +
          p.work.mass)[slot * p.work.columns + column_tile * kTileColumns + lane / 4] = mass;
    }
  }

  // `word`: word `lane` of the unit.
  __device__ __forceinline__ void Run(uint32_t word, int tile) {
    head_index = __shfl_sync(0xffffffffu, word, 0);
    const int slot = __shfl_sync(0xffffffffu, word, 1), count = __shfl_sync(0xffffffffu, word, 2);
    const int sequence = static_cast<int>(head_index / p.shape.num_kv_heads);
    head = static_cast<int>(head_index % p.shape.num_kv_heads);
    column_tile = tile;
    columns =
        min(kTileColumns, p.shape.group_size() * p.sequences[sequence].q_len - tile * kTileColumns);
    if (columns <= 0) return;
    if constexpr (Traits::kSoftCap) softcap = p.sequences[sequence].softcap;
    const int column = tile * kTileColumns + lane / 4;
    const float lse = reinterpret_cast<const float*>(
        p.workspace + p.work.global_lse)[head_index * p.work.columns + column];
    float max[kUnitPages];
#pragma unroll
    for (int i = 0; i < kUnitPages; ++i) {
      const PackedPage page = UnpackPage(__shfl_sync(0xffffffffu, word, 4 + kUnitPages + i));
      max[i] = i < count ? PageStatsOf(p, head_index, page.page)[column].x : -INFINITY;
    }
    float out[Traits::kTiles][4], mass = 0;
#pragma unroll
    for (int i = 0; i < Traits::kTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] = 0;
    }
    uint32_t key_bytes = 0, value_bytes = 0;
    for (int first = 0; first < count;) {
      // As many as fit the buffer at once.
      int last = first, used = 0;
      uint32_t copied = 0;
      while (last < count) {
        const PackedPage page = UnpackPage(__shfl_sync(0xffffffffu, word, 4 + kUnitPages + last));
        if (used + Buffer::PageBytes(page) > Buffer::kBytes) break;
        used += Buffer::PageBytes(page);
        copied += CopiedBytes(page);
        key_bytes += KeyBytes(page);
        value_bytes += ValueBytes(page);
        ++last;
      }
      const uint32_t barrier = SharedAddress(&mine.barrier);
      if (lane == 0) ArriveExpectBytes(barrier, copied);
      __syncwarp();
      for (int i = first, at = 0; i < last; ++i) {
        const PackedPage page = UnpackPage(__shfl_sync(0xffffffffu, word, 4 + kUnitPages + i));
        Fetch(page, __shfl_sync(0xffffffffu, word, 4 + i), at);
        at += Buffer::PageBytes(page);
      }
      WaitBarrier(barrier, parity);
      parity ^= 1;
      int at = 0;
#pragma unroll
      for (int i = 0; i < kUnitPages; ++i) {
        if (i < first || i >= last) continue;
        const PackedPage page = UnpackPage(__shfl_sync(0xffffffffu, word, 4 + kUnitPages + i));
        Attend(page, mine.pages + at, max[i], lse, out, &mass);
        at += Buffer::PageBytes(page);
      }
      first = last;
      FenceAsyncShared();
      __syncwarp();
    }
    Store(slot, out, mass);
    if (tile == 0 && lane == 0) {
      HeadDecision& decision = p.decisions[head_index];
      if (key_bytes > 0) AddBytes(&decision.key_bytes, key_bytes);
      AddBytes(&decision.value_bytes, value_bytes);
    }
  }
};

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
  UnitAttender<Traits> attender(p, mine, lane);
  const auto* units = reinterpret_cast<const uint32_t*>(p.workspace + p.work.units);
  WaitForDependencies();
  LaunchDependents();
  const int tiles = p.work.columns / kTileColumns;
  const int count = *reinterpret_cast<const int32_t*>(p.workspace + p.work.num_units) * tiles;
  // Neighbouring units to different multiprocessors.
  for (int i = warp * gridDim.x + blockIdx.x; i < count; i += kAttendWarps * gridDim.x) {
    constexpr int kWords = sizeof(AttendUnit) / 4;
    const uint32_t word = lane < kWords ? units[int64_t{i / tiles} * kWords + lane] : 0;
    attender.Run(word, i % tiles);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_STREAM_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_STREAM_CUH_

// How the pages of attend's slots come to shared memory: what of a page is brought, the rings, and
// who fills them.

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/page_ring.h"
#include "kernels/cuda/progressive_slice.cuh"

namespace adaattn {

inline constexpr int kAttendRoom = 168 * 1024 / kAttendCtasPerSm;  // bytes of a CTA's rings
inline constexpr int kAttendPages = 1024 / kAttendCtasPerSm;       // of a slice, found at a time

// What of an attended page is brought to shared memory, in this order.
enum AttendPart : int {
  kStats = 0,      // of the tile's columns
  kScoresLow = 1,  // of columns that exist: 16 bytes of each of the column's four lanes
  kScoresHigh = 2,
  kValueScales = 3,
  kValuePlanes = 4,  // 4..7
  kKeyScales = 8,    // where finer key planes are read
  kKeyFine = 9,      // 9, 10
  kNumAttendParts = 11
};

// Where the parts of a page stand and how long they are.
template <class Traits>
struct AttendLayout {
  PackedPage page;
  int columns;  // of the tile

  __device__ __forceinline__ int key_tiles() const {
    return min(page.key_chunks * Traits::kChunkTiles, Traits::kTiles);
  }
  __device__ __forceinline__ int scores() const { return kTileColumns * 16; }
  __device__ __forceinline__ int score_bytes() const { return columns * 64; }  // half of them
  __device__ __forceinline__ int value_scales() const { return scores() + 2 * score_bytes(); }
  __device__ __forceinline__ int values() const {
    return value_scales() + Traits::kValueScaleBytes;
  }
  __device__ __forceinline__ int key_scales() const {
    return values() + page.value_planes * Traits::kPlaneBytes;
  }
  __device__ __forceinline__ int keys() const { return key_scales() + Traits::kHeadDim; }
  __device__ __forceinline__ int key_bytes() const {
    return page.fine_planes * key_tiles() * kPlaneTileBytes;
  }
  __device__ __forceinline__ int value_bytes() const {
    return Traits::kValueScaleBytes + page.value_planes * Traits::kPlaneBytes;
  }
  __device__ __forceinline__ int bytes() const {
    return page.fine_planes > 0 ? keys() + key_bytes() : key_scales();
  }
};

// What the slots of a CTA share: kRoom bytes of rings for at most kPages pages. `kCtasPerSm`: that
// share a multiprocessor's slots.
template <class Traits, int kRoom, int kPages, int kCtasPerSm = 1>
struct AttendRings {
  static constexpr int kWarps = AttendWarps(Traits::kHeadDim) / kCtasPerSm;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kSlots = AttendSlots(Traits::kHeadDim) / kCtasPerSm;
  static_assert(kSlots * kCtasPerSm == AttendSlots(Traits::kHeadDim),
                "as many as the workspace has places for");
  static constexpr int kRingBytes = kRoom / kSlots / 128 * 128;
  alignas(128) std::byte room[kSlots][kRingBytes];
  alignas(16) uint2 query[kSlots][Traits::kTiles * 32];  // of the slot's head and a basis
  alignas(16) __half ranges[kWarps][Traits::kHeadDim];   // spread for the MMA
  alignas(16) ListedPage page[kPages];
  RingPage ring[kSlots][kRingDepth];
  alignas(8) uint64_t full[kSlots][kRingDepth];
  static_assert(3 * kTileColumns * 16 + 2 * 512 + Traits::kValueScaleBytes +
                        6 * Traits::kPlaneBytes + Traits::kHeadDim <=
                    kRingBytes,
                "at least one page");

  __device__ __forceinline__ void InitBarriers() {
    if (threadIdx.x >= kSlots * kRingDepth) return;
    InitBarrier(SharedAddress(&full[0][threadIdx.x]), 1);
    FenceBarrierInit();
  }
};

// Of the attend kernel, whose pages have neighbours.
template <class Traits>
struct AttendShared : AttendRings<Traits, kAttendRoom, kAttendPages + 2, kAttendCtasPerSm> {
  SliceShared<AttendShared::kThreads, AttendShared::kSlots> slice;
  int place[kAttendPages + 2];  // in the lists
};

// Brings the pages of a slot, by one of its warps. `Rings`: an AttendRings.
template <class Traits, class Rings>
struct PageStreamer {
  static constexpr int kRingBytes = Rings::kRingBytes;
  const ProgressiveArgs& p;
  Rings& shared;
  int tile, lane, slot;
  PageRing ring;
  int next = 0;  // page of shared.page
  // What the lane copies of a page: its part and where that stands for page 0 of head 0.
  const std::byte* source = nullptr;
  int64_t stride = 0;  // from head to head; for what is in the workspace, from page to page

  __device__ __forceinline__ PageStreamer(const ProgressiveArgs& args, Rings& room, int column_tile,
                                          int of_lane, int of_slot)
      : p(args), shared(room), tile(column_tile), lane(of_lane), slot(of_slot) {
    const PageLayout& layout = p.layout;
    int64_t from = 0;
    if (lane == kStats) {
      from = p.work.stats + tile * kTileColumns * 16;
      stride = p.work.columns * 16;
    } else if (lane <= kScoresHigh) {
      from = p.work.scores + (tile * 2 + lane - kScoresLow) * 512;
      stride = p.work.columns * 128;
    } else if (lane == kValueScales) {
      from = layout.value_scales.offset;
      stride = Traits::kValueScaleBytes;
    } else if (lane < kKeyScales) {  // the planes of one kind follow one another
      stride = Traits::kPlaneBytes;
      from = layout.value_plane[0].offset +
             int64_t{lane - kValuePlanes} * p.shape.num_kv_heads * stride;
    } else if (lane == kKeyScales) {
      from = layout.key_scales.offset;
      stride = Traits::kHeadDim;
    } else {
      stride = Traits::kPlaneBytes;
      from = layout.key_fine[0].offset + int64_t{lane - kKeyFine} * p.shape.num_kv_heads * stride;
    }
    source = (lane <= kScoresHigh ? p.workspace : p.pool) + from;
  }

  // Starts the copies of as many of the slot's pages before `end` as there is room for.
  __device__ __forceinline__ void Fill(int end) {
    for (; next < end; ++next) {
      const ListedPage listed = shared.page[next];
      const AttendLayout<Traits> layout{UnpackPage(listed.packed), TileColumns(listed, tile)};
      const int all = layout.bytes();
      if (!ring.MakeRoom(all, kRingBytes, shared.ring[slot])) return;
      const uint32_t full = SharedAddress(&shared.full[slot][ring.fetched % kRingDepth]);
      if (lane == 0) {
        shared.ring[slot][ring.fetched % kRingDepth] = ring.Next();
        ArriveExpectBytes(full, all);
      }
      __syncwarp();
      Copy(listed, layout, full);
      ring.Add(all);
    }
  }

  __device__ __forceinline__ void Copy(const ListedPage& listed, const AttendLayout<Traits>& layout,
                                       uint32_t full) const {
    const PackedPage& page = layout.page;
    const int value = lane - kValuePlanes, fine = lane - kKeyFine;
    const int fine_bytes = layout.key_tiles() * kPlaneTileBytes;
    // Without branches: lanes go different ways.
    int bytes = fine < page.fine_planes && lane < kNumAttendParts ? fine_bytes : 0;
    int target = layout.keys() + fine * fine_bytes;
    const auto take = [&](bool mine, int own_bytes, int own_target) {
      bytes = mine ? own_bytes : bytes;
      target = mine ? own_target : target;
    };
    take(lane == kKeyScales, page.fine_planes > 0 ? Traits::kHeadDim : 0, layout.key_scales());
    take(lane < kKeyScales, value < page.value_planes ? Traits::kPlaneBytes : 0,
         layout.values() + value * Traits::kPlaneBytes);
    take(lane == kValueScales, Traits::kValueScaleBytes, layout.value_scales());
    take(lane <= kScoresHigh, layout.score_bytes(),
         layout.scores() + (lane - kScoresLow) * layout.score_bytes());
    take(lane == kStats, layout.scores(), 0);
    int64_t index = listed.head;
    const std::byte* from = source + static_cast<int64_t>(listed.id) * kPageAlignment;
    if (lane <= kScoresHigh) {
      index = int64_t{listed.head_index} * p.max_sealed + page.page;
      from = source;
    }
    if (bytes > 0) {
      BulkCopy(SharedAddress(shared.room[slot] + ring.offset + target), from + index * stride,
               static_cast<uint32_t>(bytes), full);
    }
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_STREAM_CUH_

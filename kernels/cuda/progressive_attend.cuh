#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

// Attend: the values of the pages that select listed, and their keys' finer planes.
//   out = sum over attended tokens exp2(s - L) x_b(v)
// L is the estimated global LSE. Partial results are relative to it and to a power of two of their
// own, since finer planes can move scores far from where four bits saw them.
// The chunks' lists, one behind the other, are cut into slices of equal cost, one a CTA, whichever
// heads they are of: heads with much to read keep no others waiting. A slot of warps, one for each
// group of values, takes every kSlots-th page of the slice; bulk copies bring what is read of its
// next few pages into a ring of its own. Sums are kept until the head changes. A slice's part of a
// head has a place of its own in the workspace, CTA + head: no two pairs share one, since both only
// grow along the lists. grid (multiprocessors, column tiles)

#include "kernels/cuda/progressive_stream.cuh"
#include "kernels/cuda/progressive_values.cuh"

namespace adaattn {

// The warps that share a slot meet.
template <int kWarps>
__device__ __forceinline__ void SyncSlot(int slot) {
  if constexpr (kWarps == 1) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;" ::"r"(slot + 1), "n"(32 * kWarps) : "memory");
  }
}

template <class Traits>
struct PageAttender {
  static constexpr int kGroups = Traits::kValueGroups;
  static constexpr int kWarps = AttendShared<Traits>::kWarps;
  static constexpr int kThreads = AttendShared<Traits>::kThreads;
  static constexpr int kSlots = AttendShared<Traits>::kSlots;
  static constexpr int kCount = 4 / kGroups;  // score tiles that a warp refines
  static_assert(kWarps % kGroups == 0, "the same warps for each group");
  const ProgressiveArgs& p;
  AttendShared<Traits>& shared;
  int tile, lane, warp;
  PageStreamer<Traits> streamer;     // of the slot; its last warp fills the ring
  int head_index = -1, columns = 0;  // columns: of the tile
  float softcap = 0;
  float out[Traits::kTilesPerGroup][4] = {};
  float mass = 0;                      // of column lane / 4; of the first group's warps
  float reference = -INFINITY;         // log2 of what mass and out are relative to, beside L
  int key_bytes = 0, value_bytes = 0;  // likewise

  __device__ __forceinline__ bool Fetches() const { return warp % kGroups == kGroups - 1; }

  // Goes on with the pages of another head. By the whole CTA.
  __device__ __forceinline__ void Enter(const ListedPage& page) {
    const int next = page.head_index;
    head_index = next;
    columns = TileColumns(page, tile);
    const ProgressiveSequence& s = p.sequences[next / p.shape.num_kv_heads];
    if constexpr (Traits::kSoftCap) softcap = s.softcap;
    constexpr int kPieces = Traits::kTiles * 32 / 2;
    for (int i = threadIdx.x; i < s.num_bases * kPieces; i += kThreads) {
      const int run = i / kPieces, piece = i % kPieces;
      CopyAsync16(&shared.query[run][2 * piece],
                  QueryFragments<Traits>(p, next, run, tile).halves + 2 * piece);
    }
    CommitCopies();
    if (static_cast<int>(threadIdx.x) < s.num_bases) {
      shared.unit[threadIdx.x] = QueryFragments<Traits>(p, next, threadIdx.x, tile).unit;
    }
    if (threadIdx.x < kTileColumns) {
      shared.lse[threadIdx.x] = reinterpret_cast<const float*>(
          p.workspace +
          p.work.global_lse)[int64_t{next} * p.work.columns + tile * kTileColumns + threadIdx.x];
    }
    WaitCopies<0>();
    __syncthreads();
  }

  // A page: the finer planes to its scores, in place.
  __device__ __forceinline__ void Refine(std::byte* data, const AttendLayout<Traits>& layout,
                                         int group) {
    const PackedPage& page = layout.page;
    const float top =
        SpreadKeyRanges<Traits>(data + layout.key_scales(), shared.ranges[warp], lane);
    __syncwarp();
    uint32_t delta[2 * kCount];
    RefineScores<kCount>(data + layout.keys(), shared.ranges[warp], shared.query[page.basis_run],
                         shared.unit[page.basis_run] * top, page.fine_planes, layout.key_tiles(),
                         group * kCount, lane, delta);
    if (lane / 4 < columns) {
#pragma unroll
      for (int i = 0; i < 2 * kCount; ++i) {
        const int word = 2 * kCount * group + i;  // of the lane's eight
        auto* at = reinterpret_cast<uint32_t*>(data + layout.scores() +
                                               word / 4 * layout.score_bytes() + lane * 16) +
                   word % 4;
        *at = FmaHalves(kOneHalves, delta[i], *at);
      }
    }
    SyncSlot<kGroups>(warp / kGroups);
  }

  // Makes sums relative to `score`, of column lane / 4, where it is larger.
  __device__ __forceinline__ void Rescale(float score) {
    const float next = fmaxf(reference, score);
    const float factor = reference == -INFINITY ? 0.0f : Exp2(reference - next);
    reference = next;
    mass *= factor;
    const float factors[2] = {__shfl_sync(0xffffffffu, factor, lane % 4 * 8),
                              __shfl_sync(0xffffffffu, factor, lane % 4 * 8 + 4)};
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] *= factors[e % 2];
    }
  }

  // The slot's next page.
  __device__ __forceinline__ void Attend(const ListedPage& page) {
    const int group = warp % kGroups, slot = warp / kGroups,
              stage = streamer.ring.done % kRingDepth;
    WaitBarrier(SharedAddress(&shared.full[slot][stage]), streamer.ring.done / kRingDepth % 2);
    const AttendLayout<Traits> layout{UnpackPage(page.packed), columns};
    std::byte* data = shared.room[slot] + shared.ring[slot][stage].offset;
    if (layout.page.fine_planes > 0) Refine(data, layout, group);
    uint32_t scores[8] = {}, codes[8];
    float max = -INFINITY;
    if (lane / 4 < columns) {
      const auto* at = reinterpret_cast<const uint4*>(data + layout.scores());
      const uint4 low = at[lane], high = at[layout.score_bytes() / 16 + lane];
      const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) scores[j] = words[j];
      max = reinterpret_cast<const PageStats*>(data)[lane / 4].max;
    }
    LoadTokenScales<Traits>(data + layout.value_scales(), group, lane, codes);
    if (layout.page.fine_planes > 0) {  // the largest is another now, and anywhere
      float high = -INFINITY;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 y = UnpackPair<__half>(scores[j]);
        high = fmaxf(high, fmaxf(y.x, y.y));
      }
      high = QuadMax(high);
      const float shift = high == -INFINITY ? 0.0f : high;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 y = UnpackPair<__half>(scores[j]);
        scores[j] = PackPair<__half>(y.x - shift, y.y - shift);
      }
      max += high;
    }
    float2 probability[8];
    const float base = SoftCap<Traits>(max, softcap);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float2 y = UnpackPair<__half>(scores[j]);
      if constexpr (Traits::kSoftCap) {
        if (softcap != 0) {
          y.x = SoftCap<Traits>(y.x + max, softcap) - base;
          y.y = SoftCap<Traits>(y.y + max, softcap) - base;
        }
      }
      probability[j] = max == -INFINITY ? make_float2(0, 0) : make_float2(Exp2(y.x), Exp2(y.y));
    }
    const TokenWeights tokens = WeighTokens(probability, codes);
    const float score = max == -INFINITY ? max : base - shared.lse[lane / 4];
    constexpr float kFar = 32;  // the same for all warps of the slot
    if (__any_sync(0xffffffffu, score > reference + kFar)) Rescale(score);
    const float weight = score == -INFINITY ? 0.0f : Exp2(score - reference);
    if (group == 0) {
      mass = fmaf(QuadSum(tokens.probability), weight, mass);
      key_bytes += layout.key_bytes();
      value_bytes += layout.value_bytes();
    }
    const float scaled = weight * tokens.range;
    const float weights[2] = {__shfl_sync(0xffffffffu, scaled, lane % 4 * 8),
                              __shfl_sync(0xffffffffu, scaled, lane % 4 * 8 + 4)};
    AddValues<Traits>(data + layout.values() + group * Traits::kTilesPerGroup * kPlaneTileBytes,
                      layout.page.value_planes, tokens, weights, lane, out);
    if (layout.page.fine_planes > 0) FenceAsyncShared();
    SyncSlot<kGroups>(slot);
    ++streamer.ring.done;
  }

  // The warps' sums to the slot's partial output; they start again from 0. By the whole CTA.
  __device__ __forceinline__ void Flush(int cta) {
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
      shared.sums[warp][i][lane] = make_float4(out[i][0], out[i][1], out[i][2], out[i][3]);
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] = 0;
    }
    if (lane % 4 == 0) {
      shared.mass[warp][lane / 4] = mass;
      shared.reference[warp][lane / 4] = reference;
    }
    reference = -INFINITY;
    if (tile == 0 && lane == 0 && value_bytes > 0) {
      HeadDecision& decision = p.decisions[head_index];
      if (key_bytes > 0) AddBytes(&decision.key_bytes, key_bytes);
      AddBytes(&decision.value_bytes, value_bytes);
    }
    mass = 0;
    key_bytes = value_bytes = 0;
    __syncthreads();
    const int64_t first = (int64_t{cta} + head_index) * p.work.columns + tile * kTileColumns;
    if (threadIdx.x < kTileColumns) {
      float top = -INFINITY, total = 0;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        top = fmaxf(top, shared.reference[i * kGroups][threadIdx.x]);
      }
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const float own = shared.reference[i * kGroups][threadIdx.x];
        const float factor = own == -INFINITY ? 0.0f : Exp2(own - top);
        shared.factor[i][threadIdx.x] = factor;
        total = fmaf(shared.mass[i * kGroups][threadIdx.x], factor, total);
      }
      reinterpret_cast<float*>(p.workspace + p.work.mass)[first + threadIdx.x] = total;
      reinterpret_cast<float*>(p.workspace + p.work.reference)[first + threadIdx.x] = top;
    }
    __syncthreads();
    auto* partial =
        reinterpret_cast<float*>(p.workspace + p.work.partial) + first * Traits::kHeadDim;
    // Neighbouring threads take neighbouring channels, as the sums' rows hold them.
    for (int at = threadIdx.x; at < Traits::kTiles * 32; at += kThreads) {
      const int channels = at / 32, from = at % 8 * 4 + at / 8 % 4;  // channels: a tile of them
      const int group = channels / Traits::kTilesPerGroup, column = from % 4 * 2;
      if (column >= columns) continue;
      float sum[4] = {};
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const float4 x = shared.sums[i * kGroups + group][channels % Traits::kTilesPerGroup][from];
        const float low = shared.factor[i][column], high = shared.factor[i][column + 1];
        sum[0] = fmaf(x.x, low, sum[0]), sum[1] = fmaf(x.y, high, sum[1]);
        sum[2] = fmaf(x.z, low, sum[2]), sum[3] = fmaf(x.w, high, sum[3]);
      }
      float* row = partial + column * Traits::kHeadDim + channels * kTileChannels + from / 4;
      row[0] = sum[0];
      row[Traits::kHeadDim] = sum[1];
      row[8] = sum[2];
      row[Traits::kHeadDim + 8] = sum[3];
    }
    __syncthreads();
  }

  // The first `count` pages of shared.page, which are the list's from `first` on.
  __device__ __forceinline__ void Run(const SliceFinder<kThreads>& finder, int first, int count,
                                      int cta) {
    const int slot = warp / kGroups;
    streamer.next = slot;
    if (Fetches()) streamer.Fill(count);
    for (int begin = 0, end = 0, mine = slot; begin < count; begin = end) {
      const ListedPage& page = shared.page[begin];
      if (page.head_index != head_index) {
        if (head_index >= 0) Flush(cta);
        Enter(page);
      }
      end = min(count, finder.Before((head_index + 1) * p.work.chunks).pages - first);
      for (; mine < end; mine += kSlots) {
        if (Fetches()) streamer.Fill(count);
        Attend(shared.page[mine]);
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(AttendShared<Traits>::kThreads, 1)
    ProgressiveAttendKernel(const __grid_constant__ ProgressiveArgs p) {
  using Shared = AttendShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int cta = blockIdx.x, tile = blockIdx.y;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x < Shared::kSlots * kRingDepth) {
    InitBarrier(SharedAddress(&shared.full[0][threadIdx.x]), 1);
    FenceBarrierInit();
  }
  PageAttender<Traits> attender{
      p,    shared, tile,
      lane, warp,   PageStreamer<Traits>(p, shared, tile, lane, warp / Traits::kValueGroups)};
  WaitForDependencies();
  NoteTime(p.stamps, kAttendStamp);
  LaunchDependents();
  const SliceFinder<Shared::kThreads> finder(p, shared.slice);
  const Slice slice = finder.SliceOf(cta);
  const auto* lists = reinterpret_cast<const uint4*>(p.workspace + p.work.lists);
  for (int first = slice.begin; first < slice.end; first += kAttendPages) {
    const int count = min(kAttendPages, slice.end - first);
    finder.Locate(first, first + count, shared.place);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += Shared::kThreads) {
      reinterpret_cast<uint4*>(shared.page)[i] = lists[shared.place[i]];
    }
    __syncthreads();
    attender.Run(finder, first, count, cta);
    __syncthreads();
  }
  if (attender.head_index >= 0) attender.Flush(cta);
  if (tile == 0 && cta == p.work.attend_ctas - 1) finder.StoreSpans();
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

// Attend: the values of the pages that select listed, and their keys' finer planes.
//   out = sum over attended tokens exp2(s - L) x_b(v)
// L is the estimated global LSE. Partial results are relative to it and to a power of two of their
// own, since finer planes can move scores far from where four bits saw them.
// The chunks' lists, one behind the other, are cut into slices of equal cost, one a CTA, whichever
// heads they are of: heads with much to read keep no others waiting. A slot of warps, one for each
// group of values, takes some neighbouring pages of the slice and waits for no other slot; bulk
// copies bring what is read of its next few pages into a ring of its own. Sums are kept until the
// head changes. A slot's part of a head has a place of its own in the workspace, slot + head, slots
// counted over all CTAs: no two pairs share one, since both only grow along the lists. grid
// (ProgressiveWorkspace::attend_ctas, column tiles)

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

// A warp's part of a slot's pages. `Rings`: an AttendRings.
template <class Traits, class Rings>
struct PageAttender {
  static constexpr int kGroups = Traits::kValueGroups;
  static constexpr int kCount = 4 / kGroups;  // score tiles that a warp refines
  static constexpr int kOctets = kLaneOctets<Traits>;
  static constexpr bool kHalves = kOctets < 8;  // columns n and n + 4 of the sums are column n's
  static_assert(Rings::kWarps % kGroups == 0, "the same warps for each group");
  const ProgressiveArgs& p;
  Rings& shared;
  int tile, lane, warp, slot, group;
  PageStreamer<Traits, Rings> streamer;  // of the slot; its last warp fills the ring
  int head_index = -1, columns = 0;      // columns: of the tile
  int query_run = -1;                    // basis of the query in shared memory
  float unit = 0;                        // of that query
  float softcap = 0;
  float lse = 0;  // L of the lane's column
  float out[Traits::kTilesPerGroup][4] = {};
  float mass = 0;                      // of the lane's tokens; of the first group's warps
  float reference = -INFINITY;         // log2 of what mass and out are relative to, beside L
  int key_bytes = 0, value_bytes = 0;  // likewise

  __device__ __forceinline__ PageAttender(const ProgressiveArgs& args, Rings& rings,
                                          int column_tile)
      : p(args),
        shared(rings),
        tile(column_tile),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        slot(warp / kGroups),
        group(warp % kGroups),
        streamer(args, rings, column_tile, lane, slot) {}

  __device__ __forceinline__ bool Fetches() const { return group == kGroups - 1; }
  __device__ __forceinline__ int column() const { return ScoreColumn<Traits>(lane); }

  // Goes on with the pages of another head.
  __device__ __forceinline__ void Enter(const ListedPage& page) {
    head_index = page.head_index;
    columns = TileColumns(page, tile);
    query_run = -1;
    if constexpr (Traits::kSoftCap) {
      softcap = p.sequences[head_index / p.shape.num_kv_heads].softcap;
    }
  }

  // L of the head's columns, as select left it.
  __device__ __forceinline__ void LoadLse() {
    lse = reinterpret_cast<const float*>(
        p.workspace +
        p.work.global_lse)[int64_t{head_index} * p.work.columns + tile * kTileColumns + column()];
  }

  // The head's query for a basis to shared memory. By the slot's warps.
  __device__ __forceinline__ void LoadQuery(int run) {
    const QueryFragments<Traits> query(p, head_index, run, tile);
    for (int i = group * 32 + lane; i < Traits::kTiles * 16; i += 32 * kGroups) {
      CopyAsync16(&shared.query[slot][2 * i], query.halves + 2 * i);
    }
    CommitCopies();
    query_run = run;
    unit = query.unit;
    WaitCopies<0>();
    SyncSlot<kGroups>(slot);
  }

  // A page: the finer planes to its scores, in place.
  __device__ __forceinline__ void Refine(std::byte* data, const AttendLayout<Traits>& layout) {
    const PackedPage& page = layout.page;
    const float top =
        SpreadKeyRanges<Traits>(data + layout.key_scales(), shared.ranges[warp], lane);
    __syncwarp();
    uint32_t delta[2 * kCount];
    RefineScores<kCount>(data + layout.keys(), shared.ranges[warp], shared.query[slot], unit * top,
                         page.fine_planes, layout.key_tiles(), group * kCount, lane, delta);
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
    SyncSlot<kGroups>(slot);
  }

  // Makes sums relative to `score`, of the lane's column, where it is larger.
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

  // The slot's next page. `arrived` is called when it is here.
  template <typename Arrived>
  __device__ __forceinline__ void Attend(const ListedPage& page, Arrived arrived) {
    const int stage = streamer.ring.done % kRingDepth;
    const AttendLayout<Traits> layout{UnpackPage(page.packed), columns};
    const bool fine = layout.page.fine_planes > 0;
    if (fine && layout.page.basis_run != query_run) LoadQuery(layout.page.basis_run);
    WaitBarrier(SharedAddress(&shared.full[slot][stage]), streamer.ring.done / kRingDepth % 2);
    arrived();
    std::byte* data = shared.room[slot] + shared.ring[slot][stage].offset;
    if (fine) Refine(data, layout);
    uint32_t scores[kOctets] = {}, codes[kOctets];
    float max = -INFINITY;
    if (column() < columns) {
#pragma unroll
      for (int j = 0; j < kOctets; j += 4) {
        const int half = FirstLaneOctet<Traits>(lane) / 4 + j / 4;
        const uint4 words = reinterpret_cast<const uint4*>(
            data + layout.scores() + half * layout.score_bytes())[lane % (4 * Traits::kColumns)];
        scores[j] = words.x;
        scores[j + 1] = words.y;
        scores[j + 2] = words.z;
        scores[j + 3] = words.w;
      }
      max = reinterpret_cast<const PageStats*>(data)[column()].max;
    }
    LoadTokenScales<Traits>(data + layout.value_scales(), group, lane, codes);
    if (fine) {  // the largest is another now, and anywhere
      uint32_t pair = scores[0];
#pragma unroll
      for (int j = 1; j < kOctets; ++j) pair = MaxHalves(pair, scores[j]);
      const float2 halves = UnpackPair<__half>(pair);
      float high = QuadMax(fmaxf(halves.x, halves.y));
      if constexpr (kHalves) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 16));
      const float shift = high == -INFINITY ? 0.0f : high;
      const uint32_t down = PackPair<__half>(-shift, -shift);
#pragma unroll
      for (int j = 0; j < kOctets; ++j) scores[j] = FmaHalves(kOneHalves, scores[j], down);
      max += high;
    }
    float2 probability[kOctets];
    const float base = SoftCap<Traits>(max, softcap);
#pragma unroll
    for (int j = 0; j < kOctets; ++j) {
      float2 y = UnpackPair<__half>(scores[j]);
      if constexpr (Traits::kSoftCap) {
        if (softcap != 0) {
          y.x = SoftCap<Traits>(y.x + max, softcap) - base;
          y.y = SoftCap<Traits>(y.y + max, softcap) - base;
        }
      }
      probability[j] = max == -INFINITY ? make_float2(0, 0) : make_float2(Exp2(y.x), Exp2(y.y));
    }
    const TokenWeights tokens = WeighTokens(probability, codes, lane);
    const float score = max == -INFINITY ? max : base - lse;
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
    if (fine) FenceAsyncShared();
    SyncSlot<kGroups>(slot);
    ++streamer.ring.done;
  }

  // What was read, to the head's decision.
  __device__ __forceinline__ void CountBytes() const {
    if (tile == 0 && lane == 0 && value_bytes > 0) {
      HeadDecision& decision = p.decisions[head_index];
      if (key_bytes > 0) AddBytes(&decision.key_bytes, key_bytes);
      AddBytes(&decision.value_bytes, value_bytes);
    }
  }

  // The slot's number among those of all CTAs.
  __device__ __forceinline__ int Place() const { return blockIdx.x * Rings::kSlots + slot; }

  // Makes the sums of columns those of all tokens, in every lane that has some.
  __device__ __forceinline__ void JoinHalves() {
    if constexpr (!kHalves) return;
    mass += __shfl_xor_sync(0xffffffffu, mass, 16);
#pragma unroll
    for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) out[i][e] += __shfl_xor_sync(0xffffffffu, out[i][e], 2);
    }
  }
  // Whether the lane's mass and reference are its column's, once.
  __device__ __forceinline__ bool HasColumn() const {
    return group == 0 && lane % 4 == 0 && lane < 4 * Traits::kColumns;
  }

  // The slot's sums to its part of the head; they start again from 0.
  __device__ __forceinline__ void Flush() {
    JoinHalves();
    const int64_t first = (int64_t{Place()} + head_index) * p.work.columns + tile * kTileColumns;
    float* row = reinterpret_cast<float*>(p.workspace + p.work.partial) + first * Traits::kHeadDim +
                 group * Traits::kTilesPerGroup * kTileChannels + lane / 4;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = lane % 4 * 2 + e % 2;
#pragma unroll
      for (int i = 0; i < Traits::kTilesPerGroup; ++i) {
        if (column < columns) {
          row[column * Traits::kHeadDim + i * kTileChannels + e / 2 * 8] = out[i][e];
        }
        out[i][e] = 0;
      }
    }
    if (HasColumn()) {
      reinterpret_cast<float*>(p.workspace + p.work.mass)[first + lane / 4] = mass;
      reinterpret_cast<float*>(p.workspace + p.work.reference)[first + lane / 4] = reference;
    }
    CountBytes();
    mass = 0;
    reference = -INFINITY;
    key_bytes = value_bytes = 0;
  }

  // The slot has no page; the one before its part of the slice is of `head`.
  __device__ __forceinline__ void LeaveNothing(int head) const {
    if (group > 0 || lane >= kTileColumns) return;
    const int64_t first = (int64_t{Place()} + head) * p.work.columns + tile * kTileColumns;
    reinterpret_cast<float*>(p.workspace + p.work.reference)[first + lane] = -INFINITY;
  }

  // Where page `i` of `all` in shared.page is a head's first or last one, merge is told.
  __device__ __forceinline__ void MarkSpan(int i, int all) const {
    if (tile > 0 || group > 0 || lane > 0) return;
    int* span = reinterpret_cast<int*>(p.workspace + p.work.spans) + 2 * head_index;
    if (i == 0 || shared.page[i - 1].head_index != head_index) span[0] = Place();
    if (i + 1 == all || shared.page[i + 1].head_index != head_index) span[1] = Place() + 1;
  }

  // Pages [begin, end) of the `all` in shared.page.
  __device__ __forceinline__ void Run(int begin, int end, int all) {
    streamer.next = begin;
    // All slots begin at once: with their first pages alone, or these would wait for the next ones.
    if (Fetches()) streamer.Fill(min(begin + 1, end));
    for (int i = begin; i < end; ++i) {
      const ListedPage& page = shared.page[i];
      if (page.head_index != head_index) {
        if (head_index >= 0) Flush();
        Enter(page);
        LoadLse();
      }
      if (Fetches() && i > begin) streamer.Fill(end);
      MarkSpan(i, all);
      const int then = i == begin ? end : begin;  // once the first is here the next ones may come
      Attend(page, [this, then] {
        if (Fetches()) streamer.Fill(then);
      });
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(AttendShared<Traits>::kThreads, kAttendCtasPerSm)
    ProgressiveAttendKernel(const __grid_constant__ ProgressiveArgs p) {
  using Shared = AttendShared<Traits>;
  static_assert(kAttendCtasPerSm * (sizeof(Shared) + 1024) <= size_t{228} << 10,
                "what a multiprocessor has, 1 KB of each CTA's the driver's");
  extern __shared__ __align__(16) std::byte shared_bytes[];
  auto& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int cta = blockIdx.x, tile = blockIdx.y;
  shared.InitBarriers();
  PageAttender<Traits, Shared> attender(p, shared, tile);
  WaitForDependencies();
  NoteTime(p.stamps, kAttendStamp);
  LaunchDependents();
  const SliceFinder<Shared::kThreads, Shared::kSlots> finder(p, shared.slice);
  finder.FindParts(cta);
  const Slice slice = finder.All(), part = finder.PartOf(attender.slot);
  const auto* lists = reinterpret_cast<const uint4*>(p.workspace + p.work.lists);
  for (int first = slice.begin; first < slice.end; first += kAttendPages) {
    const int last = min(first + kAttendPages, slice.end);
    const int from = max(first - 1, 0), all = min(last + 1, finder.total().pages) - from;
    finder.Locate(from, from + all, shared.place);
    __syncthreads();
    for (int i = threadIdx.x; i < all; i += Shared::kThreads) {
      reinterpret_cast<uint4*>(shared.page)[i] = lists[shared.place[i]];
    }
    __syncthreads();
    attender.Run(max(part.begin, first) - from, min(part.end, last) - from, all);
    const int before = part.begin - 1;
    if (part.begin == part.end && before >= from && before < last) {
      attender.LeaveNothing(shared.page[before - from].head_index);
    }
    if (last < slice.end) __syncthreads();
  }
  if (attender.head_index >= 0) attender.Flush();
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

// Attend: depths from the global LSE, then the values.
//   out = sum over attended tokens exp2(s - L) x_b(v) + sum over skipped pages share * mean
//   x_b(code) r = (sum_i m_i 4^-i / 2 + 2^-b - 1) r         m_i: 2-bit plane i, most significant
//   first
// L is the estimated global LSE, the same for every CTA of a head, so partial results just add up.
//
// A CTA takes a chunk of one head's pages: four threads decide each page, then every warp
// takes attended pages in turn (as many at a time as its shared memory holds), then the means of
// the skipped ones are added, an MMA over pages. Values enter the MMA transposed: channels are its
// M, tokens its K, columns its N; 2-bit fields enter in place as FP16 subnormals, and the powers of
// 4 that their places add are taken out of B (fields of token + 8) and of the sums (channels + 8).
// grid (attend_chunks x column tiles, num_kv_heads, num_sequences); decisions come from all
// columns, so every tile makes the same, and further tiles find the planes in L2.

#include "kernels/cuda/progressive_decide.cuh"

namespace adaattn {

// The packed scores of a page and the maximum that they are relative to, column lane / 4.
struct PageScores {
  uint32_t packed[8];
  float max;
};

template <class Traits>
__device__ __forceinline__ PageScores LoadScores(const ProgressiveArgs& p, const SequenceView& s,
                                                 int64_t page_index, int column_tile, int lane) {
  const ProgressiveWorkspace& w = p.work;
  PageScores scores;
  uint4 low = make_uint4(0, 0, 0, 0), high = low;
  scores.max = -INFINITY;
  const int column = column_tile * kTileColumns + lane / 4;
  if (column < p.shape.group_size() * s.q_len) {
    const uint4* from = reinterpret_cast<const uint4*>(p.workspace + w.scores) +
                        (page_index * (w.columns / kTileColumns) + column_tile) * 64 + lane;
    low = from[0];
    high = from[32];
    scores.max =
        reinterpret_cast<const float4*>(p.workspace + w.stats)[page_index * w.columns + column].x;
  }
  const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) scores.packed[i] = words[i];
  return scores;
}

// Adds one page whose value scales and planes stand at `data`.
template <class Traits>
__device__ __forceinline__ void AttendValues(const SequenceView& s, const std::byte* data,
                                             int value_bits, const PageScores& scores, float lse,
                                             int lane, typename AttendShared<Traits>::Warp& mine,
                                             float (&out)[Traits::kTiles][4], float* mass) {
  using Shared = AttendShared<Traits>;
  // Token ranges relative to the page's largest, so that probability times range fits FP16.
  uint32_t top = 0;
  const auto* scales = reinterpret_cast<const uint8_t*>(data);
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
  const float base = SoftCap<Traits>(scores.max, s.softcap);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float2 y = HalvesToFloats(scores.packed[i]);
    if (s.softcap != 0) {
      y.x = SoftCap<Traits>(y.x + scores.max, s.softcap) - base;
      y.y = SoftCap<Traits>(y.y + scores.max, s.softcap) - base;
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
  AddValues<Traits>(data + Shared::kScaleBytes, mine.token_ranges, value_bits, probability, weights,
                    lane, out);
  __syncwarp();
}

// A warp's share of the listed pages; sums go to out and mass (column lane / 4).
template <class Traits>
struct PageAttender {
  using Shared = AttendShared<Traits>;
  const ProgressiveArgs& p;
  const SequenceView& s;
  Shared& shared;
  typename Shared::Warp& mine;
  int64_t head_index;
  int head, begin, column_tile, lane;
  int32_t key_bytes = 0, value_bytes = 0;

  __device__ __forceinline__ void Copy(std::byte* to, const std::byte* base,
                                       const PageLayout::Section& from, int bytes) const {
    WarpCopyAsync(to, base + from.offset + head * from.bytes, bytes, lane);
  }
  __device__ __forceinline__ const std::byte* Base(int local) const {
    return p.pool + static_cast<int64_t>(shared.base[local]) * kPageAlignment;
  }
  __device__ __forceinline__ int KeyTiles(int local) const {
    return min(shared.key_chunks[local] * Traits::kChunkTiles, Traits::kTiles);
  }

  __device__ __forceinline__ void FetchValues(int local, std::byte* target) {
    const AttendedPage<Traits> page(shared, local);
    Copy(target, Base(local), p.layout.value_scales, Shared::kScaleBytes);
    for (int i = 0; i < page.value_bits / 2; ++i) {
      Copy(target + Shared::kScaleBytes + i * Shared::kPlaneBytes, Base(local),
           p.layout.value_plane[i], Shared::kPlaneBytes);
    }
    value_bytes += page.value_bytes();
  }
  __device__ __forceinline__ void FetchKeys(int local, std::byte* target) {
    const AttendedPage<Traits> page(shared, local);
    if (page.fine_planes == 0) return;
    Copy(target, Base(local), p.layout.key_scales, Traits::kHeadDim);
    for (int i = 0; i < page.fine_planes; ++i) {
      Copy(target + Traits::kHeadDim + i * Shared::kPlaneBytes, Base(local), p.layout.key_fine[i],
           KeyTiles(local) * kPlaneTileBytes);
    }
    key_bytes += page.fine_planes * KeyTiles(local) * kPlaneTileBytes;
  }
  __device__ __forceinline__ void Refine(int local, const std::byte* data, PageScores* scores) {
    const AttendedPage<Traits> page(shared, local);
    if (page.fine_planes == 0) return;
    const float top = SpreadKeyRanges<Traits>(data, mine.ranges, lane);
    __syncwarp();
    const QueryFragments<Traits> query(p, head_index, BasisOfPage(s, begin + local), column_tile);
    RefineScores<Traits>(data + Traits::kHeadDim, mine.ranges, query.halves, query.unit * top,
                         page.fine_planes, KeyTiles(local), lane, scores->packed);
  }
  __device__ __forceinline__ PageScores Scores(int local) const {
    return LoadScores<Traits>(p, s, head_index * p.max_sealed + begin + local, column_tile, lane);
  }
  __device__ __forceinline__ static void Arrive() {
    CommitCopies();
    WaitCopies<0>();
    __syncwarp();
  }

  __device__ __forceinline__ void Run(int count, int warp, float (&out)[Traits::kTiles][4],
                                      float* mass) {
    const float lse = shared.lse[column_tile * kTileColumns + lane / 4];
    for (int item = warp; item < count;) {
      int bytes = 0, next = item;
      while (next < count) {
        const int local = shared.list[next];
        const AttendedPage<Traits> page(shared, local);
        if (bytes + page.key_bytes() + page.value_bytes() > Shared::kBufferBytes) break;
        FetchKeys(local, mine.pages + bytes);
        FetchValues(local, mine.pages + bytes + page.key_bytes());
        bytes += page.key_bytes() + page.value_bytes();
        next += kAttendWarps;
      }
      if (next == item) {  // Too deep for one go: keys, then values.
        const int local = shared.list[item];
        FetchKeys(local, mine.pages);
        PageScores scores = Scores(local);
        Arrive();
        Refine(local, mine.pages, &scores);
        __syncwarp();
        FetchValues(local, mine.pages);
        Arrive();
        AttendValues<Traits>(s, mine.pages, shared.value_bits[local], scores, lse, lane, mine, out,
                             mass);
        item += kAttendWarps;
        continue;
      }
      Arrive();
      bytes = 0;
      for (; item < next; item += kAttendWarps) {
        const int local = shared.list[item];
        const AttendedPage<Traits> page(shared, local);
        PageScores scores = Scores(local);
        Refine(local, mine.pages + bytes, &scores);
        AttendValues<Traits>(s, mine.pages + bytes + page.key_bytes(), page.value_bits, scores, lse,
                             lane, mine, out, mass);
        bytes += page.key_bytes() + page.value_bytes();
      }
    }
  }
};

// Starts the copies of the chunk's value summaries, which depend on no earlier kernel.
template <class Traits>
__device__ __forceinline__ void FetchSummaries(const ProgressiveArgs& p,
                                               const ProgressiveSequence& from, int head, int begin,
                                               int pages, AttendShared<Traits>& shared) {
  if (threadIdx.x < pages) {
    shared.base[threadIdx.x] = p.table[from.table_begin + begin + threadIdx.x];
  }
  if (threadIdx.x < kNumKeyDepths) shared.key_pages[threadIdx.x] = 0;
  if (threadIdx.x < kNumValueDepths) shared.value_pages[threadIdx.x] = 0;
  __syncthreads();
  const PageLayout::Section& section = p.layout.value_summary;
  constexpr int kPieces = AttendShared<Traits>::kSummaryBytes / 16;
  for (int i = threadIdx.x; i < pages * kPieces; i += kAttendThreads) {
    CopyAsync16(shared.summaries[i / kPieces] + i % kPieces * 16,
                p.pool + static_cast<int64_t>(shared.base[i / kPieces]) * kPageAlignment +
                    section.offset + head * section.bytes + i % kPieces * 16);
  }
  CommitCopies();
}

// Writes the CTA's sums beside its partial output.
template <class Traits>
__device__ __forceinline__ void StoreState(const ProgressiveArgs& p, int64_t head_index,
                                           int64_t slot, const AttendShared<Traits>& shared) {
  const int n = threadIdx.x;
  if (n >= kTileColumns) return;
  AttendState state{};
  state.mass = shared.figures[n][0];
  for (int i = 0; i < kAttendWarps; ++i) state.mass += shared.mass[i][n];
  state.entropy = shared.figures[n][1];
  state.rest = shared.figures[n][2];
  state.mean_squares = shared.figures[n][3];
  state.weight = shared.figures[n][4];
  reinterpret_cast<AttendState*>(p.workspace + p.work.state)[slot + n] = state;
}

// Adds the CTA's page counts and what it loaded to the head's decision.
template <class Traits>
__device__ __forceinline__ void CountReads(HeadDecision* decision,
                                           const PageAttender<Traits>& attender,
                                           const AttendShared<Traits>& shared) {
  const int i = threadIdx.x;
  if (i < kNumKeyDepths && shared.key_pages[i] > 0) {
    atomicAdd(&decision->key_pages[i], shared.key_pages[i]);
  }
  if (i < kNumValueDepths && shared.value_pages[i] > 0) {
    atomicAdd(&decision->value_pages[i], shared.value_pages[i]);
  }
  int64_t value_bytes = attender.value_bytes;
  if (i == 0) {
    for (int j = 0; j < kNumValueDepths; ++j) {
      value_bytes += shared.value_pages[j] * AttendShared<Traits>::kSummaryBytes;
    }
  }
  if (i % 32 != 0) return;
  if (attender.key_bytes > 0) AddBytes(&decision->key_bytes, attender.key_bytes);
  if (value_bytes > 0) AddBytes(&decision->value_bytes, value_bytes);
}

template <class Traits>
__global__ void __launch_bounds__(kAttendThreads,
                                  Traits::kHeadDim <= 128 && !Traits::kSoftCap ? 2 : 1)
    ProgressiveAttendKernel(const __grid_constant__ ProgressiveArgs p) {
  constexpr int kD = Traits::kHeadDim;
  using Shared = AttendShared<Traits>;
  extern __shared__ __align__(16) std::byte shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const ProgressiveWorkspace& w = p.work;
  const int tiles = w.columns / kTileColumns;
  const int chunk = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  const int head = blockIdx.y, sequence = blockIdx.z;
  const ProgressiveSequence& from = p.sequences[sequence];
  const SequenceView s(from);
  const int64_t head_index = static_cast<int64_t>(sequence) * p.shape.num_kv_heads + head;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = chunk * p.attend_chunk, end = min(begin + p.attend_chunk, from.num_sealed);
  const int pages = max(end - begin, 0);
  FetchSummaries<Traits>(p, from, head, begin, pages, shared);
  WaitForDependencies();
  LaunchDependents();
  GlobalLse<kAttendThreads>(p, head_index, shared.lse, shared.lse_parts);
  if (blockIdx.x == 0 && threadIdx.x < w.columns) {
    reinterpret_cast<float*>(p.workspace + w.global_lse)[head_index * w.columns + threadIdx.x] =
        shared.lse[threadIdx.x];
  }
  if (pages == 0) return;  // The merge knows how many chunks there are.
  const float theta = from.decision.policy == Policy::kBudget
                          ? reinterpret_cast<const float*>(p.workspace + w.theta)[head_index]
                          : from.decision.theta;
  WaitCopies<0>();
  __syncthreads();
  if (begin == 0) SubstituteSink<Traits>(p, s, head_index, shared);
  DecidePages<Traits>(p, from.decision, s, head_index, tile * kTileColumns, theta, begin, end,
                      shared);
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
  PageAttender<Traits> attender{p,     s,    shared, shared.warps[warp], head_index, head,
                                begin, tile, lane};
  attender.Run(count, warp, out, &mass);
  if (lane % 4 == 0) shared.mass[warp][lane / 4] = mass;
  __syncthreads();  // every warp is done with its pages: they become partial outputs
#pragma unroll
  for (int i = 0; i < Traits::kTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int column = lane % 4 * 2 + e % 2, channel = 16 * i + lane / 4 + (e >= 2 ? 8 : 0);
      reinterpret_cast<float*>(&shared.warps[warp])[column * kD + channel] = out[i][e];
    }
  }
  __syncthreads();
  const int64_t slot = (head_index * w.attend_chunks + chunk) * w.columns + tile * kTileColumns;
  AddMeans<Traits>(pages, shared,
                   reinterpret_cast<float*>(p.workspace + w.partial) + slot * 2 * kD);
  StoreState<Traits>(p, head_index, slot, shared);
  if (tile == 0) CountReads(&p.decisions[head_index], attender, shared);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_ATTEND_CUH_

#ifndef ADAATTN_KERNELS_CUDA_PROGRESSIVE_COMMON_CUH_
#define ADAATTN_KERNELS_CUDA_PROGRESSIVE_COMMON_CUH_

// What the kernels of a progressive step share: query fragments, views of a sequence, small pieces.

#include <cuda_fp16.h>

#include <cstdint>

#include "kernels/cuda/mma.cuh"
#include "kernels/cuda/progressive_workspace.h"
#include "kernels/cuda/stage_stamps.h"
#include "kernels/cuda/warp.cuh"
#include "kernels/format/nested_code.h"
#include "kernels/format/page_layout.h"
#include "kernels/format/planes.h"
#include "kernels/policy/ladder.h"

namespace adaattn {

inline constexpr float kLog2E = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

#if defined(__CUDACC__)

// kSoftCapV: some sequence of the batch has a soft cap; without, its code is not there.
// kColumnsV: columns of a tile that any sequence has, kTileColumns or kFewColumns.
template <int kHeadDimV, bool kSoftCapV = false, int kColumnsV = kTileColumns>
struct ProgressiveTraits {
  static constexpr int kHeadDim = kHeadDimV;
  static constexpr bool kSoftCap = kSoftCapV;
  static constexpr int kColumns = kColumnsV;
  static constexpr int kTiles = kHeadDim / kTileChannels;  // MMA k-steps of a key
  static constexpr int kValueGroups = kHeadDim % 64 == 0 ? kHeadDim / 64 : 1;
  static constexpr int kTilesPerGroup = kTiles / kValueGroups;
  static constexpr int kChunkTiles = ChunkChannels(kHeadDim) / kTileChannels;
  static constexpr int kPlaneBytes = kTiles * kPlaneTileBytes;  // of one 2-bit plane
  static constexpr int kValueScaleBytes = kPageTokens * kValueGroups;
  static_assert(kHeadDim % kTileChannels == 0, "whole tiles");
};

// --- Programmatic dependent launch: the next kernel's prologue overlaps this one's tail.
// ----------
__device__ __forceinline__ void LaunchDependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void WaitForDependencies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- 16-byte asynchronous copies, completed in groups per thread ---------------------------------
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global));
}
__device__ __forceinline__ void CommitCopies() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void WaitCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
// A warp copies `bytes` (a multiple of 16).
__device__ __forceinline__ void WarpCopyAsync(std::byte* shared, const std::byte* global, int bytes,
                                              int lane) {
  for (int at = lane * 16; at < bytes; at += 512) CopyAsync16(shared + at, global + at);
}

// x, in a way that keeps the compiler from working out what depends on it earlier, where registers
// are short.
__device__ __forceinline__ int Here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// --- Progress of an earlier kernel that may still be running: all CTAs of it have begun before
// this one could. What the CTA has stored so far is there for who sees the count.
// By all of its threads.
__device__ __forceinline__ void CountProgress(int32_t* counter) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  __threadfence();
  atomicAdd(counter, 1);
}
// Waits until it is `count`. By a warp.
__device__ __forceinline__ void AwaitProgress(const int32_t* counter, int32_t count) {
  if (threadIdx.x % 32 == 0) {
    int32_t now;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
    } while (now != count);
  }
  __syncwarp();
}

__device__ __forceinline__ void PrefetchL1(const void* global) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(global));
}

__device__ __forceinline__ float Log2(float x) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ __forceinline__ float Reciprocal(float x) {
  float out;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// log2(2^a + 2^b); -inf is the empty sum.
__device__ __forceinline__ float AddLog2(float a, float b) {
  const float high = fmaxf(a, b);
  if (high == -INFINITY) return high;
  return high + Log2(Exp2(a - high) + Exp2(b - high));
}

// The range of a scale byte, as format/nested_code.h defines it, to one ulp.
__device__ __forceinline__ float RangeOf(uint32_t scale) {
  const float code = __uint_as_float(0x4b000000u | scale) - 8388608.0f;
  return Exp2(fmaf(code, 0.25f, -40.0f));
}

// s = cap * tanh(s / cap) with s in log2 units and cap in nats; cap 0 leaves s, as does a masked
// token's -inf, which tanh would bring back to -cap.
template <class Traits>
__device__ __forceinline__ float SoftCap(float s, float cap) {
  if constexpr (!Traits::kSoftCap) return s;
  return cap == 0.0f || s == -INFINITY ? s : cap * kLog2E * tanhf(s * kLn2 / cap);
}

// Estimated log mass: half the variance of the rounding error, capped, on top.
__device__ __forceinline__ float MassCorrection(float variance) {
  return 0.5f * kLog2E * fminf(variance, 4.0f);
}
__device__ __forceinline__ float EstimatedLog2Mass(const PageStats& stats) {
  return stats.lse + MassCorrection(stats.variance);
}

__device__ __forceinline__ float ColumnMax(float x) {  // over lanes of equal lane % 4
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 4));
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 8));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 16));
}
__device__ __forceinline__ float ColumnSum(float x) {  // likewise
  x += __shfl_xor_sync(0xffffffffu, x, 4);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return x + __shfl_xor_sync(0xffffffffu, x, 16);
}
__device__ __forceinline__ float QuadSum(float x) {  // over lanes of equal lane / 4
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
__device__ __forceinline__ float QuadMax(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ void AddScaled(const float4& x, float scale, float4* sum) {
  *sum = make_float4(fmaf(x.x, scale, sum->x), fmaf(x.y, scale, sum->y), fmaf(x.z, scale, sum->z),
                     fmaf(x.w, scale, sum->w));
}

__device__ __forceinline__ uint32_t MultiplyHalves(uint32_t a, uint32_t b) {
  const __half2 c =
      __hmul2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&c);
}

// What the inner loops need of a sequence, in registers.
struct SequenceView {
  int q_start, q_len, window;
  float softcap;
  int num_bases;
  int basis_end[kMaxDeviceBasisRuns - 1];  // the last run ends with the sealed pages

  __device__ __forceinline__ explicit SequenceView(const ProgressiveSequence& s)
      : q_start(s.q_start),
        q_len(s.q_len),
        window(s.window),
        softcap(s.softcap),
        num_bases(s.num_bases) {
#pragma unroll
    for (int i = 0; i < kMaxDeviceBasisRuns - 1; ++i) basis_end[i] = s.basis_end[i];
  }
};

// How a page stands to the rows of a sequence.
enum class Visibility { kNone, kPart, kAll };
__device__ __forceinline__ Visibility PageVisibility(const SequenceView& s, int page) {
  const int first = page * kPageTokens, last = first + kPageTokens - 1;
  const int first_row = s.q_start, last_row = s.q_start + s.q_len - 1;
  if (first > last_row || (s.window > 0 && last <= first_row - s.window)) return Visibility::kNone;
  if (last <= first_row && (s.window == 0 || first > last_row - s.window)) return Visibility::kAll;
  return Visibility::kPart;
}

// The head's theta: one for all heads unless some step has them by head. Where a policy chooses it,
// once the theta launch has ended.
__device__ __forceinline__ float ThetaOf(const ProgressiveArgs& p, const ProgressiveSequence& s,
                                         int64_t head_index) {
  return p.head_thetas ? p.thetas[head_index] : s.decision.theta;
}

// The sealed pages of which some row sees a token.
struct PageRange {
  int begin, end;
};
__device__ __forceinline__ PageRange VisiblePages(const ProgressiveSequence& s) {
  PageRange range;
  range.end = min(s.num_sealed, (s.q_start + s.q_len - 1) / kPageTokens + 1);
  range.begin = s.window > 0 ? max(s.q_start - s.window + 1, 0) / kPageTokens : 0;
  range.begin = min(range.begin, range.end);
  return range;
}
__device__ __forceinline__ bool TokenVisible(const SequenceView& s, int token, int row) {
  const int position = s.q_start + row;
  return token <= position && (s.window == 0 || token > position - s.window);
}

__device__ __forceinline__ int BasisOfPage(const SequenceView& s, int page) {
  int run = 0;
#pragma unroll
  for (int i = 0; i < kMaxDeviceBasisRuns - 1; ++i) {
    run += i + 1 < s.num_bases && page >= s.basis_end[i] ? 1 : 0;
  }
  return run;
}

__device__ __forceinline__ void AddBytes(int64_t* counter, int64_t bytes) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(bytes));
}

// Rank chunks of the coarse stage; 0: the sequence scans in one stage.
template <class Traits>
__device__ __forceinline__ int CoarseStage(const ProgressiveArgs& p,
                                           const DecisionParams& decision) {
  return p.two_stage ? CoarseChunks(decision, Traits::kHeadDim) : 0;
}

// Rank chunks of the keys that the scan reads of every page: all, the coarse rank, or the static
// rank.
template <class Traits>
__device__ __forceinline__ int ScanChunks(const ProgressiveArgs& p,
                                          const DecisionParams& decision) {
  constexpr int kD = Traits::kHeadDim;
  int chunks = NumRankChunks(kD);
  if (decision.policy == Policy::kStatic) {
    chunks = StaticDepth(decision, kD, 8).key.chunks;
  } else if (const int coarse = CoarseStage<Traits>(p, decision); coarse > 0) {
    chunks = coarse;
  }
  return chunks;
}

// The scan's masses of a sequence's runs for one head, as the last stage that ran left them: entry
// i's column n at [i * MassStride(p) + n], ScanPlaces entries a run.
__device__ __forceinline__ int64_t MassStride(const ProgressiveArgs& p) {
  return int64_t{p.shape.num_kv_heads} * p.work.columns;
}
__device__ __forceinline__ const float* RunMasses(const ProgressiveArgs& p, int64_t masses,
                                                  int scan_begin, int head) {
  return reinterpret_cast<const float*>(p.workspace + masses) +
         (int64_t{scan_begin} * p.scan_places * p.shape.num_kv_heads + head) * p.work.columns;
}
__device__ __forceinline__ const float4* PageStatsOf(const ProgressiveArgs& p, int64_t head_index,
                                                     int page) {
  return reinterpret_cast<const float4*>(p.workspace + p.work.stats) +
         (head_index * p.max_sealed + page) * p.work.columns;
}

// A head's queries for one basis and column tile, as the prepare kernel left them.
template <class Traits>
struct QueryFragments {
  const uint2* halves;  // [tiles, 32]
  float unit;           // what a stored half of 1 is worth
  const float* mean;    // [8]
  __device__ __forceinline__ QueryFragments(const ProgressiveArgs& p, int64_t head_index, int run,
                                            int column_tile) {
    const ProgressiveWorkspace& w = p.work;
    const int64_t at =
        (head_index * kMaxDeviceBasisRuns + run) * (w.columns / kTileColumns) + column_tile;
    halves = reinterpret_cast<const uint2*>(p.workspace + w.query) + at * Traits::kTiles * 32;
    unit = reinterpret_cast<const float*>(p.workspace + w.query_unit)[at];
    mean = reinterpret_cast<const float*>(p.workspace + w.query_mean) + at * kTileColumns;
  }
};

// Spreads a head's channel ranges over `shared` [head_dim] halves in the order of the B fragments:
// channel 16k + {2t, 2t + 1, 2t + 8, 2t + 9} at 16k + 4t. Relative to the largest range of the
// page, which it returns, so that none overflows. `scales` is in shared memory.
template <class Traits>
__device__ __forceinline__ float SpreadKeyRanges(const std::byte* scales, __half* shared,
                                                 int lane) {
  constexpr int kWords = Traits::kHeadDim / 4;
  constexpr int kEach = (kWords + 31) / 32;
  uint32_t codes[kEach], top = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + 32 * i;
    codes[i] = at < kWords ? reinterpret_cast<const uint32_t*>(scales)[at] : 0;
    top = __vmaxu2(top, __vmaxu2(codes[i] & 0x00ff00ffu, codes[i] >> 8 & 0x00ff00ffu));
  }
  top = __reduce_max_sync(0xffffffffu, max(top & 0xffffu, top >> 16));
  // A byte under 0x4b000000 is 2^23 more than itself; the product and the sum below are exact.
  const float base = -2097152.0f - 0.25f * static_cast<float>(top);
  auto range = [base](uint32_t word, uint32_t selector) {
    return Exp2(fmaf(__uint_as_float(__byte_perm(word, 0x4b000000u, selector)), 0.25f, base));
  };
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int at = lane + 32 * i;
    if (at >= kWords) break;
    const int in_tile = at % 4 * 4;  // channels 4 at..4 at + 3
    auto* target =
        reinterpret_cast<uint32_t*>(shared + at / 4 * 16 + in_tile % 8 / 2 * 4 + in_tile / 8 * 2);
    target[0] = PackPair<__half>(range(codes[i], 0x7440u), range(codes[i], 0x7441u));
    target[2] = PackPair<__half>(range(codes[i], 0x7442u), range(codes[i], 0x7443u));
  }
  return RangeOf(top);
}

inline constexpr uint32_t kOneHalves = 0x3c003c00u;  // 1, 1

__device__ __forceinline__ uint32_t FmaHalves(uint32_t a, uint32_t b, uint32_t c) {
  const __half2 d =
      __hfma2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b),
              *reinterpret_cast<const __half2*>(&c));
  return *reinterpret_cast<const uint32_t*>(&d);
}
__device__ __forceinline__ uint32_t MaxHalves(uint32_t a, uint32_t b) {
  const __half2 c =
      __hmax2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&c);
}
// The sum of x over this lane and those before it.
__device__ __forceinline__ int WarpPrefix(int x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(0xffffffffu, x, step);
    if (lane >= step) x += before;
  }
  return x;
}

#endif  // __CUDACC__

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PROGRESSIVE_COMMON_CUH_

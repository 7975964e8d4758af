#ifndef ADAATTN_KERNELS_CUDA_APPEND_CUH_
#define ADAATTN_KERNELS_CUDA_APPEND_CUH_

// The two ends of a step: its block, q, k, v in; out, lse, decisions, flags back.
// grid (2 CTAs a multiprocessor), fixed: how much there is to do stands in the step's header. A
// warp takes one unit at a time: the rows of one AppendRun for one kv head of K or of V, or 512
// elements of q. Loads cross PCIe, so they are long and many are in flight: while some warps bring
// the block for the kernels that follow, the others read it where the host packed it. Loops over
// the grid's threads mostly turn once: to unroll them would cost a division to find out.

#include <cuda_fp8.h>

#include <cstddef>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/stage_stamps.h"
#include "kernels/cuda/step_params.h"
#include "kernels/cuda/step_report.h"
#include "kernels/format/float_types.h"
#include "kernels/format/page_layout.h"

namespace adaattn {

inline constexpr int kAppendThreads = 256;
// Loads of a thread that cross PCIe together: what is stored after one must not hold up the next.
inline constexpr int kLoadsInFlight = 4;
inline constexpr int kQueryUnit = kLoadsInFlight * 128;  // elements

// False for NaN, too.
__device__ __forceinline__ bool AllWithin(const float (&x)[4], float most) {
  return fabsf(x[0]) <= most && fabsf(x[1]) <= most && fabsf(x[2]) <= most && fabsf(x[3]) <= most;
}

// NaN stays NaN, everything else becomes finite.
__device__ __forceinline__ float Saturate(float x, float most) {
  return x != x ? x : fminf(fmaxf(x, -most), most);
}

// Four neighbours of a page; index is a multiple of 4.
__device__ __forceinline__ void StorePageFour(std::byte* data, DType type, int64_t index,
                                              float4 x) {
  if (type == DType::kF8E4m3) {
    const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(x.x, x.y), __NV_SATFINITE, __NV_E4M3);
    const uint32_t high =
        __nv_cvt_float2_to_fp8x2(make_float2(x.z, x.w), __NV_SATFINITE, __NV_E4M3);
    *reinterpret_cast<uint32_t*>(data + index) = low | high << 16;
    return;
  }
  if (type != DType::kF32) {
    const float most = type == DType::kF16 ? kFp16Max : __uint_as_float(0x7f7f0000u);
    x = make_float4(Saturate(x.x, most), Saturate(x.y, most), Saturate(x.z, most),
                    Saturate(x.w, most));
  }
  StoreFour(data, type, index, x);
}

// A part of the block, by way of the L1 cache: many threads ask for it, and nobody writes it while
// the kernel runs.
template <class T>
__device__ __forceinline__ T LoadFromBlock(const T* from) {
  static_assert(sizeof(T) % sizeof(uint4) == 0, "loaded 16 bytes at a time");
  uint4 words[sizeof(T) / sizeof(uint4)];
#pragma unroll
  for (size_t i = 0; i < sizeof(T) / sizeof(uint4); ++i) {
    words[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  }
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
}

// One kv head's part of a run, of K or of V. False when a value is not finite or does not fit.
__device__ __forceinline__ bool AppendHead(const StepParams& p, const StepHeader& header,
                                           const AppendRun& run, int kv_head, bool is_value,
                                           int lane) {
  const int d = p.shape.head_dim, pieces = d / 4;
  const int scales = is_value ? run.value_scales : run.key_scales;
  const float factor = scales < 0 ? 1.0f : 1.0f / __ldg(p.scales + scales + kv_head);
  const std::byte* in = is_value ? header.v : header.k;
  std::byte* head = p.pool + PageOffset(PageId{run.page}) +
                    (is_value ? DenseValueOffset(p.shape, kv_head, p.page_type)
                              : DenseKeyOffset(kv_head, d, p.page_type));
  const float most = LargestStored(p.page_type);
  bool finite = true;
  for (int first = lane; first < run.num_rows * pieces; first += 32 * kLoadsInFlight) {
    uint4 packed[kLoadsInFlight];
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int i = first + 32 * j, row = i / pieces;
      if (row >= run.num_rows) continue;
      packed[j] = LoadPackedFour(
          in, p.in_type,
          ((run.kv_row + row) * p.shape.num_kv_heads + kv_head) * d + i % pieces * 4);
    }
#pragma unroll
    for (int j = 0; j < kLoadsInFlight; ++j) {
      const int i = first + 32 * j, row = i / pieces;
      if (row >= run.num_rows) continue;
      float x[4];
      UnpackFour(packed[j], p.in_type, x);
      finite = finite && AllWithin(x, most);
      StorePageFour(head, p.page_type, int64_t{run.slot + row} * d + i % pieces * 4,
                    make_float4(x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor));
    }
  }
  return finite;
}

// The sequence that a row of q belongs to.
__device__ __noinline__ int SequenceOfRow(const StepParams& p, int64_t row) {
  int sequence = 0;
  while (row >= p.sequences[sequence].q_row + p.sequences[sequence].q_len) ++sequence;
  return sequence;
}

// One unit of q, copied as it is; flags the sequences of values that are not finite.
__device__ __forceinline__ void CopyQuery(const StepParams& p, const StepHeader& header, int unit,
                                          int lane) {
  const int64_t row = int64_t{p.shape.num_q_heads} * p.shape.head_dim;
  const int64_t end = header.num_lse * p.shape.head_dim;
  const int64_t first = int64_t{unit} * kQueryUnit + lane * 4;
  uint4 packed[kLoadsInFlight];
#pragma unroll
  for (int j = 0; j < kLoadsInFlight; ++j) {
    const int64_t at = first + j * 128;
    if (at < end) packed[j] = LoadPackedFour(header.q, p.in_type, at);
  }
#pragma unroll
  for (int j = 0; j < kLoadsInFlight; ++j) {
    const int64_t at = first + j * 128;
    if (at >= end) continue;
    float x[4];
    UnpackFour(packed[j], p.in_type, x);
    if (!AllWithin(x, kFloatMax)) atomicOr(p.flags + SequenceOfRow(p, at / row), kNonfiniteQ);
    StorePackedFour(p.q, p.in_type, at, packed[j]);
  }
}

__global__ void __launch_bounds__(kAppendThreads)
    AppendKernel(const __grid_constant__ StepParams p, std::byte* block, int num_decisions) {
  NoteTime(p.stamps, kAppendStamp);
  constexpr int kHeaderWords = sizeof(StepHeader) / sizeof(uint4);
  __shared__ uint4 header_words[kHeaderWords];
  const auto* packed = reinterpret_cast<const uint4*>(p.header);
  uint4 header_word;
  if (threadIdx.x < kHeaderWords) header_word = __ldg(packed + threadIdx.x);
  const int thread = blockIdx.x * kAppendThreads + threadIdx.x, lane = threadIdx.x % 32;
  const int num_threads = gridDim.x * kAppendThreads;
  // The first unit's run, asked for before the header says that there is one.
  const int heads = p.shape.num_kv_heads, first_unit = thread / 32;
  AppendRun run;
  if (first_unit / (2 * heads) < p.max_sequences) {
    run = LoadFromBlock(p.runs + first_unit / (2 * heads));
  }
  static_assert(sizeof(HeadDecision) % 4 == 0, "cleared by words");
  constexpr int kWords = sizeof(HeadDecision) / 4;
#pragma unroll 1
  for (int i = thread; i < num_decisions * kWords; i += num_threads) {
    reinterpret_cast<uint32_t*>(p.decisions)[i] = 0;
  }
  if (threadIdx.x < kHeaderWords) header_words[threadIdx.x] = header_word;
  __syncthreads();
  const StepHeader& header = *reinterpret_cast<const StepHeader*>(header_words);
  // From the grid's last thread on: units begin with the first.
#pragma unroll 1
  for (int64_t i = num_threads - 1 - thread; i < header.block_bytes / 16; i += num_threads) {
    reinterpret_cast<uint4*>(block)[i] = __ldg(packed + i);
  }
  const int append_units = header.num_runs * heads * 2;
  const int64_t query_elements = header.num_lse * p.shape.head_dim;
  const int query_units = static_cast<int>((query_elements + kQueryUnit - 1) / kQueryUnit);
  const int num_units = append_units + query_units;
  for (int unit = first_unit; unit < num_units; unit += num_threads / 32) {
    if (unit >= append_units) {
      CopyQuery(p, header, unit - append_units, lane);
      continue;
    }
    const int index = unit / (2 * heads);
    if (unit != first_unit || index >= p.max_sequences) run = LoadFromBlock(p.runs + index);
    if (!AppendHead(p, header, run, unit % heads, unit / heads % 2 != 0, lane)) {
      atomicOr(p.flags + run.sequence, kNonfiniteKv);
    }
  }
  NoteTime(p.stamps, kAppendedStamp);
}

// Tells the host that the step has ended, once for the grid, when the last of its CTAs arrives.
__device__ __forceinline__ void ReportStep(const StepParams& p, const StepHeader& header) {
  __shared__ bool is_last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence_system();  // What the CTA wrote stands in host memory before it arrives.
    is_last = atomicAdd(p.arrivals, 1) == gridDim.x - 1;
    if (is_last) p.stamps[kReturnedStamp] = GlobalTime();
  }
  __syncthreads();
  if (!is_last) return;
  StepReport& report = *header.report;
  static_assert(kNumStamps <= kAppendThreads, "a thread for each");
  if (threadIdx.x < kNumStamps) report.stamps[threadIdx.x] = p.stamps[threadIdx.x];
  __syncthreads();
  if (threadIdx.x != 0) return;
  *p.arrivals = 0;
  __threadfence_system();
  *static_cast<volatile int64_t*>(&report.ticket) = header.ticket;
}

__global__ void __launch_bounds__(kAppendThreads)
    ReturnKernel(const __grid_constant__ StepParams p) {
  NoteTime(p.stamps, kReturnStamp);
  const StepHeader header = *p.header;
  const int num_threads = gridDim.x * kAppendThreads;
  // Each part begins with other threads, so that none waits for another.
  const auto first = [&](int part) {
    return static_cast<int>((blockIdx.x + gridDim.x * part / 4) % gridDim.x * kAppendThreads +
                            threadIdx.x);
  };
#pragma unroll 1
  for (int64_t i = first(0); i < header.out_bytes / 16; i += num_threads) {
    reinterpret_cast<uint4*>(header.out)[i] = reinterpret_cast<const uint4*>(p.out)[i];
  }
  constexpr int kWords = sizeof(HeadDecision) / 4;
  constexpr int kErrorWord = offsetof(HeadDecision, predicted_error) / 4;
  const int words = p.shape.num_kv_heads * kWords;
#pragma unroll 1
  for (int i = first(1); i < header.num_sequences * words; i += num_threads) {
    const int64_t from = int64_t{p.sequences[i / words].decision} * words + i % words;
    uint32_t word = reinterpret_cast<const uint32_t*>(p.decisions)[from];
    // The kernels before leave the mean square.
    if (i % kWords == kErrorWord) word = __float_as_uint(sqrtf(__uint_as_float(word)));
    reinterpret_cast<uint32_t*>(header.decisions)[i] = word;
  }
#pragma unroll 1
  for (int64_t i = first(2); i < header.num_lse; i += num_threads) header.lse[i] = p.lse[i];
#pragma unroll 1
  for (int i = first(3); i < header.num_sequences; i += num_threads) {
    const uint32_t flags = p.flags[i];
    header.results[2 * i] = (flags & kNonfiniteQ) != 0;
    header.results[2 * i + 1] = (flags & kNonfiniteKv) != 0;
    p.flags[i] = 0;
  }
  ReportStep(p, header);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_APPEND_CUH_

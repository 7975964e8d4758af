#ifndef ADAATTN_KERNELS_CUDA_STEP_PARAMS_H_
#define ADAATTN_KERNELS_CUDA_STEP_PARAMS_H_

// What the kernels at the two ends of a step read (append.cuh).
//
// Everything that changes from step to step lies in one block, which the host packs in pinned
// memory and the first kernel copies to the same device address in every step, so that a captured
// graph stays valid. It begins with a StepHeader.

#include <cstddef>
#include <cstdint>

#include "kernels/policy/decision.h"
#include "kernels/shape.h"

namespace adaattn {

struct StepReport;

// Tensors of the batch in pinned host memory, and how much of them is used.
struct alignas(16) StepHeader {
  int64_t block_bytes = 0;       // a multiple of 16
  const std::byte* q = nullptr;  // in_type
  const std::byte* k = nullptr;
  const std::byte* v = nullptr;
  std::byte* out = nullptr;
  float* lse = nullptr;
  uint8_t* results = nullptr;  // [num_sequences, 2]: SequenceResult
  HeadDecision* decisions = nullptr;
  StepReport* report = nullptr;
  int64_t ticket = 0;  // what is reported when the step ends
  int64_t out_bytes = 0;
  int64_t num_lse = 0;  // rows of q times num_q_heads
  int32_t num_runs = 0;
  int32_t num_sequences = 0;
};

// Where one sequence's rows of q lie and where its decisions are made.
struct StepSequence {
  int32_t q_row = 0;
  int32_t q_len = 0;
  int32_t decision = 0;  // row of the device's decisions
};

// Rows of k and v that go to one page.
struct alignas(16) AppendRun {
  int64_t kv_row = 0;  // first row of k and v
  uint32_t page = 0;   // PageId
  int32_t slot = 0;    // of the first row in the page
  int32_t num_rows = 0;
  int32_t sequence = 0;
  int32_t key_scales = -1;  // index of [num_kv_heads] floats in `scales`; -1 = all 1
  int32_t value_scales = -1;
};

// Bits of StepParams::flags.
inline constexpr uint32_t kNonfiniteQ = 1;
inline constexpr uint32_t kNonfiniteKv = 2;

// All pointers are device memory. Only `header`, `sequences`, `scales` and `runs`, parts of the
// block, are pinned host memory for the first kernel of a step, which brings the block to the
// device.
struct StepParams {
  AttentionShape shape;
  DType in_type = DType::kBf16;
  DType page_type = DType::kBf16;
  std::byte* pool = nullptr;
  const StepHeader* header = nullptr;
  const StepSequence* sequences = nullptr;
  const float* scales = nullptr;
  const AppendRun* runs = nullptr;  // as many as the header says; memory for max_sequences at least
  int32_t max_sequences = 0;
  std::byte* q = nullptr;
  const std::byte* out = nullptr;
  const float* lse = nullptr;
  HeadDecision* decisions = nullptr;
  uint32_t* flags = nullptr;     // [num_sequences], zero before and after every step
  uint32_t* arrivals = nullptr;  // of the last kernel's CTAs, zero before and after every step
  uint64_t* stamps = nullptr;    // [kNumStamps] of stage_stamps.h
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_STEP_PARAMS_H_

#ifndef ADAATTN_LOADTEST_TRACE_POOL_H_
#define ADAATTN_LOADTEST_TRACE_POOL_H_

// A captured trace in device memory, sealed once, for any number of heads; sequences are copies of
// its pages.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/trace.h"
#include "kernels/cuda/device_buffer.h"
#include "kernels/format/page_layout.h"
#include "kernels/shape.h"

namespace adaattn {

inline constexpr PageFormat kTraceFormat = PageFormat::kProgressiveF16;  // traces are FP16
inline constexpr int32_t kDenseTailPages = 2;  // of a sequence; the pages before are sealed

class TracePool {
 public:
  // Seals `trace` for `shape`, whose head_dim is the trace's, and leaves `free_bytes` for cases.
  // Bases are fitted on the first 1024 tokens, their channels ordered by the first quarter of the
  // trace's rows. Keeps a reference to the trace.
  //
  // Errors: kInvalidArgument for another head_dim, or a trace of less than 1024 tokens or not
  // of whole pages.
  static absl::StatusOr<std::unique_ptr<TracePool>> Create(const Trace* trace,
                                                           const AttentionShape& shape,
                                                           int32_t stored_bits, int64_t free_bytes);

  // Pool bytes of the pages of `num_sequences` sequences of `kv_len` tokens.
  static int64_t CaseBytes(const AttentionShape& shape, int32_t stored_bits, int32_t num_sequences,
                           int32_t kv_len);

  // Gives all free memory to the pages of these sequences, shuffled, no two the same, and fills
  // them: the trace's first `kv_len` tokens, or all of it several times over. The pages of an
  // earlier call are overwritten. Returns the page tables one after the other.
  //
  // Errors: kInvalidArgument unless kv_len is a whole number of pages, at least three, that is
  // below the trace's length or a multiple of it; kResourceExhausted.
  absl::StatusOr<std::vector<PageId>> FillSequences(int32_t num_sequences, int32_t kv_len);

  const Trace& trace() const { return *trace_; }
  const AttentionShape& shape() const { return shape_; }
  int32_t stored_bits() const { return stored_bits_; }
  std::byte* pool() const { return memory_.data(); }
  PageId basis() const { return basis_; }

 private:
  TracePool(const Trace* trace, const AttentionShape& shape, int32_t stored_bits)
      : trace_(trace), shape_(shape), stored_bits_(stored_bits) {}
  absl::Status CopyIn(int64_t free_bytes);
  absl::Status LoadBasis();
  absl::Status LoadTokens();
  absl::Status Seal();

  const Trace* const trace_;
  const AttentionShape shape_;
  const int32_t stored_bits_;
  DeviceBuffer memory_;
  PageId basis_ = kNoPage;
  std::vector<PageId> dense_, sealed_;  // by page of the trace
  int64_t free_begin_ = 0;              // byte offset
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_TRACE_POOL_H_

#ifndef ADAATTN_LOADTEST_DECODE_CASE_H_
#define ADAATTN_LOADTEST_DECODE_CASE_H_

// A batch of random sequences in device memory, ready for exact decode, and its float64 judge.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/kernel_table.h"
#include "kernels/cuda/params.h"
#include "kernels/shape.h"

namespace adaattn {

struct DecodeCaseOptions {
  AttentionShape shape;
  DType kv_type = DType::kBf16;
  DType in_type = DType::kBf16;
  DType out_type = DType::kBf16;
  std::vector<int32_t> kv_lens;  // one a sequence
  int32_t q_len = 1;
  int64_t window = 0;
  float softcap = 0;
  float q_sigma = 1;    // of q; keys and values have 1
  bool scales = false;  // FP8: per-head scales other than 1
  uint64_t seed = 1;

  std::string Name() const;
};

// How far the device's outputs are from float64, over the heads and rows that were checked.
struct DecodeError {
  double worst_out = 0;  // largest relative L2 error of a row of out
  double mean_out = 0;
  double worst_lse = 0;      // absolute, nats
  double worst_entropy = 0;  // absolute, nats
  int64_t counted_tokens = 0, expected_tokens = 0;
  int64_t counted_bytes = 0, expected_bytes = 0;
};

class DecodeCase {
 public:
  // Allocates and fills. Pages are shuffled; tails of last pages and pages between are NaN.
  static absl::StatusOr<std::unique_ptr<DecodeCase>> Create(const DecodeCaseOptions& options,
                                                            int32_t num_ctas);
  ~DecodeCase();
  DecodeCase(const DecodeCase&) = delete;
  DecodeCase& operator=(const DecodeCase&) = delete;

  // Enqueues one step.
  absl::Status Run(cudaStream_t stream) const;
  // Runs one step on poisoned outputs and compares every `head_stride`-th kv head of every
  // sequence.
  absl::StatusOr<DecodeError> Check(int32_t head_stride);

  int64_t kv_bytes() const;          // of K and V that a step reads
  int64_t kv_bytes_as_bf16() const;  // the same tokens in BF16
  int32_t num_items() const { return static_cast<int32_t>(schedule_.items.size()); }
  int32_t num_slots() const { return schedule_.num_slots; }

 private:
  explicit DecodeCase(const DecodeCaseOptions& options) : options_(options) {}
  absl::Status FillPool();
  absl::Status Upload(int32_t num_ctas);
  absl::Status Compare(int32_t sequence, int32_t kv_head, DecodeError* error) const;
  absl::StatusOr<void*> Allocate(size_t bytes);
  template <typename T>
  absl::Status CopyIn(const std::vector<T>& host, const T** device);

  DecodeCaseOptions options_;
  const DecodeKernel* kernel_ = nullptr;
  int32_t row_tiles_ = 1;
  std::vector<DeviceSequence> sequences_;
  std::vector<uint32_t> page_table_;
  std::vector<float> scales_;
  std::vector<std::byte> q_, out_;
  std::vector<float> lse_;
  std::vector<HeadDecision> decisions_;
  DecodeSchedule schedule_;
  DecodeParams params_;
  int64_t num_rows_ = 0;
  int64_t num_pool_pages_ = 0;
  std::byte* pool_ = nullptr;
  std::vector<void*> allocations_;
};

}  // namespace adaattn

#endif  // ADAATTN_LOADTEST_DECODE_CASE_H_

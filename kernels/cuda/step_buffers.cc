#include "kernels/cuda/step_buffers.h"

#include <utility>

#include "kernels/cuda/device_buffer.h"
#include "kernels/cuda/status.h"

namespace adaattn {
namespace {

constexpr int64_t kLineBytes = 256;

int64_t AlignLine(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }

class PinnedStepBuffers final : public StepBuffers {
 public:
  explicit PinnedStepBuffers(const StepLimits& limits) : limits_(limits) {}

  absl::Status Allocate() {
    constexpr int64_t kTensors = 7;
    const StepLimits& l = limits_;
    const int64_t bytes = 2 * l.max_q_bytes + 2 * l.max_kv_bytes +
                          l.max_q_rows * int64_t{sizeof(float)} +
                          l.max_sequences * int64_t{sizeof(SequenceResult)} +
                          l.max_decisions * int64_t{sizeof(HeadDecision)} + kTensors * kLineBytes;
    const absl::Status status = memory_.Allocate(bytes);
    if (!status.ok()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("pinned host memory, ", bytes, " bytes: ", status.message()));
    }
    int64_t offset = 0;
    const auto take = [&](int64_t size) {
      std::byte* at = memory_.data() + offset;
      offset += AlignLine(size);
      return at;
    };
    q_ = take(l.max_q_bytes);
    k_ = take(l.max_kv_bytes);
    v_ = take(l.max_kv_bytes);
    out_ = take(l.max_q_bytes);
    lse_ = reinterpret_cast<float*>(take(l.max_q_rows * int64_t{sizeof(float)}));
    results_ =
        reinterpret_cast<SequenceResult*>(take(l.max_sequences * int64_t{sizeof(SequenceResult)}));
    decisions_ =
        reinterpret_cast<HeadDecision*>(take(l.max_decisions * int64_t{sizeof(HeadDecision)}));
    return absl::OkStatus();
  }

  const StepLimits& limits() const override { return limits_; }
  std::byte* q() override { return q_; }
  std::byte* k() override { return k_; }
  std::byte* v() override { return v_; }
  std::byte* out() override { return out_; }
  float* lse() override { return lse_; }
  SequenceResult* results() override { return results_; }
  HeadDecision* decisions() override { return decisions_; }
  StageTimes* stage_times() override { return &stage_times_; }

 private:
  const StepLimits limits_;
  PinnedBuffer memory_;
  std::byte* q_ = nullptr;
  std::byte* k_ = nullptr;
  std::byte* v_ = nullptr;
  std::byte* out_ = nullptr;
  float* lse_ = nullptr;
  SequenceResult* results_ = nullptr;
  HeadDecision* decisions_ = nullptr;
  StageTimes stage_times_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<StepBuffers>> CreatePinnedStepBuffers(const StepLimits& limits) {
  auto buffers = std::make_unique<PinnedStepBuffers>(limits);
  ADAATTN_RETURN_IF_ERROR(buffers->Allocate());
  return buffers;
}

}  // namespace adaattn

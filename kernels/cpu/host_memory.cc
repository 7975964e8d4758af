#include "kernels/cpu/host_memory.h"

#include <sys/mman.h>

#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

constexpr int64_t kLineBytes = 64;

int64_t AlignLine(int64_t bytes) { return (bytes + kLineBytes - 1) / kLineBytes * kLineBytes; }

// Every tensor of a step in one mapping.
class HostStepBuffers final : public StepBuffers {
 public:
  static int64_t TotalBytes(const StepLimits& limits) {
    return AlignLine(limits.max_q_bytes) * 2 + AlignLine(limits.max_kv_bytes) * 2 +
           AlignLine(limits.max_q_rows * static_cast<int64_t>(sizeof(float))) +
           AlignLine(limits.max_sequences * static_cast<int64_t>(sizeof(SequenceResult))) +
           AlignLine(limits.max_decisions * static_cast<int64_t>(sizeof(HeadDecision)));
  }

  HostStepBuffers(const StepLimits& limits, HostMemory memory)
      : limits_(limits), memory_(std::move(memory)) {
    int64_t offset = 0;
    const auto take = [&](int64_t bytes) {
      std::byte* at = memory_.data() + offset;
      offset += AlignLine(bytes);
      return at;
    };
    q_ = take(limits.max_q_bytes);
    k_ = take(limits.max_kv_bytes);
    v_ = take(limits.max_kv_bytes);
    out_ = take(limits.max_q_bytes);
    lse_ = reinterpret_cast<float*>(take(limits.max_q_rows * int64_t{sizeof(float)}));
    results_ = reinterpret_cast<SequenceResult*>(
        take(limits.max_sequences * int64_t{sizeof(SequenceResult)}));
    decisions_ =
        reinterpret_cast<HeadDecision*>(take(limits.max_decisions * int64_t{sizeof(HeadDecision)}));
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
  HostMemory memory_;
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

absl::StatusOr<HostMemory> HostMemory::Map(int64_t bytes) {
  if (bytes < 1) bytes = 1;
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat("mmap of ", bytes, " bytes of host memory: ", strerror(errno)));
  }
  // Only advice: without huge pages everything works, a few percent slower.
  (void)madvise(data, static_cast<size_t>(bytes), MADV_HUGEPAGE);
  HostMemory memory;
  memory.data_ = static_cast<std::byte*>(data);
  memory.bytes_ = bytes;
  return memory;
}

HostMemory::HostMemory(HostMemory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

HostMemory& HostMemory::operator=(HostMemory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

HostMemory::~HostMemory() {
  if (data_ != nullptr) (void)munmap(data_, static_cast<size_t>(bytes_));
}

absl::StatusOr<std::unique_ptr<StepBuffers>> CreateHostStepBuffers(const StepLimits& limits) {
  absl::StatusOr<HostMemory> memory = HostMemory::Map(HostStepBuffers::TotalBytes(limits));
  if (!memory.ok()) return memory.status();
  return std::make_unique<HostStepBuffers>(limits, *std::move(memory));
}

}  // namespace adaattn

// The Backend of kernels/attention.h on the processor. RunAttend computes before it returns, so
// Wait has nothing to wait for and page work is in order by itself.

#include <cstring>
#include <fstream>
#include <map>
#include <string>
#include <thread>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/attention.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/cpu/page_work.h"
#include "kernels/cpu/step.h"

namespace adaattn {
namespace {

constexpr int32_t kHeadDims[] = {64, 80, 96, 128, 256};
constexpr int32_t kMaxGroupSize = 16;
constexpr int32_t kMaxQLen = 128;

// "model name" of /proc/cpuinfo; "unknown processor" elsewhere.
std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (colon == std::string::npos || line.compare(0, 10, "model name") != 0) continue;
    return std::string(absl::StripAsciiWhitespace(line.substr(colon + 1)));
  }
  return "unknown processor";
}

class CpuPlan final : public AttendPlan {
 public:
  CpuPlan(const AttentionShape& shape, PageFormat format) : shape_(shape), format_(format) {}
  std::string DebugString() const override {
    return absl::StrCat("cpu ", CpuKernelTarget(), " ", PageFormatName(format_), " ",
                        shape_.DebugString());
  }

 private:
  const AttentionShape shape_;
  const PageFormat format_;
};

class CpuBackend final : public Backend {
 public:
  // `pool` holds the exact tier behind the pool.
  CpuBackend(HostMemory pool, int64_t pool_bytes, int32_t num_threads)
      : pool_(std::move(pool)),
        scratch_(num_threads),
        sealed_scratch_(num_threads),
        workers_(num_threads) {
    info_.name = "cpu";
    info_.device = ProcessorName();
    info_.kernels = CpuKernelTarget();
    info_.head_dims.assign(std::begin(kHeadDims), std::end(kHeadDims));
    info_.formats = {PageFormat::kF32,    PageFormat::kF16,         PageFormat::kBf16,
                     PageFormat::kF8E4m3, PageFormat::kProgressive, PageFormat::kProgressiveF16};
    info_.policies.insert(info_.policies.end(), {Policy::kEntropy, Policy::kLearned});
    info_.max_group_size = kMaxGroupSize;
    info_.max_q_len = kMaxQLen;
    info_.pool_bytes = pool_bytes;
    info_.exact_tier_bytes = pool_.bytes() - pool_bytes;
    info_.bounds_errors = true;
  }

  const BackendInfo& info() const override { return info_; }

  absl::StatusOr<std::unique_ptr<StepBuffers>> CreateStepBuffers(
      const StepLimits& limits) override {
    return CreateHostStepBuffers(limits);
  }

  absl::StatusOr<const AttendPlan*> PlanAttend(const AttendBatch& batch) override;

  absl::StatusOr<StepTicket> RunAttend(const AttendPlan& plan, const AttendBatch& batch) override {
    (void)plan;
    RunStep(CpuContext{pool_.data(), &workers_, &arena_, &wave_arena_, &scratch_, &sealed_scratch_},
            batch);
    return StepTicket{++last_ticket_};
  }

  absl::Status Wait(StepTicket ticket) override {
    if (ticket.value < 1 || ticket.value > last_ticket_) {
      return absl::InternalError(
          absl::StrCat("ticket ", ticket.value, " was never given out; last ", last_ticket_));
    }
    return absl::OkStatus();
  }

  absl::Status SealPages(absl::Span<const SealTask> tasks,
                         absl::Span<SealResult> results) override {
    SealPagesOnCpu(tasks, pool_.data(), &workers_, results);
    return absl::OkStatus();
  }
  absl::Status ReopenPages(absl::Span<const ReopenTask> tasks) override {
    ReopenPagesOnCpu(tasks, pool_.data(), &workers_);
    return absl::OkStatus();
  }
  absl::Status FitBasis(const FitBasisTask& task) override {
    return FitBasisOnCpu(task, pool_.data(), &workers_);
  }
  absl::Status LoadBasis(const LoadBasisTask& task) override {
    return LoadBasisOnCpu(task, pool_.data());
  }
  absl::Status ReadTokens(const ReadTask& task) override {
    ReadTokensOnCpu(task, pool_.data(), &workers_);
    return absl::OkStatus();
  }
  absl::Status CopyPage(PageId source, PageId target, int64_t bytes) override {
    std::memcpy(pool_.data() + PageOffset(target), pool_.data() + PageOffset(source), bytes);
    return absl::OkStatus();
  }
  absl::Status ZeroPage(PageId page, int64_t bytes) override {
    std::memset(pool_.data() + PageOffset(page), 0, bytes);
    return absl::OkStatus();
  }

 private:
  using PlanKey = std::tuple<int32_t, int32_t, int32_t, PageFormat>;

  BackendInfo info_;
  HostMemory pool_;
  std::map<PlanKey, std::unique_ptr<CpuPlan>> plans_;
  Arena arena_;
  Arena wave_arena_;
  std::vector<DenseScratch> scratch_;
  std::vector<SealedWorker> sealed_scratch_;
  int64_t last_ticket_ = 0;
  WorkerPool workers_;
};

absl::StatusOr<const AttendPlan*> CpuBackend::PlanAttend(const AttendBatch& batch) {
  const AttentionShape& shape = batch.shape;
  const bool known_dim = std::find(info_.head_dims.begin(), info_.head_dims.end(),
                                   shape.head_dim) != info_.head_dims.end();
  const bool known_group = shape.num_kv_heads > 0 && shape.num_q_heads > 0 &&
                           shape.num_q_heads % shape.num_kv_heads == 0 &&
                           shape.group_size() <= kMaxGroupSize;
  if (!known_dim || !known_group) {
    return absl::UnimplementedError(absl::StrCat(
        "no cpu kernel for ", shape.DebugString(), "; head_dim may be ",
        absl::StrJoin(info_.head_dims, ", "), ", q heads per kv head 1 to ", kMaxGroupSize));
  }
  for (const SequenceStep& sequence : batch.sequences) {
    if (sequence.q_len > kMaxQLen) {
      return absl::UnimplementedError(
          absl::StrCat("q_len ", sequence.q_len, "; at most ", kMaxQLen));
    }
  }
  std::unique_ptr<CpuPlan>& plan =
      plans_[{shape.num_q_heads, shape.num_kv_heads, shape.head_dim, batch.format}];
  if (plan == nullptr) plan = std::make_unique<CpuPlan>(shape, batch.format);
  return plan.get();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCpuBackend(const BackendOptions& options) {
  const int64_t pool_bytes = AlignPage(options.pool_bytes);
  absl::StatusOr<HostMemory> pool = HostMemory::Map(pool_bytes + options.exact_tier_bytes);
  if (!pool.ok()) return pool.status();
  const int32_t cores = std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
  const int32_t threads = options.num_threads > 0 ? options.num_threads : cores;
  return std::make_unique<CpuBackend>(*std::move(pool), pool_bytes, threads);
}

}  // namespace adaattn

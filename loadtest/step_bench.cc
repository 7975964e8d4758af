#include "loadtest/step_bench.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/attention.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/step.h"

namespace adaattn {
namespace {

using Clock = std::chrono::steady_clock;

struct StepShape {
  PageFormat format = PageFormat::kBf16;
  int32_t batch = 1;
  int32_t kv_len = 2048;

  std::string Name() const {
    return absl::StrCat(PageFormatName(format), "_n", batch, "_kv", kv_len);
  }
};

constexpr AttentionShape kShape{32, 8, 128};
// Left dense at the end of a sequence with sealed pages.
constexpr int32_t kOpenPages = 2;

// A batch of equal sequences over zeroed pages: what the host does depends on shapes alone.
class StepCase {
 public:
  // For a device of `num_sms` multiprocessors.
  StepCase(Backend* backend, const StepShape& shape, int32_t num_sms)
      : backend_(backend), shape_(shape), num_sms_(num_sms) {}

  absl::Status Prepare() {
    const int32_t num_pages = shape_.kv_len / kPageTokens + 1;
    const bool sealed = shape_.format == PageFormat::kProgressive;
    const int64_t page_bytes = std::max(DensePageBytes(kShape, DenseDType(shape_.format)),
                                        MakePageLayout(kShape, 8).page_bytes);
    if (sealed) ADAATTN_RETURN_IF_ERROR(LoadIdentity());
    const int64_t first = AlignPage(MakeBasisLayout(kShape).block_bytes) / kPageAlignment;
    for (int64_t i = 0; i < int64_t{shape_.batch} * num_pages; ++i) {
      pages_.push_back(PageId{static_cast<uint32_t>(first + i * (page_bytes / kPageAlignment))});
    }
    runs_ = {BasisRun{num_pages - kOpenPages, PageId{0}}};
    for (int32_t i = 0; i < shape_.batch; ++i) {
      SequenceStep step;
      step.kv_len = shape_.kv_len;
      step.append_len = 1;
      step.q_len = 1;
      step.q_start = shape_.kv_len;
      step.pages = absl::MakeConstSpan(pages_).subspan(int64_t{i} * num_pages, num_pages);
      if (sealed) {
        step.num_sealed_pages = num_pages - kOpenPages;
        step.bases = runs_;
      }
      step.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kShape.head_dim));
      steps_.push_back(step);
    }
    ADAATTN_RETURN_IF_ERROR(MakeBuffers());
    ADAATTN_ASSIGN_OR_RETURN(const PlanKey key, MakePlanKey(batch_));
    plan_ = std::make_unique<CudaPlan>(key, num_sms_);
    block_.resize(plan_->Needs(batch_).block);
    return absl::OkStatus();
  }

  // What of the host's part is not the CUDA runtime's: seconds to find the step's key and needs,
  // and to write its block. `anew`: with its schedules, which the step before had, too.
  absl::StatusOr<double> Pack(bool anew) {
    if (anew) schedules_.plan = nullptr;
    const auto begin = Clock::now();
    ADAATTN_RETURN_IF_ERROR(MakePlanKey(batch_).status());
    if (plan_->Needs(batch_).block > static_cast<int64_t>(block_.size())) {
      return absl::InternalError("the step has outgrown its block");
    }
    PackStep(*plan_, batch_, block_.data(), &schedules_);
    return std::chrono::duration<double>(Clock::now() - begin).count();
  }

  // One step; seconds that PlanAttend and RunAttend took, and until the results were there.
  absl::Status Run(double* host, double* whole) {
    const auto begin = Clock::now();
    ADAATTN_ASSIGN_OR_RETURN(const AttendPlan* plan, backend_->PlanAttend(batch_));
    ADAATTN_ASSIGN_OR_RETURN(const StepTicket ticket, backend_->RunAttend(*plan, batch_));
    const auto enqueued = Clock::now();
    ADAATTN_RETURN_IF_ERROR(backend_->Wait(ticket));
    const auto done = Clock::now();
    *host = std::chrono::duration<double>(enqueued - begin).count();
    *whole = std::chrono::duration<double>(done - begin).count();
    return absl::OkStatus();
  }

 private:
  absl::Status LoadIdentity() {
    const int32_t d = kShape.head_dim;
    std::vector<float> mean(kShape.num_kv_heads * d), basis(kShape.num_kv_heads * d * d);
    for (int32_t i = 0; i < kShape.num_kv_heads * d; ++i) basis[i * d + i % d] = 1;
    LoadBasisTask task;
    task.shape = kShape;
    task.mean = mean;
    task.basis = basis;
    task.target = PageId{0};
    return backend_->LoadBasis(task);
  }

  absl::Status MakeBuffers() {
    StepLimits limits;
    limits.max_sequences = shape_.batch;
    limits.max_q_rows = int64_t{shape_.batch} * kShape.num_q_heads;
    limits.max_q_bytes = limits.max_q_rows * kShape.head_dim * 2;
    limits.max_kv_bytes = int64_t{shape_.batch} * kShape.num_kv_heads * kShape.head_dim * 2;
    limits.max_decisions = int64_t{shape_.batch} * kShape.num_kv_heads;
    limits.max_table_entries = static_cast<int64_t>(pages_.size());
    ADAATTN_ASSIGN_OR_RETURN(buffers_, backend_->CreateStepBuffers(limits));
    std::memset(buffers_->q(), 0, limits.max_q_bytes);
    std::memset(buffers_->k(), 0, limits.max_kv_bytes);
    std::memset(buffers_->v(), 0, limits.max_kv_bytes);
    batch_.shape = kShape;
    batch_.format = shape_.format;
    batch_.sequences = steps_;
    batch_.buffers = buffers_.get();
    return absl::OkStatus();
  }

  Backend* const backend_;
  const StepShape shape_;
  const int32_t num_sms_;
  std::vector<PageId> pages_;
  std::vector<BasisRun> runs_;
  std::vector<SequenceStep> steps_;
  std::unique_ptr<StepBuffers> buffers_;
  AttendBatch batch_;
  std::unique_ptr<CudaPlan> plan_;
  std::vector<std::byte> block_;
  PackedSchedules schedules_;
};

double Median(std::vector<double>* values) {
  std::sort(values->begin(), values->end());
  return (*values)[values->size() / 2];
}

}  // namespace

absl::Status TimeSteps(int runs, int32_t num_sms, nlohmann::json* report) {
  for (const PageFormat format :
       {PageFormat::kBf16, PageFormat::kF8E4m3, PageFormat::kProgressive}) {
    for (const StepShape& shape :
         {StepShape{format, 1, 8192}, StepShape{format, 32, 2048}, StepShape{format, 32, 8192}}) {
      BackendOptions options;
      options.pool_bytes = int64_t{2} << 30;
      ADAATTN_ASSIGN_OR_RETURN(auto backend, CreateCudaBackend(options));
      StepCase test(backend.get(), shape, num_sms);
      ADAATTN_RETURN_IF_ERROR(test.Prepare());
      std::vector<double> hosts, packs, packs_anew, wholes;
      for (int i = -10; i < runs; ++i) {
        double host = 0, whole = 0;
        ADAATTN_RETURN_IF_ERROR(test.Run(&host, &whole));
        if (i < 0) continue;
        hosts.push_back(host);
        wholes.push_back(whole);
        ADAATTN_ASSIGN_OR_RETURN(const double anew, test.Pack(/*anew=*/true));
        packs_anew.push_back(anew);
        ADAATTN_ASSIGN_OR_RETURN(const double pack, test.Pack(/*anew=*/false));
        packs.push_back(pack);
      }
      const double host = Median(&hosts) * 1e6, whole = Median(&wholes) * 1e6;
      const double pack = Median(&packs) * 1e6, anew = Median(&packs_anew) * 1e6;
      std::printf("%-28s host %7.2f us (packing %5.2f, anew %5.2f)  step %8.2f us\n",
                  shape.Name().c_str(), host, pack, anew, whole);
      report->push_back({{"case", shape.Name()},
                         {"host_us", host},
                         {"pack_us", pack},
                         {"pack_anew_us", anew},
                         {"step_us", whole}});
    }
  }
  return absl::OkStatus();
}

}  // namespace adaattn

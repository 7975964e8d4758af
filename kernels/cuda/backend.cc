// The Backend of kernels/attention.h on one GPU. Everything runs on one stream, in order; a step is
// one launch of its plan's graph, which brings the packed block and reports its end by itself.

#include <algorithm>
#include <array>
#include <iterator>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/attention.h"
#include "kernels/cuda/append.h"
#include "kernels/cuda/device_buffer.h"
#include "kernels/cuda/page_work.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/scratch.h"
#include "kernels/cuda/stage_stamps.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/step.h"
#include "kernels/cuda/step_buffers.h"
#include "kernels/cuda/step_report.h"
#include "kernels/cuda/stream.h"
#include "kernels/cuda/tuning.h"

namespace adaattn {
namespace {

constexpr int32_t kMaxGraphs = 64;

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(int32_t device) : device_(device) {}
  ~CudaBackend() override {
    if (stream_.get() != nullptr) (void)cudaStreamSynchronize(stream_.get());
  }

  // Requires: the device exists and runs this build's kernels.
  absl::Status Start(const BackendOptions& options);

  const BackendInfo& info() const override { return info_; }
  absl::StatusOr<std::unique_ptr<StepBuffers>> CreateStepBuffers(
      const StepLimits& limits) override {
    ADAATTN_RETURN_IF_ERROR(Enter());
    return CreatePinnedStepBuffers(limits);
  }
  absl::StatusOr<const AttendPlan*> PlanAttend(const AttendBatch& batch) override;
  absl::StatusOr<StepTicket> RunAttend(const AttendPlan& plan, const AttendBatch& batch) override;
  absl::Status Wait(StepTicket ticket) override;
  absl::Status SealPages(absl::Span<const SealTask> tasks, absl::Span<SealResult> results) override;
  absl::Status ReopenPages(absl::Span<const ReopenTask> tasks) override;
  absl::Status FitBasis(const FitBasisTask& task) override {
    ADAATTN_RETURN_IF_ERROR(Enter());
    return Leave(FitBasisOnHost(task, Mover()));
  }
  absl::Status LoadBasis(const LoadBasisTask& task) override {
    ADAATTN_RETURN_IF_ERROR(Enter());
    return Leave(LoadBasisToDevice(task, Mover()));
  }
  absl::Status ReadTokens(const ReadTask& task) override {
    ADAATTN_RETURN_IF_ERROR(Enter());
    return Leave(ReadTokensToHost(task, Mover()));
  }
  absl::Status CopyPage(PageId source, PageId target, int64_t bytes) override {
    ADAATTN_RETURN_IF_ERROR(Enter());
    return Leave(Copy(source, target, bytes));
  }
  absl::Status ZeroPage(PageId page, int64_t bytes) override {
    ADAATTN_RETURN_IF_ERROR(Enter());
    return Leave(
        FromCuda(cudaMemsetAsync(memory_.At(page), 0, static_cast<size_t>(bytes), stream_.get()),
                 "cudaMemsetAsync"));
  }

 private:
  // A step in flight.
  struct Slot {
    StepReport* report() const { return reinterpret_cast<StepReport*>(report_memory.data()); }

    PinnedBuffer block, report_memory;
    PackedSchedules schedules;  // that `block` holds
    int64_t ticket = 0;         // 0 = idle
    const CudaPlan* plan = nullptr;
    StageTimes* stage_times = nullptr;
  };

  // Every call begins with Enter and ends with Leave: a lost device fails all calls from then on.
  absl::Status Enter() {
    if (!lost_.ok()) return lost_;
    int current = -1;
    if (cudaGetDevice(&current) == cudaSuccess && current == device_) return absl::OkStatus();
    return Leave(FromCuda(cudaSetDevice(device_), "cudaSetDevice"));
  }
  absl::Status Leave(absl::Status status) {
    if (status.code() == absl::StatusCode::kUnavailable) lost_ = status;
    return status;
  }
  PageMover Mover() { return PageMover{memory_, stream_.get(), &transfer_}; }
  // From pool or tier to pool or tier.
  absl::Status Copy(PageId source, PageId target, int64_t bytes) {
    return FromCuda(cudaMemcpyAsync(memory_.At(target), memory_.At(source),
                                    static_cast<size_t>(bytes), cudaMemcpyDefault, stream_.get()),
                    "cudaMemcpyAsync");
  }

  absl::StatusOr<CudaPlan*> FindPlan(const AttendBatch& batch);
  // A slot without a step in flight: the first, so that callers who wait for every step capture
  // each plan once.
  absl::StatusOr<Slot*> IdleSlot();
  // Makes scratch, block and graph fit for a step of `plan` in `slot`.
  absl::Status Prepare(const ScratchNeeds& needs, Slot* slot, CudaPlan* plan);
  StepGraph* GraphOf(const Slot* slot, CudaPlan* plan) {
    return &plan->graphs[slot - slots_.data()];
  }
  void EvictGraphs();
  absl::Status Launch(const AttendBatch& batch, Slot* slot, CudaPlan* plan);
  absl::Status Finish(Slot* slot);
  // Whether the stream has no work left.
  absl::StatusOr<bool> IsIdle();
  template <class Task>
  absl::Status RunPageTasks(absl::Span<const Task> tasks, bool seal, float* drift);

  const int32_t device_;
  BackendInfo info_;
  int32_t num_sms_ = 0;
  CudaTuning tuning_;
  absl::Status lost_;
  Stream stream_, capture_stream_;
  DeviceBuffer pool_;
  PinnedBuffer tier_;
  PageMemory memory_;
  Scratch scratch_;
  DeviceBuffer task_memory_;
  PinnedBuffer task_staging_, transfer_;
  // The one asked for last comes first: steps repeat, and a server sees thousands of shapes.
  std::vector<std::unique_ptr<CudaPlan>> plans_;
  int32_t num_graphs_ = 0;
  std::array<Slot, kStepsInFlight> slots_;
  int64_t last_ticket_ = 0;
};

absl::Status CudaBackend::Start(const BackendOptions& options) {
  const int64_t pool_bytes = AlignPage(options.pool_bytes);
  cudaDeviceProp properties;
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaGetDeviceProperties(&properties, device_));
  ADAATTN_ASSIGN_OR_RETURN(LoadedTuning loaded, LoadTuning(options.tuning_file, properties.name));
  tuning_ = std::move(loaded.tuning);
  size_t free_bytes = 0, all_bytes = 0;
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemGetInfo(&free_bytes, &all_bytes));
  const absl::Status pool = pool_.Allocate(pool_bytes);
  if (!pool.ok()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a pool of ", pool_bytes, " bytes does not fit: device ", device_, " has ",
                     free_bytes, " of ", all_bytes, " bytes free (", pool.message(), ")"));
  }
  if (options.exact_tier_bytes > 0) {
    const absl::Status tier = tier_.Allocate(options.exact_tier_bytes);
    if (!tier.ok()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("an exact tier of ", options.exact_tier_bytes,
                       " bytes of pinned memory cannot be had (", tier.message(), ")"));
    }
  }
  memory_ = PageMemory{pool_.data(), tier_.data(), pool_bytes};
  ADAATTN_RETURN_IF_ERROR(stream_.Create());
  ADAATTN_RETURN_IF_ERROR(capture_stream_.Create());
  for (Slot& slot : slots_) {
    ADAATTN_RETURN_IF_ERROR(slot.report_memory.Allocate(sizeof(StepReport)));
    *slot.report() = StepReport();
  }
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(pool_.data(), 0, static_cast<size_t>(pool_bytes), stream_.get()));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()));
  num_sms_ = properties.multiProcessorCount;
  info_.name = "cuda";
  info_.device = properties.name;
  info_.kernels = absl::StrCat("sm_", properties.major, properties.minor);
  info_.head_dims.assign(std::begin(kCudaHeadDims), std::end(kCudaHeadDims));
  info_.formats = {PageFormat::kF32,    PageFormat::kF16,         PageFormat::kBf16,
                   PageFormat::kF8E4m3, PageFormat::kProgressive, PageFormat::kProgressiveF16};
  info_.policies.insert(info_.policies.end(), {Policy::kEntropy, Policy::kLearned});
  info_.max_group_size = kCudaMaxGroupSize;
  info_.max_q_len = kCudaMaxQLen;
  info_.pool_bytes = pool_bytes;
  info_.exact_tier_bytes = tier_.bytes();
  info_.bounds_errors = true;
  info_.tuning = std::move(loaded.source);
  info_.seal_crossovers = SealCrossovers(tuning_);
  return absl::OkStatus();
}

absl::StatusOr<CudaPlan*> CudaBackend::FindPlan(const AttendBatch& batch) {
  ADAATTN_ASSIGN_OR_RETURN(const PlanKey key, MakePlanKey(batch));
  auto found =
      std::find_if(plans_.begin(), plans_.end(),
                   [&key](const std::unique_ptr<CudaPlan>& plan) { return plan->key() == key; });
  if (found == plans_.end()) {
    found = plans_.insert(found, std::make_unique<CudaPlan>(key, num_sms_, tuning_));
  }
  std::rotate(plans_.begin(), found, found + 1);
  return plans_.front().get();
}

void CudaBackend::EvictGraphs() {
  for (auto plan = plans_.rbegin(); num_graphs_ == kMaxGraphs; ++plan) {
    for (StepGraph& graph : (*plan)->graphs) {
      if (graph.exec.get() == nullptr) continue;
      graph.exec.Reset(nullptr);
      --num_graphs_;
    }
  }
}

absl::Status CudaBackend::Prepare(const ScratchNeeds& needs, Slot* slot, CudaPlan* plan) {
  if (!scratch_.Covers(needs)) ADAATTN_RETURN_IF_ERROR(scratch_.Grow(needs, stream_.get()));
  if (slot->block.bytes() < needs.block) {
    slot->schedules = PackedSchedules();
    ADAATTN_RETURN_IF_ERROR(slot->block.Allocate(needs.block + needs.block / 2));
  }
  const std::byte* source = slot->block.data();
  StepGraph* graph = GraphOf(slot, plan);
  const bool captured = graph->exec.get() != nullptr;
  if (captured && graph->generation == scratch_.generation() && graph->source == source) {
    return absl::OkStatus();
  }
  if (!captured) {
    if (num_graphs_ == kMaxGraphs) EvictGraphs();
    ++num_graphs_;
  }
  const absl::Status status = Capture(
      capture_stream_.get(),
      [&](cudaStream_t stream) {
        return EnqueueStep(*plan, scratch_, memory_, source, num_sms_, stream);
      },
      &graph->exec);
  if (graph->exec.get() == nullptr) --num_graphs_;
  graph->generation = status.ok() ? scratch_.generation() : -1;
  graph->source = source;
  return status;
}

absl::StatusOr<const AttendPlan*> CudaBackend::PlanAttend(const AttendBatch& batch) {
  ADAATTN_RETURN_IF_ERROR(Enter());
  return FindPlan(batch);
}

absl::StatusOr<StepTicket> CudaBackend::RunAttend(const AttendPlan& plan,
                                                  const AttendBatch& batch) {
  ADAATTN_RETURN_IF_ERROR(Enter());
  // Plans are this backend's own and only it may change them.
  auto* own = const_cast<CudaPlan*>(static_cast<const CudaPlan*>(&plan));
  const absl::StatusOr<Slot*> slot = IdleSlot();
  if (!slot.ok()) return Leave(slot.status());
  ADAATTN_RETURN_IF_ERROR(Leave(Prepare(own->Needs(batch), *slot, own)));
  ADAATTN_RETURN_IF_ERROR(Leave(Launch(batch, *slot, own)));
  return StepTicket{last_ticket_};
}

absl::StatusOr<CudaBackend::Slot*> CudaBackend::IdleSlot() {
  Slot* slot = std::min_element(slots_.begin(), slots_.end(),
                                [](const Slot& a, const Slot& b) { return a.ticket < b.ticket; });
  if (slot->ticket != 0) ADAATTN_RETURN_IF_ERROR(Finish(slot));
  return slot;
}

absl::Status CudaBackend::Launch(const AttendBatch& batch, Slot* slot, CudaPlan* plan) {
  PackStep(*plan, batch, slot->block.data(), &slot->schedules);
  auto* header = reinterpret_cast<StepHeader*>(slot->block.data());
  header->report = slot->report();
  header->ticket = last_ticket_ + 1;
  slot->plan = plan;
  slot->stage_times = batch.buffers->stage_times();
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaGraphLaunch(GraphOf(slot, plan)->exec.get(), stream_.get()));
  slot->ticket = ++last_ticket_;
  return absl::OkStatus();
}

absl::StatusOr<bool> CudaBackend::IsIdle() {
  const cudaError_t state = cudaStreamQuery(stream_.get());
  if (state != cudaErrorNotReady) {
    ADAATTN_RETURN_IF_ERROR(FromCuda(state, "cudaStreamQuery"));
    return true;
  }
  (void)cudaGetLastError();  // Not an error, but kept like one.
  return false;
}

absl::Status CudaBackend::Finish(Slot* slot) {
  const int64_t ticket = std::exchange(slot->ticket, 0);
  ADAATTN_RETURN_IF_ERROR(AwaitReport(*slot->report(), ticket, [this] { return IsIdle(); }));
  *slot->stage_times = StagesFromStamps(slot->plan->key(), slot->report()->stamps);
  return absl::OkStatus();
}

absl::Status CudaBackend::Wait(StepTicket ticket) {
  if (ticket.value < 1 || ticket.value > last_ticket_) {
    return absl::InternalError(
        absl::StrCat("ticket ", ticket.value, " was never given out; last ", last_ticket_));
  }
  ADAATTN_RETURN_IF_ERROR(Enter());
  for (Slot& slot : slots_) {
    if (slot.ticket == ticket.value) return Leave(Finish(&slot));
  }
  // Its slot went on to another step and was waited for then.
  return absl::OkStatus();
}

// Runs tasks of one shape, depth and page type. drift [num_tasks, num_kv_heads] when sealing.
template <class Task>
absl::Status CudaBackend::RunPageTasks(absl::Span<const Task> tasks, bool seal, float* drift) {
  const size_t n = tasks.size(), heads = tasks[0].shape.num_kv_heads;
  const int64_t ids_bytes = AlignPage(static_cast<int64_t>(3 * n * sizeof(uint32_t)));
  const int64_t bytes = ids_bytes + static_cast<int64_t>(n * heads * sizeof(float));
  if (task_memory_.bytes() < bytes) {
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()));
    ADAATTN_RETURN_IF_ERROR(task_memory_.Allocate(2 * bytes));
    ADAATTN_RETURN_IF_ERROR(task_staging_.Allocate(2 * bytes));
  }
  auto* ids = reinterpret_cast<uint32_t*>(task_staging_.data());
  for (size_t i = 0; i < n; ++i) {
    ids[i] = static_cast<uint32_t>(tasks[i].source);
    ids[n + i] = static_cast<uint32_t>(tasks[i].target);
    ids[2 * n + i] = static_cast<uint32_t>(tasks[i].basis);
  }
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(task_memory_.data(), ids, 3 * n * sizeof(uint32_t),
                                               cudaMemcpyHostToDevice, stream_.get()));
  SealParams params;
  params.shape = tasks[0].shape;
  params.stored_bits = tasks[0].stored_bits;
  params.page_type = tasks[0].page_type;
  params.num_tasks = static_cast<int32_t>(n);
  params.pool = pool_.data();
  params.source = reinterpret_cast<const uint32_t*>(task_memory_.data());
  params.target = params.source + n;
  params.basis = params.source + 2 * n;
  params.drift = reinterpret_cast<float*>(task_memory_.data() + ids_bytes);
  ADAATTN_RETURN_IF_ERROR(seal ? LaunchSeal(params, stream_.get())
                               : LaunchReopen(params, stream_.get()));
  if (seal) {
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(drift, params.drift, n * heads * sizeof(float),
                                                 cudaMemcpyDeviceToHost, stream_.get()));
  }
  // The staging memory is used again.
  return FromCuda(cudaStreamSynchronize(stream_.get()), "cudaStreamSynchronize");
}

// The tasks at the front of `tasks` that one launch can take.
template <class Task>
absl::Span<const Task> AlikeTasks(absl::Span<const Task> tasks) {
  size_t n = 1;
  while (n < tasks.size() && tasks[n].shape == tasks[0].shape &&
         tasks[n].stored_bits == tasks[0].stored_bits && tasks[n].page_type == tasks[0].page_type) {
    ++n;
  }
  return tasks.subspan(0, n);
}

absl::Status CudaBackend::SealPages(absl::Span<const SealTask> tasks,
                                    absl::Span<SealResult> results) {
  ADAATTN_RETURN_IF_ERROR(Enter());
  for (size_t first = 0; first < tasks.size();) {
    const absl::Span<const SealTask> alike = AlikeTasks(tasks.subspan(first));
    const int32_t heads = alike[0].shape.num_kv_heads;
    std::vector<float> drift(alike.size() * heads);
    for (const SealTask& task : alike) {
      if (task.exact_copy == kNoPage) continue;
      const int64_t bytes = DensePageBytes(task.shape, task.page_type);
      ADAATTN_RETURN_IF_ERROR(Leave(Copy(task.source, task.exact_copy, bytes)));
    }
    ADAATTN_RETURN_IF_ERROR(Leave(RunPageTasks(alike, /*seal=*/true, drift.data())));
    for (size_t i = 0; i < alike.size(); ++i) {
      float sum = 0;
      for (int32_t head = 0; head < heads; ++head) sum += drift[i * heads + head];
      results[first + i].drift_ratio = sum / static_cast<float>(heads);
    }
    first += alike.size();
  }
  return absl::OkStatus();
}

absl::Status CudaBackend::ReopenPages(absl::Span<const ReopenTask> tasks) {
  ADAATTN_RETURN_IF_ERROR(Enter());
  for (size_t first = 0; first < tasks.size();) {
    const absl::Span<const ReopenTask> alike = AlikeTasks(tasks.subspan(first));
    ADAATTN_RETURN_IF_ERROR(Leave(RunPageTasks(alike, /*seal=*/false, nullptr)));
    first += alike.size();
  }
  return absl::OkStatus();
}

std::string Version(int version) { return absl::StrCat(version / 1000, ".", version % 1000 / 10); }

// kFailedPrecondition, naming what is missing, unless device `ordinal` runs this build's kernels.
absl::Status CheckDevice(int32_t ordinal) {
  int count = 0, driver = 0, runtime = 0;
  const cudaError_t counted = cudaGetDeviceCount(&count);
  (void)cudaGetLastError();
  (void)cudaDriverGetVersion(&driver);
  (void)cudaRuntimeGetVersion(&runtime);
  if (counted == cudaErrorInsufficientDriver && driver > 0) {
    return absl::FailedPreconditionError(absl::StrCat("the NVIDIA driver supports CUDA ",
                                                      Version(driver), ", this build needs ",
                                                      Version(runtime)));
  }
  if (counted != cudaSuccess || count == 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "no usable CUDA device: ",
        driver == 0 ? "no NVIDIA driver found"
                    : cudaGetErrorString(counted == cudaSuccess ? cudaErrorNoDevice : counted)));
  }
  if (ordinal < 0 || ordinal >= count) {
    return absl::FailedPreconditionError(
        absl::StrCat("CUDA device ", ordinal, " does not exist; there are ", count));
  }
  const cudaError_t set = cudaSetDevice(ordinal);
  const cudaError_t probed = set == cudaSuccess ? ProbeKernelImage() : set;
  if (probed == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();
  cudaDeviceProp properties;
  const bool known = cudaGetDeviceProperties(&properties, ordinal) == cudaSuccess;
  (void)cudaGetLastError();
  if (known &&
      (probed == cudaErrorNoKernelImageForDevice || probed == cudaErrorInvalidDeviceFunction ||
       probed == cudaErrorUnsupportedPtxVersion)) {
    return absl::FailedPreconditionError(
        absl::StrCat("this build has no kernels for CUDA device ", ordinal, ", ", properties.name,
                     " (compute capability ", properties.major, ".", properties.minor, ")"));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("CUDA device ", ordinal, " cannot be used: ", cudaGetErrorString(probed)));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend(const BackendOptions& options) {
  ADAATTN_RETURN_IF_ERROR(CheckDevice(options.device));
  auto backend = std::make_unique<CudaBackend>(options.device);
  ADAATTN_RETURN_IF_ERROR(backend->Start(options));
  return backend;
}

}  // namespace adaattn

#include "loadtest/progressive_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/status.h"
#include "kernels/cuda/step.h"
#include "kernels/cuda/step_buffers.h"
#include "kernels/format/float_types.h"

namespace adaattn {
namespace {

constexpr DType kIoType = DType::kF16;  // the trace's own

// Events that keep time, unlike those of stream.h.
class Stopwatch {
 public:
  Stopwatch() = default;
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;
  ~Stopwatch() {
    if (start_ != nullptr) (void)cudaEventDestroy(start_);
    if (stop_ != nullptr) (void)cudaEventDestroy(stop_);
  }
  absl::Status Create() {
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaEventCreate(&start_));
    return FromCuda(cudaEventCreate(&stop_), "cudaEventCreate");
  }
  absl::Status Start(cudaStream_t stream) {
    return FromCuda(cudaEventRecord(start_, stream), "cudaEventRecord");
  }
  // Waits. Microseconds since Start.
  absl::StatusOr<double> Stop(cudaStream_t stream) {
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaEventRecord(stop_, stream));
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaEventSynchronize(stop_));
    float milliseconds = 0;
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&milliseconds, start_, stop_));
    return milliseconds * 1e3;
  }

 private:
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ProgressiveCase>> ProgressiveCase::Create(
    TracePool* pool, int32_t num_sequences, int32_t kv_len, const DecisionParams& decision) {
  std::unique_ptr<ProgressiveCase> made(new ProgressiveCase(pool, num_sequences, kv_len));
  ADAATTN_ASSIGN_OR_RETURN(made->tables_, pool->FillSequences(num_sequences, kv_len));
  made->basis_run_ = {made->num_pages() - kDenseTailPages, pool->basis()};
  made->group_ = SealedGroupOf(pool->stored_bits());
  ADAATTN_RETURN_IF_ERROR(made->Prepare(decision));
  return made;
}

std::vector<SequenceStep> ProgressiveCase::Steps(const DecisionParams& decision) const {
  std::vector<SequenceStep> steps;
  for (int32_t i = 0; i < num_sequences_; ++i) {
    SequenceStep step;
    step.kv_len = kv_len_;
    step.q_len = 1;
    step.q_start = kv_len_ - 1;
    step.pages = absl::MakeConstSpan(tables_).subspan(size_t{1} * i * num_pages(), num_pages());
    step.num_sealed_pages = basis_run_.num_pages;
    step.bases = absl::MakeConstSpan(&basis_run_, 1);
    step.stored_bits = pool_->stored_bits();
    step.softmax_scale = static_cast<float>(pool_->trace().softmax_scale);
    step.decision = decision;
    steps.push_back(step);
  }
  return steps;
}

absl::Status ProgressiveCase::Prepare(const DecisionParams& decision) {
  const int64_t d = shape().head_dim, rows = int64_t{num_sequences_} * shape().num_q_heads;
  StepLimits limits;
  limits.max_sequences = num_sequences_;
  limits.max_q_bytes = rows * d * DTypeBytes(kIoType);
  limits.max_q_rows = rows;
  limits.max_decisions = int64_t{num_sequences_} * shape().num_kv_heads;
  limits.max_table_entries = static_cast<int64_t>(tables_.size());
  ADAATTN_ASSIGN_OR_RETURN(buffers_, CreatePinnedStepBuffers(limits));
  ADAATTN_RETURN_IF_ERROR(stream_.Create());
  ADAATTN_RETURN_IF_ERROR(SetDecision(decision));
  const Trace& trace = pool_->trace();
  for (int64_t row = 0; row < rows; ++row) {
    const TraceRow source = Source(static_cast<int32_t>(row / shape().num_q_heads),
                                   static_cast<int32_t>(row % shape().num_q_heads));
    const int64_t from = (int64_t{source.q_head} * trace.num_rows + source.row) * d;
    std::memcpy(buffers_->q() + row * d * 2, trace.q.data() + from, d * 2);
  }
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(scratch_.q(), buffers_->q(), limits.max_q_bytes, cudaMemcpyHostToDevice));
  return Capture(
      stream_.get(),
      [this](cudaStream_t stream) {
        return RunProgressive(SealedParams(*plan_, scratch_, pool_->pool(), group_), stream);
      },
      &graph_);
}

absl::Status ProgressiveCase::SetDecision(const DecisionParams& decision) {
  const std::vector<SequenceStep> steps = Steps(decision);
  AttendBatch batch;
  batch.shape = shape();
  batch.format = PageFormat::kProgressive;
  batch.in_type = kIoType;
  batch.out_type = kIoType;
  batch.sequences = steps;
  batch.buffers = buffers_.get();
  if (plan_ == nullptr) {
    int device = 0, num_sms = 0;
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
    ADAATTN_RETURN_IF_CUDA_ERROR(
        cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
    ADAATTN_ASSIGN_OR_RETURN(const PlanKey key, MakePlanKey(batch));
    plan_ = std::make_unique<CudaPlan>(key, num_sms);
    ADAATTN_RETURN_IF_ERROR(scratch_.Grow(plan_->Needs(batch), stream_.get()));
  }
  std::vector<std::byte> block(plan_->Needs(batch).block);
  DecodeSchedule schedule;
  const int64_t bytes = PackStep(*plan_, batch, &schedule, block.data());
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(scratch_.block(), block.data(), bytes, cudaMemcpyHostToDevice));
  return FromCuda(cudaDeviceSynchronize(), "copying the step's block");
}

absl::StatusOr<ProgressiveOutput> ProgressiveCase::Run() {
  const ProgressiveParams params = SealedParams(*plan_, scratch_, pool_->pool(), group_);
  const int64_t elements = int64_t{num_sequences_} * shape().num_q_heads * shape().head_dim;
  ProgressiveOutput output;
  output.out.resize(elements);
  output.decisions.resize(int64_t{num_sequences_} * shape().num_kv_heads);
  const int64_t decision_bytes =
      static_cast<int64_t>(output.decisions.size() * sizeof(HeadDecision));
  // What the kernels leave out must not look like an earlier run's answer.
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(params.out, 0xff, elements * DTypeBytes(kIoType), stream_.get()));
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemsetAsync(params.decisions, 0xff, decision_bytes, stream_.get()));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaGraphLaunch(graph_.get(), stream_.get()));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(buffers_->out(), params.out,
                                               elements * DTypeBytes(kIoType),
                                               cudaMemcpyDeviceToHost, stream_.get()));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(output.decisions.data(), params.decisions,
                                               decision_bytes, cudaMemcpyDeviceToHost,
                                               stream_.get()));
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_.get()));
  for (int64_t i = 0; i < elements; ++i) {
    output.out[i] = ReadElement(buffers_->out(), kIoType, i);
  }
  for (HeadDecision& decision : output.decisions) {
    decision.predicted_error = std::sqrt(decision.predicted_error);  // the kernels leave its square
  }
  return output;
}

absl::StatusOr<std::vector<double>> ProgressiveCase::Time(int runs, const DeviceBuffer& flush) {
  constexpr int kWarmUps = 3;
  Stopwatch watch;
  ADAATTN_RETURN_IF_ERROR(watch.Create());
  std::vector<double> times;
  for (int i = -kWarmUps; i < runs; ++i) {
    ADAATTN_RETURN_IF_CUDA_ERROR(
        cudaMemsetAsync(flush.data(), i & 0xff, flush.bytes(), stream_.get()));
    ADAATTN_RETURN_IF_ERROR(watch.Start(stream_.get()));
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaGraphLaunch(graph_.get(), stream_.get()));
    ADAATTN_ASSIGN_OR_RETURN(const double microseconds, watch.Stop(stream_.get()));
    if (i >= 0) times.push_back(microseconds);
  }
  std::sort(times.begin(), times.end());
  return times;
}

std::string ProgressiveCase::Name() const {
  return absl::StrCat("progressive_d", shape().head_dim, "_n", num_sequences_, "_kv", kv_len_, "_h",
                      shape().num_q_heads, "/", shape().num_kv_heads);
}

int64_t ProgressiveCase::bytes_as_bf16() const {
  return int64_t{num_sequences_} * kv_len_ * 2 * shape().num_kv_heads * shape().head_dim * 2;
}

}  // namespace adaattn

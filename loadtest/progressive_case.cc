#include "loadtest/progressive_case.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cuda/status.h"
#include "kernels/cuda/step.h"
#include "kernels/cuda/step_buffers.h"
#include "kernels/format/float_types.h"
#include "kernels/policy/feedback.h"
#include "loadtest/bench_case.h"
#include "loadtest/device_timer.h"

namespace adaattn {
namespace {

constexpr DType kIoType = DType::kF16;  // the trace's own

}  // namespace

absl::StatusOr<std::unique_ptr<ProgressiveCase>> ProgressiveCase::Create(
    TracePool* pool, const ProgressiveCaseOptions& options) {
  std::unique_ptr<ProgressiveCase> made(new ProgressiveCase(pool, options));
  ADAATTN_ASSIGN_OR_RETURN(made->tables_,
                           pool->FillSequences(options.num_sequences, options.kv_len));
  made->basis_run_ = {made->num_pages() - kDenseTailPages, pool->basis()};
  made->group_ = SealedGroupOf(pool->stored_bits());
  const DecisionParams& decision = options.decision;
  if (decision.policy == Policy::kFeedback) {
    if (FeedbackAim2(decision.target_relative_error) <= 0) {
      return absl::InvalidArgumentError("the target leaves feedback nothing to aim at");
    }
    const std::vector<float> thetas(pool->shape().num_kv_heads, decision.theta);
    made->feedback_.assign(options.num_sequences, {thetas, decision.target_relative_error});
    made->thetas_.resize(options.num_sequences * thetas.size());
  }
  ADAATTN_RETURN_IF_ERROR(made->Prepare());
  return made;
}

std::vector<SequenceStep> ProgressiveCase::Steps(const DecisionParams& decision) {
  std::vector<SequenceStep> steps;
  for (int32_t i = 0; i < num_sequences(); ++i) {
    SequenceStep step;
    step.kv_len = kv_len();
    step.q_len = 1;
    step.q_start = kv_len() - 1;
    step.pages = absl::MakeConstSpan(tables_).subspan(size_t{1} * i * num_pages(), num_pages());
    step.num_sealed_pages = basis_run_.num_pages;
    step.bases = absl::MakeConstSpan(&basis_run_, 1);
    step.stored_bits = pool_->stored_bits();
    step.softmax_scale = static_cast<float>(pool_->trace().softmax_scale);
    step.decision = decision;
    if (!feedback_.empty()) {
      UseFeedback(feedback_[i], thetas_.data() + int64_t{i} * shape().num_kv_heads, &step);
    }
    steps.push_back(step);
  }
  return steps;
}

absl::Status ProgressiveCase::Prepare() {
  const int64_t d = shape().head_dim, rows = int64_t{num_sequences()} * shape().num_q_heads;
  StepLimits limits;
  limits.max_sequences = num_sequences();
  limits.max_q_bytes = rows * d * DTypeBytes(kIoType);
  limits.max_q_rows = rows;
  limits.max_decisions = int64_t{num_sequences()} * shape().num_kv_heads;
  limits.max_table_entries = static_cast<int64_t>(tables_.size());
  ADAATTN_ASSIGN_OR_RETURN(buffers_, CreatePinnedStepBuffers(limits));
  ADAATTN_RETURN_IF_ERROR(stream_.Create());
  ADAATTN_RETURN_IF_ERROR(SetDecision(options_.decision));
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

absl::Status ProgressiveCase::MakePlan(const AttendBatch& batch) {
  int device = 0, num_sms = 0;
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  ADAATTN_ASSIGN_OR_RETURN(const PlanKey key, MakePlanKey(batch));
  plan_ = std::make_unique<CudaPlan>(key, num_sms, options_.tuning);
  return scratch_.Grow(plan_->Needs(batch), stream_.get());
}

absl::Status ProgressiveCase::SetDecision(const DecisionParams& decision) {
  const std::vector<SequenceStep> steps = Steps(decision);
  AttendBatch batch;
  batch.shape = shape();
  batch.format = kTraceFormat;
  batch.in_type = kIoType;
  batch.out_type = kIoType;
  batch.sequences = steps;
  batch.buffers = buffers_.get();
  if (plan_ == nullptr) ADAATTN_RETURN_IF_ERROR(MakePlan(batch));
  std::vector<std::byte> block(plan_->Needs(batch).block);
  PackedSchedules schedules;
  const int64_t bytes = PackStep(*plan_, batch, block.data(), &schedules);
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(scratch_.block(), block.data(), bytes, cudaMemcpyHostToDevice));
  return FromCuda(cudaDeviceSynchronize(), "copying the step's block");
}

absl::Status ProgressiveCase::Follow(int num_steps) {
  const auto num_heads = static_cast<size_t>(shape().num_kv_heads);
  for (int step = 0; step < num_steps; ++step) {
    ADAATTN_ASSIGN_OR_RETURN(const ProgressiveOutput output, Run());
    for (size_t i = 0; i < feedback_.size(); ++i) {
      FollowFeedback(absl::MakeConstSpan(output.decisions).subspan(i * num_heads, num_heads),
                     options_.decision.target_relative_error, &feedback_[i]);
    }
    ADAATTN_RETURN_IF_ERROR(SetDecision(options_.decision));
  }
  return absl::OkStatus();
}

absl::StatusOr<ProgressiveOutput> ProgressiveCase::Run() {
  const ProgressiveParams params = SealedParams(*plan_, scratch_, pool_->pool(), group_);
  const int64_t elements = int64_t{num_sequences()} * shape().num_q_heads * shape().head_dim;
  ProgressiveOutput output;
  output.out.resize(elements);
  output.decisions.resize(int64_t{num_sequences()} * shape().num_kv_heads);
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

absl::StatusOr<std::vector<double>> ProgressiveCase::Time(int runs, const L2Flush& flush) {
  return TimeFlushed(stream_.get(), runs, flush, [this](cudaStream_t stream) {
    return FromCuda(cudaGraphLaunch(graph_.get(), stream), "cudaGraphLaunch");
  });
}

std::string ProgressiveCase::Name() const {
  return BenchCaseName("progressive", shape(), num_sequences(), kv_len());
}

int64_t ProgressiveCase::bytes_as_bf16() const {
  return BytesAsBf16(shape(), num_sequences(), kv_len());
}

}  // namespace adaattn

#ifndef ADAATTN_TESTS_UNIT_ENGINE_HARNESS_H_
#define ADAATTN_TESTS_UNIT_ENGINE_HARNESS_H_

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "kernels/mutex.h"
#include "server/engine.h"

namespace adaattn {

// Waits for one value from another thread.
template <typename T>
class Mailbox {
 public:
  void Put(T value) {
    MutexLock lock(&mutex_);
    value_ = std::move(value);
    full_ = true;
    arrived_.Signal();
  }
  T Take() {
    MutexLock lock(&mutex_);
    while (!full_) arrived_.Wait(&mutex_);
    full_ = false;
    return std::move(value_);
  }

 private:
  Mutex mutex_;
  CondVar arrived_;
  bool full_ ABSL_GUARDED_BY(mutex_) = false;
  T value_ ABSL_GUARDED_BY(mutex_) = T();
};

using TaskMailbox = Mailbox<std::unique_ptr<AttentionTask>>;

// What tests send: the first element of a row carries the value, the rest is 1.
struct TestPayload {
  std::vector<float> q, k, v;
};

inline SessionConfig TestConfig(PageFormat format, int32_t num_layers = 1) {
  SessionConfig config;
  config.tenant = "tenant-a";
  config.routing_key = "route";
  config.shape = {/*num_q_heads=*/2, /*num_kv_heads=*/1, /*head_dim=*/64};
  config.num_layers = num_layers;
  config.softmax_scale = 0.125f;
  config.format = format;
  config.max_tokens = 1 << 16;
  config.lease = absl::Seconds(60);
  return config;
}

// Builds float32 tasks, one sequence after the other.
class TaskBuilder {
 public:
  explicit TaskBuilder(const std::shared_ptr<Session>& model, int32_t layer = 0)
      : task_(std::make_unique<AttentionTask>()), payload_(std::make_shared<TestPayload>()) {
    task_->shape = model->config().shape;
    task_->format = model->config().format;
    task_->layer = layer;
    task_->out_type = DType::kF32;
  }

  // Appends `append_len` tokens of values first_value, first_value + 1, ... and attends q_len rows.
  TaskBuilder& Add(std::shared_ptr<Session> session, int64_t position, uint64_t step_id,
                   int32_t append_len, int32_t q_len, float first_value) {
    SequenceTask sequence;
    sequence.session = std::move(session);
    sequence.position = position;
    sequence.step_id = step_id;
    sequence.append_len = append_len;
    sequence.q_len = q_len;
    task_->sequences.push_back(std::move(sequence));
    for (int32_t i = 0; i < append_len; ++i) {
      AddRow(task_->shape.num_kv_heads, first_value + static_cast<float>(i), &payload_->k);
      AddRow(task_->shape.num_kv_heads, 1, &payload_->v);
    }
    for (int32_t i = 0; i < q_len; ++i) AddRow(task_->shape.num_q_heads, 1, &payload_->q);
    return *this;
  }
  TaskBuilder& AddFailed(absl::Status status, int32_t append_len, int32_t q_len) {
    Add(nullptr, 0, 0, append_len, q_len, 0);
    task_->sequences.back().status = std::move(status);
    return *this;
  }
  AttentionTask* operator->() { return task_.get(); }
  TestPayload* payload() { return payload_.get(); }

  std::unique_ptr<AttentionTask> Build(TaskMailbox* mailbox) {
    task_->q = Pieces(payload_->q);
    task_->k = Pieces(payload_->k);
    task_->v = Pieces(payload_->v);
    task_->payload_owner = payload_;
    task_->done = [mailbox](std::unique_ptr<AttentionTask> task) {
      if (mailbox != nullptr) mailbox->Put(std::move(task));
    };
    return std::move(task_);
  }

 private:
  void AddRow(int32_t heads, float value, std::vector<float>* rows) {
    const size_t begin = rows->size();
    rows->resize(begin + static_cast<size_t>(heads) * task_->shape.head_dim, 1.0f);
    (*rows)[begin] = value;
  }
  // In two pieces that part inside an element, as a transport may deliver them.
  static TensorPieces Pieces(const std::vector<float>& rows) {
    TensorPieces tensor;
    tensor.type = DType::kF32;
    const auto* const bytes = reinterpret_cast<const std::byte*>(rows.data());
    const size_t size = rows.size() * sizeof(float);
    if (size == 0) return tensor;
    tensor.pieces.push_back({bytes, size / 3 + 1});
    tensor.pieces.push_back({bytes + size / 3 + 1, size - size / 3 - 1});
    return tensor;
  }

  std::unique_ptr<AttentionTask> task_;
  std::shared_ptr<TestPayload> payload_;
};

// Element 0 of row `row` of o, and the row's first lse.
inline float OutAt(const AttentionTask& task, int64_t row) {
  float value;
  const int64_t size = int64_t{task.shape.num_q_heads} * task.shape.head_dim * sizeof(float);
  std::memcpy(&value, task.reply.buffer->bytes.get() + row * size, sizeof(value));
  return value;
}
inline float LseAt(const AttentionTask& task, int64_t row) {
  float value;
  std::memcpy(&value,
              task.reply.buffer->bytes.get() + task.reply.buffer->out_bytes +
                  row * task.shape.num_q_heads * static_cast<int64_t>(sizeof(float)),
              sizeof(value));
  return value;
}

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_ENGINE_HARNESS_H_

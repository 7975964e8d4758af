#ifndef ADAATTN_TESTS_UNIT_CUDA_PACKED_H_
#define ADAATTN_TESTS_UNIT_CUDA_PACKED_H_

// Batches and their packed blocks, for tests of the CUDA backend's host work.

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/host_memory.h"
#include "kernels/cuda/plan.h"
#include "kernels/cuda/step.h"

namespace adaattn {

inline constexpr int32_t kNumSms = 132;  // of an H100

// A batch of sequences of the given lengths before the append, all over one long table.
class Batch {
 public:
  explicit Batch(const std::vector<int64_t>& lengths, PageFormat format = PageFormat::kBf16) {
    table_.resize(4096);
    for (size_t i = 0; i < table_.size(); ++i) table_[i] = PageId{static_cast<uint32_t>(7 * i + 3)};
    for (const int64_t length : lengths) {
      SequenceStep step;
      step.kv_len = length;
      step.append_len = 1;
      step.q_len = 1;
      step.q_start = length;
      step.pages = absl::MakeConstSpan(table_).subspan(0, length / kPageTokens + 1);
      step.softmax_scale = 0.1f;
      steps.push_back(step);
    }
    batch_.shape = {32, 8, 128};
    batch_.format = format;
    StepLimits limits;
    limits.max_sequences = 64;
    limits.max_q_bytes = limits.max_kv_bytes = 1 << 20;
    limits.max_q_rows = limits.max_decisions = 4096;
    buffers_ = *CreateHostStepBuffers(limits);
    batch_.buffers = buffers_.get();
  }

  const AttendBatch& get() {
    batch_.sequences = steps;
    return batch_;
  }
  void Seal(size_t i, int32_t num_pages) {
    steps[i].num_sealed_pages = num_pages;
    bases_ = {BasisRun{num_pages, PageId{99}}};
    steps[i].bases = bases_;
  }
  AttendBatch* mutable_batch() { return &batch_; }

  std::vector<SequenceStep> steps;

 private:
  std::vector<PageId> table_;
  std::vector<BasisRun> bases_;
  std::unique_ptr<StepBuffers> buffers_;
  AttendBatch batch_;
};

// The packed block of a batch.
struct Packed {
  explicit Packed(Batch* batch)
      : plan(*MakePlanKey(batch->get()), kNumSms), block(plan.Needs(batch->get()).block) {
    Pack(batch);
  }
  // Again, of the same plan, over what is there.
  void Pack(Batch* batch) { bytes = PackStep(plan, batch->get(), block.data(), &schedules); }
  template <class T>
  T At(int64_t offset, int64_t index) const {
    T value;
    std::memcpy(&value, block.data() + offset + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
    return value;
  }
  // What exact decode is to read.
  std::vector<DecodeItem> Items() const {
    std::vector<DecodeItem> items(At<int32_t>(plan.layout().cta_items, plan.num_ctas()));
    for (size_t i = 0; i < items.size(); ++i) {
      items[i] = At<DecodeItem>(plan.layout().items, static_cast<int64_t>(i));
    }
    return items;
  }

  CudaPlan plan;
  std::vector<std::byte> block;
  PackedSchedules schedules;
  int64_t bytes = 0;
};

}  // namespace adaattn

#endif  // ADAATTN_TESTS_UNIT_CUDA_PACKED_H_

#include "kernels/cuda/step.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <new>

#include "kernels/cuda/append.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/stage_stamps.h"
#include "kernels/cuda/status.h"

namespace adaattn {
namespace {

// Positions that fit 32 bits, and the window that shows the same keys. Rows past the end of the
// cache (a shard of a longer sequence) may lie at any 64-bit position.
struct RowPositions {
  int32_t q_start = 0;
  int32_t window = 0;
};

RowPositions ClipPositions(const SequenceStep& sequence) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - kPageTokens;
  const int64_t q_start = std::min(sequence.q_start, kMost);
  int64_t window = sequence.window;
  if (window > 0) {
    window = std::max<int64_t>(window - (sequence.q_start - q_start), 1);
    if (window > kMost) window = 0;
  }
  return {static_cast<int32_t>(q_start), static_cast<int32_t>(window)};
}

void FillPaged(const SequenceStep& sequence, const DeviceSequence& device, PagedSequence* out) {
  const RowPositions positions = ClipPositions(sequence);
  out->table_begin = device.page_table;
  out->num_sealed = sequence.num_sealed_pages;
  out->kv_len = device.total_len;
  out->q_begin = device.q_row;
  out->q_len = sequence.q_len;
  out->q_start = positions.q_start;
  out->window = positions.window;
  out->softmax_scale = sequence.softmax_scale;
  out->softcap = sequence.softcap;
  out->num_bases = static_cast<int32_t>(sequence.bases.size());
  int32_t end = 0;
  for (int32_t i = 0; i < out->num_bases; ++i) {
    end += sequence.bases[i].num_pages;
    out->basis_end[i] = end;
    out->basis[i] = sequence.bases[i].basis;
  }
  out->decision = sequence.decision;
}

// Fills the block in its place: copies of structures just made wait for their stores.
class Packer {
 public:
  Packer(const CudaPlan& plan, const AttendBatch& batch, std::byte* block,
         PackedSchedules* schedules)
      : plan_(plan),
        batch_(batch),
        block_(block),
        header_(reinterpret_cast<StepHeader*>(block)),
        steps_(reinterpret_cast<StepSequence*>(block + plan.layout().steps)),
        sequences_(reinterpret_cast<DeviceSequence*>(block + plan.layout().sequences)),
        progressive_(reinterpret_cast<ProgressiveSequence*>(block + plan.layout().progressive)),
        thetas_(reinterpret_cast<float*>(block + plan.layout().thetas)),
        bounded_(reinterpret_cast<BoundedSequence*>(block + plan.layout().bounded)),
        scales_(reinterpret_cast<float*>(block + plan.layout().scales)),
        table_(reinterpret_cast<uint32_t*>(block + plan.layout().tail)),
        schedules_(schedules) {
    if (schedules_->plan != &plan) {
      schedules_->plan = &plan;
      schedules_->exact.clear();
      schedules_->sealed.clear();
    }
    for (int32_t i = 0; i < kNumSealedGroups; ++i) next_sealed_[i] = plan.FirstSealed(i);
  }

  int64_t Pack() {
    ReserveRuns();
    for (const SequenceStep& sequence : batch_.sequences) AddSequence(sequence);
    AddRuns();
    if (!HoldsScanRuns()) AddScanRuns();
    FillHeader();
    if (plan_.exact() != nullptr && !HoldsSchedule()) AddSchedule();
    return header_->block_bytes;
  }

 private:
  void AddSequence(const SequenceStep& sequence);
  void AddBounded(const SequenceStep& sequence, const DeviceSequence& device, BoundedSequence* out);
  void AddThetas(const SequenceStep& sequence, float* out) const;
  void AddPages(absl::Span<const PageId> pages);
  int32_t AddScales(absl::Span<const float> scales);
  void ReserveRuns();
  void AddRuns();
  // Whether the block has the runs of these very pages; tells the sequences which are theirs.
  bool HoldsScanRuns();
  void AddScanRuns();
  // Likewise of the items.
  bool HoldsSchedule();
  void AddSchedule();
  void FillHeader();

  const CudaPlan& plan_;
  const AttendBatch& batch_;
  std::byte* const block_;
  StepHeader* const header_;
  StepSequence* const steps_;
  DeviceSequence* const sequences_;
  ProgressiveSequence* const progressive_;
  float* const thetas_;
  BoundedSequence* const bounded_;
  float* const scales_;
  uint32_t* const table_;
  PackedSchedules* const schedules_;
  int32_t next_sealed_[kNumSealedGroups] = {};
  int32_t num_bounded_ = 0;
  int32_t num_sequences_ = 0;
  int32_t num_entries_ = 0;
  int32_t num_scales_ = 0;
  int32_t q_row_ = 0;
  int32_t kv_row_ = 0;
};

void Packer::AddSequence(const SequenceStep& sequence) {
  const bool sealed = UsesSealedPages(sequence), bounded = IsBounded(sequence);
  DeviceSequence& device = *new (sequences_ + num_sequences_) DeviceSequence;
  device.q_start = sequence.q_start;
  device.window = sequence.window;
  device.q_row = q_row_;
  device.q_len = sealed || bounded ? 0 : sequence.q_len;  // its rows are other kernels'
  device.kv_row = kv_row_;
  device.append_len = sequence.append_len;
  device.kv_len = static_cast<int32_t>(sequence.kv_len);
  device.total_len = device.kv_len + sequence.append_len;
  device.page_table = num_entries_;
  device.softmax_scale = sequence.softmax_scale;
  device.softcap = sequence.softcap;
  if (batch_.format == PageFormat::kF8E4m3) {
    device.key_scales = AddScales(sequence.key_scales);
    device.value_scales = AddScales(sequence.value_scales);
  }
  StepSequence& step = *new (steps_ + num_sequences_) StepSequence;
  step.q_row = q_row_;
  step.q_len = sequence.q_len;
  step.decision = num_sequences_;
  if (sealed) {
    const int32_t at = next_sealed_[SealedGroupOf(sequence.stored_bits)]++;
    step.decision = plan_.key().max_sequences + at;
    FillPaged(sequence, device, new (progressive_ + at) ProgressiveSequence);
    AddThetas(sequence, thetas_ + int64_t{at} * batch_.shape.num_kv_heads);
  }
  AddPages(sequence.pages);
  if (bounded) {
    step.decision = plan_.key().max_sequences + plan_.FirstBounded() + num_bounded_;
    AddBounded(sequence, device, new (bounded_ + num_bounded_++) BoundedSequence);
  }
  ++num_sequences_;
  q_row_ += sequence.q_len;
  kv_row_ += sequence.append_len;
}

void Packer::AddBounded(const SequenceStep& sequence, const DeviceSequence& device,
                        BoundedSequence* out) {
  FillPaged(sequence, device, out);
  if (!sequence.exact_pages.empty()) {
    out->exact_begin = num_entries_;
    AddPages(sequence.exact_pages);
  }
  out->stored_bits = sequence.stored_bits;
  out->key_scales = device.key_scales;
  out->value_scales = device.value_scales;
}

void Packer::AddThetas(const SequenceStep& sequence, float* out) const {
  if (sequence.thetas.empty()) {
    std::fill_n(out, batch_.shape.num_kv_heads, sequence.decision.theta);
  } else {
    std::copy(sequence.thetas.begin(), sequence.thetas.end(), out);
  }
}

void Packer::AddPages(absl::Span<const PageId> pages) {
  static_assert(sizeof(PageId) == sizeof(uint32_t), "a table of page ids is one of words");
  std::memcpy(table_ + num_entries_, pages.data(), pages.size() * sizeof(uint32_t));
  num_entries_ += static_cast<int32_t>(pages.size());
}

int32_t Packer::AddScales(absl::Span<const float> scales) {
  if (scales.empty()) return -1;
  const int32_t first = num_scales_;
  std::copy(scales.begin(), scales.end(), scales_ + first);
  num_scales_ += static_cast<int32_t>(scales.size());
  return first;
}

// Table entries follow the runs.
void Packer::ReserveRuns() {
  int64_t num_runs = 0;
  for (const SequenceStep& sequence : batch_.sequences) {
    if (sequence.append_len == 0) continue;
    num_runs += (sequence.kv_len % kPageTokens + sequence.append_len - 1) / kPageTokens + 1;
  }
  num_entries_ = static_cast<int32_t>(num_runs * sizeof(AppendRun) / sizeof(uint32_t));
}

void Packer::AddRuns() {
  auto* runs = reinterpret_cast<AppendRun*>(block_ + plan_.layout().tail);
  int32_t num_runs = 0;
  for (int32_t i = 0; i < num_sequences_; ++i) {
    const DeviceSequence& sequence = sequences_[i];
    for (int32_t row = 0; row < sequence.append_len;) {
      const int32_t position = sequence.kv_len + row;
      AppendRun& run = *new (runs + num_runs++) AppendRun;
      run.kv_row = sequence.kv_row + row;
      run.page = table_[sequence.page_table + position / kPageTokens];
      run.slot = position % kPageTokens;
      run.num_rows = std::min(sequence.append_len - row, kPageTokens - run.slot);
      run.sequence = i;
      run.key_scales = sequence.key_scales;
      run.value_scales = sequence.value_scales;
      row += run.num_rows;
    }
  }
  header_->num_runs = num_runs;
  header_->block_bytes = plan_.layout().tail + (int64_t{num_entries_} + 3) / 4 * 16;
}

bool Packer::HoldsScanRuns() {
  std::vector<PackedSchedules::Sealed>& last = schedules_->sealed;
  const size_t num_sealed = plan_.FirstSealed(kNumSealedGroups);
  bool same = last.size() == num_sealed;
  last.resize(num_sealed);
  for (size_t i = 0; i < num_sealed; ++i) {
    const PageRun pages = VisibleSealedPages(progressive_[i]);
    same = same && pages == last[i].pages;
    last[i].pages = pages;
    progressive_[i].scan_begin = last[i].scan_begin;
    progressive_[i].num_scan_runs = last[i].num_scan_runs;
  }
  return same;
}

void Packer::AddScanRuns() {
  auto* runs = reinterpret_cast<ScanRun*>(block_ + plan_.layout().scan_runs);
  for (int32_t i = 0; i < kNumSealedGroups; ++i) {
    const int32_t count = plan_.key().sealed[i].num_sequences;
    if (count == 0) continue;
    ScheduleScan(plan_.GroupParams(i), absl::MakeSpan(progressive_ + plan_.FirstSealed(i), count),
                 runs + plan_.FirstScanRun(i));
  }
  for (size_t i = 0; i < schedules_->sealed.size(); ++i) {
    schedules_->sealed[i].scan_begin = progressive_[i].scan_begin;
    schedules_->sealed[i].num_scan_runs = progressive_[i].num_scan_runs;
  }
}

void Packer::FillHeader() {
  StepBuffers& buffers = *batch_.buffers;
  const AttentionShape& shape = batch_.shape;
  header_->q = buffers.q();
  header_->k = buffers.k();
  header_->v = buffers.v();
  header_->out = buffers.out();
  header_->lse = buffers.lse();
  static_assert(sizeof(SequenceResult) == 2 && sizeof(bool) == 1, "what ReturnKernel writes");
  header_->results = reinterpret_cast<uint8_t*>(buffers.results());
  header_->decisions = buffers.decisions();
  header_->num_lse = int64_t{q_row_} * shape.num_q_heads;
  header_->out_bytes = header_->num_lse * shape.head_dim * DTypeBytes(batch_.out_type);
  header_->num_sequences = num_sequences_;
}

bool Packer::HoldsSchedule() {
  std::vector<PackedSchedules::Exact>& last = schedules_->exact;
  bool same = static_cast<int32_t>(last.size()) == num_sequences_;
  last.resize(num_sequences_);
  for (int32_t i = 0; i < num_sequences_; ++i) {
    const int32_t q_len = sequences_[i].q_len;
    const PageRun pages = q_len > 0 ? AttendedPages(sequences_[i]) : PageRun();
    same = same && pages == last[i].pages && q_len == last[i].q_len;
    last[i].pages = pages;
    last[i].q_len = q_len;
  }
  return same;
}

void Packer::AddSchedule() {
  ScheduleDecode(absl::MakeConstSpan(sequences_, num_sequences_), batch_.shape.num_kv_heads,
                 batch_.shape.group_size(), plan_.key().exact_row_tiles, plan_.num_ctas(),
                 reinterpret_cast<DecodeItem*>(block_ + plan_.layout().items),
                 reinterpret_cast<int32_t*>(block_ + plan_.layout().cta_items));
}

// What a kernel at one of the two ends of a step gets; it reads the block at `block`.
StepParams EndParams(const CudaPlan& plan, const Scratch& scratch, const PageMemory& memory,
                     const std::byte* block) {
  StepParams params;
  params.shape = plan.key().shape;
  params.in_type = plan.key().in_type;
  params.page_type = DenseDType(plan.key().format);
  params.pool = memory.pool;
  params.header = reinterpret_cast<const StepHeader*>(block);
  params.runs = reinterpret_cast<const AppendRun*>(block + plan.layout().tail);
  params.max_sequences = plan.key().max_sequences;
  params.sequences = reinterpret_cast<const StepSequence*>(block + plan.layout().steps);
  params.scales = reinterpret_cast<const float*>(block + plan.layout().scales);
  params.q = scratch.q();
  params.out = scratch.out();
  params.lse = scratch.lse();
  params.decisions = scratch.decisions();
  params.flags = scratch.flags();
  params.arrivals = scratch.arrivals();
  params.stamps = scratch.stamps();
  return params;
}

}  // namespace

int64_t PackStep(const CudaPlan& plan, const AttendBatch& batch, std::byte* block,
                 PackedSchedules* schedules) {
  return Packer(plan, batch, block, schedules).Pack();
}

ProgressiveParams SealedParams(const CudaPlan& plan, const Scratch& scratch, std::byte* pool,
                               int32_t group) {
  const PlanKey& key = plan.key();
  std::byte* block = scratch.block();
  const int32_t first = plan.FirstSealed(group);
  ProgressiveParams params = plan.GroupParams(group);
  params.pool = pool;
  params.sequences =
      reinterpret_cast<const ProgressiveSequence*>(block + plan.layout().progressive) + first;
  params.thetas = reinterpret_cast<float*>(block + plan.layout().thetas) +
                  int64_t{first} * key.shape.num_kv_heads;
  params.table = reinterpret_cast<const uint32_t*>(block + plan.layout().tail);
  params.scan_runs =
      reinterpret_cast<const ScanRun*>(block + plan.layout().scan_runs) + plan.FirstScanRun(group);
  params.q = scratch.q();
  params.out = scratch.out();
  params.lse = scratch.lse();
  params.decisions =
      scratch.decisions() + int64_t{key.max_sequences + first} * key.shape.num_kv_heads;
  params.workspace = scratch.workspace();
  params.rotated = scratch.rotated();
  params.stamps = scratch.stamps() + kFirstGroupStamp + group * kNumGroupStamps;
  params.page_type = DenseDType(key.format);
  return params;
}

BoundedParams BoundedStepParams(const CudaPlan& plan, const Scratch& scratch,
                                const PageMemory& memory) {
  const PlanKey& key = plan.key();
  const std::byte* block = scratch.block();
  BoundedParams params = plan.BoundedShapes();
  params.memory = memory;
  params.sequences = reinterpret_cast<const BoundedSequence*>(block + plan.layout().bounded);
  params.table = reinterpret_cast<const uint32_t*>(block + plan.layout().tail);
  params.scales = reinterpret_cast<const float*>(block + plan.layout().scales);
  params.q = scratch.q();
  params.out = scratch.out();
  params.lse = scratch.lse();
  params.decisions = scratch.decisions() +
                     int64_t{key.max_sequences + plan.FirstBounded()} * key.shape.num_kv_heads;
  params.workspace = scratch.workspace();
  params.stamps = scratch.stamps();
  return params;
}

absl::Status EnqueueStep(const CudaPlan& plan, const Scratch& scratch, const PageMemory& memory,
                         const std::byte* source, int32_t num_sms, cudaStream_t stream) {
  const PlanKey& key = plan.key();
  const std::byte* block = scratch.block();
  const BlockLayout& layout = plan.layout();
  const int32_t exact_decisions = key.max_sequences * key.shape.num_kv_heads;
  ADAATTN_RETURN_IF_ERROR(LaunchAppend(EndParams(plan, scratch, memory, source), scratch.block(),
                                       exact_decisions, num_sms, stream));
  if (plan.exact() != nullptr) {
    DecodeParams exact;
    exact.memory = memory;
    exact.page_table = reinterpret_cast<const uint32_t*>(block + layout.tail);
    exact.sequences = reinterpret_cast<const DeviceSequence*>(block + layout.sequences);
    exact.items = reinterpret_cast<const DecodeItem*>(block + layout.items);
    exact.cta_items = reinterpret_cast<const int32_t*>(block + layout.cta_items);
    exact.scales = reinterpret_cast<const float*>(block + layout.scales);
    exact.q = scratch.q();
    exact.out = scratch.out();
    exact.lse = scratch.lse();
    exact.decisions = scratch.decisions();
    exact.partial_out = scratch.partial_out();
    exact.partial_state = scratch.partial_state();
    exact.counters = scratch.counters();
    exact.num_ctas = plan.num_ctas();
    exact.num_q_heads = key.shape.num_q_heads;
    exact.num_kv_heads = key.shape.num_kv_heads;
    exact.head_dim = key.shape.head_dim;
    exact.in_type = key.in_type;
    exact.out_type = key.out_type;
    ADAATTN_RETURN_IF_ERROR(plan.exact()->run(exact, key.exact_row_tiles, stream));
  }
  for (int32_t i = 0; i < kNumSealedGroups; ++i) {
    if (key.sealed[i].num_sequences == 0) continue;
    ADAATTN_RETURN_IF_ERROR(RunProgressive(SealedParams(plan, scratch, memory.pool, i), stream));
  }
  if (key.bounded.num_sequences > 0) {
    ADAATTN_RETURN_IF_ERROR(RunBounded(BoundedStepParams(plan, scratch, memory), stream));
  }
  return LaunchReturn(EndParams(plan, scratch, memory, block), num_sms, stream);
}

}  // namespace adaattn

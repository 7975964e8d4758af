#include "kernels/cuda/plan.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/cuda/decode_schedule.h"
#include "kernels/cuda/stage_stamps.h"
#include "kernels/policy/ladder.h"

namespace adaattn {
namespace {

int32_t RoundUpPower(int32_t x) {
  int32_t power = 1;
  while (power < x) power *= 2;
  return power;
}

// At most an eighth more, in steps of at least 16 pages: 512 stays 512, 513 becomes 576.
int32_t RoundUpPages(int32_t pages) {
  const int32_t step = std::max(RoundUpPower(pages) / 16, 16);
  return (pages + step - 1) / step * step;
}

absl::Status CheckShape(const AttendBatch& batch) {
  const AttentionShape& shape = batch.shape;
  const bool known_dim = std::find(std::begin(kCudaHeadDims), std::end(kCudaHeadDims),
                                   shape.head_dim) != std::end(kCudaHeadDims);
  const bool known_group = shape.num_kv_heads > 0 && shape.num_q_heads > 0 &&
                           shape.num_q_heads % shape.num_kv_heads == 0 &&
                           shape.group_size() <= kCudaMaxGroupSize;
  if (!known_dim || !known_group) {
    return absl::UnimplementedError(absl::StrCat(
        "no cuda kernel for ", shape.DebugString(), "; head_dim may be ",
        absl::StrJoin(kCudaHeadDims, ", "), ", q heads per kv head 1 to ", kCudaMaxGroupSize));
  }
  constexpr int64_t kMaxTokens = std::numeric_limits<int32_t>::max() - kPageTokens;
  for (const SequenceStep& sequence : batch.sequences) {
    if (sequence.q_len > kCudaMaxQLen) {
      return absl::UnimplementedError(
          absl::StrCat("q_len ", sequence.q_len, "; at most ", kCudaMaxQLen, " with cuda"));
    }
    if (sequence.kv_len + sequence.append_len > kMaxTokens) {
      return absl::UnimplementedError(absl::StrCat("kv_len ", sequence.kv_len + sequence.append_len,
                                                   "; at most ", kMaxTokens, " with cuda"));
    }
    if (sequence.num_sealed_pages > kCudaMaxSealedPages) {
      return absl::UnimplementedError(absl::StrCat(
          sequence.num_sealed_pages, " sealed pages; at most ", kCudaMaxSealedPages, " with cuda"));
    }
    if (static_cast<int32_t>(sequence.bases.size()) > kMaxDeviceBasisRuns) {
      return absl::UnimplementedError(absl::StrCat(sequence.bases.size(), " basis runs; at most ",
                                                   kMaxDeviceBasisRuns, " with cuda"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PlanKey> MakePlanKey(const AttendBatch& batch) {
  ADAATTN_RETURN_IF_ERROR(CheckShape(batch));
  PlanKey key;
  key.shape = batch.shape;
  key.format = batch.format;
  key.in_type = batch.in_type;
  key.out_type = batch.out_type;
  key.max_sequences = RoundUpPower(static_cast<int32_t>(batch.sequences.size()));
  int32_t exact_q_len = 0;
  for (const SequenceStep& sequence : batch.sequences) {
    if (IsBounded(sequence)) {
      const auto pages = static_cast<int32_t>(sequence.pages.size());
      ++key.bounded.num_sequences;
      key.bounded.max_q_len = std::max(key.bounded.max_q_len, sequence.q_len);
      key.bounded.max_pages = std::max(key.bounded.max_pages, RoundUpPages(pages));
      continue;
    }
    if (!UsesSealedPages(sequence)) {
      exact_q_len = std::max(exact_q_len, sequence.q_len);
      continue;
    }
    SealedGroup& group = key.sealed[SealedGroupOf(sequence.stored_bits)];
    ++group.num_sequences;
    group.max_q_len = std::max(group.max_q_len, sequence.q_len);
    group.max_sealed = std::max(group.max_sealed, RoundUpPages(sequence.num_sealed_pages));
    group.two_stage |= CoarseChunks(sequence.decision, batch.shape.head_dim) > 0;
    group.theta |= ChoosesTheta(sequence.decision.policy);
    group.head_thetas |= ChoosesTheta(sequence.decision.policy) || !sequence.thetas.empty();
    group.budget |= sequence.decision.policy == Policy::kBudget;
    group.softcap |= sequence.softcap != 0;
  }
  if (exact_q_len > 0) {
    const int32_t group_size = batch.shape.group_size();
    key.exact_row_tiles = ChooseRowTiles(batch.shape.head_dim, group_size, exact_q_len);
    const int32_t rows = 8 * key.exact_row_tiles;
    key.exact_row_blocks = (group_size * exact_q_len + rows - 1) / rows;
  }
  return key;
}

CudaPlan::CudaPlan(const PlanKey& key, int32_t num_sms, const CudaTuning& tuning)
    : key_(key),
      num_sms_(std::max(num_sms * tuning.progressive_cta_percent / 100, 1)),
      conclude_pages_(tuning.conclude_pages),
      num_ctas_(std::min(num_sms * tuning.exact_ctas_per_sm, kMaxDecodeCtas)) {
  if (key.exact_row_tiles > 0) {
    exact_ = FindDecodeKernel(DenseDType(key.format), key.shape.head_dim);
    max_groups_ = key.max_sequences * key.shape.num_kv_heads * key.exact_row_blocks;
    max_items_ = MaxDecodeItems(max_groups_, num_ctas_);
  }
  int64_t end = 0;
  const auto add = [&end](int64_t bytes) {
    const int64_t begin = end;
    end += (bytes + 15) / 16 * 16;
    return begin;
  };
  const int64_t n = key.max_sequences;
  add(sizeof(StepHeader));
  layout_.steps = add(n * int64_t{sizeof(StepSequence)});
  layout_.sequences = add(n * int64_t{sizeof(DeviceSequence)});
  layout_.progressive = add(FirstSealed(kNumSealedGroups) * int64_t{sizeof(ProgressiveSequence)});
  layout_.thetas = add(int64_t{FirstSealed(kNumSealedGroups)} * key.shape.num_kv_heads * 4);
  layout_.scan_runs = add(FirstScanRun(kNumSealedGroups) * int64_t{sizeof(ScanRun)});
  layout_.bounded = add(key.bounded.num_sequences * int64_t{sizeof(BoundedSequence)});
  const bool scaled = key.format == PageFormat::kF8E4m3;
  layout_.scales = add(scaled ? n * 2 * key.shape.num_kv_heads * int64_t{sizeof(float)} : 0);
  layout_.cta_items = add(exact_ != nullptr ? (num_ctas_ + 1) * int64_t{sizeof(int32_t)} : 0);
  layout_.items = add(max_items_ * int64_t{sizeof(DecodeItem)});
  layout_.tail = end;
  shape_needs_ = ShapeNeeds();
}

std::string CudaPlan::DebugString() const {
  std::string text =
      absl::StrCat("cuda ", PageFormatName(key_.format), " ", key_.shape.DebugString(), " up to ",
                   key_.max_sequences, " sequences");
  if (exact_ != nullptr) {
    absl::StrAppend(&text, "; exact: ", num_ctas_, " CTAs, ", 8 * key_.exact_row_tiles, " rows");
  }
  for (int32_t i = 0; i < kNumSealedGroups; ++i) {
    const SealedGroup& group = key_.sealed[i];
    if (group.num_sequences == 0) continue;
    const ProgressiveParams params = GroupParams(i);
    absl::StrAppend(&text, "; ", SealedGroupBits(i), " bits: ", group.num_sequences,
                    " sequences of up to ", group.max_sealed, " pages, scan in ", params.scan_ctas,
                    " runs");
  }
  if (key_.bounded.num_sequences > 0) {
    absl::StrAppend(&text, "; bounded: ", key_.bounded.num_sequences, " sequences of up to ",
                    key_.bounded.max_pages, " pages");
  }
  return text;
}

int32_t CudaPlan::num_decisions() const {
  return (key_.max_sequences + FirstBounded() + key_.bounded.num_sequences) *
         key_.shape.num_kv_heads;
}

int32_t CudaPlan::FirstSealed(int32_t group) const {
  int32_t first = 0;
  for (int32_t i = 0; i < group; ++i) first += key_.sealed[i].num_sequences;
  return first;
}

int32_t CudaPlan::FirstScanRun(int32_t group) const {
  int32_t first = 0;
  for (int32_t i = 0; i < group; ++i) {
    if (key_.sealed[i].num_sequences > 0) first += NumScanRuns(GroupParams(i));
  }
  return first;
}

ProgressiveParams CudaPlan::GroupParams(int32_t group) const {
  ProgressiveParams params;
  params.shape = key_.shape;
  params.stored_bits = SealedGroupBits(group);
  params.num_sequences = key_.sealed[group].num_sequences;
  params.max_q_len = key_.sealed[group].max_q_len;
  params.max_sealed = key_.sealed[group].max_sealed;
  params.two_stage = key_.sealed[group].two_stage;
  params.theta = key_.sealed[group].theta;
  params.head_thetas = key_.sealed[group].head_thetas;
  params.budget = key_.sealed[group].budget;
  params.softcap = key_.sealed[group].softcap;
  params.in_type = key_.in_type;
  params.out_type = key_.out_type;
  params.conclude_pages = conclude_pages_;
  PlanProgressive(num_sms_, &params);
  return params;
}

BoundedParams CudaPlan::BoundedShapes() const {
  BoundedParams params;
  params.shape = key_.shape;
  params.num_sequences = key_.bounded.num_sequences;
  params.max_q_len = key_.bounded.max_q_len;
  params.max_pages = key_.bounded.max_pages;
  params.in_type = key_.in_type;
  params.out_type = key_.out_type;
  params.page_type = DenseDType(key_.format);
  return params;
}

ScratchNeeds CudaPlan::Needs(const AttendBatch& batch) const {
  int64_t q_rows = 0, entries = 0, runs = 0;
  for (const SequenceStep& sequence : batch.sequences) {
    q_rows += sequence.q_len;
    entries += static_cast<int64_t>(sequence.pages.size());
    if (IsBounded(sequence)) entries += static_cast<int64_t>(sequence.exact_pages.size());
    runs += sequence.append_len / kPageTokens + 2;  // at least max_sequences in all
  }
  const int64_t rows = q_rows * key_.shape.num_q_heads, elements = rows * key_.shape.head_dim;
  ScratchNeeds needs = shape_needs_;
  needs.block = layout_.tail + runs * int64_t{sizeof(AppendRun)} + (entries + 3) / 4 * 16;
  needs.q = elements * DTypeBytes(key_.in_type);
  needs.out = elements * DTypeBytes(key_.out_type);
  needs.lse = rows * int64_t{sizeof(float)};
  return needs;
}

ScratchNeeds CudaPlan::ShapeNeeds() const {
  ScratchNeeds needs;
  needs.decisions = num_decisions() * int64_t{sizeof(HeadDecision)};
  needs.flags = key_.max_sequences * int64_t{sizeof(uint32_t)};
  needs.arrivals = sizeof(uint32_t);
  needs.stamps = kNumStamps * int64_t{sizeof(uint64_t)};
  const int64_t rows = int64_t{MaxDecodeSlots(num_ctas_)} * 8 * key_.exact_row_tiles;
  needs.partial_out = rows * key_.shape.head_dim * int64_t{sizeof(float)};
  needs.partial_state = rows * int64_t{sizeof(float2)};
  needs.counters = max_groups_ * int64_t{sizeof(int32_t)};
  for (int32_t i = 0; i < kNumSealedGroups; ++i) {
    if (key_.sealed[i].num_sequences == 0) continue;
    needs.workspace = std::max(needs.workspace, ProgressiveWorkspaceBytes(GroupParams(i)));
    needs.rotated = sizeof(int32_t);
  }
  if (key_.bounded.num_sequences > 0) {
    needs.workspace = std::max(needs.workspace, BoundedWorkspaceBytes(BoundedShapes()));
  }
  return needs;
}

}  // namespace adaattn

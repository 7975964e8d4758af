#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/progressive.h"
#include "kernels/cuda/progressive_common.cuh"
#include "kernels/cuda/progressive_inst.h"

namespace adaattn {

void PlanProgressive(int32_t num_sms, ProgressiveParams* params) {
  const int32_t head_groups = CeilDiv(params->shape.num_kv_heads, kScanWarps);
  const int32_t pages = std::max(params->max_sealed, 1);
  // Scan: about two waves (four CTAs a multiprocessor), so that the hardware evens out their ends.
  const int32_t dense = params->num_sequences * params->shape.num_kv_heads;
  const int32_t scan_chunks = std::max(4 * num_sms / (head_groups * params->num_sequences), 1);
  const int32_t warps_per_head = kScanWarps / std::min(params->shape.num_kv_heads, kScanWarps);
  params->scan_chunk =
      std::min(std::max(CeilDiv(pages, scan_chunks), 2), kMaxScanItems * warps_per_head);
  // Attend: four CTAs a multiprocessor, so that the hardware evens out heads that differ in work.
  const int32_t attend_chunks = std::max(4 * num_sms / dense, 1);
  params->attend_chunk = std::min(std::max(CeilDiv(pages, attend_chunks), 16), kMaxAttendChunk);
}

int64_t ProgressiveWorkspaceBytes(const ProgressiveParams& params) {
  return MakeProgressiveWorkspace(params).bytes;
}

absl::Status RunProgressive(const ProgressiveParams& params, cudaStream_t stream) {
  if (params.shape.group_size() * params.max_q_len > kMaxColumns) {
    return absl::UnimplementedError(absl::StrCat("progressive decode: group size ",
                                                 params.shape.group_size(), " x q_len ",
                                                 params.max_q_len, " exceeds ", kMaxColumns));
  }
  ProgressiveArgs args;
  static_cast<ProgressiveParams&>(args) = params;
  args.two_stage = params.two_stage && params.shape.group_size() * params.max_q_len <= kTileColumns;
  args.layout = MakePageLayout(params.shape, params.stored_bits);
  args.work = MakeProgressiveWorkspace(args);
  switch (params.shape.head_dim) {
    case 64:
      return RunProgressiveD64(args, stream);
    case 80:
      return RunProgressiveD80(args, stream);
    case 96:
      return RunProgressiveD96(args, stream);
    case 128:
      return RunProgressiveD128(args, stream);
    case 256:
      return RunProgressiveD256(args, stream);
    default:
      return absl::UnimplementedError(
          absl::StrCat("progressive decode: head_dim ", params.shape.head_dim));
  }
}

}  // namespace adaattn

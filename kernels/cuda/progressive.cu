#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/progressive.h"
#include "kernels/cuda/progressive_merge.cuh"
#include "kernels/cuda/progressive_rotate.cuh"
#include "kernels/cuda/status.h"

namespace adaattn {
namespace {

// Launches `kernel` so that its prologue may run before the kernel in front of it has ended.
template <typename Kernel>
absl::Status Launch(Kernel kernel, dim3 grid, int threads, size_t shared_bytes, bool overlap,
                    const ProgressiveArgs& args, cudaStream_t stream, const char* name) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return FromCuda(cudaLaunchKernelEx(&config, kernel, args), name);
}

template <typename Kernel>
absl::Status AllowShared(Kernel kernel, size_t bytes) {
  return FromCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                       static_cast<int>(bytes)),
                  "cudaFuncSetAttribute");
}

template <class Traits>
absl::Status Run(const ProgressiveArgs& p, cudaStream_t stream) {
  constexpr size_t kRotateShared = sizeof(RotateShared<Traits>);
  constexpr size_t kScanShared = std::max(sizeof(ScanShared<Traits>), sizeof(DenseShared<Traits>));
  constexpr size_t kAttendShared = sizeof(AttendShared<Traits>);
  static const absl::Status allowed = [] {
    ADAATTN_RETURN_IF_ERROR(AllowShared(ProgressiveRotateKernel<Traits>, kRotateShared));
    ADAATTN_RETURN_IF_ERROR(AllowShared(ProgressiveScanKernel<Traits>, kScanShared));
    return AllowShared(ProgressiveAttendKernel<Traits>, kAttendShared);
  }();
  ADAATTN_RETURN_IF_ERROR(allowed);
  const auto heads = static_cast<unsigned>(p.shape.num_kv_heads);
  const auto sequences = static_cast<unsigned>(p.num_sequences);
  const auto columns = static_cast<unsigned>(p.shape.group_size() * p.max_q_len);
  ADAATTN_RETURN_IF_ERROR(Launch(ProgressiveRotateKernel<Traits>, dim3(heads, sequences),
                                 kRotateThreads, kRotateShared, false, p, stream, "rotate"));
  const auto scan_ctas =
      static_cast<unsigned>(CeilDiv(p.max_sealed, p.scan_chunk) *
                            CeilDiv(p.shape.num_kv_heads, kScanWarps) * p.num_sequences);
  ADAATTN_RETURN_IF_ERROR(Launch(ProgressiveScanKernel<Traits>, dim3(scan_ctas + heads * sequences),
                                 kScanWarps * 32, kScanShared, true, p, stream, "scan"));
  const auto chunks = static_cast<unsigned>(CeilDiv(p.max_sealed, p.attend_chunk));
  ADAATTN_RETURN_IF_ERROR(Launch(ProgressiveAttendKernel<Traits>, dim3(chunks, heads, sequences),
                                 kAttendThreads, kAttendShared, true, p, stream, "attend"));
  return Launch(ProgressiveMergeKernel<Traits>, dim3(columns, heads, sequences), Traits::kHeadDim,
                0, true, p, stream, "merge");
}

}  // namespace

void PlanProgressive(int32_t num_sms, ProgressiveParams* params) {
  const int32_t head_groups = CeilDiv(params->shape.num_kv_heads, kScanWarps);
  const int32_t pages = std::max(params->max_sealed, 1);
  // Scan: two CTAs a multiprocessor in one wave, the dense tails included.
  const int32_t dense = params->num_sequences * params->shape.num_kv_heads;
  const int32_t slots = 2 * num_sms > 2 * dense ? 2 * num_sms - dense : 2 * num_sms;
  const int32_t scan_chunks = std::max(slots / (head_groups * params->num_sequences), 1);
  params->scan_chunk = std::max(CeilDiv(pages, scan_chunks), 2);
  // Attend: four CTAs a multiprocessor, so that the hardware evens out heads that differ in work.
  const int32_t attend_chunks = std::max(4 * num_sms / dense, 1);
  params->attend_chunk = std::min(std::max(CeilDiv(pages, attend_chunks), 16), kMaxAttendChunk);
}

int64_t ProgressiveWorkspaceBytes(const ProgressiveParams& params) {
  return MakeProgressiveWorkspace(params).bytes;
}

absl::Status RunProgressive(const ProgressiveParams& params, cudaStream_t stream) {
  if (params.shape.group_size() * params.max_q_len > kTileColumns) {
    return absl::UnimplementedError(absl::StrCat("progressive decode: group size ",
                                                 params.shape.group_size(), " x q_len ",
                                                 params.max_q_len, " exceeds ", kTileColumns));
  }
  ProgressiveArgs args;
  static_cast<ProgressiveParams&>(args) = params;
  args.layout = MakePageLayout(params.shape, params.stored_bits);
  args.work = MakeProgressiveWorkspace(params);
  switch (params.shape.head_dim) {
    case 64:
      return Run<ProgressiveTraits<64>>(args, stream);
    case 128:
      return Run<ProgressiveTraits<128>>(args, stream);
    default:
      return absl::UnimplementedError(
          absl::StrCat("progressive decode: head_dim ", params.shape.head_dim));
  }
}

}  // namespace adaattn

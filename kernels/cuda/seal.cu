#include "absl/strings/str_cat.h"
#include "kernels/cuda/seal.cuh"
#include "kernels/cuda/status.h"

namespace adaattn {
namespace {

template <class Traits, typename Kernel>
absl::Status Launch(Kernel kernel, const SealParams& params, cudaStream_t stream,
                    const char* name) {
  if (params.num_tasks == 0) return absl::OkStatus();
  constexpr auto kShared = static_cast<int>(sizeof(SealShared<Traits>));
  ADAATTN_RETURN_IF_ERROR(FromCuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared), name));
  const dim3 grid(static_cast<unsigned>(params.num_tasks),
                  static_cast<unsigned>(params.shape.num_kv_heads));
  kernel<<<grid, kSealThreads, kShared, stream>>>(params,
                                                  MakePageLayout(params.shape, params.stored_bits));
  return FromCuda(cudaGetLastError(), name);
}

template <class Traits>
absl::Status Seal(const SealParams& params, cudaStream_t stream) {
  return Launch<Traits>(SealPageKernel<Traits>, params, stream, "SealPageKernel");
}
template <class Traits>
absl::Status Reopen(const SealParams& params, cudaStream_t stream) {
  return Launch<Traits>(ReopenPageKernel<Traits>, params, stream, "ReopenPageKernel");
}

absl::Status Unsupported(const SealParams& params) {
  return absl::UnimplementedError(absl::StrCat("sealed pages of head_dim ", params.shape.head_dim,
                                               "; supported: 64, 80, 96, 128, 256"));
}

}  // namespace

absl::Status LaunchSeal(const SealParams& params, cudaStream_t stream) {
  switch (params.shape.head_dim) {
    case 64:
      return Seal<ProgressiveTraits<64>>(params, stream);
    case 80:
      return Seal<ProgressiveTraits<80>>(params, stream);
    case 96:
      return Seal<ProgressiveTraits<96>>(params, stream);
    case 128:
      return Seal<ProgressiveTraits<128>>(params, stream);
    case 256:
      return Seal<ProgressiveTraits<256>>(params, stream);
    default:
      return Unsupported(params);
  }
}

absl::Status LaunchReopen(const SealParams& params, cudaStream_t stream) {
  switch (params.shape.head_dim) {
    case 64:
      return Reopen<ProgressiveTraits<64>>(params, stream);
    case 80:
      return Reopen<ProgressiveTraits<80>>(params, stream);
    case 96:
      return Reopen<ProgressiveTraits<96>>(params, stream);
    case 128:
      return Reopen<ProgressiveTraits<128>>(params, stream);
    case 256:
      return Reopen<ProgressiveTraits<256>>(params, stream);
    default:
      return Unsupported(params);
  }
}

}  // namespace adaattn

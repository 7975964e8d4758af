#ifndef ADAATTN_KERNELS_CUDA_STATUS_H_
#define ADAATTN_KERNELS_CUDA_STATUS_H_

// The one place where CUDA errors become absl::Status, and the macros that pass a Status on.

#include <cuda_runtime_api.h>

#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace adaattn {

inline absl::Status FromCuda(cudaError_t error, absl::string_view call) {
  if (error == cudaSuccess) return absl::OkStatus();
  (void)cudaGetLastError();  // Clear it, or the next innocent call reports it again.
  const std::string message = absl::StrCat(call, ": ", cudaGetErrorName(error));
  if (error == cudaErrorMemoryAllocation) return absl::ResourceExhaustedError(message);
  if (cudaFree(nullptr) != cudaSuccess) return absl::UnavailableError(message);  // Context lost.
  return absl::InternalError(message);
}

}  // namespace adaattn

#define ADAATTN_STATUS_CONCAT_(a, b) a##b
#define ADAATTN_STATUS_NAME_(a, b) ADAATTN_STATUS_CONCAT_(a, b)

// Returns from the calling function when `expression` (an absl::Status) is an error.
#define ADAATTN_RETURN_IF_ERROR(expression)          \
  do {                                               \
    absl::Status adaattn_status = (expression);      \
    if (!adaattn_status.ok()) return adaattn_status; \
  } while (false)

// Assigns the value of `expression` (an absl::StatusOr) to `target`, or returns its error.
#define ADAATTN_ASSIGN_OR_RETURN(target, expression)                                      \
  ADAATTN_ASSIGN_OR_RETURN_IMPL_(ADAATTN_STATUS_NAME_(adaattn_result_, __LINE__), target, \
                                 expression)
#define ADAATTN_ASSIGN_OR_RETURN_IMPL_(result, target, expression) \
  auto result = (expression);                                      \
  if (!result.ok()) return result.status();                        \
  target = std::move(result).value()

// Returns from the calling function when the CUDA runtime call `call` fails.
#define ADAATTN_RETURN_IF_CUDA_ERROR(call) \
  ADAATTN_RETURN_IF_ERROR(::adaattn::FromCuda((call), #call))

#endif  // ADAATTN_KERNELS_CUDA_STATUS_H_

#ifndef ADAATTN_KERNELS_CPU_PAGE_WORK_H_
#define ADAATTN_KERNELS_CPU_PAGE_WORK_H_

// Work on whole pages, off the step's critical path: sealing, reopening, reading back, bases. Each
// function is Backend's method of the same name on the CPU.

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "kernels/attention.h"
#include "kernels/cpu/worker_pool.h"

namespace adaattn {

void SealPagesOnCpu(absl::Span<const SealTask> tasks, std::byte* pool, WorkerPool* workers,
                    absl::Span<SealResult> results);
void ReopenPagesOnCpu(absl::Span<const ReopenTask> tasks, std::byte* pool, WorkerPool* workers);
absl::Status FitBasisOnCpu(const FitBasisTask& task, std::byte* pool, WorkerPool* workers);
absl::Status LoadBasisOnCpu(const LoadBasisTask& task, std::byte* pool);
void ReadTokensOnCpu(const ReadTask& task, const std::byte* pool, WorkerPool* workers);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_PAGE_WORK_H_

#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/attention.h"

namespace adaattn {

int64_t TokensToSeal(absl::Span<const SealCrossover> crossovers, double kv_heads) {
  if (crossovers.empty()) return 0;
  const SealCrossover* nearest = &crossovers.front();
  for (const SealCrossover& crossover : crossovers) {
    if (crossover.kv_heads <= kv_heads) nearest = &crossover;
  }
  if (nearest->tokens == SealCrossover::kNever) return SealCrossover::kNever;
  return std::llround(static_cast<double>(nearest->tokens) * nearest->kv_heads / kv_heads);
}

absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(const std::string& name,
                                                       const BackendOptions& options,
                                                       std::string* note) {
  note->clear();
  if (name == "cpu") return CreateCpuBackend(options);
  if (name == "cuda") return CreateCudaBackend(options);
  if (name != "auto") {
    return absl::InvalidArgumentError(
        absl::StrCat("backend \"", name, "\"; must be auto, cpu or cuda"));
  }
  absl::StatusOr<std::unique_ptr<Backend>> cuda = CreateCudaBackend(options);
  if (cuda.ok()) return cuda;
  *note = absl::StrCat("cpu, because ", cuda.status().message());
  return CreateCpuBackend(options);
}

}  // namespace adaattn

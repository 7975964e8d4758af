#ifndef ADAATTN_KERNELS_CPU_SEALED_STEP_H_
#define ADAATTN_KERNELS_CPU_SEALED_STEP_H_

// Scan, select and attend over the sealed pages of a batch.

#include "absl/types/span.h"
#include "kernels/attention.h"
#include "kernels/cpu/step.h"

namespace adaattn {

// Attends the sealed pages of all heads: fills their decisions and appends one softmax state, back
// in the model's frame, to each head's splits (which have room for it). Dense splits must be done.
// Adds scan, select and attend to `times`.
void AttendSealed(const CpuContext& context, const AttendBatch& batch, absl::Span<HeadJob> heads,
                  StageTimes* times);

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_SEALED_STEP_H_

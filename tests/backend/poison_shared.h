#ifndef ADAATTN_TESTS_BACKEND_POISON_SHARED_H_
#define ADAATTN_TESTS_BACKEND_POISON_SHARED_H_

#include "absl/status/status.h"

namespace adaattn {

// Fills the shared memory of the device's idle multiprocessors with NaN, whatever the type, and
// waits: what a kernel reads there without having written it shows. Needs a build with CUDA.
absl::Status PoisonSharedMemory();

}  // namespace adaattn

#endif  // ADAATTN_TESTS_BACKEND_POISON_SHARED_H_

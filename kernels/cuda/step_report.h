#ifndef ADAATTN_KERNELS_CUDA_STEP_REPORT_H_
#define ADAATTN_KERNELS_CUDA_STEP_REPORT_H_

// How the host learns that a step has ended: its last kernel writes to pinned memory, the host
// looks there. An event would cost the host a call for every step, and the device some time after
// it.

#include <chrono>
#include <cstdint>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "kernels/cuda/stage_stamps.h"

namespace adaattn {

// In pinned host memory, one for each step in flight.
struct StepReport {
  // Of the last step that reported here; written when all its results stand in host memory.
  int64_t ticket;
  uint64_t stamps[kNumStamps];
};

// How long AwaitReport looks without a pause; few steps take longer.
inline constexpr std::chrono::milliseconds kReportSpin{10};
// Between looks from then on; Linux sleeps up to 50 us longer.
inline constexpr std::chrono::microseconds kReportPause{50};

// Returns once `report` has `ticket`. A device that has lost its way never writes it: from
// kReportSpin on `ended()` (a StatusOr<bool>) is asked, whether all work enqueued has ended, and
// its error returned. kInternal when all has and the ticket is not there.
template <class Ended>
absl::Status AwaitReport(const StepReport& report, int64_t ticket, const Ended& ended) {
  const auto reported = [&] { return __atomic_load_n(&report.ticket, __ATOMIC_ACQUIRE) == ticket; };
  const auto begin = std::chrono::steady_clock::now();
  do {
    // The clock is slower than a look, and the line should rest while the device writes it.
    for (int32_t i = 0; i < 16; ++i) {
      if (reported()) return absl::OkStatus();
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  } while (std::chrono::steady_clock::now() - begin < kReportSpin);
  for (;;) {
    const absl::StatusOr<bool> all_ended = ended();
    if (reported()) return absl::OkStatus();
    if (!all_ended.ok()) return all_ended.status();
    if (*all_ended) return absl::InternalError(absl::StrCat("step ", ticket, " ended unreported"));
    std::this_thread::sleep_for(kReportPause);
  }
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_STEP_REPORT_H_

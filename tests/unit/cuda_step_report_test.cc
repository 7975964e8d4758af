// Waiting for a step that a device reports; here a thread plays the device.

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <thread>

#include "kernels/cuda/step_report.h"

namespace adaattn {
namespace {

constexpr int64_t kTicket = 7;

void Write(StepReport* report, int64_t ticket) {
  __atomic_store_n(&report->ticket, ticket, __ATOMIC_RELEASE);
}

TEST(AwaitReportTest, ReturnsWhenTheTicketIsThere) {
  StepReport report{};
  report.ticket = kTicket - 2;  // of the step before in the same place
  int result = 0;
  std::thread device([&] {
    result = 42;
    Write(&report, kTicket);
  });
  const absl::Status status =
      AwaitReport(report, kTicket, []() -> absl::StatusOr<bool> { return false; });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(result, 42);
  device.join();
}

TEST(AwaitReportTest, PausesBetweenLooksAtALongStep) {
  StepReport report{};
  int asked = 0;
  const auto begin = std::chrono::steady_clock::now();
  const absl::Status status = AwaitReport(report, kTicket, [&]() -> absl::StatusOr<bool> {
    if (++asked == 20) Write(&report, kTicket);
    return false;
  });
  EXPECT_TRUE(status.ok()) << status;
  EXPECT_GE(std::chrono::steady_clock::now() - begin, kReportSpin + 19 * kReportPause);
}

TEST(AwaitReportTest, ReturnsTheErrorOfADeviceThatNeverReports) {
  StepReport report{};
  const absl::Status status = AwaitReport(report, kTicket, []() -> absl::StatusOr<bool> {
    return absl::UnavailableError("cudaStreamQuery: cudaErrorLaunchFailure");
  });
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
}

TEST(AwaitReportTest, SaysThatAStepEndedUnreported) {
  StepReport report{};
  report.ticket = kTicket - 2;
  int asked = 0;
  const absl::Status status =
      AwaitReport(report, kTicket, [&]() -> absl::StatusOr<bool> { return ++asked == 3; });
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(asked, 3);
  EXPECT_NE(status.message().find("step 7"), absl::string_view::npos) << status;
}

TEST(AwaitReportTest, BelievesAReportThatCameWhileItAsked) {
  StepReport report{};
  const absl::Status status = AwaitReport(report, kTicket, [&]() -> absl::StatusOr<bool> {
    Write(&report, kTicket);
    return true;
  });
  EXPECT_TRUE(status.ok()) << status;
}

}  // namespace
}  // namespace adaattn

// Steps that are enqueued before those in front of them were waited for.

#include <gtest/gtest.h>

#include <iterator>
#include <utility>
#include <vector>

#include "tests/backend/backend_harness.h"

namespace adaattn {
namespace {

// One sequence and its step in flight.
struct Flight {
  TestSequence sequence;
  StepCase step;
  PendingStep pending;
};

class FlightTest : public ::testing::Test {
 protected:
  FlightTest()
      : harness_([] {
          HarnessOptions options;
          options.format = PageFormat::kBf16;
          options.shape = {8, 2, 64};
          return options;
        }()) {}

  Flight MakeFlight(int64_t length) {
    Flight flight;
    flight.sequence = harness_.NewSequence(length);
    return flight;
  }
  void Start(Flight* flight, int32_t q_len = 1) {
    flight->step = StepCase();
    flight->step.sequence = &flight->sequence;
    flight->step.append_len = flight->step.q_len = q_len;
    flight->pending = harness_.Start({flight->step});
  }
  void Land(Flight* flight) {
    const StepOutput output = harness_.Finish(std::move(flight->pending))[0];
    harness_.ExpectExact(flight->step, output, harness_.exact_limits());
  }

  BackendHarness harness_;
};

TEST_F(FlightTest, StepsKeepApart) {
  ASSERT_TRUE(harness_.ok());
  std::vector<Flight> flights;
  for (const int64_t length : {100, 130, 70}) flights.push_back(MakeFlight(length));
  for (int round = 0; round < 3; ++round) {
    for (Flight& flight : flights) Start(&flight);
    for (Flight& flight : flights) Land(&flight);
  }
}

TEST_F(FlightTest, StepsAreWaitedForInAnyOrder) {
  ASSERT_TRUE(harness_.ok());
  std::vector<Flight> flights;
  for (const int64_t length : {64, 3, 200, 90}) flights.push_back(MakeFlight(length));
  for (int round = 0; round < 3; ++round) {
    for (Flight& flight : flights) Start(&flight);
    for (const int i : {2, 0, 3, 1}) Land(&flights[i]);
  }
}

TEST_F(FlightTest, OneStepStaysInFlightWhileOthersComeAndGo) {
  ASSERT_TRUE(harness_.ok());
  Flight flights[] = {MakeFlight(80), MakeFlight(20)};
  const int32_t q_lens[] = {1, 1, 2, 4, 8, 1, 1};  // other plans and larger blocks, too
  Start(&flights[0], q_lens[0]);
  for (size_t i = 1; i < std::size(q_lens); ++i) {
    Start(&flights[i % 2], q_lens[i]);
    Land(&flights[(i - 1) % 2]);
  }
  Land(&flights[(std::size(q_lens) - 1) % 2]);
}

}  // namespace
}  // namespace adaattn

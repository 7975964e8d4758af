// Exact attention over dense pages against float64 over the very values that the pages hold, so
// that only the kernels' own arithmetic is judged.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <tuple>

#include "tests/backend/backend_harness.h"

namespace adaattn {
namespace {

using Variant = std::tuple<PageFormat, int32_t, int32_t>;  // format, head_dim, group size

class DenseTest : public ::testing::TestWithParam<Variant> {
 protected:
  HarnessOptions Options() const {
    HarnessOptions options;
    options.format = std::get<0>(GetParam());
    options.shape = {2 * std::get<2>(GetParam()), 2, std::get<1>(GetParam())};
    return options;
  }
};

TEST_P(DenseTest, MatchesFloat64AtEveryLength) {
  BackendHarness harness(Options());
  ASSERT_TRUE(harness.ok());
  for (const int64_t length : {0, 1, 63, 64, 65, 200}) {
    TestSequence sequence = harness.NewSequence(length);
    StepCase step;
    step.sequence = &sequence;
    step.q_len = 1;
    step.q_start = length > 0 ? length - 1 : 0;
    harness.ExpectExact(step, harness.Run({step})[0], harness.exact_limits());
  }
}

TEST_P(DenseTest, MatchesFloat64WithManyRowsWindowAndSoftCap) {
  BackendHarness harness(Options());
  ASSERT_TRUE(harness.ok());
  TestSequence sequence = harness.NewSequence(130);
  for (const int32_t q_len : {2, 3, 8}) {
    StepCase step;
    step.sequence = &sequence;
    step.append_len = q_len;
    step.q_len = q_len;
    step.softmax_scale = 0.3f;
    step.window = q_len == 3 ? 70 : 0;
    step.softcap = q_len == 8 ? 2.5f : 0;
    ErrorLimits limits = harness.exact_limits();
    limits.out *= 2;
    limits.lse *= 2;
    harness.ExpectExact(step, harness.Run({step})[0], limits);
  }
}

std::string VariantName(const ::testing::TestParamInfo<Variant>& info) {
  return std::string(PageFormatName(std::get<0>(info.param))) + "_d" +
         std::to_string(std::get<1>(info.param)) + "_g" + std::to_string(std::get<2>(info.param));
}

INSTANTIATE_TEST_SUITE_P(AllShapes, DenseTest,
                         ::testing::Combine(::testing::Values(PageFormat::kF32, PageFormat::kF16,
                                                              PageFormat::kBf16,
                                                              PageFormat::kF8E4m3),
                                            ::testing::Values(64, 80, 96, 128, 256),
                                            ::testing::Values(1, 2, 3, 4, 5, 6, 7, 8, 16)),
                         VariantName);

}  // namespace
}  // namespace adaattn

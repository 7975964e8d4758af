// What a test must not read by accident holds NaN.

#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/backend/backend_harness.h"
#ifdef ADAATTN_TEST_CUDA
#include "tests/backend/poison_shared.h"
#endif

namespace adaattn {

void BackendHarness::PoisonPages() {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t row = int64_t{options_.shape.num_kv_heads} * options_.shape.head_dim;
  TestSequence sequence;
  for (const PageId page : free_pages_) {
    StepCase step;
    step.sequence = &sequence;
    sequence.pages = {page};
    sequence.length = 0;
    step.append_len = kPageTokens;
    step.q_len = 0;
    step.k.assign(kPageTokens * row, nan);
    step.v = step.k;
    EXPECT_TRUE(Run({step})[0].result.nonfinite_kv);
  }
}

void BackendHarness::PoisonScratch(std::vector<StepCase> cases) {
  const char* wanted = std::getenv("ADAATTN_TEST_POISON_SCRATCH");
  if (wanted != nullptr && std::string(wanted) == "0") return;
  bool has_rows = true;  // before the steps append
  for (StepCase& step : cases) {
    has_rows &= step.sequence->length >= step.q_len;
    const int64_t rows = int64_t{step.q_len} * options_.shape.num_q_heads;
    step.q.assign(rows * options_.shape.head_dim, std::numeric_limits<float>::quiet_NaN());
    step.append_len = 0;
    step.k.clear();
    step.v.clear();
  }
  if (has_rows) Finish(Start(std::move(cases)));
#ifdef ADAATTN_TEST_CUDA
  if (backend_->info().name == "cuda") {
    EXPECT_TRUE(PoisonSharedMemory().ok());
  }
#endif
}

}  // namespace adaattn

#include "tests/backend/backend_harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <string>
#include <utility>

#include "kernels/format/float_types.h"
#include "kernels/reference/attention_f64.h"
#include "tests/support/test_backend.h"

namespace adaattn {
namespace {

int64_t SlotBytes(const HarnessOptions& options) {
  const AttentionShape& shape = options.shape;
  return std::max({DensePageBytes(shape, DenseDType(options.format)),
                   MakePageLayout(shape, 8).page_bytes, MakeBasisLayout(shape).block_bytes});
}

void WriteTensor(DType type, const std::vector<float>& values, int64_t first, std::byte* out) {
  for (size_t i = 0; i < values.size(); ++i) {
    WriteElement(out, type, first + static_cast<int64_t>(i), values[i]);
  }
}

// A tuning file for `device` where the environment's ADAATTN_TEST_CONCLUDE_PAGES says another
// CudaTuning::conclude_pages than the default (0: no step ends with one launch, however few its
// heads), else "". Written here, since builds without CUDA have no FormatTuning.
std::string TestTuningFile(const std::string& device) {
  const char* pages = std::getenv("ADAATTN_TEST_CONCLUDE_PAGES");
  if (pages == nullptr) return "";
  std::string path = ::testing::TempDir() + "/adaattn_test_tuning.json";
  std::ofstream(path) << R"({"version": 1, "devices": [{"device": ")" << device
                      << R"(", "exact_ctas_per_sm": 2, "progressive_cta_percent": 100,)"
                      << R"("conclude_pages": )" << pages
                      << R"(, "crossovers": [], "provenance": {}}]})";
  return path;
}

}  // namespace

std::unique_ptr<Backend> MakeTestBackend(int64_t pool_bytes, int32_t num_threads,
                                         int64_t exact_tier_bytes) {
  BackendOptions options;
  options.exact_tier_bytes = exact_tier_bytes;
  options.pool_bytes = pool_bytes;
  options.num_threads = num_threads;
  std::string note;
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateBackend(TestBackend(), options, &note);
  EXPECT_TRUE(backend.ok()) << backend.status();
  static const std::string* const tuning =
      new std::string(backend.ok() ? TestTuningFile((*backend)->info().device) : "");
  if (backend.ok() && !tuning->empty() && (*backend)->info().name == "cuda") {
    options.tuning_file = *tuning;
    backend->reset();  // its memory first
    backend = CreateBackend(TestBackend(), options, &note);
    EXPECT_TRUE(backend.ok()) << backend.status();
  }
  return backend.ok() ? *std::move(backend) : nullptr;
}

float RoundTo(DType type, float value) {
  float stored;
  WriteElement(&stored, type, 0, value);
  return ReadElement(&stored, type, 0);
}

BackendHarness::BackendHarness(const HarnessOptions& options)
    : options_(options), random_(options.seed) {
  ::testing::Test::RecordProperty("seed", static_cast<int>(options.seed));
  const int64_t slot = SlotBytes(options);
  const int64_t original = DensePageBytes(options.shape, DenseDType(options.format));
  backend_ = MakeTestBackend(slot * options.num_pages, options.num_threads,
                             original * options.num_tier_pages);
  for (int32_t i = 0; i < options.num_pages; ++i) {
    free_pages_.push_back(PageId{static_cast<uint32_t>(i * (slot / kPageAlignment))});
  }
  if (options.shuffle) std::shuffle(free_pages_.begin(), free_pages_.end(), random_);
  if (options.poison && ok()) PoisonPages();
}

PageId BackendHarness::NewPage() {
  EXPECT_FALSE(free_pages_.empty()) << "the test needs more num_pages";
  const PageId page = free_pages_.back();
  free_pages_.pop_back();
  return page;
}

PageId BackendHarness::NewTierPage() {
  EXPECT_LT(next_tier_page_, options_.num_tier_pages) << "the test needs more num_tier_pages";
  const int64_t bytes = DensePageBytes(options_.shape, DenseDType(options_.format));
  const int64_t offset = backend_->info().pool_bytes + next_tier_page_++ * bytes;
  return PageId{static_cast<uint32_t>(offset / kPageAlignment)};
}

std::vector<float> BackendHarness::RandomRows(int64_t rows, int32_t heads, float spread) {
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> values(rows * heads * options_.shape.head_dim);
  for (float& value : values) value = RoundTo(options_.in_type, normal(random_));
  return values;
}

TestSequence BackendHarness::NewSequence(int64_t length) {
  TestSequence sequence;
  const int32_t heads = options_.shape.num_kv_heads;
  AppendTokens(&sequence, RandomRows(length, heads), RandomRows(length, heads));
  return sequence;
}

void BackendHarness::AppendTokens(TestSequence* sequence, const std::vector<float>& k,
                                  const std::vector<float>& v) {
  const int64_t row = int64_t{options_.shape.num_kv_heads} * options_.shape.head_dim;
  const int64_t tokens = static_cast<int64_t>(k.size()) / row;
  if (tokens == 0) return;
  StepCase step;
  step.sequence = sequence;
  step.append_len = static_cast<int32_t>(tokens);
  step.q_len = 0;
  step.k = k;
  step.v = v;
  Run({step});
}

PageId BackendHarness::FitBasis(const TestSequence& sequence, int32_t fit_pages,
                                const std::vector<float>& query_sample,
                                const std::vector<float>& error_factors) {
  FitBasisTask task;
  task.shape = options_.shape;
  task.pages = absl::MakeConstSpan(sequence.pages).subspan(0, fit_pages);
  task.page_type = DenseDType(options_.format);
  task.query_sample = query_sample;
  task.error_factors = error_factors;
  task.softmax_scale = 1.0f / std::sqrt(static_cast<float>(task.shape.head_dim));
  task.target = NewPage();
  const absl::Status status = backend_->FitBasis(task);
  EXPECT_TRUE(status.ok()) << status;
  return task.target;
}

void BackendHarness::SealWith(TestSequence* sequence, int32_t count, PageId basis) {
  for (int32_t i = 0; i < count; ++i) {
    PageId& page = sequence->pages[sequence->num_sealed_pages];
    SealTask task;
    task.page_type = DenseDType(options_.format);
    task.shape = options_.shape;
    task.source = page;
    task.target = NewPage();
    task.basis = basis;
    task.stored_bits = sequence->stored_bits;
    if (sequence->keep_exact && options_.num_tier_pages > 0) task.exact_copy = NewTierPage();
    SealResult result;
    const absl::Status status = backend_->SealPages({&task, 1}, {&result, 1});
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_GT(result.drift_ratio, 0);
    page = task.target;
    ++sequence->num_sealed_pages;
    if (sequence->bases.empty() || sequence->bases.back().basis != basis) {
      sequence->bases.push_back({0, basis});
    }
    ++sequence->bases.back().num_pages;
    if (sequence->keep_exact) {
      const bool copied = task.exact_copy != kNoPage;
      sequence->exact_pages.push_back(copied ? task.exact_copy : task.source);
    }
    if (!sequence->keep_exact || task.exact_copy != kNoPage) {
      free_pages_.insert(free_pages_.begin(), task.source);
    }
  }
}

void BackendHarness::Seal(TestSequence* sequence, int32_t count, int32_t fit_pages,
                          const std::vector<float>& query_sample) {
  SealWith(sequence, count, FitBasis(*sequence, fit_pages, query_sample));
}

SequenceStep BackendHarness::MakeStep(const StepCase& step) const {
  const TestSequence& sequence = *step.sequence;
  SequenceStep out;
  out.kv_len = sequence.length;
  out.append_len = step.append_len;
  out.q_len = step.q_len;
  out.q_start = step.q_start >= 0 ? step.q_start : sequence.length + step.append_len - step.q_len;
  out.pages = sequence.pages;
  out.num_sealed_pages = sequence.num_sealed_pages;
  out.bases = sequence.bases;
  out.stored_bits = sequence.stored_bits;
  out.exact_pages = sequence.exact_pages;
  out.softmax_scale = step.softmax_scale > 0
                          ? step.softmax_scale
                          : 1.0f / std::sqrt(static_cast<float>(options_.shape.head_dim));
  out.softcap = step.softcap;
  out.window = step.window;
  out.key_scales = sequence.key_scales;
  out.value_scales = sequence.value_scales;
  out.decision = step.decision;
  out.thetas = step.thetas;
  return out;
}

void BackendHarness::CountAppended(StepCase* step, const std::vector<float>& k,
                                   const std::vector<float>& v) {
  TestSequence* sequence = step->sequence;
  const DType type = DenseDType(options_.format);
  const auto keep = [&](const std::vector<float>& rows, const std::vector<float>& scales,
                        std::vector<float>* to) {
    for (size_t i = 0; i < rows.size(); ++i) {
      const size_t head = i / options_.shape.head_dim % options_.shape.num_kv_heads;
      const float scale = scales.empty() ? 1.0f : scales[head];
      to->push_back(scale * RoundTo(type, rows[i] * (1.0f / scale)));
    }
  };
  keep(k, sequence->key_scales, &sequence->k);
  keep(v, sequence->value_scales, &sequence->v);
  sequence->length += step->append_len;
}

std::vector<StepOutput> BackendHarness::Run(std::vector<StepCase> cases) {
  PoisonScratch(cases);
  return Finish(Start(std::move(cases)));
}

PendingStep BackendHarness::Start(std::vector<StepCase> cases) {
  const AttentionShape& shape = options_.shape;
  StepLimits limits;
  limits.max_sequences = static_cast<int32_t>(cases.size());
  limits.max_decisions = limits.max_sequences * int64_t{shape.num_kv_heads};
  for (StepCase& step : cases) {
    if (step.q.empty()) step.q = RandomRows(step.q_len, shape.num_q_heads);
    if (step.k.empty()) step.k = RandomRows(step.append_len, shape.num_kv_heads);
    if (step.v.empty()) step.v = RandomRows(step.append_len, shape.num_kv_heads);
    while (static_cast<int64_t>(step.sequence->pages.size()) * kPageTokens <
           step.sequence->length + step.append_len) {
      step.sequence->pages.push_back(NewPage());
    }
    limits.max_q_bytes += static_cast<int64_t>(step.q.size()) * 4;
    limits.max_kv_bytes += static_cast<int64_t>(step.k.size()) * 4;
    limits.max_q_rows += int64_t{step.q_len} * shape.num_q_heads;
    limits.max_table_entries += static_cast<int64_t>(step.sequence->pages.size());
  }
  auto buffers = backend_->CreateStepBuffers(limits);
  EXPECT_TRUE(buffers.ok()) << buffers.status();
  std::vector<SequenceStep> steps;
  int64_t q_at = 0, kv_at = 0;
  for (const StepCase& step : cases) {
    steps.push_back(MakeStep(step));
    WriteTensor(options_.in_type, step.q, q_at, (*buffers)->q());
    WriteTensor(options_.in_type, step.k, kv_at, (*buffers)->k());
    WriteTensor(options_.in_type, step.v, kv_at, (*buffers)->v());
    q_at += static_cast<int64_t>(step.q.size());
    kv_at += static_cast<int64_t>(step.k.size());
  }
  AttendBatch batch;
  batch.shape = shape;
  batch.format = options_.format;
  batch.in_type = options_.in_type;
  batch.out_type = options_.out_type;
  batch.sequences = steps;
  batch.buffers = buffers->get();
  auto plan = backend_->PlanAttend(batch);
  EXPECT_TRUE(plan.ok()) << plan.status();
  auto ticket = backend_->RunAttend(**plan, batch);
  EXPECT_TRUE(ticket.ok()) << ticket.status();
  return PendingStep{std::move(cases), *std::move(buffers), *ticket};
}

std::vector<StepOutput> BackendHarness::Finish(PendingStep step) {
  EXPECT_TRUE(backend_->Wait(step.ticket).ok());
  stage_times_ = *step.buffers->stage_times();
  std::vector<StepOutput> outputs = TakeOutputs(step.cases, step.buffers.get());
  for (size_t i = 0; i < step.cases.size(); ++i) {
    if (!outputs[i].result.nonfinite_kv) {
      CountAppended(&step.cases[i], step.cases[i].k, step.cases[i].v);
    }
  }
  return outputs;
}

std::vector<StepOutput> BackendHarness::TakeOutputs(const std::vector<StepCase>& cases,
                                                    StepBuffers* buffers) const {
  const AttentionShape& shape = options_.shape;
  std::vector<StepOutput> outputs(cases.size());
  int64_t row = 0;
  for (size_t i = 0; i < cases.size(); ++i) {
    StepOutput& output = outputs[i];
    const int64_t rows = int64_t{cases[i].q_len} * shape.num_q_heads;
    output.q = cases[i].q;
    for (int64_t e = 0; e < rows * shape.head_dim; ++e) {
      output.out.push_back(
          ReadElement(buffers->out(), options_.out_type, row * shape.head_dim + e));
    }
    output.lse.assign(buffers->lse() + row, buffers->lse() + row + rows);
    output.result = buffers->results()[i];
    const HeadDecision* decisions = buffers->decisions() + i * shape.num_kv_heads;
    output.decisions.assign(decisions, decisions + shape.num_kv_heads);
    row += rows;
  }
  return outputs;
}

void BackendHarness::Read(const TestSequence& sequence, int64_t begin, int64_t end,
                          std::vector<float>* k, std::vector<float>* v) {
  const int64_t row = int64_t{options_.shape.num_kv_heads} * options_.shape.head_dim;
  k->assign((end - begin) * row, std::numeric_limits<float>::quiet_NaN());
  *v = *k;
  ReadTask task;
  task.shape = options_.shape;
  task.format = options_.format;
  task.pages = sequence.pages;
  task.num_sealed_pages = sequence.num_sealed_pages;
  task.bases = sequence.bases;
  task.stored_bits = sequence.stored_bits;
  task.key_scales = sequence.key_scales;
  task.value_scales = sequence.value_scales;
  task.begin = begin;
  task.end = end;
  task.k = k->data();
  task.v = v->data();
  const absl::Status status = backend_->ReadTokens(task);
  EXPECT_TRUE(status.ok()) << status;
}

ErrorLimits BackendHarness::exact_limits() const {
  const DType type = DenseDType(options_.format);
  if (backend_->info().name != "cuda" || type == DType::kF32) return {1e-5, 1e-5};
  return {type == DType::kBf16 ? 4e-3 : 5e-4, 1e-4};
}

SealedLimits BackendHarness::sealed_limits() const {
  // Queries are halves in CUDA's scan: scores of 12 nats err by 12 * 2^-12.
  if (backend_->info().name == "cuda") return {1e-2, 2e-2, 2e-2, 2e-2, 5e-2, {5e-3, 3e-3}};
  return {1e-4, 1e-5, 1e-4, 1e-4, 1e-4, {2e-4, 1e-4}};
}

void BackendHarness::ExpectExact(const StepCase& step, const StepOutput& output,
                                 const ErrorLimits& limits) {
  const AttentionShape& shape = options_.shape;
  const TestSequence& sequence = *step.sequence;
  AttentionF64Params params;
  params.shape = shape;
  params.kv_len = sequence.length;
  params.q_len = step.q_len;
  params.q_start = step.q_start >= 0 ? step.q_start : sequence.length - step.q_len;
  params.softmax_scale =
      step.softmax_scale > 0 ? step.softmax_scale : 1.0f / std::sqrt(float(shape.head_dim));
  params.softcap = step.softcap;
  params.window = step.window;
  const AttentionF64Result expected =
      AttentionF64(params, output.q.data(), sequence.k.data(), sequence.v.data());
  for (size_t row = 0; row < expected.lse.size(); ++row) {
    double error = 0, norm = 0;
    for (int32_t c = 0; c < shape.head_dim; ++c) {
      const size_t i = row * shape.head_dim + c;
      const double difference = output.out[i] - expected.out[i];
      error += difference * difference;
      norm += expected.out[i] * expected.out[i];
    }
    if (std::isinf(expected.lse[row])) {
      EXPECT_EQ(output.lse[row], expected.lse[row]) << "row " << row;
      EXPECT_EQ(error, 0) << "row " << row;
      continue;
    }
    EXPECT_LE(std::sqrt(error), limits.out * std::sqrt(norm))
        << "row " << row << " first " << output.out[row * shape.head_dim] << " expected "
        << expected.out[row * shape.head_dim];
    EXPECT_NEAR(output.lse[row], expected.lse[row], limits.lse) << "row " << row;
  }
}

}  // namespace adaattn

#ifndef ADAATTN_KERNELS_CPU_BOUNDED_H_
#define ADAATTN_KERNELS_CPU_BOUNDED_H_

// Bounded steps (DecisionParams::bounded) on the CPU: what policy/bound.h needs of each head, and
// reading deeper until the bound holds.

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/sealed_job.h"
#include "kernels/cpu/step.h"
#include "kernels/policy/bound.h"

namespace adaattn {

// The largest norms among some dense tokens of one kv head.
struct DenseExtent {
  double key = 0;
  double value = 0;
};

// One kv head of a bounded step. Between Plan and Settle the caller attends the sealed pages as
// SealedJob says; all partial results stand in the head's splits by Settle.
class BoundedHead {
 public:
  // `job` is the head's sealed pages, scanned and selected; null where it has none.
  BoundedHead(const CpuContext& context, const AttendBatch& batch, HeadJob* head, SealedJob* job);

  // Deepens depths, and marks exact pages, until the bound is expected to hold.
  void Plan(SealedWorker* worker);
  // Forgets the partial results of sealed and exact pages.
  void Restart() { head_->num_splits = dense_splits_; }
  // Attends the marked pages' originals into the split behind the sealed one.
  void AttendExactPages(DenseScratch* scratch);
  // Measures the bound of what was attended. True: it is reported, met or not. False: there is
  // more to read, planned for; attend again.
  bool Settle(SealedWorker* worker);

 private:
  struct RowBound {
    double relative = 0;
    LseBound lse;
  };

  int32_t rows() const { return head_->rows; }
  int64_t Cell(int32_t page, int32_t row) const { return int64_t{row} * job_->stride + page; }
  bool exact(int32_t page) const { return job_ != nullptr && job_->exact[page] != 0; }
  bool keeps_exact_pages() const { return !head_->sequence->exact_pages.empty(); }
  bool Deepen(SealedWorker* worker);
  void RefinePages(SealedWorker* worker);
  void RefinePage(int32_t page, SealedWorker* worker);
  void BoundScores(int32_t page);
  DenseExtent ExtentOf(absl::Span<const PageId> pages, int64_t begin, int64_t end) const;
  void AttendRun(int32_t first, int32_t end, DenseScratch* scratch);

  // The bound of a row whose output is `o` (model frame) and log sum of exponentials `lse`.
  // exact_mass: of the exact pages; negative: the rest of 1.
  RowBound BoundRow(int32_t row, const double* o, double lse, double exact_mass) const;
  double ExactMass(int32_t row, double lse) const;
  void AddSealedTerms(int32_t row, const double* rotated_o, double norm, double lse,
                      std::vector<BoundTerm>* terms, double* rounding) const;
  BoundTerm TermOf(int32_t row, double mass, const DenseExtent& extent, double norm) const;
  double Expected() const;
  RowBound Measure() const;
  void MarkExact(int32_t count);
  int32_t ExactPagesNeeded();
  std::vector<int32_t> PagesByWeight() const;
  void Report(const RowBound& worst, BoundDepth depth);

  const CpuContext context_;
  const AttendBatch& batch_;
  HeadJob* const head_;
  SealedJob* const job_;
  const int32_t head_dim_;
  const int32_t group_;
  const int32_t dense_splits_;
  DenseExtent dense_;
  DenseExtent exact_;                 // of the exact pages read
  std::vector<double> query_norms_;   // [rows]
  std::vector<double> score_errors_;  // [rows, stride] at raw_bits
  BoundDepth depth_ = BoundDepth::kPolicy;
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CPU_BOUNDED_H_

#include "kernels/cpu/page_work.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/convert.h"
#include "kernels/cpu/sealed_kernels.h"
#include "kernels/format/basis.h"
#include "kernels/format/seal.h"
#include "kernels/policy/value_factors.h"

namespace adaattn {
namespace {

// One kv head's tokens [begin, end) of a dense page as floats. scale: FP8 only.
void ReadDenseRows(const std::byte* head, DType type, int32_t head_dim, int32_t begin, int32_t end,
                   float scale, float* out) {
  const int64_t first = int64_t{begin} * head_dim, count = int64_t{end - begin} * head_dim;
  if (type == DType::kF8E4m3) {
    for (int64_t i = 0; i < count; ++i) out[i] = scale * ReadElement(head, type, first + i);
  } else {
    (void)ToFloats(type, head + first * DTypeBytes(type), count, out);
  }
}

SealedHead MakeSealedHead(const AttentionShape& shape, int32_t kv_head, int32_t stored_bits) {
  SealedHead head;
  head.head_dim = shape.head_dim;
  head.kv_head = kv_head;
  head.layout = MakePageLayout(shape, stored_bits);
  head.order = kCpuTileOrder;
  return head;
}

void SealOneHead(const SealTask& task, int32_t kv_head, std::byte* pool, float* drift) {
  const AttentionShape& shape = task.shape;
  const int64_t count = int64_t{kPageTokens} * shape.head_dim;
  std::vector<float> keys(count), values(count);
  const std::byte* source = pool + PageOffset(task.source);
  const DType type = task.page_type;
  ReadDenseRows(source + DenseKeyOffset(kv_head, shape.head_dim, type), type, shape.head_dim, 0,
                kPageTokens, 1, keys.data());
  ReadDenseRows(source + DenseValueOffset(shape, kv_head, type), type, shape.head_dim, 0,
                kPageTokens, 1, values.data());
  const BasisView basis = ViewBasis(pool + PageOffset(task.basis), shape, kv_head);
  *drift = SealHead(MakeSealedHead(shape, kv_head, task.stored_bits), basis, keys.data(),
                    values.data(), pool + PageOffset(task.target));
}

void ReopenOneHead(const ReopenTask& task, int32_t kv_head, std::byte* pool) {
  const AttentionShape& shape = task.shape;
  const int64_t count = int64_t{kPageTokens} * shape.head_dim;
  std::vector<float> rows(count);
  const SealedHead head = MakeSealedHead(shape, kv_head, task.stored_bits);
  const BasisView basis = ViewBasis(pool + PageOffset(task.basis), shape, kv_head);
  const std::byte* source = pool + PageOffset(task.source);
  std::byte* target = pool + PageOffset(task.target);
  DecodeKeys(head, basis, source, task.stored_bits, NumRankChunks(shape.head_dim), rows.data());
  const DType type = task.page_type;
  FromFloats(type, rows.data(), 1, count, target + DenseKeyOffset(kv_head, shape.head_dim, type));
  DecodeValues(head, source, task.stored_bits, rows.data());
  FromFloats(type, rows.data(), 1, count, target + DenseValueOffset(shape, kv_head, type));
}

// Basis of the sealed page `page` of a table.
PageId BasisOf(absl::Span<const BasisRun> runs, int64_t page) {
  for (const BasisRun& run : runs) {
    if (page < run.num_pages) return run.basis;
    page -= run.num_pages;
  }
  return kNoPage;
}

// Tokens of one page and kv head as floats, [end - begin, head_dim], positions inside the page.
void ReadHead(const ReadTask& task, const std::byte* pool, int64_t page, int32_t kv_head,
              int32_t begin, int32_t end, std::vector<float>* k, std::vector<float>* v) {
  const AttentionShape& shape = task.shape;
  const std::byte* at = pool + PageOffset(task.pages[page]);
  k->resize(int64_t{kPageTokens} * shape.head_dim);
  v->resize(k->size());
  if (page >= task.num_sealed_pages) {
    const DType type = DenseDType(task.format);
    const float key_scale = HeadFactor(task.key_scales, kv_head);
    const float value_scale = HeadFactor(task.value_scales, kv_head);
    ReadDenseRows(at + DenseKeyOffset(kv_head, shape.head_dim, type), type, shape.head_dim, begin,
                  end, key_scale, k->data());
    ReadDenseRows(at + DenseValueOffset(shape, kv_head, type), type, shape.head_dim, begin, end,
                  value_scale, v->data());
    return;
  }
  const SealedHead head = MakeSealedHead(shape, kv_head, task.stored_bits);
  const BasisView basis = ViewBasis(pool + PageOffset(BasisOf(task.bases, page)), shape, kv_head);
  DecodeKeys(head, basis, at, task.stored_bits, NumRankChunks(shape.head_dim), k->data());
  DecodeValues(head, at, task.stored_bits, v->data());
  const int64_t first = int64_t{begin} * shape.head_dim;
  std::copy(k->begin() + first, k->end(), k->begin());
  std::copy(v->begin() + first, v->end(), v->begin());
}

}  // namespace

void SealPagesOnCpu(absl::Span<const SealTask> tasks, std::byte* pool, WorkerPool* workers,
                    absl::Span<SealResult> results) {
  if (tasks.empty()) return;
  // Tasks may differ in shape: items are numbered by the largest head count.
  int32_t heads = 0;
  for (const SealTask& task : tasks) heads = std::max(heads, task.shape.num_kv_heads);
  std::vector<float> drifts(tasks.size() * static_cast<size_t>(heads));
  workers->ParallelFor(static_cast<int64_t>(drifts.size()), false, [&](int64_t item, int32_t) {
    const SealTask& task = tasks[item / heads];
    const int32_t kv_head = static_cast<int32_t>(item % heads);
    if (kv_head >= task.shape.num_kv_heads) return;
    SealOneHead(task, kv_head, pool, &drifts[item]);
    if (kv_head == 0 && task.exact_copy != kNoPage) {
      std::memcpy(pool + PageOffset(task.exact_copy), pool + PageOffset(task.source),
                  static_cast<size_t>(DensePageBytes(task.shape, task.page_type)));
    }
  });
  for (size_t i = 0; i < tasks.size(); ++i) {
    const int32_t count = tasks[i].shape.num_kv_heads;
    float sum = 0;
    for (int32_t head = 0; head < count; ++head) sum += drifts[i * heads + head];
    results[i].drift_ratio = sum / static_cast<float>(count);
  }
}

void ReopenPagesOnCpu(absl::Span<const ReopenTask> tasks, std::byte* pool, WorkerPool* workers) {
  for (const ReopenTask& task : tasks) {
    workers->ParallelFor(task.shape.num_kv_heads, false, [&](int64_t kv_head, int32_t) {
      ReopenOneHead(task, static_cast<int32_t>(kv_head), pool);
    });
  }
}

absl::Status FitBasisOnCpu(const FitBasisTask& task, std::byte* pool, WorkerPool* workers) {
  const AttentionShape& shape = task.shape;
  const int64_t page_floats = int64_t{kPageTokens} * shape.head_dim;
  const int64_t group_floats = int64_t{shape.group_size()} * shape.head_dim;
  const int64_t row_floats = int64_t{shape.num_q_heads} * shape.head_dim;
  const int64_t num_rows = static_cast<int64_t>(task.query_sample.size()) / row_floats;
  std::vector<absl::Status> statuses(shape.num_kv_heads);
  workers->ParallelFor(shape.num_kv_heads, false, [&](int64_t item, int32_t) {
    const int32_t kv_head = static_cast<int32_t>(item);
    std::vector<float> keys(task.pages.size() * page_floats), values(keys.size());
    std::vector<float> queries(num_rows * group_floats);
    for (size_t page = 0; page < task.pages.size(); ++page) {
      const std::byte* source = pool + PageOffset(task.pages[page]);
      const auto read = [&](int64_t offset, std::vector<float>* rows) {
        ReadDenseRows(source + offset, task.page_type, shape.head_dim, 0, kPageTokens, 1,
                      rows->data() + page * page_floats);
      };
      read(DenseKeyOffset(kv_head, shape.head_dim, task.page_type), &keys);
      read(DenseValueOffset(shape, kv_head, task.page_type), &values);
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      const float* from = task.query_sample.data() + row * row_floats + kv_head * group_floats;
      std::copy(from, from + group_floats, queries.begin() + row * group_floats);
    }
    absl::StatusOr<Basis> basis = FitBasis(shape.head_dim, keys, queries);
    statuses[kv_head] = basis.status();
    if (!basis.ok()) return;
    basis->value_factors =
        Scaled(MeasureValueFactors({shape.head_dim, shape.group_size(), task.softmax_scale,
                                    task.softcap, keys, values, queries}),
               HeadFactor(task.error_factors, kv_head));
    WriteBasis(*basis, shape, kv_head, pool + PageOffset(task.target));
  });
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status LoadBasisOnCpu(const LoadBasisTask& task, std::byte* pool) {
  const AttentionShape& shape = task.shape;
  const int64_t d = shape.head_dim;
  std::vector<Basis> bases;
  for (int32_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    absl::StatusOr<Basis> basis = CheckBasis(shape.head_dim, task.mean.subspan(kv_head * d, d),
                                             task.basis.subspan(kv_head * d * d, d * d));
    if (!basis.ok()) return basis.status();
    basis->value_factors = Scaled({}, HeadFactor(task.error_factors, kv_head));
    bases.push_back(*std::move(basis));
  }
  for (int32_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    WriteBasis(bases[kv_head], shape, kv_head, pool + PageOffset(task.target));
  }
  return absl::OkStatus();
}

void ReadTokensOnCpu(const ReadTask& task, const std::byte* pool, WorkerPool* workers) {
  if (task.begin >= task.end) return;
  const AttentionShape& shape = task.shape;
  const int64_t first_page = task.begin / kPageTokens;
  const int64_t num_pages = (task.end - 1) / kPageTokens - first_page + 1;
  const int64_t token_floats = int64_t{shape.num_kv_heads} * shape.head_dim;
  workers->ParallelFor(num_pages * shape.num_kv_heads, false, [&](int64_t item, int32_t) {
    const int64_t page = first_page + item / shape.num_kv_heads;
    const int32_t kv_head = static_cast<int32_t>(item % shape.num_kv_heads);
    const int64_t start = page * kPageTokens;
    const auto begin = static_cast<int32_t>(std::max<int64_t>(task.begin - start, 0));
    const auto end = static_cast<int32_t>(std::min<int64_t>(task.end - start, kPageTokens));
    std::vector<float> k, v;
    ReadHead(task, pool, page, kv_head, begin, end, &k, &v);
    for (int32_t t = begin; t < end; ++t) {
      const int64_t from = int64_t{t - begin} * shape.head_dim;
      const int64_t to =
          (start + t - task.begin) * token_floats + int64_t{kv_head} * shape.head_dim;
      std::copy_n(k.data() + from, shape.head_dim, task.k + to);
      std::copy_n(v.data() + from, shape.head_dim, task.v + to);
    }
  });
}

}  // namespace adaattn

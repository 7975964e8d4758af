#include "loadtest/trace_pool.h"

#include <algorithm>
#include <numeric>
#include <random>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/progressive.h"
#include "kernels/cuda/status.h"
#include "kernels/format/basis.h"
#include "kernels/format/float_types.h"
#include "loadtest/row_judge.h"

namespace adaattn {
namespace {

constexpr int32_t kFitTokens = 1024;
constexpr DType kDenseType = DenseDType(kTraceFormat);

PageId PageAt(int64_t offset) { return PageId{static_cast<uint32_t>(offset / kPageAlignment)}; }

std::vector<float> Widen(const uint16_t* values, int64_t count) {
  std::vector<float> wide(count);
  std::transform(values, values + count, wide.begin(),
                 [](uint16_t bits) { return ToFloat(Fp16{bits}); });
  return wide;
}

}  // namespace

absl::StatusOr<std::unique_ptr<TracePool>> TracePool::Create(const Trace* trace,
                                                             const AttentionShape& shape,
                                                             int32_t stored_bits,
                                                             int64_t free_bytes) {
  if (shape.head_dim != trace->shape.head_dim || trace->num_tokens < kFitTokens ||
      trace->num_tokens % kPageTokens != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a trace of ", trace->num_tokens, " tokens, head_dim ", trace->shape.head_dim,
        "; must be whole pages of at least ", kFitTokens, " tokens, head_dim ", shape.head_dim));
  }
  std::unique_ptr<TracePool> made(new TracePool(trace, shape, stored_bits));
  ADAATTN_RETURN_IF_ERROR(made->CopyIn(free_bytes));
  ADAATTN_RETURN_IF_ERROR(made->Seal());
  return made;
}

absl::Status TracePool::CopyIn(int64_t free_bytes) {
  const int64_t num_pages = trace_->num_tokens / kPageTokens;
  int64_t end = 0;
  const auto take = [&end](int64_t bytes) {
    const PageId page = PageAt(end);
    end += bytes;
    return page;
  };
  basis_ = take(MakeBasisLayout(shape_).block_bytes);
  for (int64_t i = 0; i < num_pages; ++i)
    dense_.push_back(take(DensePageBytes(shape_, kDenseType)));
  for (int64_t i = 0; i < num_pages; ++i) {
    sealed_.push_back(take(MakePageLayout(shape_, stored_bits_).page_bytes));
  }
  free_begin_ = end;
  ADAATTN_RETURN_IF_ERROR(memory_.Allocate(end + free_bytes));
  ADAATTN_RETURN_IF_ERROR(LoadBasis());
  return LoadTokens();
}

absl::Status TracePool::LoadBasis() {
  const int32_t d = shape_.head_dim, group = trace_->shape.group_size();
  std::vector<std::byte> block(MakeBasisLayout(shape_).block_bytes);
  for (int32_t source = 0; source < trace_->shape.num_kv_heads; ++source) {
    const std::vector<float> keys =
        Widen(trace_->k.data() + source * trace_->num_tokens * d, int64_t{kFitTokens} * d);
    std::vector<float> queries;
    for (int32_t q_head = source * group; q_head < (source + 1) * group; ++q_head) {
      const std::vector<float> rows =
          Widen(trace_->q.data() + int64_t{q_head} * trace_->num_rows * d,
                int64_t{std::max(1, trace_->num_rows / 4)} * d);
      queries.insert(queries.end(), rows.begin(), rows.end());
    }
    ADAATTN_ASSIGN_OR_RETURN(const Basis basis, FitBasis(d, keys, queries));
    for (int32_t head = 0; head < shape_.num_kv_heads; ++head) {
      if (SourceKvHead(*trace_, head) == source) WriteBasis(basis, shape_, head, block.data());
    }
  }
  return FromCuda(
      cudaMemcpy(pool() + PageOffset(basis_), block.data(), block.size(), cudaMemcpyHostToDevice),
      "cudaMemcpy of the basis");
}

// Rounds the tokens of each head once and copies them to every head and page that holds them.
absl::Status TracePool::LoadTokens() {
  const int32_t d = shape_.head_dim;
  const int64_t head_bytes = DenseHeadBytes(d, kDenseType);
  const auto num_pages = static_cast<int64_t>(dense_.size());
  std::vector<std::byte> narrow(num_pages * head_bytes);
  for (const bool keys : {true, false}) {
    for (int32_t source = 0; source < trace_->shape.num_kv_heads; ++source) {
      const uint16_t* from =
          (keys ? trace_->k : trace_->v).data() + source * trace_->num_tokens * d;
      for (int64_t i = 0; i < num_pages * kPageTokens * d; ++i) {
        WriteElement(narrow.data(), kDenseType, i, ToFloat(Fp16{from[i]}));
      }
      for (int32_t head = 0; head < shape_.num_kv_heads; ++head) {
        if (SourceKvHead(*trace_, head) != source) continue;
        const int64_t offset =
            keys ? DenseKeyOffset(head, d, kDenseType) : DenseValueOffset(shape_, head, kDenseType);
        const int64_t pitch = DensePageBytes(shape_, kDenseType);
        ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpy2D(pool() + PageOffset(dense_[0]) + offset, pitch,
                                                  narrow.data(), head_bytes, head_bytes, num_pages,
                                                  cudaMemcpyHostToDevice));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status TracePool::Seal() {
  const auto n = static_cast<int64_t>(dense_.size());
  std::vector<PageId> ids = dense_;
  ids.insert(ids.end(), sealed_.begin(), sealed_.end());
  ids.insert(ids.end(), n, basis_);
  const int64_t ids_bytes = 3 * n * int64_t{sizeof(PageId)};
  const int64_t drift_bytes = n * shape_.num_kv_heads * int64_t{sizeof(float)};
  DeviceBuffer tasks;
  ADAATTN_RETURN_IF_ERROR(tasks.Allocate(ids_bytes + drift_bytes));
  ADAATTN_RETURN_IF_CUDA_ERROR(
      cudaMemcpy(tasks.data(), ids.data(), ids_bytes, cudaMemcpyHostToDevice));
  SealParams params;
  params.shape = shape_;
  params.stored_bits = stored_bits_;
  params.page_type = kDenseType;
  params.num_tasks = static_cast<int32_t>(n);
  params.pool = pool();
  params.source = reinterpret_cast<const uint32_t*>(tasks.data());
  params.target = params.source + n;
  params.basis = params.source + 2 * n;
  params.drift = reinterpret_cast<float*>(tasks.data() + ids_bytes);
  ADAATTN_RETURN_IF_ERROR(LaunchSeal(params, nullptr));
  return FromCuda(cudaDeviceSynchronize(), "sealing the trace");
}

int64_t TracePool::CaseBytes(const AttentionShape& shape, int32_t stored_bits,
                             int32_t num_sequences, int32_t kv_len) {
  const int64_t sealed = kv_len / kPageTokens - kDenseTailPages;
  return num_sequences * (sealed * MakePageLayout(shape, stored_bits).page_bytes +
                          kDenseTailPages * DensePageBytes(shape, kDenseType));
}

absl::StatusOr<std::vector<PageId>> TracePool::FillSequences(int32_t num_sequences,
                                                             int32_t kv_len) {
  const int64_t tokens = trace_->num_tokens;
  const int32_t num_pages = kv_len / kPageTokens;
  if (kv_len % kPageTokens != 0 || num_pages <= kDenseTailPages ||
      (kv_len > tokens && kv_len % tokens != 0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "kv_len ", kv_len, "; must be a multiple of ", kPageTokens, " above ",
        kDenseTailPages * kPageTokens, ", and beyond the trace's ", tokens, " tokens of those"));
  }
  if (free_begin_ + CaseBytes(shape_, stored_bits_, num_sequences, kv_len) > memory_.bytes()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(num_sequences, " sequences of ", kv_len, " tokens do not fit the pool"));
  }
  std::vector<int32_t> order(int64_t{num_sequences} * num_pages);  // entries of the tables
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937_64(1));
  std::vector<PageId> tables(order.size());
  int64_t end = free_begin_;
  for (const int32_t entry : order) {
    const int32_t page = entry % num_pages;
    const bool dense = page >= num_pages - kDenseTailPages;
    const int64_t bytes = dense ? DensePageBytes(shape_, kDenseType)
                                : MakePageLayout(shape_, stored_bits_).page_bytes;
    const PageId from = (dense ? dense_ : sealed_)[page % dense_.size()];
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(pool() + end, pool() + PageOffset(from), bytes,
                                                 cudaMemcpyDeviceToDevice, nullptr));
    tables[entry] = PageAt(end);
    end += bytes;
  }
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaDeviceSynchronize());
  return tables;
}

}  // namespace adaattn

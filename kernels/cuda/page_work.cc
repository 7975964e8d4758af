#include "kernels/cuda/page_work.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "kernels/cuda/status.h"
#include "kernels/format/basis.h"
#include "kernels/format/seal.h"
#include "kernels/policy/value_factors.h"

namespace adaattn {
namespace {

absl::Status Reserve(int64_t bytes, PinnedBuffer* buffer) {
  return buffer->bytes() >= bytes ? absl::OkStatus() : buffer->Allocate(bytes);
}

// Calls work(i) for i in [0, count) on as many threads as there are cores.
void ParallelFor(int64_t count, const std::function<void(int64_t)>& work) {
  const int64_t cores = std::max(1u, std::thread::hardware_concurrency());
  std::atomic<int64_t> next{0};
  const auto loop = [&] {
    for (int64_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < std::min(cores, count); ++i) threads.emplace_back(loop);
  loop();
  for (std::thread& thread : threads) thread.join();
}

// Elements [first, first + count) of a dense array as floats.
void ReadElements(const std::byte* data, DType type, int64_t first, int64_t count, float scale,
                  float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = scale * ReadElement(data, type, first + i);
}

absl::Status UploadBlock(const std::vector<std::byte>& block, PageId target,
                         const PageMover& mover) {
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(mover.memory.At(target), block.data(), block.size(),
                                               cudaMemcpyDefault, mover.stream));
  return FromCuda(cudaStreamSynchronize(mover.stream), "cudaStreamSynchronize");
}

// The pages of one ReadTask, copied in batches, and the bases of its sealed ones.
class TokenReader {
 public:
  TokenReader(const ReadTask& task, const PageMover& mover)
      : task_(task),
        mover_(mover),
        layout_(MakePageLayout(task.shape, task.stored_bits)),
        type_(DenseDType(task.format)),
        slot_bytes_(std::max(layout_.page_bytes, DensePageBytes(task.shape, type_))) {}

  absl::Status Read() {
    ADAATTN_RETURN_IF_ERROR(CopyBases());
    const int64_t end = (task_.end - 1) / kPageTokens + 1;
    for (int64_t first = task_.begin / kPageTokens; first < end; first += kBatchPages) {
      const int64_t count = std::min(end - first, kBatchPages);
      ADAATTN_RETURN_IF_ERROR(CopyPages(first, count));
      ParallelFor(count * task_.shape.num_kv_heads, [&](int64_t item) {
        const int64_t page = item / task_.shape.num_kv_heads;
        ReadHead(first + page, static_cast<int32_t>(item % task_.shape.num_kv_heads),
                 mover_.staging->data() + page * slot_bytes_);
      });
    }
    return absl::OkStatus();
  }

 private:
  static constexpr int64_t kBatchPages = 32;

  absl::Status CopyBases() {
    const int64_t bytes = MakeBasisLayout(task_.shape).block_bytes;
    for (const BasisRun& run : task_.bases) {
      bases_.emplace_back(bytes);
      ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(bases_.back().data(),
                                                   mover_.memory.At(run.basis), bytes,
                                                   cudaMemcpyDefault, mover_.stream));
    }
    return absl::OkStatus();
  }

  absl::Status CopyPages(int64_t first, int64_t count) {
    ADAATTN_RETURN_IF_ERROR(Reserve(kBatchPages * slot_bytes_, mover_.staging));
    for (int64_t i = 0; i < count; ++i) {
      const bool sealed = first + i < task_.num_sealed_pages;
      const int64_t bytes = sealed ? layout_.page_bytes : DensePageBytes(task_.shape, type_);
      ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(mover_.staging->data() + i * slot_bytes_,
                                                   mover_.memory.At(task_.pages[first + i]), bytes,
                                                   cudaMemcpyDefault, mover_.stream));
    }
    return FromCuda(cudaStreamSynchronize(mover_.stream), "cudaStreamSynchronize");
  }

  const std::byte* BasisOf(int64_t page) const {
    size_t run = 0;
    while (page >= task_.bases[run].num_pages) page -= task_.bases[run++].num_pages;
    return bases_[run].data();
  }

  void ReadHead(int64_t page, int32_t kv_head, const std::byte* at) const {
    const AttentionShape& shape = task_.shape;
    const int64_t d = shape.head_dim, start = page * kPageTokens;
    const int64_t begin = std::max(task_.begin - start, int64_t{0});
    const int64_t end = std::min(task_.end - start, int64_t{kPageTokens});
    std::vector<float> k(kPageTokens * d), v(kPageTokens * d);
    if (page < task_.num_sealed_pages) {
      const SealedHead head{shape.head_dim, kv_head, layout_, TileOrder::kMma};
      DecodeKeys(head, ViewBasis(BasisOf(page), shape, kv_head), at, task_.stored_bits,
                 NumRankChunks(shape.head_dim), k.data());
      DecodeValues(head, at, task_.stored_bits, v.data());
    } else {
      const float key_scale = HeadFactor(task_.key_scales, kv_head);
      const float value_scale = HeadFactor(task_.value_scales, kv_head);
      ReadElements(at + DenseKeyOffset(kv_head, shape.head_dim, type_), type_, begin * d,
                   (end - begin) * d, key_scale, k.data() + begin * d);
      ReadElements(at + DenseValueOffset(shape, kv_head, type_), type_, begin * d,
                   (end - begin) * d, value_scale, v.data() + begin * d);
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t to = ((start + t - task_.begin) * shape.num_kv_heads + kv_head) * d;
      std::copy_n(k.data() + t * d, d, task_.k + to);
      std::copy_n(v.data() + t * d, d, task_.v + to);
    }
  }

  const ReadTask& task_;
  const PageMover& mover_;
  const PageLayout layout_;
  const DType type_;
  const int64_t slot_bytes_;
  std::vector<std::vector<std::byte>> bases_;
};

}  // namespace

absl::Status FitBasisOnHost(const FitBasisTask& task, const PageMover& mover) {
  const AttentionShape& shape = task.shape;
  const int64_t head_floats = int64_t{kPageTokens} * shape.head_dim;
  const int64_t head_bytes = DenseHeadBytes(shape.head_dim, task.page_type);
  const int64_t page_bytes = 2 * head_bytes * shape.num_kv_heads;  // keys, then values
  const auto num_pages = static_cast<int64_t>(task.pages.size());
  ADAATTN_RETURN_IF_ERROR(Reserve(num_pages * page_bytes, mover.staging));
  for (int64_t i = 0; i < num_pages; ++i) {
    ADAATTN_RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(mover.staging->data() + i * page_bytes,
                                                 mover.memory.At(task.pages[i]), page_bytes,
                                                 cudaMemcpyDefault, mover.stream));
  }
  ADAATTN_RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(mover.stream));
  const int64_t group_floats = int64_t{shape.group_size()} * shape.head_dim;
  const int64_t row_floats = int64_t{shape.num_q_heads} * shape.head_dim;
  const int64_t num_rows = static_cast<int64_t>(task.query_sample.size()) / row_floats;
  std::vector<std::byte> block(MakeBasisLayout(shape).block_bytes);
  std::vector<absl::Status> statuses(shape.num_kv_heads);
  ParallelFor(shape.num_kv_heads, [&](int64_t kv_head) {
    std::vector<float> keys(num_pages * head_floats), values(keys.size());
    std::vector<float> queries(num_rows * group_floats);
    for (int64_t i = 0; i < num_pages; ++i) {
      const std::byte* page = mover.staging->data() + i * page_bytes;
      const auto read = [&](int64_t offset, std::vector<float>* rows) {
        ReadElements(page + offset, task.page_type, 0, head_floats, 1,
                     rows->data() + i * head_floats);
      };
      const auto head = static_cast<int32_t>(kv_head);
      read(DenseKeyOffset(head, shape.head_dim, task.page_type), &keys);
      read(DenseValueOffset(shape, head, task.page_type), &values);
    }
    for (int64_t row = 0; row < num_rows; ++row) {
      std::copy_n(task.query_sample.data() + row * row_floats + kv_head * group_floats,
                  group_floats, queries.data() + row * group_floats);
    }
    absl::StatusOr<Basis> basis = FitBasis(shape.head_dim, keys, queries);
    statuses[kv_head] = basis.status();
    if (!basis.ok()) return;
    basis->value_factors =
        Scaled(MeasureValueFactors({shape.head_dim, shape.group_size(), task.softmax_scale,
                                    task.softcap, keys, values, queries}),
               HeadFactor(task.error_factors, static_cast<int32_t>(kv_head)));
    WriteBasis(*basis, shape, static_cast<int32_t>(kv_head), block.data());
  });
  for (const absl::Status& status : statuses) ADAATTN_RETURN_IF_ERROR(status);
  return UploadBlock(block, task.target, mover);
}

absl::Status LoadBasisToDevice(const LoadBasisTask& task, const PageMover& mover) {
  const AttentionShape& shape = task.shape;
  const int64_t d = shape.head_dim;
  std::vector<std::byte> block(MakeBasisLayout(shape).block_bytes);
  for (int32_t kv_head = 0; kv_head < shape.num_kv_heads; ++kv_head) {
    ADAATTN_ASSIGN_OR_RETURN(Basis basis,
                             CheckBasis(shape.head_dim, task.mean.subspan(kv_head * d, d),
                                        task.basis.subspan(kv_head * d * d, d * d)));
    basis.value_factors = Scaled({}, HeadFactor(task.error_factors, kv_head));
    WriteBasis(basis, shape, kv_head, block.data());
  }
  return UploadBlock(block, task.target, mover);
}

absl::Status ReadTokensToHost(const ReadTask& task, const PageMover& mover) {
  if (task.begin >= task.end) return absl::OkStatus();
  return TokenReader(task, mover).Read();
}

}  // namespace adaattn

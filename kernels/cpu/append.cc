#include "kernels/cpu/append.h"

#include "hwy/aligned_allocator.h"
#include "kernels/cpu/convert.h"

namespace adaattn {
namespace {

constexpr int32_t kMaxHeadDim = 256;

// One token of one tensor: [num_kv_heads, head_dim] to its slot in the page.
bool AppendToken(const AttendBatch& batch, const std::byte* in, int64_t page_offset, int32_t slot,
                 absl::Span<const float> scales, std::byte* page) {
  const AttentionShape& shape = batch.shape;
  const DType type = DenseDType(batch.format);
  const int64_t in_bytes = int64_t{shape.head_dim} * DTypeBytes(batch.in_type);
  const int64_t out_bytes = int64_t{shape.head_dim} * DTypeBytes(type);
  const float most = LargestStored(type);
  alignas(64) float row[kMaxHeadDim];
  bool finite = true;
  for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
    finite &= ToFloats(batch.in_type, in + head * in_bytes, shape.head_dim, row, most);
    const float factor = type == DType::kF8E4m3 ? 1.0f / HeadFactor(scales, head) : 1.0f;
    std::byte* slot_at =
        page + page_offset + head * DenseHeadBytes(shape.head_dim, type) + slot * out_bytes;
    FromFloats(type, row, factor, shape.head_dim, slot_at);
  }
  return finite;
}

}  // namespace

bool AppendRows(const AttendBatch& batch, const AppendWork& work, std::byte* pool) {
  const AttentionShape& shape = batch.shape;
  const SequenceStep& sequence = *work.sequence;
  const DType type = DenseDType(batch.format);
  const int64_t token_bytes =
      int64_t{shape.num_kv_heads} * shape.head_dim * DTypeBytes(batch.in_type);
  bool finite = true;
  for (int32_t row = work.begin; row < work.end; ++row) {
    const int64_t position = sequence.kv_len + row;
    const int32_t slot = static_cast<int32_t>(position % kPageTokens);
    std::byte* page = pool + PageOffset(sequence.pages[position / kPageTokens]);
    const int64_t in = (work.first_kv_row + row) * token_bytes;
    finite &= AppendToken(batch, batch.buffers->k() + in, DenseKeyOffset(0, shape.head_dim, type),
                          slot, sequence.key_scales, page);
    finite &= AppendToken(batch, batch.buffers->v() + in, DenseValueOffset(shape, 0, type), slot,
                          sequence.value_scales, page);
  }
  return finite;
}

}  // namespace adaattn

#include "server/payload_reader.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

#include "kernels/format/float_types.h"

namespace adaattn {
namespace {

const std::array<float, 256>& Fp8Values() {
  static const std::array<float, 256>* const values = [] {
    auto* table = new std::array<float, 256>;
    for (int32_t code = 0; code < 256; ++code) {
      (*table)[code] = ToFloat(Fp8E4m3{static_cast<uint8_t>(code)});
    }
    return table;
  }();
  return *values;
}

int64_t RowBytes(DType type, int32_t num_heads, int32_t head_dim) {
  return int64_t{num_heads} * head_dim * DTypeBytes(type);
}

}  // namespace

PayloadReader::PayloadReader(const TensorPieces* tensor, int32_t num_heads, int32_t head_dim)
    : tensor_(tensor),
      num_heads_(num_heads),
      head_dim_(head_dim),
      wire_row_bytes_(RowBytes(tensor->type, num_heads, head_dim)),
      row_bytes_(RowBytes(tensor->type == DType::kF8E4m3 ? DType::kF16 : tensor->type, num_heads,
                          head_dim)) {}

void PayloadReader::Skip(int64_t rows) { SkipBytes(rows * wire_row_bytes_); }

void PayloadReader::Read(int64_t rows, std::byte* target) {
  if (tensor_->type == DType::kF8E4m3) {
    ReadFp8(rows, target);
  } else {
    ReadBytes(rows * wire_row_bytes_, target);
  }
}

void PayloadReader::SkipBytes(int64_t bytes) {
  while (bytes > 0) {
    assert(piece_ < tensor_->pieces.size());
    const auto left = static_cast<int64_t>(tensor_->pieces[piece_].size() - piece_byte_);
    const int64_t step = std::min(left, bytes);
    piece_byte_ += static_cast<size_t>(step);
    bytes -= step;
    if (step == left) {
      ++piece_;
      piece_byte_ = 0;
    }
  }
}

void PayloadReader::ReadBytes(int64_t bytes, std::byte* target) {
  while (bytes > 0) {
    assert(piece_ < tensor_->pieces.size());
    const absl::Span<const std::byte> piece = tensor_->pieces[piece_];
    const int64_t step = std::min(static_cast<int64_t>(piece.size() - piece_byte_), bytes);
    std::memcpy(target, piece.data() + piece_byte_, static_cast<size_t>(step));
    target += step;
    SkipBytes(step);
    bytes -= step;
  }
}

void PayloadReader::ReadFp8(int64_t rows, std::byte* target) {
  const std::array<float, 256>& values = Fp8Values();
  std::array<std::byte, 256> codes;  // head_dim is at most 256
  assert(head_dim_ <= static_cast<int32_t>(codes.size()));
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t head = 0; head < num_heads_; ++head) {
      const float scale = HeadFactor(tensor_->scales, head);
      ReadBytes(head_dim_, codes.data());
      for (int32_t c = 0; c < head_dim_; ++c) {
        WriteElement(target, DType::kF16, c, values[static_cast<uint8_t>(codes[c])] * scale);
      }
      target += head_dim_ * DTypeBytes(DType::kF16);
    }
  }
}

}  // namespace adaattn

#ifndef ADAATTN_SERVER_PAYLOAD_READER_H_
#define ADAATTN_SERVER_PAYLOAD_READER_H_

#include <cstddef>
#include <cstdint>

#include "server/attention_task.h"

namespace adaattn {

// Copies rows of a tensor that arrived in pieces, front to back. Not thread-safe.
class PayloadReader {
 public:
  // Rows of num_heads * head_dim elements. `tensor` outlives the reader.
  PayloadReader(const TensorPieces* tensor, int32_t num_heads, int32_t head_dim);

  int64_t row_bytes() const { return row_bytes_; }  // as Read writes them
  void Skip(int64_t rows);
  // FP8 rows arrive as F16, times their head's scale; all others as they are.
  void Read(int64_t rows, std::byte* target);

 private:
  void ReadBytes(int64_t bytes, std::byte* target);
  void SkipBytes(int64_t bytes);
  void ReadFp8(int64_t rows, std::byte* target);

  const TensorPieces* const tensor_;
  const int32_t num_heads_;
  const int32_t head_dim_;
  const int64_t wire_row_bytes_;
  const int64_t row_bytes_;
  size_t piece_ = 0;       // the current one
  size_t piece_byte_ = 0;  // the next byte in it
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_PAYLOAD_READER_H_

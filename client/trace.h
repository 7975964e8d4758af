#ifndef ADAATTN_CLIENT_TRACE_H_
#define ADAATTN_CLIENT_TRACE_H_

// Captured attention of one layer of a real model, for replays and tests. Files are safetensors:
//
//   q             F16 [q_heads, rows, head_dim]
//   k, v          F16 [kv_heads, tokens, head_dim], k after its position encoding
//   positions     I32 [rows], ascending: row r attends tokens 0..positions[r]
//   expected_o    F32 [q_heads, rows, head_dim]      computed in float64
//   expected_lse  F32 [q_heads, rows]                natural log
//   metadata      model, layer, softmax_scale; tokens where present must agree with k

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/shape.h"

namespace adaattn {

// One such file in memory; arrays in the order given above, FP16 as its bits.
struct Trace {
  std::string model;
  int32_t layer = 0;
  double softmax_scale = 0;
  AttentionShape shape;
  int64_t num_tokens = 0;
  int32_t num_rows = 0;
  std::vector<int32_t> positions;
  std::vector<uint16_t> q;
  std::vector<uint16_t> k;
  std::vector<uint16_t> v;
  std::vector<float> expected_o;
  std::vector<float> expected_lse;
};

// Reads a whole trace file. Errors: kNotFound when it cannot be opened; otherwise as ParseTrace,
// with the path in front.
absl::StatusOr<Trace> LoadTrace(const std::string& path);

// Parses the bytes of a trace file. Any input is safe. Errors: kInvalidArgument, naming the tensor
// or field, what it holds and what it must hold.
absl::StatusOr<Trace> ParseTrace(absl::string_view bytes);

}  // namespace adaattn

#endif  // ADAATTN_CLIENT_TRACE_H_

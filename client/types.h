#ifndef ADAATTN_CLIENT_TYPES_H_
#define ADAATTN_CLIENT_TYPES_H_

// What goes into the client library and comes out of it, as plain data. Fields mean what the field
// of the same name means in proto/adaattn/v1/attention.proto; zero stands for the same default.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace adaattn::client {

// Values are those of the enums in attention.proto.
enum class DType : int { kUnspecified = 0, kF32 = 1, kF16 = 2, kBf16 = 3, kF8E4m3 = 4 };
enum class PageFormat : int {
  kDefault = 0,
  kF32 = 1,
  kF16 = 2,
  kBf16 = 3,
  kF8E4m3 = 4,
  kProgressive = 5,
};
enum class ExactTier : int { kNone = 0, kBf16Pages = 1, kHostPages = 2 };
enum class Mode : int {
  kDefault = 0,
  kExact = 1,
  kFullDepth = 2,
  kStatistical = 3,
  kDeterministic = 4,
  kStatic = 5,
};
enum class Policy : int {
  kDefault = 0,
  kThreshold = 1,
  kBudget = 2,
  kEntropy = 3,
  kLearned = 4,
  kFeedback = 5
};
enum class Detail : int { kDefault = 0, kNone = 1, kSummary = 2, kPerHead = 3 };
enum class Fallback : int {
  kNone = 0,
  kNoBasis = 1,
  kBudget = 2,
  kPressure = 3,
  kStoredBits = 4,
  kExactPages = 5,
  kBoundUnmet = 6,
};

// Bytes of one element; 0 for kUnspecified.
constexpr int64_t ElementBytes(DType dtype) {
  return dtype == DType::kUnspecified ? 0
         : dtype == DType::kF32       ? 4
         : dtype == DType::kF8E4m3    ? 1
                                      : 2;
}

using Shape = std::vector<int64_t>;

// A borrowed tensor: little-endian elements, row-major. Empty (no data) = absent. The bytes must
// stay valid for the duration of the call that takes the view.
struct TensorView {
  DType dtype = DType::kUnspecified;
  Shape shape;
  absl::Span<const std::byte> data;
  absl::Span<const float> scales;  // FP8 only: one per head; empty = 1

  bool empty() const { return data.empty(); }
};

// A view of `elements`; the caller says what they are.
template <typename T>
TensorView MakeView(DType dtype, Shape shape, absl::Span<const T> elements) {
  const auto* bytes = reinterpret_cast<const std::byte*>(elements.data());
  return {dtype, std::move(shape), {bytes, elements.size() * sizeof(T)}, {}};
}

// An owned tensor of an answer.
struct Tensor {
  DType dtype = DType::kUnspecified;
  Shape shape;
  std::string data;

  // Requires: dtype == kF32.
  absl::Span<const float> floats() const {
    return {reinterpret_cast<const float*>(data.data()), data.size() / sizeof(float)};
  }
};

struct ModelShape {
  int32_t num_layers = 1;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  float softmax_scale = 0;  // 0 = 1 / sqrt(head_dim)
};

struct LayerOptions {
  int64_t window = 0;
  float softcap = 0;
};

struct AttendOptions {
  Mode mode = Mode::kDefault;
  Policy policy = Policy::kDefault;
  float theta = 0;
  float target_relative_error = 0;
  float max_relative_error = 0;
  int32_t floor_key_bits = 0;
  int32_t floor_value_bits = 0;
  int32_t static_key_bits = 0;
  int32_t static_rank = 0;
  int32_t static_value_bits = 0;
  std::optional<int32_t> coarse_rank;  // 0 = one-stage scan; unset = the server's default
  std::optional<float> coarse_z;
  Detail detail = Detail::kDefault;
  std::optional<int64_t> window;
  std::optional<float> softcap;
};

struct SessionOptions {
  ModelShape model;
  PageFormat page_format = PageFormat::kDefault;
  DType element_type = DType::kUnspecified;  // kProgressive: kF16 (the default) or kBf16
  int32_t stored_bits = 0;
  ExactTier exact_tier = ExactTier::kNone;
  std::vector<LayerOptions> layers;
  int64_t max_tokens = 0;
  absl::Duration lease;  // zero = the server's default
  AttendOptions default_options;
  std::vector<float> key_scales;
  std::vector<float> value_scales;
  std::string profile;
  int64_t start_position = 0;
  // 1 to 64 characters of [A-Za-z0-9._-]; "" = the client's own key.
  std::string route_key;
};

struct SessionRef {
  std::string session_id;
  uint64_t epoch = 0;
};

// What the server granted.
struct SessionGrant {
  int64_t max_tokens = 0;
  absl::Duration lease;
  PageFormat page_format = PageFormat::kDefault;
  int64_t max_message_bytes = 0;
  DType element_type = DType::kUnspecified;
};

// One sequence's part of a step.
struct SequenceInput {
  SessionRef session;
  int64_t position = 0;  // start_position included
  uint64_t step_id = 0;
  int32_t append_len = 0;
  int32_t q_len = 0;
  std::optional<int64_t> q_position;
};

// One message: one layer of one or more sequences. Rows of q, k and v belong to the sequences in
// order: q [sum q_len, num_q_heads, head_dim], k and v [sum append_len, num_kv_heads, head_dim].
struct AttendInput {
  int32_t layer = 0;
  std::vector<SequenceInput> sequences;
  TensorView q, k, v;
  std::optional<AttendOptions> options;  // unset = the session's
  DType output_dtype = DType::kUnspecified;
};

struct KeyPageCount {
  int32_t bits = 0;
  int32_t rank = 0;
  int32_t pages = 0;
};
struct ValuePageCount {
  int32_t bits = 0;
  int32_t pages = 0;
};
struct HeadDecision {
  int32_t kv_head = 0;
  std::vector<KeyPageCount> key_pages;
  std::vector<ValuePageCount> value_pages;
  int64_t dense_tokens = 0;
  float theta = 0;
  float entropy = 0;
  float predicted_error = 0;  // a prediction, not a bound
  int64_t key_bytes = 0;
  int64_t value_bytes = 0;
  float error_bound = 0;  // DETERMINISTIC only, as are the next three
  float lse_below = 0;
  float lse_above = 0;
  int32_t exact_pages = 0;
};

struct Decision {
  float mean_key_bits = 0;
  float mean_value_bits = 0;
  float mean_rank = 0;
  int64_t pages_sealed = 0;
  int64_t pages_skipped = 0;
  float theta = 0;
  float entropy = 0;
  float predicted_error = 0;  // a prediction, not a bound
  float error_bound = 0;      // DETERMINISTIC only, as are the next three
  float lse_below = 0;        // the true lse of every row lies in [lse - below, lse + above]
  float lse_above = 0;
  int64_t exact_pages = 0;
  int64_t bytes_read = 0;
  int64_t bytes_bf16 = 0;
  int64_t basis_bytes = 0;
  Fallback fallback = Fallback::kNone;
  float effective_target = 0;
  std::vector<HeadDecision> heads;  // Detail::kPerHead
};

struct StageTimes {
  absl::Duration queue, copy_in, append, scan, select, attend, merge, copy_out;
};

struct SequenceOutcome {
  absl::Status status;    // of this sequence alone; its rows of o and lse are zero on an error
  int64_t kv_len = 0;     // tokens in the layer after the step, start_position not included
  bool replayed = false;  // the append had been applied by an earlier attempt
  std::optional<Decision> decision;
};

struct AttendOutput {
  std::vector<SequenceOutcome> sequences;
  Tensor o;    // [sum q_len, num_q_heads, head_dim]
  Tensor lse;  // [sum q_len, num_q_heads] f32, natural log; -inf over an empty range
  StageTimes stage_times;
  absl::Duration retry_after;  // zero = the server gave no hint
};

struct ImportInput {
  int32_t first_layer = 0;
  // [num_layers, tokens, num_kv_heads, head_dim], or [tokens, num_kv_heads, head_dim] of one layer.
  TensorView k, v;
  TensorView query_sample;       // [rows, num_q_heads, head_dim] of first_layer; orders the basis
  TensorView basis_mean, basis;  // of first_layer, instead of a fitted basis
  // Return only once every page that is due is sealed. Then k and v may be absent.
  bool wait_sealed = false;
};

struct ExportRange {
  int32_t first_layer = 0;
  int32_t num_layers = 0;  // 0 = all from first_layer on
  int64_t begin = 0;
  int64_t end = 0;  // 0 = the length
  DType dtype = DType::kUnspecified;
};
struct ExportChunk {
  int32_t layer = 0;
  int64_t position = 0;
  Tensor k, v;  // [tokens, num_kv_heads, head_dim]
};

struct TruncateResult {
  int64_t kv_len = 0;
  int32_t pages_reopened = 0;
};

struct Lease {
  std::string session_id;
  absl::Status status;
  absl::Duration left;
};

struct SessionSummary {
  SessionRef session;
  ModelShape model;
  PageFormat page_format = PageFormat::kDefault;
  int64_t kv_len = 0;
  int64_t pages_dense = 0;
  int64_t pages_sealed = 0;
  int64_t pages_exact = 0;
  int64_t bytes = 0;
  int64_t exact_tier_bytes = 0;
  absl::Duration age, lease_left;
  double basis_drift_ratio = 0;
  DType element_type = DType::kUnspecified;
};

struct Profile {
  std::string name;
  ModelShape model;
  TensorView basis_mean, basis;
  std::vector<float> key_scales, value_scales;
  std::string policy_json;           // of the learned policy; "" = the server's
  std::vector<float> error_factors;  // of predicted errors, [num_layers, num_kv_heads]; empty = 1
  std::string extends;               // a profile that gives what is left out; "" = none
};

// What a server holds of a profile, and what audits say of the errors that it predicts. Vectors
// [num_layers, num_kv_heads].
struct ProfileSummary {
  ModelShape model;
  int64_t bytes = 0;
  bool has_basis = false;
  bool has_policy = false;
  std::vector<float> error_factors;          // what predictions are multiplied by
  std::vector<int64_t> audits;               // of steps under a budget
  std::vector<float> audited_error_factors;  // what to upload next
};

struct ServerInfo {
  std::string version, build, instance, backend, device, kernels, tuning;
  std::vector<int32_t> head_dims;
  std::vector<PageFormat> page_formats;
  std::vector<Mode> modes;
  std::vector<Policy> policies;
  int32_t max_group_size = 0;
  int32_t max_q_len = 0;
  int64_t pool_bytes = 0;
  int64_t pool_bytes_free = 0;
  int64_t exact_tier_bytes = 0;
  int64_t exact_tier_bytes_free = 0;
  int64_t max_message_bytes = 0;
  int64_t max_tokens_per_session = 0;
  int64_t max_sessions = 0;
  absl::Duration default_lease;
  PageFormat default_page_format = PageFormat::kDefault;
  std::vector<std::string> unsupported;
};

// "fp32", "fp16", "bf16", "fp8_e4m3", "progressive"; "default" for kDefault.
const char* PageFormatName(PageFormat format);
// "fp32", "fp16", "bf16", "fp8_e4m3"; "default" for kUnspecified.
const char* DTypeName(DType dtype);
// "none", "bf16_pages", "host_pages".
const char* ExactTierName(ExactTier tier);
// "exact", "full_depth", "statistical", "deterministic", "static"; "default".
const char* ModeName(Mode mode);
// "threshold", "budget"; "default".
const char* PolicyName(Policy policy);

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_TYPES_H_

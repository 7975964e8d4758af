#include "client/trace.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace adaattn {
namespace {

using Json = nlohmann::json;

constexpr size_t kLengthBytes = 8;  // little-endian length of the JSON header
constexpr uint64_t kMaxHeaderBytes = 1 << 20;
constexpr int64_t kMaxDimension = 1 << 24;
constexpr size_t kMaxDimensions = 3;

absl::Status Bad(absl::string_view field, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", problem));
}

// A safetensors file: the JSON header and the bytes that follow it.
struct File {
  File() = default;
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  Json header;
  absl::string_view data;
};

absl::Status ParseFile(absl::string_view bytes, File* file) {
  if (bytes.size() < kLengthBytes) {
    return Bad("header",
               absl::StrCat("the file has ", bytes.size(), " bytes; must have 8 or more"));
  }
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    length |= uint64_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
  }
  bytes.remove_prefix(kLengthBytes);
  if (length > kMaxHeaderBytes || length > bytes.size()) {
    return Bad("header", absl::StrCat("length ", length, " exceeds the file's ", bytes.size(),
                                      " bytes or the limit of ", kMaxHeaderBytes));
  }
  const absl::string_view text = bytes.substr(0, length);
  file->header = Json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!file->header.is_object()) return Bad("header", "not a JSON object");
  file->data = bytes.substr(length);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int64_t>> ParseShape(absl::string_view name, const Json& tensor,
                                                size_t num_dimensions) {
  const auto found = tensor.find("shape");
  if (found == tensor.end() || !found->is_array() || found->size() != num_dimensions) {
    return Bad(name, absl::StrCat("shape must have ", num_dimensions, " dimensions"));
  }
  std::vector<int64_t> shape;
  for (const Json& dimension : *found) {
    if (!dimension.is_number_unsigned() || dimension.get<uint64_t>() < 1 ||
        dimension.get<uint64_t>() > uint64_t{kMaxDimension}) {
      return Bad(name, absl::StrCat("every dimension must be in [1, ", kMaxDimension, "]"));
    }
    shape.push_back(static_cast<int64_t>(dimension.get<uint64_t>()));
  }
  return shape;
}

// The bytes of tensor `name`, after checking that dtype, shape and offsets agree with each other.
absl::StatusOr<absl::string_view> FindBytes(const File& file, absl::string_view name,
                                            absl::string_view dtype, uint64_t element_bytes,
                                            size_t num_dimensions, std::vector<int64_t>* shape) {
  const auto tensor = file.header.find(std::string(name));
  if (tensor == file.header.end() || !tensor->is_object()) return Bad(name, "tensor is missing");
  const auto type = tensor->find("dtype");
  if (type == tensor->end() || !type->is_string() || type->get<std::string>() != dtype) {
    return Bad(name, absl::StrCat("dtype must be ", dtype));
  }
  absl::StatusOr<std::vector<int64_t>> dimensions = ParseShape(name, *tensor, num_dimensions);
  if (!dimensions.ok()) return dimensions.status();
  const auto offsets = tensor->find("data_offsets");
  if (offsets == tensor->end() || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return Bad(name, "data_offsets must be two offsets");
  }
  const auto begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
  if (begin > end || end > file.data.size()) {
    return Bad(name, absl::StrCat("data_offsets [", begin, ", ", end, "] leave the file's ",
                                  file.data.size(), " bytes of data"));
  }
  // At most three dimensions of at most 2^24 each: compare by division, which cannot overflow.
  uint64_t rest = (end - begin) / element_bytes;
  bool agrees = (end - begin) % element_bytes == 0;
  for (const int64_t dimension : *dimensions) {
    agrees = agrees && rest % static_cast<uint64_t>(dimension) == 0;
    rest /= static_cast<uint64_t>(dimension);
  }
  if (!agrees || rest != 1) {
    return Bad(name, absl::StrCat(end - begin, " bytes do not hold shape [",
                                  absl::StrJoin(*dimensions, ", "), "] of ", dtype));
  }
  *shape = *std::move(dimensions);
  return file.data.substr(begin, end - begin);
}

template <typename T>
absl::Status Read(const File& file, absl::string_view name, absl::string_view dtype,
                  size_t num_dimensions, std::vector<int64_t>* shape, std::vector<T>* out) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4, "F16, F32 or I32");
  absl::StatusOr<absl::string_view> bytes =
      FindBytes(file, name, dtype, sizeof(T), num_dimensions, shape);
  if (!bytes.ok()) return bytes.status();
  out->resize(bytes->size() / sizeof(T));
  std::memcpy(out->data(), bytes->data(), bytes->size());
  return absl::OkStatus();
}

absl::Status CheckShape(absl::string_view name, const std::vector<int64_t>& shape,
                        const std::vector<int64_t>& expected) {
  if (shape == expected) return absl::OkStatus();
  return Bad(name, absl::StrCat("shape is [", absl::StrJoin(shape, ", "), "]; must be [",
                                absl::StrJoin(expected, ", "), "]"));
}

absl::StatusOr<std::string> MetadataField(const File& file, const std::string& name) {
  const auto metadata = file.header.find("__metadata__");
  if (metadata == file.header.end() || !metadata->is_object()) {
    return Bad("__metadata__", "missing");
  }
  const auto field = metadata->find(name);
  if (field == metadata->end() || !field->is_string()) {
    return Bad(absl::StrCat("__metadata__.", name), "missing or not a string");
  }
  return field->get<std::string>();
}

absl::Status ReadMetadata(const File& file, Trace* trace) {
  const absl::StatusOr<std::string> model = MetadataField(file, "model");
  if (!model.ok()) return model.status();
  trace->model = *model;
  const absl::StatusOr<std::string> layer = MetadataField(file, "layer");
  if (!layer.ok()) return layer.status();
  if (!absl::SimpleAtoi(*layer, &trace->layer) || trace->layer < 0) {
    return Bad("__metadata__.layer", absl::StrCat("is '", *layer, "'; must be an integer >= 0"));
  }
  const absl::StatusOr<std::string> scale = MetadataField(file, "softmax_scale");
  if (!scale.ok()) return scale.status();
  if (!absl::SimpleAtod(*scale, &trace->softmax_scale) || !std::isfinite(trace->softmax_scale) ||
      trace->softmax_scale <= 0) {
    return Bad("__metadata__.softmax_scale",
               absl::StrCat("is '", *scale, "'; must be finite and > 0"));
  }
  const absl::StatusOr<std::string> tokens = MetadataField(file, "tokens");
  if (tokens.ok() && *tokens != absl::StrCat(trace->num_tokens)) {
    return Bad("__metadata__.tokens",
               absl::StrCat("is '", *tokens, "'; k holds ", trace->num_tokens));
  }
  return absl::OkStatus();
}

absl::Status CheckPositions(const Trace& trace) {
  int64_t least = 0;
  for (size_t row = 0; row < trace.positions.size(); ++row) {
    const int64_t position = trace.positions[row];
    if (position < least || position >= trace.num_tokens) {
      return Bad(absl::StrCat("positions[", row, "]"),
                 absl::StrCat("is ", position, "; must be in [", least, ", ", trace.num_tokens,
                              "), ascending"));
    }
    least = position + 1;
  }
  return absl::OkStatus();
}

absl::Status ReadTensors(const File& file, Trace* trace) {
  std::vector<int64_t> q, k, v, positions, out, lse;
  absl::Status status = Read(file, "q", "F16", kMaxDimensions, &q, &trace->q);
  status.Update(Read(file, "k", "F16", kMaxDimensions, &k, &trace->k));
  status.Update(Read(file, "v", "F16", kMaxDimensions, &v, &trace->v));
  status.Update(Read(file, "positions", "I32", 1, &positions, &trace->positions));
  status.Update(Read(file, "expected_o", "F32", kMaxDimensions, &out, &trace->expected_o));
  status.Update(Read(file, "expected_lse", "F32", 2, &lse, &trace->expected_lse));
  if (!status.ok()) return status;
  status.Update(CheckShape("k", k, {k[0], k[1], q[2]}));
  status.Update(CheckShape("v", v, k));
  status.Update(CheckShape("positions", positions, {q[1]}));
  status.Update(CheckShape("expected_o", out, q));
  status.Update(CheckShape("expected_lse", lse, {q[0], q[1]}));
  if (!status.ok()) return status;
  if (q[0] % k[0] != 0) {
    return Bad("q", absl::StrCat(q[0], " heads; must be a multiple of k's ", k[0]));
  }
  trace->shape.num_q_heads = static_cast<int32_t>(q[0]);
  trace->shape.num_kv_heads = static_cast<int32_t>(k[0]);
  trace->shape.head_dim = static_cast<int32_t>(q[2]);
  trace->num_rows = static_cast<int32_t>(q[1]);
  trace->num_tokens = k[1];
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Trace> ParseTrace(absl::string_view bytes) {
  File file;
  Trace trace;
  absl::Status status = ParseFile(bytes, &file);
  if (status.ok()) status = ReadTensors(file, &trace);
  if (status.ok()) status = ReadMetadata(file, &trace);
  if (status.ok()) status = CheckPositions(trace);
  if (!status.ok()) return status;
  return trace;
}

absl::StatusOr<Trace> LoadTrace(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  absl::StatusOr<Trace> trace = ParseTrace(bytes);
  if (trace.ok()) return trace;
  return absl::Status(trace.status().code(), absl::StrCat(path, ": ", trace.status().message()));
}

}  // namespace adaattn

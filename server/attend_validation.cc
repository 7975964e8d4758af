#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/format/float_types.h"
#include "server/validation.h"

namespace adaattn {
namespace {

std::string ShapeText(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

absl::Status CheckScalesOf(absl::string_view field, const v1::Tensor& tensor, int64_t heads) {
  if (tensor.scales().empty()) return absl::OkStatus();
  if (tensor.dtype() != v1::DATA_TYPE_FP8_E4M3) {
    return InvalidField(absl::StrCat(field, ".scales"),
                        absl::StrCat(tensor.scales_size(), " factors"), "none unless dtype is FP8");
  }
  if (tensor.scales_size() != heads) {
    return InvalidField(absl::StrCat(field, ".scales"),
                        absl::StrCat(tensor.scales_size(), " factors"),
                        absl::StrCat("none or one for each of ", heads, " heads"));
  }
  for (const float scale : tensor.scales()) {
    if (!std::isfinite(scale) || scale <= 0) {
      return InvalidField(absl::StrCat(field, ".scales"), absl::StrCat(scale),
                          "finite and above 0");
    }
  }
  return absl::OkStatus();
}

// q, k or v of a message: `rows` of [heads, head_dim], absent when there are none.
absl::Status TakeTensor(absl::string_view field, const v1::Tensor* tensor, const WireBytes& bytes,
                        absl::Span<const int64_t> shape, TensorPieces* target) {
  if (shape[0] == 0) {
    if (tensor == nullptr ||
        (bytes.size == 0 && (tensor->shape().empty() || tensor->shape(0) == 0)))
      return absl::OkStatus();
    return InvalidField(absl::StrCat(field, ".shape"), ShapeText(tensor->shape()),
                        "absent: no sequence has rows of it");
  }
  if (tensor == nullptr) {
    return InvalidField(field, "no tensor", absl::StrCat("of shape ", ShapeText(shape)));
  }
  absl::Status status = CheckTensor(field, *tensor, bytes.size, shape, /*allow_fp8=*/true);
  if (status.ok()) status = CheckScalesOf(field, *tensor, shape[shape.size() - 2]);
  if (!status.ok()) return status;
  target->type = DTypeOf(tensor->dtype());
  target->pieces.assign(bytes.pieces.begin(), bytes.pieces.end());
  target->scales.assign(tensor->scales().begin(), tensor->scales().end());
  return absl::OkStatus();
}

DType ComputeType(const TensorPieces& tensor) {
  return tensor.type == DType::kF8E4m3 ? DType::kF16 : tensor.type;
}

// q, k and v reach the backend in one type.
absl::Status CheckSameTypes(const AttentionTask& task) {
  const TensorPieces* first = nullptr;
  for (const TensorPieces* tensor : {&task.q, &task.k, &task.v}) {
    if (tensor->pieces.empty()) continue;
    if (first == nullptr) first = tensor;
    if (ComputeType(*tensor) != ComputeType(*first)) {
      return absl::InvalidArgumentError(
          absl::StrCat("q, k, v: dtypes ", DTypeName(first->type), " and ", DTypeName(tensor->type),
                       " are not allowed together; they must be the same (fp8 goes with fp16)"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSequence(const v1::SequenceInput& input, const std::string& field,
                           int32_t max_q_len) {
  for (const absl::Status& status :
       {CheckRange<int64_t>(field + "position", input.position(), 0, kMaxPosition),
        CheckRange<int32_t>(field + "append_len", input.append_len(), 0, 1 << 24),
        CheckRange<int32_t>(field + "q_len", input.q_len(), 0, max_q_len)}) {
    if (!status.ok()) return status;
  }
  if (input.q_len() == 0 && input.append_len() == 0) {
    return InvalidField(field + "q_len", "0 with append_len 0", "at least one of them above 0");
  }
  if (input.append_len() > 0 && input.step_id() == 0) {
    return InvalidField(field + "step_id", "0", "above 0 where append_len is");
  }
  if (input.has_q_position()) {
    // A row may not stand before the shard's own first key less what it brings itself.
    return CheckRange<int64_t>(field + "q_position", input.q_position(), 0, kMaxPosition);
  }
  const int64_t end = input.position() + input.append_len();
  if (input.q_len() > end) {
    return InvalidField(
        field + "q_len", absl::StrCat(input.q_len()),
        absl::StrCat("at most position + append_len (", end, ") unless q_position is set"));
  }
  return absl::OkStatus();
}

absl::Status CheckSessionFits(const Session& session, const Session& first, int32_t layer,
                              const std::string& field) {
  const SessionConfig& config = session.config();
  if (layer >= config.num_layers) {
    return InvalidField("layer", absl::StrCat(layer),
                        absl::StrCat("from 0 to ", config.num_layers - 1));
  }
  if (!(config.shape == first.config().shape) || config.format != first.config().format) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, "session_id: a session of ", config.shape.DebugString(), " ",
                     PageFormatName(config.format), " is not allowed beside one of ",
                     first.config().shape.DebugString(), " ", PageFormatName(first.config().format),
                     "; all sequences of a message must have one model shape and page format"));
  }
  return absl::OkStatus();
}

// Fills task->sequences; `first` is the first session found, or null.
absl::Status TakeSequences(const v1::AttendRequest& header, const Caller& caller,
                           SessionTable* sessions, int32_t max_q_len, AttentionTask* task,
                           std::shared_ptr<Session>* first) {
  for (int i = 0; i < header.sequences_size(); ++i) {
    const v1::SequenceInput& input = header.sequences(i);
    const std::string field = absl::StrCat("sequences[", i, "].");
    absl::Status status = CheckSequence(input, field, max_q_len);
    if (!status.ok()) return status;
    SequenceTask sequence;
    sequence.position = input.position();
    sequence.step_id = input.step_id();
    sequence.append_len = input.append_len();
    sequence.q_len = input.q_len();
    if (input.has_q_position()) sequence.q_position = input.q_position();
    auto session = sessions->Find(input.session_id(), input.epoch(), caller.tenant);
    if (session.ok()) {
      if (*first == nullptr) *first = *session;
      status = CheckSessionFits(**session, **first, header.layer(), field);
      if (!status.ok()) return status;
      sequence.session = *std::move(session);
    } else {
      sequence.status = absl::Status(
          session.status().code(), absl::StrCat(field, "session_id: ", session.status().message()));
    }
    task->sequences.push_back(std::move(sequence));
  }
  return absl::OkStatus();
}

absl::Status TakeOutputType(const v1::AttendRequest& header, AttentionTask* task) {
  switch (header.output_dtype()) {
    case v1::DATA_TYPE_UNSPECIFIED:
      task->out_type = task->q.pieces.empty() ? DType::kBf16 : ComputeType(task->q);
      return absl::OkStatus();
    case v1::DATA_TYPE_FP32:
    case v1::DATA_TYPE_FP16:
    case v1::DATA_TYPE_BF16:
      task->out_type = DTypeOf(header.output_dtype());
      return absl::OkStatus();
    default:
      return InvalidField("output_dtype", absl::StrCat(header.output_dtype()),
                          "FP32, FP16, BF16 or unspecified");
  }
}

absl::Status CheckHeader(const v1::AttendRequest& header) {
  if (header.sequences_size() < 1 || header.sequences_size() > kMaxMessageSequences) {
    return InvalidField("sequences", absl::StrCat(header.sequences_size(), " entries"),
                        absl::StrCat("from 1 to ", kMaxMessageSequences));
  }
  if (header.kv_follows()) {
    return InvalidField("kv_follows", "true", "false outside AttendStream");
  }
  return CheckRange<int32_t>("layer", header.layer(), 0, kMaxLayers - 1);
}

}  // namespace

absl::Status CheckTensor(absl::string_view field, const v1::Tensor& tensor, int64_t bytes,
                         absl::Span<const int64_t> shape, bool allow_fp8) {
  if (tensor.has_shared_memory()) {
    return absl::UnimplementedError(absl::StrCat(
        field, ".shared_memory: no such transport was granted; supported: data in the message"));
  }
  const v1::DataType type = tensor.dtype();
  const bool fp8 = type == v1::DATA_TYPE_FP8_E4M3;
  if (!v1::DataType_IsValid(type) || type == v1::DATA_TYPE_UNSPECIFIED || (fp8 && !allow_fp8)) {
    return InvalidField(absl::StrCat(field, ".dtype"), absl::StrCat(type),
                        allow_fp8 ? "FP32 (1), FP16 (2), BF16 (3) or FP8_E4M3 (4)"
                                  : "FP32 (1), FP16 (2) or BF16 (3)");
  }
  if (!std::equal(tensor.shape().begin(), tensor.shape().end(), shape.begin(), shape.end())) {
    return InvalidField(absl::StrCat(field, ".shape"), ShapeText(tensor.shape()), ShapeText(shape));
  }
  int64_t expected = DTypeBytes(DTypeOf(type));
  for (const int64_t size : shape) expected *= size;
  if (bytes != expected) {
    return InvalidField(
        absl::StrCat(field, ".data"), absl::StrCat(bytes, " bytes"),
        absl::StrCat(expected, " bytes for ", ShapeText(shape), " ", DTypeName(DTypeOf(type))));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<AttentionTask>> ValidateAttend(AttendMessage message,
                                                              const Caller& caller,
                                                              SessionTable* sessions,
                                                              const ValidationContext& context) {
  const v1::AttendRequest& header = message.header;
  absl::Status status = CheckHeader(header);
  if (!status.ok()) return status;
  auto task = std::make_unique<AttentionTask>();
  std::shared_ptr<Session> first;
  status = TakeSequences(header, caller, sessions, context.backend->max_q_len, task.get(), &first);
  if (!status.ok()) return status;
  auto options = ValidateAttendOptions(header.options(), "options", context);
  if (!options.ok()) return options.status();
  task->options = *options;
  task->layer = header.layer();
  task->deadline = caller.deadline;
  if (first == nullptr) return task;

  const SessionConfig& config = first->config();
  task->shape = config.shape;
  task->format = config.format;
  const int64_t q_shape[] = {task->q_rows(), config.shape.num_q_heads, config.shape.head_dim};
  const int64_t kv_shape[] = {task->appended_rows(), config.shape.num_kv_heads,
                              config.shape.head_dim};
  const auto tensor = [](bool has, const v1::Tensor& field) { return has ? &field : nullptr; };
  status = TakeTensor("q", tensor(header.has_q(), header.q()), message.q, q_shape, &task->q);
  if (status.ok()) {
    status = TakeTensor("k", tensor(header.has_k(), header.k()), message.k, kv_shape, &task->k);
  }
  if (status.ok()) {
    status = TakeTensor("v", tensor(header.has_v(), header.v()), message.v, kv_shape, &task->v);
  }
  if (status.ok()) status = CheckSameTypes(*task);
  if (status.ok()) status = TakeOutputType(header, task.get());
  if (!status.ok()) return status;
  const auto resolved = ResolveOptions(task->options, config.default_options, config.format,
                                       config.keeps_exact_pages(), config.shape.head_dim);
  // A mode that this session cannot serve is the sequence's error; the engine says it.
  task->exact = resolved.ok() && resolved->mode == AttendMode::kExact;
  task->payload_owner = std::make_shared<AttendMessage>(std::move(message));
  return task;
}

absl::StatusOr<std::unique_ptr<AttentionTask>> ValidateImport(
    const std::shared_ptr<const v1::ImportKvRequest>& request,
    const std::shared_ptr<Session>& session, const Caller& caller) {
  const SessionConfig& config = session->config();
  const int32_t layers = request->num_layers() == 0 ? 1 : request->num_layers();
  for (const absl::Status& status :
       {CheckRange<int32_t>("first_layer", request->first_layer(), 0, config.num_layers - 1),
        CheckRange<int32_t>("num_layers", layers, 1, config.num_layers - request->first_layer()),
        CheckRange<int64_t>("position", request->position(), 0, kMaxPosition)}) {
    if (!status.ok()) return status;
  }
  // The tokens of the chunk are k's to say; everything else must agree.
  const int64_t tokens = request->k().shape_size() == 4 ? request->k().shape(1) : 0;
  if (tokens < 1 || tokens > (1 << 24)) {
    return InvalidField("k.shape", ShapeText(request->k().shape()),
                        absl::StrCat("[", layers, ", tokens, ", config.shape.num_kv_heads, ", ",
                                     config.shape.head_dim, "] with tokens of at least 1"));
  }
  auto task = std::make_unique<AttentionTask>();
  task->shape = config.shape;
  task->format = config.format;
  task->layer = request->first_layer();
  task->num_layers = layers;
  task->is_import = true;
  task->deadline = caller.deadline;
  const int64_t shape[] = {layers, tokens, config.shape.num_kv_heads, config.shape.head_dim};
  const auto bytes = [](const std::string& data) {
    WireBytes wire;
    wire.size = static_cast<int64_t>(data.size());
    if (!data.empty()) {
      wire.pieces.emplace_back(reinterpret_cast<const std::byte*>(data.data()), data.size());
    }
    return wire;
  };
  absl::Status status = TakeTensor("k", &request->k(), bytes(request->k().data()), shape, &task->k);
  if (status.ok()) {
    status = TakeTensor("v", &request->v(), bytes(request->v().data()), shape, &task->v);
  }
  if (status.ok()) status = CheckSameTypes(*task);
  if (!status.ok()) return status;
  SequenceTask sequence;
  sequence.session = session;
  sequence.position = request->position();
  sequence.append_len = static_cast<int32_t>(tokens);
  task->sequences.push_back(std::move(sequence));
  // Only kept, never written.
  task->payload_owner = std::const_pointer_cast<v1::ImportKvRequest>(request);
  return task;
}

absl::StatusOr<std::vector<float>> TensorFloats(absl::string_view field, const v1::Tensor& tensor) {
  const size_t size = static_cast<size_t>(DTypeBytes(DTypeOf(tensor.dtype())));
  std::vector<float> floats(tensor.data().size() / size);
  for (size_t i = 0; i < floats.size(); ++i) {
    const char* element = tensor.data().data() + i * size;
    uint16_t half = 0;
    if (size == 4) {
      std::memcpy(&floats[i], element, sizeof(float));
    } else {
      std::memcpy(&half, element, sizeof(half));
      floats[i] = tensor.dtype() == v1::DATA_TYPE_BF16 ? ToFloat(Bf16{half}) : ToFloat(Fp16{half});
    }
    if (!std::isfinite(floats[i])) {
      return InvalidField(absl::StrCat(field, ".data"),
                          absl::StrCat("element ", i, " is ", floats[i], ", which"), "finite");
    }
  }
  return floats;
}

DType DTypeOf(v1::DataType type) {
  return type == v1::DATA_TYPE_FP16       ? DType::kF16
         : type == v1::DATA_TYPE_BF16     ? DType::kBf16
         : type == v1::DATA_TYPE_FP8_E4M3 ? DType::kF8E4m3
                                          : DType::kF32;
}

v1::DataType ToProto(DType type) { return static_cast<v1::DataType>(static_cast<int>(type) + 1); }

PageFormat PageFormatOf(v1::PageFormat format, v1::DataType element_type, PageFormat unspecified) {
  if (format != v1::PAGE_FORMAT_UNSPECIFIED) {
    unspecified = static_cast<PageFormat>(static_cast<int>(format) - 1);
  }
  if (!IsProgressive(unspecified)) return unspecified;
  return element_type == v1::DATA_TYPE_BF16 ? PageFormat::kProgressive
                                            : PageFormat::kProgressiveF16;
}

v1::PageFormat ToProto(PageFormat format) {
  return IsProgressive(format) ? v1::PAGE_FORMAT_PROGRESSIVE
                               : static_cast<v1::PageFormat>(static_cast<int>(format) + 1);
}

}  // namespace adaattn

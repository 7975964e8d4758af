#include "server/wire.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace adaattn {
namespace {

enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

constexpr uint32_t kTensorDataField = 3;
constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();

// Reads forward over a list of slices. Every read either succeeds or leaves the message refused.
class SliceReader {
 public:
  explicit SliceReader(const std::vector<grpc::Slice>& slices) : slices_(slices) {
    for (const grpc::Slice& slice : slices_) total_ += static_cast<int64_t>(slice.size());
    SkipEmpty();
  }

  int64_t position() const { return position_; }
  int64_t total() const { return total_; }

  bool ReadVarint(uint64_t* value) {
    *value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (position_ == total_) return false;
      const uint64_t byte = slices_[slice_].begin()[offset_];
      Advance(1);
      *value |= (byte & 0x7f) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  // The next `size` bytes, piece by piece; false when the message is shorter.
  template <typename Visit>
  bool ReadPieces(int64_t size, Visit visit) {
    if (size > total_ - position_) return false;
    while (size > 0) {
      const int64_t left = static_cast<int64_t>(slices_[slice_].size()) - offset_;
      const int64_t count = std::min(left, size);
      visit(slices_[slice_].begin() + offset_, count);
      Advance(count);
      size -= count;
    }
    return true;
  }

 private:
  void Advance(int64_t count) {
    position_ += count;
    offset_ += count;
    SkipEmpty();
  }
  void SkipEmpty() {
    while (slice_ < slices_.size() && offset_ == static_cast<int64_t>(slices_[slice_].size())) {
      ++slice_;
      offset_ = 0;
    }
  }

  const std::vector<grpc::Slice>& slices_;
  size_t slice_ = 0;
  int64_t offset_ = 0;    // in the current slice
  int64_t position_ = 0;  // in the message
  int64_t total_ = 0;
};

void AppendVarint(uint64_t value, std::string* out) {
  for (; value >= 0x80; value >>= 7) out->push_back(static_cast<char>(value | 0x80));
  out->push_back(static_cast<char>(value));
}

void AppendTag(uint32_t field, WireType type, std::string* out) {
  AppendVarint(field << 3 | type, out);
}

// Splits one message into tensor payloads (left in place) and everything else (copied, small).
class AttendSplitter {
 public:
  AttendSplitter(SliceReader* reader, AttendMessage* message)
      : reader_(*reader), message_(*message) {}

  absl::Status Split() {
    while (reader_.position() < reader_.total()) {
      absl::Status status = SplitField();
      if (!status.ok()) return status;
    }
    if (header_.size() > static_cast<size_t>(kMaxLength)) return Malformed("too long");
    if (!message_.header.ParseFromArray(header_.data(), static_cast<int>(header_.size()))) {
      return Malformed("a field does not parse");
    }
    return absl::OkStatus();
  }

 private:
  absl::Status Malformed(absl::string_view why) const {
    return absl::InvalidArgumentError(absl::StrCat("AttendRequest: malformed message of ",
                                                   reader_.total(), " bytes, at byte ",
                                                   reader_.position(), ": ", why));
  }

  absl::Status SplitField() {
    uint32_t field = 0, type = 0;
    absl::Status status = ReadTag(&field, &type);
    if (!status.ok()) return status;
    WireBytes* payload = type == kBytes ? PayloadOf(field) : nullptr;
    if (payload == nullptr) return CopyField(field, type, &header_);
    std::string tensor;
    status = SplitTensor(payload, &tensor);
    AppendTag(field, kBytes, &header_);
    AppendVarint(tensor.size(), &header_);
    header_.append(tensor);
    return status;
  }

  WireBytes* PayloadOf(uint32_t field) {
    switch (field) {
      case v1::AttendRequest::kQFieldNumber:
        return &message_.q;
      case v1::AttendRequest::kKFieldNumber:
        return &message_.k;
      case v1::AttendRequest::kVFieldNumber:
        return &message_.v;
      default:
        return nullptr;
    }
  }

  absl::Status SplitTensor(WireBytes* payload, std::string* rest) {
    int64_t length = 0;
    absl::Status status = ReadLength(&length);
    if (!status.ok()) return status;
    const int64_t end = reader_.position() + length;
    while (reader_.position() < end) {
      uint32_t field = 0, type = 0;
      status = ReadTag(&field, &type);
      if (!status.ok()) return status;
      status = field == kTensorDataField && type == kBytes ? TakeBytes(payload)
                                                           : CopyField(field, type, rest);
      if (!status.ok()) return status;
    }
    if (reader_.position() != end) return Malformed("a field runs past the end of its tensor");
    return absl::OkStatus();
  }

  absl::Status ReadTag(uint32_t* field, uint32_t* type) {
    uint64_t tag = 0;
    if (!reader_.ReadVarint(&tag) || tag > std::numeric_limits<uint32_t>::max() || tag >> 3 == 0) {
      return Malformed("not a field tag");
    }
    *field = static_cast<uint32_t>(tag >> 3);
    *type = static_cast<uint32_t>(tag & 7);
    return absl::OkStatus();
  }

  absl::Status ReadLength(int64_t* length) {
    uint64_t value = 0;
    if (!reader_.ReadVarint(&value)) return Malformed("not a length");
    const int64_t left = reader_.total() - reader_.position();
    if (value > static_cast<uint64_t>(std::min(left, kMaxLength))) {
      return Malformed(absl::StrCat("a length of ", value, " where ", left, " bytes are left"));
    }
    *length = static_cast<int64_t>(value);
    return absl::OkStatus();
  }

  absl::Status TakeBytes(WireBytes* payload) {
    int64_t length = 0;
    absl::Status status = ReadLength(&length);
    if (!status.ok()) return status;
    payload->pieces.clear();  // Of a field that comes twice, the last one counts.
    payload->size = length;
    reader_.ReadPieces(length, [payload](const uint8_t* bytes, int64_t count) {
      payload->pieces.emplace_back(reinterpret_cast<const std::byte*>(bytes),
                                   static_cast<size_t>(count));
    });
    return absl::OkStatus();
  }

  absl::Status CopyField(uint32_t field, uint32_t type, std::string* out) {
    uint64_t value = 0;
    int64_t length = 0;
    AppendTag(field, static_cast<WireType>(type), out);
    switch (type) {
      case kVarint:
        if (!reader_.ReadVarint(&value)) return Malformed("not a varint");
        AppendVarint(value, out);
        return absl::OkStatus();
      case kFixed64:
        length = 8;
        break;
      case kFixed32:
        length = 4;
        break;
      case kBytes: {
        absl::Status status = ReadLength(&length);
        if (!status.ok()) return status;
        AppendVarint(static_cast<uint64_t>(length), out);
        break;
      }
      default:
        return Malformed(absl::StrCat("field ", field, " is a group or has no known wire type"));
    }
    const bool whole = reader_.ReadPieces(length, [out](const uint8_t* bytes, int64_t count) {
      out->append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(count));
    });
    return whole ? absl::OkStatus() : Malformed("the message ends inside a field");
  }

  SliceReader& reader_;
  AttendMessage& message_;
  std::string header_;
};

size_t DataBytes(const ReplyTensor& tensor) {
  size_t bytes = 0;
  for (const grpc::Slice& slice : tensor.data) bytes += slice.size();
  return bytes;
}

// Everything of a tensor field up to the first byte of its payload, which stands last.
void AppendTensorHead(uint32_t field, const ReplyTensor& tensor, std::string* out) {
  v1::Tensor header;
  header.set_dtype(tensor.dtype);
  header.mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
  std::string inner = header.SerializeAsString();
  const size_t payload = DataBytes(tensor);
  AppendTag(kTensorDataField, kBytes, &inner);
  AppendVarint(payload, &inner);
  AppendTag(field, kBytes, out);
  AppendVarint(inner.size() + payload, out);
  out->append(inner);
}

}  // namespace

absl::StatusOr<AttendMessage> ParseAttendRequest(const grpc::ByteBuffer& buffer) {
  AttendMessage message;
  if (buffer.Valid()) {
    const grpc::Status dumped = buffer.Dump(&message.slices);
    if (!dumped.ok()) return absl::InvalidArgumentError(dumped.error_message());
  }
  SliceReader reader(message.slices);
  const absl::Status status = AttendSplitter(&reader, &message).Split();
  if (!status.ok()) return status;
  return message;
}

grpc::Slice ShareBytes(std::shared_ptr<const void> owner, absl::Span<const std::byte> bytes) {
  if (bytes.empty()) return grpc::Slice();
  using Owner = std::shared_ptr<const void>;
  // The slice API takes a mutable pointer, but the transport only reads.
  return grpc::Slice(
      const_cast<std::byte*>(bytes.data()), bytes.size(),
      [](void* kept) { delete static_cast<Owner*>(kept); }, new Owner(std::move(owner)));
}

grpc::ByteBuffer BuildAttendReply(const v1::AttendResponse& header, const ReplyTensor* o,
                                  const ReplyTensor* lse) {
  std::vector<grpc::Slice> slices;
  std::string text = header.SerializeAsString();
  const auto add = [&slices, &text](uint32_t field, const ReplyTensor& tensor) {
    AppendTensorHead(field, tensor, &text);
    slices.emplace_back(text);
    text.clear();
    slices.insert(slices.end(), tensor.data.begin(), tensor.data.end());
  };
  if (o != nullptr) add(v1::AttendResponse::kOFieldNumber, *o);
  if (lse != nullptr) add(v1::AttendResponse::kLseFieldNumber, *lse);
  if (!text.empty()) slices.emplace_back(text);
  return grpc::ByteBuffer(slices.data(), slices.size());
}

}  // namespace adaattn

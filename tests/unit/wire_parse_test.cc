#include <google/protobuf/stubs/logging.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "server/wire.h"

namespace adaattn {
namespace {

using google::protobuf::util::MessageDifferencer;

std::string Flatten(const WireBytes& bytes) {
  std::string flat;
  for (const auto& piece : bytes.pieces) {
    flat.append(reinterpret_cast<const char*>(piece.data()), piece.size());
  }
  return flat;
}

// The message as the generated parser would have given it.
v1::AttendRequest Rejoin(const AttendMessage& message) {
  v1::AttendRequest joined = message.header;
  if (joined.has_q()) joined.mutable_q()->set_data(Flatten(message.q));
  if (joined.has_k()) joined.mutable_k()->set_data(Flatten(message.k));
  if (joined.has_v()) joined.mutable_v()->set_data(Flatten(message.v));
  return joined;
}

std::string RandomBytes(size_t count, std::mt19937* random) {
  std::string bytes(count, '\0');
  for (char& byte : bytes) byte = static_cast<char>((*random)());
  return bytes;
}

void FillTensor(size_t bytes, std::mt19937* random, v1::Tensor* tensor) {
  tensor->set_dtype(v1::DATA_TYPE_BF16);
  for (const int64_t size : {int64_t{1}, int64_t{4}, int64_t{64}}) tensor->add_shape(size);
  tensor->set_data(RandomBytes(bytes, random));
  tensor->add_scales(0.5f);
}

v1::AttendRequest SampleRequest(std::mt19937* random) {
  v1::AttendRequest request;
  request.set_request_id(77);
  request.set_layer(3);
  for (int i = 0; i < 3; ++i) {
    v1::SequenceInput* sequence = request.add_sequences();
    sequence->set_session_id("route.instance." + std::to_string(i));
    sequence->set_epoch(2);
    sequence->set_position(100 + i);
    sequence->set_step_id(5);
    sequence->set_append_len(1);
    sequence->set_q_len(1);
  }
  FillTensor(512, random, request.mutable_q());
  FillTensor(128, random, request.mutable_k());
  FillTensor(130, random, request.mutable_v());
  request.mutable_options()->set_theta(0.01f);
  request.mutable_options()->set_window(0);
  request.set_kv_follows(true);
  return request;
}

// `bytes` cut into slices of random lengths, empty ones among them.
grpc::ByteBuffer CutIntoSlices(const std::string& bytes, size_t longest, std::mt19937* random) {
  std::vector<grpc::Slice> slices;
  for (size_t begin = 0; begin < bytes.size();) {
    const size_t count = std::min<size_t>((*random)() % (longest + 1), bytes.size() - begin);
    slices.emplace_back(bytes.data() + begin, count);
    begin += count;
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

TEST(WireParseTest, EqualsTheGeneratedParserHoweverTheBytesAreCut) {
  std::mt19937 random(1);
  const v1::AttendRequest request = SampleRequest(&random);
  const std::string bytes = request.SerializeAsString();
  for (const size_t longest : {1, 2, 3, 7, 40, 200, 100000}) {
    auto message = ParseAttendRequest(CutIntoSlices(bytes, longest, &random));
    ASSERT_TRUE(message.ok()) << message.status() << " longest slice " << longest;
    EXPECT_TRUE(message->header.q().data().empty());
    EXPECT_EQ(message->q.size, 512);
    EXPECT_EQ(message->k.size, 128);
    EXPECT_EQ(message->v.size, 130);
    EXPECT_TRUE(MessageDifferencer::Equals(Rejoin(*message), request)) << longest;
  }
}

TEST(WireParseTest, PayloadStaysInTheReceivedSlices) {
  std::mt19937 random(2);
  const v1::AttendRequest request = SampleRequest(&random);
  const grpc::Slice whole(request.SerializeAsString());
  auto message = ParseAttendRequest(grpc::ByteBuffer(&whole, 1));
  ASSERT_TRUE(message.ok()) << message.status();
  ASSERT_EQ(message->q.pieces.size(), 1u);
  const auto* piece = reinterpret_cast<const uint8_t*>(message->q.pieces[0].data());
  EXPECT_GE(piece, whole.begin());
  EXPECT_LE(piece + 512, whole.end());
}

TEST(WireParseTest, PiecesSurviveAMoveOfTheMessage) {
  std::mt19937 random(3);
  const v1::AttendRequest request = SampleRequest(&random);
  // Slices this short are stored inside the slice object itself.
  auto parsed = ParseAttendRequest(CutIntoSlices(request.SerializeAsString(), 5, &random));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  AttendMessage moved = std::move(*parsed);
  AttendMessage again;
  again = std::move(moved);
  EXPECT_TRUE(MessageDifferencer::Equals(Rejoin(again), request));
}

TEST(WireParseTest, RepeatedTensorsMergeAsProtobufMerges) {
  std::mt19937 random(4);
  v1::AttendRequest first, second;
  FillTensor(64, &random, first.mutable_q());
  second.mutable_q()->set_data("later");
  second.mutable_q()->add_shape(9);
  const std::string bytes = first.SerializeAsString() + second.SerializeAsString();
  v1::AttendRequest expected;
  ASSERT_TRUE(expected.ParseFromString(bytes));
  auto message = ParseAttendRequest(CutIntoSlices(bytes, 11, &random));
  ASSERT_TRUE(message.ok()) << message.status();
  EXPECT_TRUE(MessageDifferencer::Equals(Rejoin(*message), expected));
}

TEST(WireParseTest, AnEmptyMessageIsAllDefaults) {
  auto message = ParseAttendRequest(grpc::ByteBuffer());
  ASSERT_TRUE(message.ok()) << message.status();
  EXPECT_EQ(message->header.ByteSizeLong(), 0u);
  EXPECT_FALSE(message->header.has_q());
}

TEST(WireParseTest, EveryTruncationEndsInAnErrorOrInWhatTheGeneratedParserSees) {
  std::mt19937 random(5);
  const std::string bytes = SampleRequest(&random).SerializeAsString();
  int refused = 0;
  for (size_t length = 0; length < bytes.size(); ++length) {
    const std::string cut = bytes.substr(0, length);
    v1::AttendRequest expected;
    const bool accepted = expected.ParseFromString(cut);
    auto message = ParseAttendRequest(CutIntoSlices(cut, 50, &random));
    ASSERT_EQ(message.ok(), accepted) << "cut to " << length << ": " << message.status();
    if (accepted) {
      EXPECT_TRUE(MessageDifferencer::Equals(Rejoin(*message), expected)) << length;
    } else {
      ++refused;
      EXPECT_EQ(message.status().code(), absl::StatusCode::kInvalidArgument);
      EXPECT_NE(message.status().message().find("at byte"), absl::string_view::npos);
    }
  }
  EXPECT_GT(refused, static_cast<int>(bytes.size()) / 2);
}

// Flips, overwrites, drops or duplicates a few bytes.
std::string Mutate(std::string bytes, std::mt19937* random) {
  const int edits = 1 + static_cast<int>((*random)() % 4);
  for (int i = 0; i < edits && !bytes.empty(); ++i) {
    // Half of the edits go to the fields before the first payload, where the structure is.
    const size_t reach = (*random)() % 2 == 0 ? bytes.size() : std::min<size_t>(bytes.size(), 120);
    const size_t at = (*random)() % reach;
    switch ((*random)() % 4) {
      case 0:
        bytes[at] = static_cast<char>(bytes[at] ^ (1 << ((*random)() % 8)));
        break;
      case 1:
        bytes[at] = static_cast<char>((*random)());
        break;
      case 2:
        bytes.erase(at, 1 + (*random)() % 8);
        break;
      default:
        bytes.insert(at, bytes.substr(at, (*random)() % 16));
    }
  }
  return bytes;
}

TEST(WireParseTest, MutatedMessagesNeverCrashAndNeverMeanSomethingElse) {
  const google::protobuf::LogSilencer quiet;  // It reports every broken string on stderr.
  std::mt19937 random(6);
  const std::string bytes = SampleRequest(&random).SerializeAsString();
  int accepted_count = 0, refused_count = 0;
  for (int round = 0; round < 20000; ++round) {
    const std::string mutated = Mutate(bytes, &random);
    v1::AttendRequest expected;
    const bool accepted = expected.ParseFromString(mutated);
    auto message = ParseAttendRequest(CutIntoSlices(mutated, 300, &random));
    if (!message.ok()) {
      EXPECT_EQ(message.status().code(), absl::StatusCode::kInvalidArgument);
      const bool group = message.status().message().find("group") != absl::string_view::npos;
      EXPECT_TRUE(group || !accepted) << "round " << round << ": " << message.status();
    } else if (accepted) {
      // Both keep unknown fields, whose order between known ones is not ours to keep.
      expected.DiscardUnknownFields();
      v1::AttendRequest joined = Rejoin(*message);
      joined.DiscardUnknownFields();
      ASSERT_EQ(joined.SerializeAsString(), expected.SerializeAsString()) << "round " << round;
    }
    ++(message.ok() ? accepted_count : refused_count);
  }
  EXPECT_GT(accepted_count, 1000);
  EXPECT_GT(refused_count, 1000);
}

std::string Join(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string flat;
  for (const grpc::Slice& slice : slices) {
    flat.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return flat;
}

TEST(WireReplyTest, ReadsBackAsTheGeneratedMessage) {
  std::mt19937 random(7);
  const std::string o = RandomBytes(256, &random), lse = RandomBytes(32, &random);
  v1::AttendResponse header;
  header.set_request_id(9);
  header.add_sequences()->set_kv_len(41);
  header.mutable_stage_times()->set_scan(1e-4);
  const ReplyTensor o_tensor{v1::DATA_TYPE_BF16, {1, 2, 64}, {grpc::Slice(o)}};
  const ReplyTensor lse_tensor{
      v1::DATA_TYPE_FP32, {4, 2}, {grpc::Slice(lse.data(), 12), grpc::Slice(lse.data() + 12, 20)}};
  v1::AttendResponse expected = header;
  expected.mutable_o()->set_dtype(v1::DATA_TYPE_BF16);
  for (const int64_t size : o_tensor.shape) expected.mutable_o()->add_shape(size);
  expected.mutable_o()->set_data(o);
  v1::AttendResponse only_o = expected;
  expected.mutable_lse()->set_dtype(v1::DATA_TYPE_FP32);
  for (const int64_t size : lse_tensor.shape) expected.mutable_lse()->add_shape(size);
  expected.mutable_lse()->set_data(lse);

  v1::AttendResponse read;
  ASSERT_TRUE(read.ParseFromString(Join(BuildAttendReply(header, &o_tensor, &lse_tensor))));
  EXPECT_TRUE(MessageDifferencer::Equals(read, expected));
  ASSERT_TRUE(read.ParseFromString(Join(BuildAttendReply(header, &o_tensor, nullptr))));
  EXPECT_TRUE(MessageDifferencer::Equals(read, only_o));
  ASSERT_TRUE(read.ParseFromString(Join(BuildAttendReply(header, nullptr, nullptr))));
  EXPECT_TRUE(MessageDifferencer::Equals(read, header));
}

TEST(WireReplyTest, SharedBytesKeepTheirOwnerUntilTheReplyIsGone) {
  auto owner = std::make_shared<std::vector<std::byte>>(1000, std::byte{0x5a});
  const std::weak_ptr<void> watch = owner;
  {
    const ReplyTensor o{v1::DATA_TYPE_FP32, {250}, {ShareBytes(owner, *owner)}};
    const grpc::ByteBuffer reply = BuildAttendReply(v1::AttendResponse(), &o, nullptr);
    owner.reset();
    EXPECT_FALSE(watch.expired());
    v1::AttendResponse read;
    ASSERT_TRUE(read.ParseFromString(Join(reply)));
    EXPECT_EQ(read.o().data(), std::string(1000, 0x5a));
  }
  EXPECT_TRUE(watch.expired());
}

}  // namespace
}  // namespace adaattn

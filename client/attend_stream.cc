#include "client/attend_stream.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/connection.h"
#include "client/convert.h"
#include "client/stream_call.h"

namespace adaattn::client {

// A message and, behind kv_follows, its second part; kept until answered, to be sent again.
struct PendingStep {
  uint64_t request_id = 0;
  bool wants_key_value = false;
  std::vector<std::shared_ptr<const v1::AttendRequest>> messages;
};

namespace {

StreamOptions Complete(StreamOptions options, const ClientOptions& client) {
  if (options.answer_timeout <= absl::ZeroDuration()) options.answer_timeout = client.deadline;
  options.max_unanswered = std::max(1, options.max_unanswered);
  return options;
}

}  // namespace

AttendStream::AttendStream(std::shared_ptr<Connection> connection, StreamOptions options)
    : connection_(std::move(connection)),
      options_(Complete(std::move(options), connection_->options())),
      call_(StreamCall::Start(connection_.get(), options_.route_key)) {}

AttendStream::~AttendStream() = default;

absl::StatusOr<uint64_t> AttendStream::Send(const AttendInput& input) {
  return SendMessage(input, /*kv_follows=*/false);
}

absl::StatusOr<uint64_t> AttendStream::SendQuery(const AttendInput& input) {
  AttendInput query = input;
  query.k = query.v = TensorView();
  return SendMessage(query, /*kv_follows=*/true);
}

absl::StatusOr<uint64_t> AttendStream::SendMessage(const AttendInput& input, bool kv_follows) {
  auto message = std::make_shared<v1::AttendRequest>();
  ToProto(input, message.get());
  message->set_kv_follows(kv_follows);
  absl::MutexLock lock(&mutex_);
  if (!status_.ok()) return status_;
  if (unanswered_.size() >= static_cast<size_t>(options_.max_unanswered)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("max_unanswered ", options_.max_unanswered, ": receive answers first"));
  }
  message->set_request_id(++last_request_id_);
  auto pending = std::make_unique<PendingStep>();
  pending->request_id = last_request_id_;
  pending->wants_key_value = kv_follows;
  pending->messages.push_back(message);
  unanswered_.push_back(std::move(pending));
  call_->Write(std::move(message));
  return last_request_id_;
}

absl::Status AttendStream::SendKeyValue(uint64_t request_id, const TensorView& k,
                                        const TensorView& v) {
  auto message = std::make_shared<v1::AttendRequest>();
  message->set_request_id(request_id);
  ToProto(k, message->mutable_k());
  ToProto(v, message->mutable_v());
  absl::MutexLock lock(&mutex_);
  if (!status_.ok()) return status_;
  const auto found = std::find_if(unanswered_.begin(), unanswered_.end(), [&](const auto& pending) {
    return pending->request_id == request_id;
  });
  if (found == unanswered_.end() || !(*found)->wants_key_value) {
    return absl::FailedPreconditionError(
        absl::StrCat("request_id ", request_id, ": no query waits for its k and v"));
  }
  (*found)->wants_key_value = false;
  (*found)->messages.push_back(message);
  call_->Write(std::move(message));
  return absl::OkStatus();
}

absl::StatusOr<StreamAnswer> AttendStream::Receive() {
  RetryState retry(connection_->options().retry, RetryRule::kRepeatable);
  while (true) {
    std::shared_ptr<StreamCall> call;
    uint64_t expected = 0;
    {
      absl::MutexLock lock(&mutex_);
      if (!status_.ok()) return status_;
      if (unanswered_.empty()) {
        return absl::FailedPreconditionError("nothing is unanswered on this stream");
      }
      call = call_;
      expected = unanswered_.front()->request_id;
    }
    v1::AttendResponse response;
    absl::Status status = call->Read(absl::Now() + options_.answer_timeout, &response);
    if (status.ok() && response.request_id() == expected) {
      absl::MutexLock lock(&mutex_);
      unanswered_.pop_front();
      return StreamAnswer{expected, FromCode(response.code(), response.message()),
                          FromProto(&response)};
    }
    if (status.ok()) {
      status = absl::InternalError(
          absl::StrCat("request_id ", response.request_id(), " answered, expected ", expected));
    }
    const auto wait = retry.Next(status, absl::ZeroDuration());
    if (!wait) {
      absl::MutexLock lock(&mutex_);
      status_ = status;
      return status;
    }
    call.reset();
    Restart(*wait);
  }
}

void AttendStream::Restart(absl::Duration wait) {
  SleepBetween(connection_->options().retry, wait);
  absl::MutexLock lock(&mutex_);
  call_ = StreamCall::Start(connection_.get(), options_.route_key);
  for (const auto& pending : unanswered_) {
    for (const auto& message : pending->messages) call_->Write(message);
  }
}

absl::StatusOr<AttendOutput> AttendStream::Attend(const AttendInput& input) {
  RetryState retry(connection_->options().retry, RetryRule::kRepeatable);
  while (true) {
    absl::StatusOr<uint64_t> request_id = Send(input);
    if (!request_id.ok()) return request_id.status();
    absl::StatusOr<StreamAnswer> answer = Receive();
    if (!answer.ok()) return answer.status();
    absl::Status status = answer->status;
    const auto& sequences = answer->output.sequences;
    if (status.ok() && sequences.size() == 1) status = sequences[0].status;
    if (status.ok()) return std::move(answer->output);
    const auto wait = retry.Next(status, answer->output.retry_after);
    if (!wait && answer->status.ok()) return std::move(answer->output);
    if (!wait) return status;
    SleepBetween(connection_->options().retry, *wait);
  }
}

absl::Status AttendStream::Finish() {
  std::shared_ptr<StreamCall> call;
  {
    absl::MutexLock lock(&mutex_);
    if (!status_.ok()) return status_;
    if (!unanswered_.empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat(unanswered_.size(), " messages are unanswered"));
    }
    status_ = absl::FailedPreconditionError("the stream is finished");
    call = call_;
  }
  call->HalfClose();
  return call->WaitDone(absl::Now() + options_.answer_timeout);
}

}  // namespace adaattn::client

#include "client/stream_call.h"

#include <utility>

#include "client/connection.h"
#include "client/convert.h"

namespace adaattn::client {

std::shared_ptr<StreamCall> StreamCall::Start(Connection* connection,
                                              const std::string& route_key) {
  std::shared_ptr<StreamCall> call(new StreamCall);
  connection->Prepare(&call->context_, route_key, absl::InfiniteDuration());
  absl::MutexLock lock(&call->mutex_);
  connection->NextStub()->async()->AttendStream(&call->context_, call.get());
  call->AddHold();  // writes start outside of reactions
  call->StartRead(&call->incoming_);
  call->StartCall();
  return call;
}

StreamCall::~StreamCall() {
  Cancel();
  HalfClose();  // no more writes: lets a cancelled call end
  (void)WaitDone(absl::InfiniteFuture());
  absl::MutexLock lock(&mutex_);  // OnDone may still be unlocking
}

void StreamCall::Write(std::shared_ptr<const v1::AttendRequest> message) {
  absl::MutexLock lock(&mutex_);
  if (!held_) return;
  outgoing_.push_back(std::move(message));
  if (!writing_) WriteNext();
}

void StreamCall::HalfClose() {
  absl::MutexLock lock(&mutex_);
  if (!held_ || half_close_) return;
  half_close_ = true;
  if (!writing_) WriteNext();
}

void StreamCall::Cancel() { context_.TryCancel(); }

// The message that is being written stays at the front until OnWriteDone.
void StreamCall::WriteNext() {
  if (!outgoing_.empty()) {
    writing_ = true;
    StartWrite(outgoing_.front().get());
  } else if (half_close_) {
    StartWritesDone();
    ReleaseHold();
  }
}

void StreamCall::ReleaseHold() {
  if (!held_) return;
  held_ = false;
  RemoveHold();
}

void StreamCall::OnWriteDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  writing_ = false;
  outgoing_.pop_front();
  if (ok && held_) WriteNext();
}

void StreamCall::OnReadDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  if (!ok) {
    ReleaseHold();
    return;
  }
  answers_.push_back(std::move(incoming_));
  incoming_.Clear();
  StartRead(&incoming_);
}

void StreamCall::OnDone(const grpc::Status& status) {
  absl::MutexLock lock(&mutex_);
  status_ = FromGrpc(status);
  done_ = true;
}

absl::Status StreamCall::Read(absl::Time deadline, v1::AttendResponse* answer) {
  absl::MutexLock lock(&mutex_);
  const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !answers_.empty() || done_;
  };
  if (!mutex_.AwaitWithDeadline(absl::Condition(&ready), deadline)) {
    return absl::DeadlineExceededError("no answer on the stream in time");
  }
  if (answers_.empty()) {
    return status_.ok() ? absl::UnavailableError("the server ended the stream") : status_;
  }
  *answer = std::move(answers_.front());
  answers_.pop_front();
  return absl::OkStatus();
}

absl::Status StreamCall::WaitDone(absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  if (!mutex_.AwaitWithDeadline(absl::Condition(&done_), deadline)) {
    return absl::DeadlineExceededError("the stream did not end in time");
  }
  return status_;
}

}  // namespace adaattn::client

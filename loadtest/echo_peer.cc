#include "loadtest/echo_peer.h"

#include <fcntl.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"

extern char** environ;

namespace adaattn {
namespace {

constexpr absl::Duration kAnswerDeadline = absl::Seconds(30);

// Answers every message with `answer_bytes` bytes.
class EchoReactor final : public grpc::ServerGenericBidiReactor {
 public:
  explicit EchoReactor(const grpc::ByteBuffer& answer) : answer_(answer) { StartRead(&incoming_); }

  void OnReadDone(bool ok) override {
    if (!ok) return Finish(grpc::Status::OK);
    outgoing_ = answer_;
    StartWrite(&outgoing_);
  }
  void OnWriteDone(bool ok) override {
    if (!ok) return Finish(grpc::Status::CANCELLED);
    StartRead(&incoming_);
  }
  void OnDone() override { delete this; }

 private:
  const grpc::ByteBuffer answer_;
  grpc::ByteBuffer incoming_, outgoing_;
};

class EchoService final : public grpc::CallbackGenericService {
 public:
  explicit EchoService(size_t answer_bytes) {
    const grpc::Slice slice(std::string(answer_bytes, 'e'));
    answer_ = grpc::ByteBuffer(&slice, 1);
  }
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext*) override {
    return new EchoReactor(answer_);
  }

 private:
  grpc::ByteBuffer answer_;
};

}  // namespace

int RunEchoServer(const std::string& address, size_t answer_bytes) {
  EchoService service(answer_bytes);
  grpc::ServerBuilder builder;
  builder.AddListeningPort(address, grpc::InsecureServerCredentials());
  builder.RegisterCallbackGenericService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  char byte = 0;
  while (read(STDIN_FILENO, &byte, 1) > 0) {
  }
  server->Shutdown(std::chrono::system_clock::now());
  return 0;
}

absl::StatusOr<std::unique_ptr<Child>> Child::Start(const std::vector<std::string>& command) {
  int pipe_ends[2];
  if (pipe2(pipe_ends, O_CLOEXEC) != 0) return absl::InternalError("pipe2 failed");
  std::vector<char*> arguments;
  arguments.reserve(command.size() + 1);
  for (const std::string& word : command) arguments.push_back(const_cast<char*>(word.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, pipe_ends[0], STDIN_FILENO);
  posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t pid = 0;
  const int error = posix_spawn(&pid, arguments[0], &actions, nullptr, arguments.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  close(pipe_ends[0]);
  if (error != 0) {
    close(pipe_ends[1]);
    return absl::NotFoundError(absl::StrCat(command[0], ": cannot be started"));
  }
  return std::unique_ptr<Child>(new Child(pid, pipe_ends[1]));
}

Child::~Child() {
  close(stdin_);
  kill(pid_, SIGTERM);
  (void)waitpid(pid_, nullptr, 0);
}

SocketFolder::SocketFolder() {
  const char* parent = std::getenv("TMPDIR");
  path_ = absl::StrCat(parent != nullptr ? parent : "/tmp", "/adaattn-echo-XXXXXX");
  if (mkdtemp(path_.data()) == nullptr) path_.clear();
}

SocketFolder::~SocketFolder() {
  for (const char* name : {"echo", "server"}) (void)unlink(Path(name).c_str());
  (void)rmdir(path_.c_str());
}

std::string SocketFolder::Path(const std::string& name) const {
  return absl::StrCat(path_, "/", name);
}

grpc::ByteBuffer ToBuffer(const std::string& bytes) {
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

std::string ToString(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  std::string bytes;
  if (!buffer.Dump(&slices).ok()) return bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

RawStream::RawStream(const std::string& address, const std::string& method)
    : stub_(grpc::CreateChannel(address, grpc::InsecureChannelCredentials())) {
  context_.set_wait_for_ready(true);
  context_.AddMetadata("adaattn-route", "echo-bench");
  stub_.PrepareBidiStreamingCall(&context_, method, grpc::StubOptions(), this);
  AddHold();  // operations start outside of reactions
  StartCall();
}

RawStream::~RawStream() {
  context_.TryCancel();
  RemoveHold();
  absl::MutexLock lock(&mutex_);
  mutex_.Await(absl::Condition(&done_));
}

absl::StatusOr<grpc::ByteBuffer> RawStream::RoundTrip(const grpc::ByteBuffer& request) {
  outgoing_ = request;
  {
    absl::MutexLock lock(&mutex_);
    pending_ = 2;
  }
  StartRead(&incoming_);
  StartWrite(&outgoing_);
  absl::MutexLock lock(&mutex_);
  const auto complete = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return pending_ == 0; };
  if (!mutex_.AwaitWithTimeout(absl::Condition(&complete), kAnswerDeadline) || !ok_) {
    return absl::UnavailableError("no answer on the stream");
  }
  return std::move(incoming_);
}

void RawStream::OnReadDone(bool ok) { Complete(ok); }
void RawStream::OnWriteDone(bool ok) { Complete(ok); }

void RawStream::Complete(bool ok) {
  absl::MutexLock lock(&mutex_);
  ok_ = ok_ && ok;
  --pending_;
}

void RawStream::OnDone(const grpc::Status&) {
  absl::MutexLock lock(&mutex_);
  done_ = true;
}

}  // namespace adaattn

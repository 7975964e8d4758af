#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "absl/time/clock.h"
#include "tests/integration/server_fixture.h"

namespace adaattn {
namespace {

using ::testing::HasSubstr;

// adaattn-server as a process of its own; its stderr goes to a file.
class Process {
 public:
  explicit Process(std::vector<std::string> args) {
    const char* binary = std::getenv("ADAATTN_TEST_SERVER");
    args.insert(args.begin(), binary == nullptr ? ADAATTN_SERVER_BINARY : binary);
    std::vector<char*> argv;
    argv.reserve(args.size() + 1);
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    const std::string out = dir_.File("stdout"), err = dir_.File("stderr");
    pid_ = fork();
    if (pid_ != 0) return;
    dup2(open(out.c_str(), O_CREAT | O_WRONLY, 0600), STDOUT_FILENO);
    dup2(open(err.c_str(), O_CREAT | O_WRONLY, 0600), STDERR_FILENO);
    execv(argv[0], argv.data());
    _exit(127);
  }
  ~Process() {
    if (running_) {
      kill(pid_, SIGKILL);
      Wait();
    }
  }

  void Signal(int signal) const { kill(pid_, signal); }
  // The exit code; -1 when a signal ended it.
  int Wait() {
    int status = 0;
    waitpid(pid_, &status, 0);
    running_ = false;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }
  bool Exited() {
    int status = 0;
    running_ = running_ && waitpid(pid_, &status, WNOHANG) == 0;
    return !running_;
  }
  std::string Stdout() const { return Read("stdout"); }
  std::string Stderr() const { return Read("stderr"); }

 private:
  std::string Read(const std::string& name) const {
    std::ifstream file(dir_.File(name));
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
  }

  TempDir dir_;
  pid_t pid_ = -1;
  bool running_ = true;
};

class ProcessTest : public ::testing::Test {
 protected:
  std::vector<std::string> Flags(std::vector<std::string> more) const {
    std::vector<std::string> flags = {"--listen=127.0.0.1:0",
                                      "--metrics-listen=127.0.0.1:0",
                                      "--backend=" + TestBackend(),
                                      "--pool-bytes=16MiB",
                                      "--max-batch-q-bytes=1MiB",
                                      "--max-batch-kv-bytes=1MiB",
                                      "--threads=1",
                                      "--port-file=" + dir_.File("ports.json"),
                                      "--unix-socket=" + dir_.File("s.sock")};
    flags.insert(flags.end(), more.begin(), more.end());
    return flags;
  }
  // Waits for the port file; the test's own timeout bounds it.
  nlohmann::json Addresses(Process* process) const {
    while (!std::filesystem::exists(dir_.File("ports.json"))) {
      if (process->Exited()) {
        ADD_FAILURE() << "the server ended: " << process->Stderr();
        return {};
      }
      absl::SleepFor(absl::Milliseconds(5));
    }
    std::ifstream file(dir_.File("ports.json"));
    return nlohmann::json::parse(file);
  }
  static int MetricsPort(const nlohmann::json& addresses) {
    const std::string address = addresses["metrics"];
    return std::stoi(address.substr(address.rfind(':') + 1));
  }
  static v1::OpenSessionRequest OpenRequest() {
    v1::OpenSessionRequest request;
    request.mutable_model()->set_num_layers(1);
    request.mutable_model()->set_num_q_heads(2);
    request.mutable_model()->set_num_kv_heads(1);
    request.mutable_model()->set_head_dim(64);
    return request;
  }

  TempDir dir_;
};

TEST_F(ProcessTest, ServesTcpAndUnixAndDrainsWithAStreamOpen) {
  Process process(Flags({"--drain-pause=300ms", "--drain-deadline=20s"}));
  const auto addresses = Addresses(&process);
  ASSERT_FALSE(addresses.is_null());
  const std::string targets[] = {addresses["grpc"], "unix:" + addresses["unix"].get<std::string>()};
  std::unique_ptr<v1::Attention::Stub> stub;
  v1::OpenSessionResponse session;
  for (const std::string& target : targets) {
    stub = v1::Attention::NewStub(grpc::CreateChannel(target, grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    const grpc::Status status = stub->OpenSession(&context, OpenRequest(), &session);
    ASSERT_TRUE(status.ok()) << target << ": " << status.error_message();
  }
  grpc::ClientContext stream_context;
  auto stream = stub->AttendStream(&stream_context);
  const auto step = [&](int64_t position) {
    v1::AttendRequest request;
    v1::SequenceInput* sequence = request.add_sequences();
    sequence->set_session_id(session.session_id());
    sequence->set_epoch(session.epoch());
    sequence->set_position(position);
    sequence->set_append_len(1);
    sequence->set_q_len(1);
    sequence->set_step_id(static_cast<uint64_t>(position) + 1);
    *request.mutable_q() = F32Tensor(RandomFloats(128, 1), {1, 2, 64});
    *request.mutable_k() = F32Tensor(RandomFloats(64, 2), {1, 1, 64});
    *request.mutable_v() = F32Tensor(RandomFloats(64, 3), {1, 1, 64});
    v1::AttendResponse response;
    return stream->Write(request) && stream->Read(&response) && response.code() == 0 &&
           response.sequences(0).code() == 0;
  };
  EXPECT_TRUE(step(0));
  EXPECT_EQ(HttpGet(MetricsPort(addresses), "/readyz").status, 200);

  process.Signal(SIGTERM);
  while (HttpGet(MetricsPort(addresses), "/readyz").status == 200) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  // Draining: no new session, but the open stream goes on, during the pause and after it.
  grpc::ClientContext refused;
  const grpc::Status status = stub->OpenSession(&refused, OpenRequest(), &session);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
  EXPECT_TRUE(step(1));
  absl::SleepFor(absl::Milliseconds(400));  // Past the pause: GOAWAY has been sent.
  EXPECT_TRUE(step(2));
  stream->WritesDone();
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_EQ(process.Wait(), 0) << process.Stderr();
  EXPECT_FALSE(std::filesystem::exists(dir_.File("s.sock")));
  // Every line of the log is JSON with its fixed fields.
  std::istringstream lines(process.Stderr());
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) {
    const auto parsed = nlohmann::json::parse(line, nullptr, false);
    ASSERT_TRUE(parsed.is_object()) << line;
    EXPECT_TRUE(parsed.contains("ts") && parsed.contains("level") && parsed.contains("msg"));
  }
  EXPECT_GE(count, 3);
}

TEST_F(ProcessTest, ASecondSignalHurries) {
  Process process(Flags({"--drain-pause=1h", "--drain-deadline=1h"}));
  const auto addresses = Addresses(&process);
  ASSERT_FALSE(addresses.is_null());
  auto stub = v1::Attention::NewStub(grpc::CreateChannel(addresses["grpc"].get<std::string>(),
                                                         grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  auto stream = stub->AttendStream(&context);
  ASSERT_TRUE(stream->Write(v1::AttendRequest()));
  v1::AttendResponse response;
  ASSERT_TRUE(stream->Read(&response));
  process.Signal(SIGTERM);
  while (HttpGet(MetricsPort(addresses), "/readyz").status == 200) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  process.Signal(SIGTERM);
  EXPECT_EQ(process.Wait(), 0) << process.Stderr();
  EXPECT_FALSE(stream->Finish().ok()) << "the open stream was cut";
}

TEST_F(ProcessTest, BadSettingsEndItBeforeAnythingListens) {
  const auto refuse = [this](const std::vector<std::string>& flags, const std::string& part) {
    Process process(Flags(flags));
    EXPECT_NE(process.Wait(), 0) << part;
    EXPECT_THAT(process.Stderr(), HasSubstr(part));
    EXPECT_FALSE(std::filesystem::exists(dir_.File("ports.json")));
  };
  refuse({"--max-sessions=none"}, "max-sessions");
  refuse({"--listen=127.0.0.1:7999", "--metrics-listen=127.0.0.1:7999"}, "listen and metrics");
  refuse({"--unknown"}, "--unknown");
  refuse({"--config=/no/such/file"}, "/no/such/file");
  refuse({"--tls-cert=/no/cert", "--tls-key=/no/key"}, "tls-cert");
  const std::string text = dir_.File("text");
  std::ofstream(text) << "no certificate\n";
  refuse({"--tls-cert=" + text, "--tls-key=" + text}, "setting tls-cert");
  std::ofstream(dir_.File("config.json")) << R"({"max-sesions": 3})";
  refuse({"--config=" + dir_.File("config.json")}, "max-sesions");
  refuse({"--port-file=/proc/ports.json"}, "setting port-file");
  refuse({"--unix-socket=/no/such/folder/s.sock"}, "setting unix-socket");
  refuse({"--trace-endpoint=https://collector/v1/traces"}, "setting trace-endpoint");
  refuse({"--listen=no.such.host.invalid:7999"}, "setting listen");
}

TEST_F(ProcessTest, APortThatIsTakenIsNamedBeforeAnythingElseListens) {
  auto taken = HttpServer::Start("127.0.0.1:0", {});
  ASSERT_TRUE(taken.ok()) << taken.status();
  const std::string address = absl::StrCat("127.0.0.1:", (*taken)->port());
  for (const char* setting : {"listen", "metrics-listen", "admin-listen"}) {
    Process process(Flags({absl::StrCat("--", setting, "=", address)}));
    EXPECT_NE(process.Wait(), 0) << setting;
    EXPECT_THAT(process.Stderr(), HasSubstr(absl::StrCat("setting ", setting)));
    EXPECT_THAT(process.Stderr(), HasSubstr(address));
    EXPECT_FALSE(std::filesystem::exists(dir_.File("s.sock"))) << "nothing listened";
  }
}

TEST_F(ProcessTest, PrintsItsMetricsAndItsConfig) {
  Process metrics({"--print-metrics"});
  EXPECT_EQ(metrics.Wait(), 0);
  EXPECT_GT(nlohmann::json::parse(metrics.Stdout()).size(), 30u);
  Process config({"--print-config", "--max-sessions=12"});
  EXPECT_EQ(config.Wait(), 0);
  EXPECT_EQ(nlohmann::json::parse(config.Stdout())["max-sessions"], 12);
}

}  // namespace
}  // namespace adaattn

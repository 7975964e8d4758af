// adaattn-echo-bench: what an Attend with almost nothing to do costs beside a bare gRPC echo.
//
// Starts two processes, an echo server (gRPC callback API, bidirectional stream of raw bytes) and
// adaattn-server, each on a Unix socket of its own, and times closed-loop round trips over one
// stream to each, in turns, with the same raw client. The echo receives the very bytes of the
// AttendRequest and answers with as many as the AttendResponse has. A third row is the same Attend
// through the client library.

#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "adaattn/v1/attention.pb.h"
#include "client/cli_args.h"
#include "client/client.h"
#include "client/replay.h"
#include "loadtest/echo_peer.h"
#include "nlohmann/json.hpp"

namespace adaattn {
namespace {

using client::Args;
using client::Flag;

constexpr double kMaxRatio = 3;
constexpr char kAttendMethod[] = "/adaattn.v1.Attention/AttendStream";
constexpr char kEchoMethod[] = "/adaattn.bench.Echo/Stream";
constexpr int kQHeads = 8, kKvHeads = 2, kHeadDim = 64;
constexpr int64_t kRounds = 10;  // the three take turns, so that noise meets all of them

struct Timings {
  std::vector<double> echo_us, attend_us, library_us;
};

absl::Status TimeRaw(RawStream* stream, const grpc::ByteBuffer& request, int64_t count,
                     std::vector<double>* samples) {
  for (int64_t i = 0; i < count; ++i) {
    const absl::Time start = absl::Now();
    absl::StatusOr<grpc::ByteBuffer> answer = stream->RoundTrip(request);
    if (!answer.ok()) return answer.status();
    samples->push_back(absl::ToDoubleMicroseconds(absl::Now() - start));
  }
  return absl::OkStatus();
}

absl::Status TimeLibrary(client::AttendStream* stream, const client::AttendInput& input,
                         int64_t count, std::vector<double>* samples) {
  for (int64_t i = 0; i < count; ++i) {
    const absl::Time start = absl::Now();
    const absl::StatusOr<client::AttendOutput> output = stream->Attend(input);
    if (!output.ok()) return output.status();
    samples->push_back(absl::ToDoubleMicroseconds(absl::Now() - start));
  }
  return absl::OkStatus();
}

// A session with one token, which every timed step attends without appending: each is the same
// message.
struct Subject {
  std::unique_ptr<client::Client> client;
  std::unique_ptr<client::Session> session;
  std::vector<uint16_t> q = std::vector<uint16_t>(kQHeads * kHeadDim, 0x3f80);  // BF16 1
  std::vector<uint16_t> kv = std::vector<uint16_t>(kKvHeads * kHeadDim, 0x3f80);

  client::AttendInput Input() const {
    client::AttendInput input;
    input.sequences.push_back(session->NextStep(0, /*append_len=*/0, /*q_len=*/1));
    input.q = client::MakeView<uint16_t>(client::DType::kBf16, {1, kQHeads, kHeadDim}, q);
    return input;
  }

  std::string Message() const {
    const client::AttendInput input = Input();
    v1::AttendRequest request;
    v1::SequenceInput* sequence = request.add_sequences();
    sequence->set_session_id(input.sequences[0].session.session_id);
    sequence->set_epoch(input.sequences[0].session.epoch);
    sequence->set_position(input.sequences[0].position);
    sequence->set_step_id(input.sequences[0].step_id);
    sequence->set_q_len(1);
    request.set_request_id(1);
    request.mutable_q()->set_dtype(v1::DATA_TYPE_BF16);
    for (int64_t dimension : input.q.shape) request.mutable_q()->add_shape(dimension);
    request.mutable_q()->set_data(input.q.data.data(), input.q.data.size());
    return request.SerializeAsString();
  }
};

absl::StatusOr<Subject> OpenSubject(const std::string& address) {
  Subject subject;
  client::ClientOptions options;
  options.address = address;
  options.route_key = "echo-bench";
  options.retry.max_attempts = 100;  // the server is starting
  options.retry.max_backoff = absl::Milliseconds(200);
  auto client = client::Client::Create(options);
  if (!client.ok()) return client.status();
  subject.client = *std::move(client);
  client::SessionOptions session_options;
  session_options.model = {1, kQHeads, kKvHeads, kHeadDim, 0};
  session_options.page_format = client::PageFormat::kBf16;
  auto session = subject.client->OpenSession(session_options);
  if (!session.ok()) return session.status();
  subject.session = *std::move(session);
  client::Step step;
  step.append_len = step.q_len = 1;
  step.q = client::MakeView<uint16_t>(client::DType::kBf16, {1, kQHeads, kHeadDim}, subject.q);
  step.k = client::MakeView<uint16_t>(client::DType::kBf16, {1, kKvHeads, kHeadDim}, subject.kv);
  step.v = step.k;
  const auto output = subject.session->Attend(step);
  if (!output.ok()) return output.status();
  return subject;
}

// The sizes of a message and its answer.
struct Sizes {
  size_t request = 0, answer = 0;
};

absl::StatusOr<Timings> Measure(const std::string& self, const SocketFolder& folder,
                                const std::string& address, int64_t samples, Sizes* sizes) {
  absl::StatusOr<Subject> subject = OpenSubject(address);
  if (!subject.ok()) return subject.status();
  const grpc::ByteBuffer message = ToBuffer(subject->Message());
  RawStream attend(address, kAttendMethod);
  absl::StatusOr<grpc::ByteBuffer> answer = attend.RoundTrip(message);
  if (!answer.ok()) return answer.status();
  v1::AttendResponse response;
  if (!response.ParseFromString(ToString(*answer)) || response.code() != 0 ||
      response.sequences_size() != 1 || response.sequences(0).code() != 0) {
    return absl::InternalError(absl::StrCat("Attend failed: ", response.ShortDebugString()));
  }
  *sizes = {message.Length(), answer->Length()};
  const std::string echo_address = absl::StrCat("unix:", folder.Path("echo"));
  const auto echo_server = Child::Start({self, absl::StrCat("--serve-echo=", echo_address),
                                         absl::StrCat("--answer-bytes=", answer->Length())});
  if (!echo_server.ok()) return echo_server.status();
  RawStream echo(echo_address, kEchoMethod);
  client::StreamOptions stream_options;
  stream_options.route_key = "echo-bench";
  const auto library = subject->client->OpenStream(stream_options);
  const client::AttendInput input = subject->Input();
  Timings timings;
  for (int64_t round = 0; round <= kRounds; ++round) {
    if (round == 1) timings = Timings();  // the first was the warm-up
    const int64_t count = std::max<int64_t>(1, samples / kRounds);
    absl::Status status = TimeRaw(&echo, message, count, &timings.echo_us);
    if (status.ok()) status = TimeRaw(&attend, message, count, &timings.attend_us);
    if (status.ok()) status = TimeLibrary(library.get(), input, count, &timings.library_us);
    if (!status.ok()) return status;
  }
  return timings;
}

std::string Processor() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (absl::StartsWith(line, "model name")) return line.substr(line.find(':') + 2);
  }
  return "unknown processor";
}

std::string Machine() {
  utsname name{};
  (void)uname(&name);
  return absl::StrCat(Processor(), ", ", std::thread::hardware_concurrency(), " threads, ",
                      name.sysname, " ", name.release);
}

// Prints the result; returns the ratio of the medians, raw Attend over echo.
double Report(const Timings& timings, const Sizes& sizes, const std::string& command, bool json) {
  const client::Quantiles echo = client::ComputeQuantiles(timings.echo_us);
  const client::Quantiles attend = client::ComputeQuantiles(timings.attend_us);
  const client::Quantiles library = client::ComputeQuantiles(timings.library_us);
  const double ratio = attend.p50 / echo.p50;
  if (json) {
    const auto row = [](const client::Quantiles& q) {
      return nlohmann::ordered_json({{"p50", q.p50}, {"p99", q.p99}});
    };
    std::puts(nlohmann::ordered_json({{"machine", Machine()},
                                      {"command", command},
                                      {"commit", ADAATTN_COMMIT},
                                      {"request_bytes", sizes.request},
                                      {"answer_bytes", sizes.answer},
                                      {"samples", timings.echo_us.size()},
                                      {"echo_us", row(echo)},
                                      {"attend_us", row(attend)},
                                      {"client_library_us", row(library)},
                                      {"ratio_p50", ratio},
                                      {"ratio_p99", attend.p99 / echo.p99}})
                  .dump(2)
                  .c_str());
    return ratio;
  }
  std::printf("machine: %s\ncommand: %s\ncommit: %s\n", Machine().c_str(), command.c_str(),
              ADAATTN_COMMIT);
  std::printf("%zu bytes there, %zu back, %zu round trips each over a Unix socket stream\n\n",
              sizes.request, sizes.answer, timings.echo_us.size());
  const auto row = [&echo](const char* name, const client::Quantiles& q) {
    std::printf("%-24s p50 %7.1f us  p99 %7.1f us  %5.2f x  %5.2f x\n", name, q.p50, q.p99,
                q.p50 / echo.p50, q.p99 / echo.p99);
  };
  row("echo", echo);
  row("attend", attend);
  row("attend, client library", library);
  return ratio;
}

int Main(int argc, char** argv) {
  const std::vector<Flag> flags = {
      {"server", Flag::Type::kString, "", "adaattn-server to start; or --address"},
      {"address", Flag::Type::kString, "", "a running server, unix:path"},
      {"samples", Flag::Type::kInt, "20000", "round trips of each kind"},
      {"check", Flag::Type::kBool, "false", "exit with 1 when the medians' ratio is above 3"},
      {"json", Flag::Type::kBool, "false", "print JSON"},
      {"serve-echo", Flag::Type::kString, "", "be the echo server, on unix:path (internal)"},
      {"answer-bytes", Flag::Type::kInt, "0", "of the echo server's answers"},
  };
  const std::vector<std::string> words(argv, argv + argc);
  const auto args = Args::Parse(absl::MakeConstSpan(words).subspan(1), flags);
  const bool echo_child = args.ok() && !args->String("serve-echo").empty();
  const bool one_server =
      args.ok() && args->String("server").empty() != args->String("address").empty();
  if (!args.ok() || args->Int("samples") < 1 || args->Int("answer-bytes") < 0 ||
      (!echo_child && !one_server)) {
    std::fprintf(stderr, "%s\nusage: adaattn-echo-bench --server=PATH [--flag=value ...]\n%s",
                 std::string(args.status().message()).c_str(), FlagHelp(flags).c_str());
    return 2;
  }
  if (echo_child) {
    return RunEchoServer(args->String("serve-echo"), args->Int("answer-bytes"));
  }
  const SocketFolder folder;
  if (!folder.ok()) {
    std::fputs("no folder for the sockets\n", stderr);
    return 2;
  }
  std::string address = args->String("address");
  std::unique_ptr<Child> server;
  if (address.empty()) {
    address = absl::StrCat("unix:", folder.Path("server"));
    auto started = Child::Start({args->String("server"), "--listen=", "--metrics-listen=",
                                 absl::StrCat("--unix-socket=", folder.Path("server")),
                                 "--drain-pause=0", "--log-level=warning"});
    if (!started.ok()) {
      std::fprintf(stderr, "%s\n", started.status().ToString().c_str());
      return 2;
    }
    server = *std::move(started);
  }
  Sizes sizes;
  const auto timings = Measure("/proc/self/exe", folder, address, args->Int("samples"), &sizes);
  if (!timings.ok()) {
    std::fprintf(stderr, "%s\n", timings.status().ToString().c_str());
    return 2;
  }
  const double ratio = Report(*timings, sizes, absl::StrJoin(words, " "), args->Bool("json"));
  const bool good = ratio <= kMaxRatio;
  if (!good) std::fprintf(stderr, "MISSED: %.2f x the echo's median, at most 3\n", ratio);
  return args->Bool("check") && !good ? 1 : 0;
}

}  // namespace
}  // namespace adaattn

int main(int argc, char** argv) { return adaattn::Main(argc, argv); }

#include "server/server.h"

#include <grpcpp/ext/channelz_service_plugin.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/clock.h"
#include "server/log.h"
#include "server/policy_file.h"
#include "server/preflight.h"
#include "server/session_id.h"

namespace adaattn {
namespace {

std::string WithPort(const std::string& address, int port) {
  return absl::StrCat(address.substr(0, address.rfind(':')), ":", port);
}

// A socket file that nobody answers on is left over from a server that was killed.
absl::Status RemoveStaleSocket(const std::string& path) {
  struct stat info;
  if (lstat(path.c_str(), &info) != 0) return absl::OkStatus();
  if (!S_ISSOCK(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat("setting unix-socket: \"", path, "\" exists and is no socket"));
  }
  sockaddr_un address;
  std::memset(&address, 0, sizeof(address));
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), path.size());
  const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool alive = probe >= 0 && connect(probe, reinterpret_cast<const sockaddr*>(&address),
                                           sizeof(address)) == 0;
  if (probe >= 0) close(probe);
  if (alive) {
    return absl::UnavailableError(
        absl::StrCat("setting unix-socket: another server answers on \"", path, "\""));
  }
  unlink(path.c_str());
  return absl::OkStatus();
}

// Keeps reflection and channelz, which join every server of a process, off the public one.
class WithoutAdminServices final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->erase(std::remove_if(plugins->begin(), plugins->end(),
                                  [](const std::unique_ptr<grpc::ServerBuilderPlugin>& plugin) {
                                    return plugin->name() == "proto_server_reflection" ||
                                           plugin->name() == "channelz_service";
                                  }),
                   plugins->end());
  }
};

}  // namespace

MetricsInfo BuildInfo() {
  MetricsInfo info;
  info.version = ADAATTN_VERSION;
  info.commit = ADAATTN_COMMIT;
  info.compiler = ADAATTN_COMPILER;
  return info;
}

std::string ServerAddresses::ToJson() const {
  const nlohmann::ordered_json json = {
      {"grpc", grpc}, {"unix", unix}, {"metrics", metrics}, {"admin", admin}};
  return json.dump();
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options,
                                                      std::unique_ptr<Backend> backend) {
  absl::Status status = ValidateOptions(options);
  if (status.ok()) status = Preflight(options);
  if (!status.ok()) return status;
  std::unique_ptr<Server> server(new Server(options, std::move(backend)));
  if (!options.policy_file.empty()) {
    absl::StatusOr<ThetaModel> model = LoadPolicyFile(options.policy_file);
    if (!model.ok()) return model.status();
    server->theta_model_ = *model;
  }
  // gRPC accepts calls as soon as it listens, so what answers them comes first.
  status = server->StartBackend();
  if (status.ok()) status = server->StartHttp();
  if (status.ok()) status = server->StartGrpc();
  if (status.ok()) status = server->StartAdmin();
  if (!status.ok()) return status;
  server->SampleLive();
  server->ready_.store(true);
  server->metrics_->SetReady(true);
  return server;
}

absl::Status Server::StartBackend() {
  std::string note;
  if (backend_ == nullptr) {
    absl::StatusOr<std::unique_ptr<Backend>> backend =
        CreateBackend(options_.backend, options_.device, &note);
    if (!backend.ok()) return backend.status();
    backend_ = *std::move(backend);
  }
  const BackendInfo& device = backend_->info();
  Log(LogLevel::kInfo, "backend",
      {{"backend", device.name},
       {"device", device.device},
       {"kernels", device.kernels},
       {"pool_bytes", device.pool_bytes},
       {"exact_tier_bytes", device.exact_tier_bytes},
       {"tuning", device.tuning},
       {"note", note}});
  MetricsInfo info = BuildInfo();
  info.backend = device.name;
  info.device = device.device;
  info.kernels = device.kernels;
  metrics_ = std::make_unique<Metrics>(info);
  history_ = std::make_unique<LiveHistory>(metrics_.get(), info, absl::Now());
  SessionTableOptions sessions = options_.sessions;
  sessions.instance = MakeInstanceName();
  if (!options_.trace_endpoint.empty()) {
    absl::StatusOr<TraceEndpoint> endpoint = ParseTraceEndpoint(options_.trace_endpoint);
    if (!endpoint.ok()) return endpoint.status();
    tracer_ = std::make_unique<TraceExporter>(
        *std::move(endpoint), sessions.instance,
        [this](bool exported, int64_t spans) { metrics_->OnSpans(exported, spans); });
  }
  const Clock* clock = SystemClock::Get();
  sessions_ = std::make_unique<SessionTable>(sessions, clock);
  profiles_ = std::make_unique<ProfileStore>(options_.max_tenant_profile_bytes);
  admission_ = std::make_unique<Admission>(options_.admission);
  metrics_->SetInflightBytesSource([this] { return admission_->inflight_bytes(); });
  // In the order of Limit.
  metrics_->SetLimits({options_.engine.batcher.max_queued_tasks,
                       options_.engine.batcher.max_queued_bytes,
                       options_.admission.max_inflight_bytes, options_.sessions.max_sessions,
                       device.pool_bytes, options_.engine.seal.max_backlog_pages});
  engine_ = std::make_unique<Engine>(options_.engine, backend_.get(), sessions_.get(),
                                     metrics_.get(), clock);
  ServiceContext context;
  context.options = &options_;
  context.engine = engine_.get();
  context.sessions = sessions_.get();
  context.profiles = profiles_.get();
  context.admission = admission_.get();
  context.metrics = metrics_.get();
  context.clock = clock;
  context.streams = &streams_;
  context.tracer = tracer_.get();
  context.exemplars = &exemplars_;
  context.refuse_sessions = &refuse_sessions_;
  if (theta_model_) context.theta_model = &*theta_model_;
  context.info = info;
  service_ = std::make_unique<AttentionService>(std::move(context));
  return engine_->Start([this](const absl::Status& status) { OnDeviceLost(status); });
}

std::shared_ptr<grpc::ServerCredentials> Server::Credentials() const {
  if (options_.tls_cert.empty()) return grpc::InsecureServerCredentials();
  namespace tls = grpc::experimental;
  const auto reload = static_cast<unsigned>(absl::ToInt64Seconds(options_.tls_reload));
  auto files = options_.tls_ca.empty()
                   ? std::make_shared<tls::FileWatcherCertificateProvider>(
                         options_.tls_key, options_.tls_cert, reload)
                   : std::make_shared<tls::FileWatcherCertificateProvider>(
                         options_.tls_key, options_.tls_cert, options_.tls_ca, reload);
  tls::TlsServerCredentialsOptions settings(files);
  settings.watch_identity_key_cert_pairs();
  if (options_.tls_ca.empty()) {
    settings.set_cert_request_type(GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE);
  } else {
    settings.watch_root_certs();
    settings.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return tls::TlsServerCredentials(settings);
}

absl::Status Server::StartGrpc() {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  const auto bytes = static_cast<int>(options_.max_message_bytes);
  builder.SetMaxReceiveMessageSize(bytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options_.max_connection_streams);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_ENABLE_CHANNELZ, options_.admin_listen.empty() ? 0 : 1);
  builder.SetOption(std::make_unique<WithoutAdminServices>());
  grpc::ResourceQuota quota("adaattn");
  quota.Resize(static_cast<size_t>(options_.memory_quota_bytes));
  builder.SetResourceQuota(quota);
  const std::shared_ptr<grpc::ServerCredentials> credentials = Credentials();
  int port = 0, unix_port = 0;
  if (!options_.listen.empty()) {
    builder.AddListeningPort(options_.listen, credentials, &port);
  }
  if (!options_.unix_socket.empty()) {
    absl::Status status = RemoveStaleSocket(options_.unix_socket);
    if (!status.ok()) return status;
    builder.AddListeningPort(absl::StrCat("unix:", options_.unix_socket),
                             grpc::InsecureServerCredentials(), &unix_port);
  }
  builder.RegisterService(service_.get());
  grpc_server_ = builder.BuildAndStart();
  if (grpc_server_ == nullptr) {
    return absl::UnavailableError(absl::StrCat("settings listen, unix-socket: cannot listen on \"",
                                               options_.listen, "\" and \"", options_.unix_socket,
                                               "\""));
  }
  // The service by name, beside "" that stands for the whole server.
  grpc_server_->GetHealthCheckService()->SetServingStatus("adaattn.v1.Attention", true);
  if (!options_.listen.empty()) addresses_.grpc = WithPort(options_.listen, port);
  addresses_.unix = options_.unix_socket;
  return absl::OkStatus();
}

absl::Status Server::StartAdmin() {
  if (options_.admin_listen.empty()) return absl::OkStatus();
  grpc::channelz::experimental::InitChannelzService();
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddListeningPort(options_.admin_listen, grpc::InsecureServerCredentials(), &port);
  admin_server_ = builder.BuildAndStart();
  if (admin_server_ == nullptr) {
    return absl::UnavailableError(
        absl::StrCat("setting admin-listen: cannot listen on \"", options_.admin_listen, "\""));
  }
  addresses_.admin = WithPort(options_.admin_listen, port);
  return absl::OkStatus();
}

absl::Status Server::StartHttp() {
  if (options_.metrics_listen.empty()) return absl::OkStatus();
  absl::StatusOr<std::unique_ptr<HttpServer>> http = HttpServer::Start(
      options_.metrics_listen,
      AdminHandlers(metrics_.get(), history_.get(), &exemplars_, [this] { return ready(); }));
  if (!http.ok()) {
    return absl::Status(http.status().code(),
                        absl::StrCat("setting metrics-listen: ", http.status().message()));
  }
  http_server_ = *std::move(http);
  addresses_.metrics = WithPort(options_.metrics_listen, http_server_->port());
  return absl::OkStatus();
}

void Server::OnDeviceLost(const absl::Status& status) {
  Log(LogLevel::kError, "device lost", {{"status", status.ToString()}});
  device_lost_.store(true);
  StopAccepting();
}

void Server::StopAccepting() {
  refuse_sessions_.store(true);
  if (!ready_.exchange(false)) return;
  metrics_->SetReady(false);
  if (grpc_server_ != nullptr) grpc_server_->GetHealthCheckService()->SetServingStatus(false);
}

void Server::Drain(absl::Time deadline, const std::function<bool()>& hurry) {
  if (stopped_.exchange(true)) return;
  StopAccepting();
  std::atomic<bool> down{false};
  std::thread grpc_shutdown([this, deadline, &down] {
    // GOAWAY now; open calls go on until the deadline.
    if (grpc_server_ != nullptr) grpc_server_->Shutdown(absl::ToChronoTime(deadline));
    down.store(true);
  });
  bool cancelled = false;
  while (!down.load()) {
    if (!cancelled && (absl::Now() >= deadline || hurry())) {
      // Answers still queued would keep the calls open.
      admission_->StartDraining();
      streams_.CancelAll();
      cancelled = true;
    }
    absl::SleepFor(absl::Milliseconds(5));
  }
  grpc_shutdown.join();
  if (admin_server_ != nullptr) admin_server_->Shutdown(absl::ToChronoTime(absl::Now()));
  engine_->Stop(absl::Now() + absl::Seconds(1));
  http_server_.reset();
  if (!options_.unix_socket.empty()) unlink(options_.unix_socket.c_str());
}

Server::~Server() {
  if (engine_ == nullptr) return;
  Drain(absl::Now(), [] { return true; });
  grpc_server_.reset();
  admin_server_.reset();
  service_.reset();
  engine_.reset();
}

}  // namespace adaattn

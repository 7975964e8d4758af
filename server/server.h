#ifndef ADAATTN_SERVER_SERVER_H_
#define ADAATTN_SERVER_SERVER_H_

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "server/admin_page.h"
#include "server/attention_service.h"
#include "server/options.h"

namespace adaattn {

// Where a running server can be reached; ports are the actual ones, "" where nothing listens.
struct ServerAddresses {
  std::string grpc;     // "host:port"
  std::string unix;     // path
  std::string metrics;  // "host:port"
  std::string admin;    // "host:port"

  std::string ToJson() const;
};

// The whole server: backend, engine, services, ports. Owns everything; Drain or the destructor
// stops it in the order health, new work, open calls, gRPC, engine, backend.
//   auto server = Server::Start(options);  // ready when it returns
//   (*server)->Drain(...);
// Threads: all methods may be called from any thread; Drain from one.
class Server {
 public:
  // `backend`: null = the one that the options name. Errors: kInvalidArgument for options or
  // certificates, kUnavailable for an address that is taken, and those of CreateBackend.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options,
                                                       std::unique_ptr<Backend> backend = nullptr);
  ~Server();
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  const ServerAddresses& addresses() const { return addresses_; }
  bool ready() const { return ready_.load(); }
  Engine* engine() { return engine_.get(); }
  SessionTable* sessions() { return sessions_.get(); }
  Metrics* metrics() { return metrics_.get(); }

  // One point of the live page's history; call it once a second.
  void SampleLive() { history_->Sample(absl::Now()); }

  // The first step of a drain: health says NOT_SERVING and no session opens; all else goes on.
  void StopAccepting();
  // The rest: open calls may end until `deadline`, then are cancelled; blocks until all is down.
  // `hurry` is asked a few times a second whether to cancel them now.
  void Drain(absl::Time deadline, const std::function<bool()>& hurry);

  // Set once the device is lost: everything queued has failed, health is NOT_SERVING.
  bool device_lost() const { return device_lost_.load(); }

 private:
  Server(const ServerOptions& options, std::unique_ptr<Backend> backend)
      : options_(options), backend_(std::move(backend)) {}
  absl::Status StartBackend();
  absl::Status StartGrpc();
  absl::Status StartAdmin();
  absl::Status StartHttp();
  std::shared_ptr<grpc::ServerCredentials> Credentials() const;
  void OnDeviceLost(const absl::Status& status);

  const ServerOptions options_;
  std::optional<ThetaModel> theta_model_;  // of the policy file
  ServerAddresses addresses_;
  std::atomic<bool> ready_{false};
  std::atomic<bool> refuse_sessions_{false};
  std::atomic<bool> device_lost_{false};
  std::atomic<bool> stopped_{false};
  StreamRegistry streams_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<LiveHistory> history_;
  Exemplars exemplars_;
  std::unique_ptr<TraceExporter> tracer_;
  std::unique_ptr<SessionTable> sessions_;
  std::unique_ptr<ProfileStore> profiles_;
  std::unique_ptr<Admission> admission_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<AttentionService> service_;
  std::unique_ptr<grpc::Server> grpc_server_;
  std::unique_ptr<grpc::Server> admin_server_;
  std::unique_ptr<HttpServer> http_server_;
};

// "0.1.0", the commit and the compiler that this binary was built with.
MetricsInfo BuildInfo();

}  // namespace adaattn

#endif  // ADAATTN_SERVER_SERVER_H_

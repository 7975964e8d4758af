#ifndef ADAATTN_SERVER_CALL_H_
#define ADAATTN_SERVER_CALL_H_

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <string>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/mutex.h"
#include "server/admission.h"
#include "server/engine.h"
#include "server/metrics.h"
#include "server/openmetrics.h"
#include "server/options.h"
#include "server/profile_store.h"
#include "server/session_table.h"
#include "server/trace.h"
#include "server/validation.h"

namespace adaattn {

// Streams that are open, so that a hurried stop can end them. Threads: any.
class StreamRegistry {
 public:
  void Add(grpc::CallbackServerContext* context);
  void Remove(grpc::CallbackServerContext* context);
  void CancelAll();

 private:
  Mutex mutex_;
  absl::flat_hash_set<grpc::CallbackServerContext*> open_ ABSL_GUARDED_BY(mutex_);
};

// What every RPC needs. All outlive the gRPC server.
struct ServiceContext {
  const ServerOptions* options = nullptr;
  Engine* engine = nullptr;
  SessionTable* sessions = nullptr;
  ProfileStore* profiles = nullptr;
  Admission* admission = nullptr;
  Metrics* metrics = nullptr;
  const Clock* clock = nullptr;
  StreamRegistry* streams = nullptr;
  TraceExporter* tracer = nullptr;                     // none: no spans
  Exemplars* exemplars = nullptr;                      // set where tracer is
  const std::atomic<bool>* refuse_sessions = nullptr;  // draining: no new sessions
  const ThetaModel* theta_model = nullptr;             // of the policy file; null = none
  MetricsInfo info;

  ValidationContext validation() const { return {options, &engine->backend_info(), theta_model}; }
};

// The codes share their numbers.
grpc::Status ToGrpcStatus(const absl::Status& status);

// Tenant, client address, routing key, deadline and trace context of a call.
// Errors: kInvalidArgument for an `adaattn-route` that is no routing key.
absl::StatusOr<Caller> MakeCaller(const grpc::CallbackServerContext& context);

WireTransport TransportOf(const grpc::CallbackServerContext& context);

// Trailing metadata `adaattn-retry-after-seconds`; before Finish.
void SetRetryAfter(grpc::CallbackServerContext* context, absl::Duration retry_after);

// What a refusal should say about trying again: the engine's guess, where trying again can help.
absl::Duration RetryAfter(const ServiceContext& service, const absl::Status& status);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_CALL_H_

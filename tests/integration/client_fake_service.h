#ifndef ADAATTN_TESTS_INTEGRATION_CLIENT_FAKE_SERVICE_H_
#define ADAATTN_TESTS_INTEGRATION_CLIENT_FAKE_SERVICE_H_

// A server for tests of the client: keeps FP32 keys and values, attends in double, follows the
// append-once rule, and fails when it is told to.

#include <grpcpp/server.h>

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "adaattn/v1/attention.grpc.pb.h"

namespace adaattn::client {

// One failure, of the next Attend, stream message or import chunk.
struct Fault {
  absl::StatusCode code = absl::StatusCode::kUnavailable;
  bool after_applying = false;  // the work is done, only the answer is lost
  bool in_message = false;      // AttendStream: answered with the code; else the stream ends
  int64_t retry_after_ms = 0;   // 0 = no hint
  int32_t after = 0;            // so many more succeed before
};

class FakeService final : public v1::Attention::Service {
 public:
  void AddFault(const Fault& fault);
  int64_t length(const std::string& session_id, int32_t layer);
  size_t num_sessions();
  std::set<std::string> routes();  // seen so far
  int32_t num_attends();           // Attend calls and stream messages, faults included
  float query_sample_first();      // first element of the last query sample

  grpc::Status OpenSession(grpc::ServerContext* context, const v1::OpenSessionRequest* request,
                           v1::OpenSessionResponse* response) override;
  grpc::Status ImportKv(grpc::ServerContext* context,
                        grpc::ServerReader<v1::ImportKvRequest>* reader,
                        v1::ImportKvResponse* response) override;
  grpc::Status Attend(grpc::ServerContext* context, const v1::AttendRequest* request,
                      v1::AttendResponse* response) override;
  grpc::Status AttendStream(
      grpc::ServerContext* context,
      grpc::ServerReaderWriter<v1::AttendResponse, v1::AttendRequest>* stream) override;
  grpc::Status TruncateSession(grpc::ServerContext* context,
                               const v1::TruncateSessionRequest* request,
                               v1::TruncateSessionResponse* response) override;
  grpc::Status ForkSession(grpc::ServerContext* context, const v1::ForkSessionRequest* request,
                           v1::ForkSessionResponse* response) override;
  grpc::Status ExportKv(grpc::ServerContext* context, const v1::ExportKvRequest* request,
                        grpc::ServerWriter<v1::ExportKvResponse>* writer) override;
  grpc::Status CloseSession(grpc::ServerContext* context, const v1::CloseSessionRequest* request,
                            v1::CloseSessionResponse* response) override;
  grpc::Status KeepAlive(grpc::ServerContext* context, const v1::KeepAliveRequest* request,
                         v1::KeepAliveResponse* response) override;
  grpc::Status ListSessions(grpc::ServerContext* context, const v1::ListSessionsRequest* request,
                            v1::ListSessionsResponse* response) override;
  grpc::Status GetServerInfo(grpc::ServerContext* context, const v1::GetServerInfoRequest* request,
                             v1::GetServerInfoResponse* response) override;

 private:
  struct Layer {
    std::vector<float> k, v;  // [length, num_kv_heads, head_dim]
    int64_t length = 0;
    uint64_t last_step_id = 0;
  };
  struct Session {
    v1::OpenSessionRequest options;
    std::vector<Layer> layers;
  };

  // The fault that is due now, if any.
  bool TakeFault(Fault* fault);
  void NoteRoute(const grpc::ServerContext& context);
  absl::Status Append(Session* session, int32_t layer, int64_t position, uint64_t step_id,
                      bool is_import, int64_t tokens, const float* k, const float* v,
                      bool* replayed) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void AttendRows(const Session& session, int32_t layer, int64_t q_start, int64_t rows,
                  const float* q, std::vector<float>* o, std::vector<float>* lse)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Process(const v1::AttendRequest& request, v1::AttendResponse* response);

  absl::Mutex mutex_;
  std::map<std::string, Session> sessions_ ABSL_GUARDED_BY(mutex_);
  std::deque<Fault> faults_ ABSL_GUARDED_BY(mutex_);
  std::set<std::string> routes_ ABSL_GUARDED_BY(mutex_);
  int32_t next_id_ ABSL_GUARDED_BY(mutex_) = 0;
  int32_t num_attends_ ABSL_GUARDED_BY(mutex_) = 0;
  float query_sample_first_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Small, so that imports are cut into many chunks.
inline constexpr int64_t kMaxMessageBytes = 65536;

void SetFloats(const std::vector<float>& values, const std::vector<int64_t>& shape,
               v1::Tensor* tensor);
grpc::Status Fail(const Fault& fault, grpc::ServerContext* context);
grpc::Status NotFound();

// A FakeService listening on a Unix socket in a directory of its own.
class FakeServer {
 public:
  FakeServer();
  ~FakeServer();

  FakeService* service() { return &service_; }
  const std::string& address() const { return address_; }

 private:
  std::string directory_;
  std::string address_;
  FakeService service_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace adaattn::client

#endif  // ADAATTN_TESTS_INTEGRATION_CLIENT_FAKE_SERVICE_H_

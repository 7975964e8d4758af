#ifndef ADAATTN_SERVER_ATTENTION_SERVICE_H_
#define ADAATTN_SERVER_ATTENTION_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include "adaattn/v1/attention.grpc.pb.h"
#include "server/call.h"

namespace adaattn {

namespace internal {
// Attend and AttendStream get raw messages, everything else parsed ones.
template <class Base>
using WithParsedMethods = v1::Attention::WithCallbackMethod_OpenSession<
    v1::Attention::WithCallbackMethod_ImportKv<v1::Attention::WithCallbackMethod_TruncateSession<
        v1::Attention::WithCallbackMethod_ForkSession<v1::Attention::WithCallbackMethod_ExportKv<
            v1::Attention::WithCallbackMethod_CloseSession<
                v1::Attention::WithCallbackMethod_KeepAlive<
                    v1::Attention::WithCallbackMethod_ListSessions<
                        v1::Attention::WithCallbackMethod_UploadProfile<
                            v1::Attention::WithCallbackMethod_GetProfile<
                                v1::Attention::WithCallbackMethod_GetServerInfo<Base>>>>>>>>>>>;
}  // namespace internal

using AttentionServiceBase =
    v1::Attention::WithRawCallbackMethod_Attend<v1::Attention::WithRawCallbackMethod_AttendStream<
        internal::WithParsedMethods<v1::Attention::Service>>>;

// The RPCs of attention.proto: each parses, validates and hands over to the engine; none waits.
class AttentionService final : public AttentionServiceBase {
 public:
  explicit AttentionService(ServiceContext context) : service_(std::move(context)) {}

  grpc::ServerUnaryReactor* Attend(grpc::CallbackServerContext* context,
                                   const grpc::ByteBuffer* request,
                                   grpc::ByteBuffer* response) override;
  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* AttendStream(
      grpc::CallbackServerContext* context) override;

  grpc::ServerUnaryReactor* OpenSession(grpc::CallbackServerContext* context,
                                        const v1::OpenSessionRequest* request,
                                        v1::OpenSessionResponse* response) override;
  grpc::ServerReadReactor<v1::ImportKvRequest>* ImportKv(grpc::CallbackServerContext* context,
                                                         v1::ImportKvResponse* response) override;
  grpc::ServerUnaryReactor* TruncateSession(grpc::CallbackServerContext* context,
                                            const v1::TruncateSessionRequest* request,
                                            v1::TruncateSessionResponse* response) override;
  grpc::ServerUnaryReactor* ForkSession(grpc::CallbackServerContext* context,
                                        const v1::ForkSessionRequest* request,
                                        v1::ForkSessionResponse* response) override;
  grpc::ServerWriteReactor<v1::ExportKvResponse>* ExportKv(
      grpc::CallbackServerContext* context, const v1::ExportKvRequest* request) override;
  grpc::ServerUnaryReactor* CloseSession(grpc::CallbackServerContext* context,
                                         const v1::CloseSessionRequest* request,
                                         v1::CloseSessionResponse* response) override;
  grpc::ServerUnaryReactor* KeepAlive(grpc::CallbackServerContext* context,
                                      const v1::KeepAliveRequest* request,
                                      v1::KeepAliveResponse* response) override;
  grpc::ServerUnaryReactor* ListSessions(grpc::CallbackServerContext* context,
                                         const v1::ListSessionsRequest* request,
                                         v1::ListSessionsResponse* response) override;
  grpc::ServerUnaryReactor* UploadProfile(grpc::CallbackServerContext* context,
                                          const v1::UploadProfileRequest* request,
                                          v1::UploadProfileResponse* response) override;
  grpc::ServerUnaryReactor* GetProfile(grpc::CallbackServerContext* context,
                                       const v1::GetProfileRequest* request,
                                       v1::GetProfileResponse* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetServerInfoRequest* request,
                                          v1::GetServerInfoResponse* response) override;

 private:
  const ServiceContext service_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ATTENTION_SERVICE_H_

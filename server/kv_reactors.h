#ifndef ADAATTN_SERVER_KV_REACTORS_H_
#define ADAATTN_SERVER_KV_REACTORS_H_

#include <grpcpp/grpcpp.h>

#include "adaattn/v1/attention.pb.h"
#include "server/call.h"

namespace adaattn {

// One ImportKv call: chunks are appended as they come, a few at a time. The first error ends it.
grpc::ServerReadReactor<v1::ImportKvRequest>* NewImportReactor(grpc::CallbackServerContext* context,
                                                               const ServiceContext* service,
                                                               v1::ImportKvResponse* response);

// One ExportKv call: tokens are read back in chunks, one at a time, between the engine's batches.
grpc::ServerWriteReactor<v1::ExportKvResponse>* NewExportReactor(
    grpc::CallbackServerContext* context, const ServiceContext* service,
    const v1::ExportKvRequest* request);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_KV_REACTORS_H_

#ifndef ADAATTN_CLIENT_IMPORTER_H_
#define ADAATTN_CLIENT_IMPORTER_H_

// Chunked imports. Internal to the library.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/types.h"

namespace adaattn::client {

class Connection;

// One message of an import.
struct ImportChunk {
  int32_t layer = 0;
  int64_t position = 0;
  TensorView k, v;  // views into the caller's tensors: [1, tokens, num_kv_heads, head_dim]
};

// What is sent, in order. The caller's tensors outlive it.
struct ImportPlan {
  SessionRef session;
  int32_t first_layer = 0;
  int32_t num_layers = 1;
  std::vector<ImportChunk> chunks;  // may be empty: no tokens
  TensorView query_sample, basis_mean, basis;
  bool wait_sealed = false;
};

// Cuts `input` into chunks of whole tokens, of one layer each, whose messages stay below
// `max_message_bytes` (0 = unknown) and near 4 MiB.
//
//   lengths  [num_layers of the session]: tokens that each layer has
//
// Errors: kInvalidArgument naming the tensor.
absl::StatusOr<ImportPlan> PlanImport(const ImportInput& input, const SessionRef& session,
                                      int64_t start_position, absl::Span<const int64_t> lengths,
                                      int64_t max_message_bytes);

// Sends the plan and returns the lengths of all layers of the session. A lost connection is taken
// up again at the first chunk that was not applied, found by sending chunks one by one: a chunk
// that ends where its layer ends is ignored by the server, an earlier one refused.
absl::StatusOr<std::vector<int64_t>> RunImport(Connection* connection, const std::string& route_key,
                                               const ImportPlan& plan);

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_IMPORTER_H_

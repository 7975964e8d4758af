#include <cstdint>
#include <vector>

#include "server/options.h"

namespace adaattn {
namespace {

constexpr double kMaxBytes = 1e15;
constexpr double kMaxCount = 1e12;
constexpr double kMaxInt = 2147483647.0;
constexpr double kDay = 86400;

void AddAddresses(ServerOptions* o, std::vector<Setting>* table) {
  table->push_back(
      {"listen", &o->listen, "gRPC over TCP on host:port; port 0 takes a free one; empty = none."});
  table->push_back(
      {"unix-socket", &o->unix_socket, "gRPC over a Unix socket at this path too; empty = none."});
  table->push_back(
      {"metrics-listen", &o->metrics_listen,
       "HTTP on host:port: /metrics, /healthz, /readyz, the live page; empty = none."});
  table->push_back({"admin-listen", &o->admin_listen,
                    "gRPC reflection and channelz on host:port, only there; empty = none."});
  table->push_back(
      {"port-file", &o->port_file,
       "Where to write the addresses in use, as JSON, once serving; empty = nowhere."});
  table->push_back({"trace-endpoint", &o->trace_endpoint,
                    "Collector of OTLP/HTTP JSON spans, http://host:port/path, for calls whose "
                    "traceparent is sampled; empty = none."});
  table->push_back({"log-level",
                    &o->log_level,
                    "Least severe lines that are logged.",
                    0,
                    0,
                    {"debug", "info", "warning", "error"}});
  table->push_back({"allow-plaintext", &o->allow_plaintext,
                    "Serve without TLS on an address that is not loopback."});
  table->push_back({"tls-cert", &o->tls_cert, "PEM file: certificate chain; empty = plaintext."});
  table->push_back({"tls-key", &o->tls_key, "PEM file: private key of tls-cert."});
  table->push_back({"tls-ca", &o->tls_ca,
                    "PEM file: authorities of client certificates, then required; the tenant is "
                    "the certificate's first SAN. Empty = no client certificates, one tenant."});
  table->push_back(
      {"tls-reload", &o->tls_reload, "How often the three files are read again.", 1, kDay});
}

void AddDevice(ServerOptions* o, std::vector<Setting>* table) {
  table->push_back({"backend",
                    &o->backend,
                    "auto takes the GPU where there is one.",
                    0,
                    0,
                    {"auto", "cpu", "cuda"}});
  table->push_back({"pool-bytes", &o->device.pool_bytes,
                    "Memory for KV pages, allocated at start and never grown.", 1 << 20,
                    kMaxBytes});
  table->push_back({"exact-tier-bytes", &o->device.exact_tier_bytes,
                    "Host memory for the originals of sealed pages (exact_tier "
                    "HOST_PAGES), on top of the pool; 0 = not offered.",
                    0, kMaxBytes});
  table->push_back(
      {"threads", &o->device.num_threads, "Threads of the cpu backend; 0 = one a core.", 0, 1024});
  table->push_back({"device", &o->device.device, "Ordinal of the GPU.", 0, 64});
  table->push_back({"tuning-file", &o->device.tuning_file,
                    "What adaattn_bench tune measured, for cuda; empty = built-in numbers."});
  table->push_back({"default-page-format",
                    &o->default_page_format,
                    "Of sessions that ask for none.",
                    0,
                    0,
                    {"fp32", "fp16", "bf16", "fp8_e4m3", "progressive"}});
}

void AddPolicy(ServerOptions* o, std::vector<Setting>* table) {
  DefaultPolicy& policy = o->default_policy;
  table->push_back(
      {"default-policy",
       &policy.name,
       "How progressive sessions are attended that name neither mode nor policy.",
       0,
       0,
       {"full_depth", "static", "threshold", "budget", "entropy", "learned", "feedback"}});
  table->push_back({"default-theta", &policy.theta,
                    "theta of the default policy (threshold, entropy); 0 = the policy's own.", 0,
                    1});
  table->push_back({"default-target-relative-error", &policy.target_relative_error,
                    "What budget, feedback and learned policies aim at unless the caller says.",
                    1e-6, 1});
  table->push_back({"default-max-relative-error", &policy.max_relative_error,
                    "How far pressure may raise that target; 0 = never.", 0, 1});
  table->push_back({"default-static-key-bits", &policy.static_key_bits,
                    "Key bits of the default policy static: 4, 6 or 8.", 4, 8});
  table->push_back(
      {"default-static-rank", &policy.static_rank, "Its leading channels of K; 0 = all.", 0, 256});
  table->push_back({"default-static-value-bits", &policy.static_value_bits,
                    "Its value bits: 2, 4, 6 or 8.", 2, 8});
  table->push_back({"policy-file", &o->policy_file,
                    "JSON file with the learned policy's weights, as adaattn.fit_policy writes "
                    "it; empty = none."});
}

void AddLimits(ServerOptions* o, std::vector<Setting>* table) {
  table->push_back({"max-message-bytes", &o->max_message_bytes, "Largest message received or sent.",
                    4096, kMaxInt});
  table->push_back({"max-tokens-per-session", &o->max_tokens_per_session,
                    "Tokens that one session may hold in a layer.", 1, kMaxInt});
  table->push_back(
      {"max-sessions", &o->sessions.max_sessions, "Sessions of all tenants.", 1, kMaxCount});
  table->push_back({"max-tenant-sessions", &o->sessions.max_tenant_sessions,
                    "Sessions of one tenant.", 1, kMaxCount});
  table->push_back({"max-tenant-bytes", &o->engine.pages.max_tenant_bytes,
                    "Page memory of one tenant; 0 = the whole pool.", 0, kMaxBytes});
  table->push_back({"max-tenant-exact-bytes", &o->engine.pages.max_tenant_exact_bytes,
                    "Exact tier of one tenant; 0 = all of it.", 0, kMaxBytes});
  table->push_back({"max-tenant-profile-bytes", &o->max_tenant_profile_bytes,
                    "Host memory of one tenant's uploaded profiles.", 1, kMaxBytes});
  table->push_back({"max-connection-streams", &o->max_connection_streams,
                    "Calls at once on one connection; more wait on the client's side.", 1, 65536});
  table->push_back({"max-client-streams", &o->admission.max_client_streams,
                    "AttendStream and ImportKv calls of one client (tenant, or address without "
                    "certificates) at once.",
                    1, 1 << 20});
  table->push_back({"max-client-inflight-bytes", &o->admission.max_client_inflight_bytes,
                    "Payload of one client received and not yet answered.", 4096, kMaxBytes});
  table->push_back({"max-inflight-bytes", &o->admission.max_inflight_bytes,
                    "The same of all clients.", 4096, kMaxBytes});
  table->push_back({"stream-window", &o->stream_window,
                    "Messages of one AttendStream that may wait for their answers; reading stops "
                    "there.",
                    1, 4096});
  table->push_back({"memory-quota-bytes", &o->memory_quota_bytes,
                    "gRPC's own buffers, of all connections: a backstop that closes connections.",
                    1 << 20, kMaxBytes});
  table->push_back({"default-lease", &o->default_lease,
                    "A session ends this long after its last call unless it asks otherwise.", 0.01,
                    365 * kDay});
  table->push_back({"max-lease", &o->max_lease, "Longest lease granted.", 0.01, 365 * kDay});
}

void AddEngine(ServerOptions* o, std::vector<Setting>* table) {
  EngineOptions& engine = o->engine;
  BatcherOptions& batcher = engine.batcher;
  table->push_back(
      {"max-queued-tasks", &batcher.max_queued_tasks, "Messages waiting.", 1, kMaxCount});
  table->push_back({"max-queued-tokens", &batcher.max_queued_tokens,
                    "Query rows and appended rows waiting.", 1, kMaxCount});
  table->push_back(
      {"max-queued-bytes", &batcher.max_queued_bytes, "Payload waiting.", 4096, kMaxBytes});
  table->push_back({"max-batch-sequences", &batcher.max_batch_sequences,
                    "(sequence, layer) pairs that run together; a larger message never fits.", 1,
                    65536});
  table->push_back({"max-batch-tokens", &batcher.max_batch_tokens,
                    "Query rows and appended rows that run together.", 1, kMaxInt});
  table->push_back({"max-batch-q-bytes", &batcher.max_batch_q_bytes,
                    "Of q, and of o, that run together: host memory taken at start.", 4096,
                    kMaxBytes});
  table->push_back({"max-batch-kv-bytes", &batcher.max_batch_kv_bytes, "Of k, and of v, likewise.",
                    4096, kMaxBytes});
  table->push_back({"batch-delay", &batcher.max_delay,
                    "How long a batch smaller than the one before waits for the rest; 0 = never.",
                    0, 1});
  table->push_back({"batch-spin", &batcher.spin,
                    "How long the engine looks for work before it sleeps; 0 = not at all.", 0, 1});
  table->push_back({"fit-tokens", &engine.seal.fit_tokens,
                    "Tokens that a session's basis is fitted on; a multiple of 64.", 64, 65536});
  table->push_back({"seal-pages-per-slice", &engine.seal.pages_per_slice,
                    "Pages sealed in one go: the longest that a step may wait for sealing.", 1,
                    65536});
  table->push_back({"max-seal-backlog-pages", &engine.seal.max_backlog_pages,
                    "Above this many, sealing goes before the next batch; 0 = whenever one is due.",
                    0, kMaxCount});
  table->push_back({"seal-min-tokens", &engine.seal.min_tokens,
                    "Tokens of a layer from which on its pages are sealed; -1 = where the device's "
                    "tuning has it that sealed pages pay, 0 = at any length.",
                    -1, kMaxInt});
  table->push_back({"refit-drift-ratio", &engine.seal.refit_drift_ratio,
                    "Mean drift above which a new basis is fitted; 0 = never.", 0, 1e6});
  table->push_back({"audit-share", &engine.audit_share,
                    "Share of statistical steps that are recomputed after their reply; 0 = none.",
                    0, 1});
  table->push_back({"pressure-threshold", &engine.pressure_threshold,
                    "Fill of the queue above which error budgets grow toward max_relative_error; "
                    "1 = never.",
                    0.01, 1});
  table->push_back({"drain-pause", &o->drain_pause,
                    "After SIGTERM: health says no, but everything is still answered.", 0, kDay});
  table->push_back({"drain-deadline", &o->drain_deadline,
                    "After the pause: how long open calls may take to end.", 0, kDay});
}

}  // namespace

std::vector<Setting> SettingTable(ServerOptions* options) {
  std::vector<Setting> table;
  AddAddresses(options, &table);
  AddDevice(options, &table);
  AddPolicy(options, &table);
  AddLimits(options, &table);
  AddEngine(options, &table);
  return table;
}

}  // namespace adaattn

#include "server/http_server.h"

#include <civetweb.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "server/log.h"

namespace adaattn {
namespace {

const char* ReasonPhrase(int status) {
  switch (status) {
    case 200:
      return "OK";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 503:
      return "Service Unavailable";
    default:
      return "Internal Server Error";
  }
}

void Send(mg_connection* connection, const HttpReply& reply, bool with_body) {
  const std::string head = absl::StrCat(
      "HTTP/1.1 ", reply.status, " ", ReasonPhrase(reply.status),
      "\r\nContent-Type: ", reply.content_type, "\r\nContent-Length: ", reply.body.size(),
      "\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n",
      reply.status == 405 ? "Allow: GET, HEAD\r\n" : "",
      // The page is self-contained and must stay so.
      "Content-Security-Policy: default-src 'self'\r\nConnection: close\r\n\r\n");
  mg_write(connection, head.data(), head.size());
  if (with_body) mg_write(connection, reply.body.data(), reply.body.size());
}

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(
    const std::string& address, std::map<std::string, Handler> handlers) {
  static const unsigned initialised = mg_init_library(0);
  (void)initialised;
  std::unique_ptr<HttpServer> server(new HttpServer(std::move(handlers)));
  mg_callbacks callbacks;
  std::memset(&callbacks, 0, sizeof(callbacks));
  callbacks.begin_request = &HttpServer::OnRequest;
  callbacks.log_message = &HttpServer::OnLog;
  const char* settings[] = {"listening_ports",
                            address.c_str(),
                            "num_threads",
                            "4",
                            "enable_keep_alive",
                            "no",
                            "request_timeout_ms",
                            "10000",
                            "enable_auth_domain_check",
                            "no",
                            nullptr};
  server->context_ = mg_start(&callbacks, server.get(), settings);
  if (server->context_ == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot listen for HTTP on \"", address, "\""));
  }
  mg_server_port port;
  std::memset(&port, 0, sizeof(port));
  if (mg_get_server_ports(server->context_, 1, &port) != 1) {
    return absl::InternalError("the HTTP server does not say its port");
  }
  server->port_ = port.port;
  server->host_ = address.substr(0, address.rfind(':'));
  return server;
}

HttpServer::~HttpServer() {
  if (context_ == nullptr) return;
  // The listening thread looks at its stop flag when a connection comes, or every two seconds.
  std::atomic<bool> stopped{false};
  std::thread waker([this, &stopped] {
    while (!stopped.load()) {
      char error[128];
      mg_connection* connection =
          mg_connect_client(host_.c_str(), port_, /*use_ssl=*/0, error, sizeof(error));
      if (connection != nullptr) mg_close_connection(connection);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
  });
  mg_stop(context_);
  stopped.store(true);
  waker.join();
}

int HttpServer::OnRequest(mg_connection* connection) {
  const auto* server = static_cast<const HttpServer*>(mg_get_request_info(connection)->user_data);
  server->Answer(connection);
  return 1;
}

int HttpServer::OnLog(const mg_connection*, const char* message) {
  Log(LogLevel::kDebug, message, {{"library", "civetweb"}});
  return 1;
}

void HttpServer::Answer(mg_connection* connection) const {
  const mg_request_info* request = mg_get_request_info(connection);
  const absl::string_view method = request->request_method;
  const char* path = request->local_uri;
  if (method != "GET" && method != "HEAD") {
    Send(connection, {405, "text/plain; charset=utf-8", "only GET and HEAD\n"}, true);
    return;
  }
  const auto found = path == nullptr ? handlers_.end() : handlers_.find(path);
  if (found == handlers_.end()) {
    std::string known = "no such page; there are:\n";
    for (const auto& [name, handler] : handlers_) absl::StrAppend(&known, name, "\n");
    Send(connection, {404, "text/plain; charset=utf-8", known}, method == "GET");
    return;
  }
  Send(connection, found->second(), method == "GET");
}

}  // namespace adaattn

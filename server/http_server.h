#ifndef ADAATTN_SERVER_HTTP_SERVER_H_
#define ADAATTN_SERVER_HTTP_SERVER_H_

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

struct mg_context;
struct mg_connection;

namespace adaattn {

struct HttpReply {
  int status = 200;
  std::string content_type = "text/plain; charset=utf-8";
  std::string body;
};

// A small read-only web server: GET and HEAD of a fixed set of paths, anything else is 404 or 405.
// Handlers run on the server's own few threads, at the same time; the destructor waits for them.
class HttpServer {
 public:
  using Handler = std::function<HttpReply()>;

  // Listens on "host:port" (port 0: any free one). `handlers` is keyed by path: "/metrics".
  // Errors: kInvalidArgument for an address that is none, kUnavailable when it cannot be had.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& address,
                                                           std::map<std::string, Handler> handlers);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const { return port_; }

 private:
  explicit HttpServer(std::map<std::string, Handler> handlers) : handlers_(std::move(handlers)) {}
  static int OnRequest(mg_connection* connection);
  static int OnLog(const mg_connection* connection, const char* message);
  void Answer(mg_connection* connection) const;

  const std::map<std::string, Handler> handlers_;
  mg_context* context_ = nullptr;
  std::string host_;
  int port_ = 0;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_HTTP_SERVER_H_

#ifndef ADAATTN_TESTS_SUPPORT_HTTP_GET_H_
#define ADAATTN_TESTS_SUPPORT_HTTP_GET_H_

#include <civetweb.h>

#include <string>

namespace adaattn {

struct HttpResponse {
  int status = 0;  // 0: no answer
  std::string content_type;
  std::string body;
};

// One request to 127.0.0.1:`port`; waits at most ten seconds.
inline HttpResponse HttpRequest(int port, const std::string& method, const std::string& path) {
  HttpResponse response;
  char error[256] = "";
  mg_connection* connection =
      mg_download("127.0.0.1", port, /*use_ssl=*/0, error, sizeof(error),
                  "%s %s HTTP/1.0\r\nHost: localhost\r\n\r\n", method.c_str(), path.c_str());
  if (connection == nullptr) return response;
  const mg_response_info* info = mg_get_response_info(connection);
  response.status = info->status_code;
  if (const char* type = mg_get_header(connection, "Content-Type")) response.content_type = type;
  char buffer[4096];
  for (int count; method != "HEAD" && (count = mg_read(connection, buffer, sizeof(buffer))) > 0;) {
    response.body.append(buffer, static_cast<size_t>(count));
  }
  mg_close_connection(connection);
  return response;
}

inline HttpResponse HttpGet(int port, const std::string& path) {
  return HttpRequest(port, "GET", path);
}

}  // namespace adaattn

#endif  // ADAATTN_TESTS_SUPPORT_HTTP_GET_H_

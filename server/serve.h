#ifndef ADAATTN_SERVER_SERVE_H_
#define ADAATTN_SERVER_SERVE_H_

#include <memory>

#include "kernels/attention.h"
#include "server/options.h"

namespace adaattn {

// Runs a server as the whole purpose of this process: says its addresses on stdout and in the port
// file, then serves until SIGTERM, SIGINT or the loss of its device, and drains; a second signal
// hurries the drain. Returns the exit code: 0, or 1 when it could not start or lost its device.
// `backend`: see Server::Start.
int Serve(const ServerOptions& options, std::unique_ptr<Backend> backend = nullptr);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_SERVE_H_

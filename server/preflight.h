#ifndef ADAATTN_SERVER_PREFLIGHT_H_
#define ADAATTN_SERVER_PREFLIGHT_H_

#include "absl/status/status.h"
#include "server/options.h"

namespace adaattn {

// What the machine has to give before anything listens: certificates that can be read, paths that
// can be written, ports that are free. Another process may still be faster; the start then fails.
// Errors name the setting: kInvalidArgument for files, kUnavailable for a port that is taken.
absl::Status Preflight(const ServerOptions& options);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_PREFLIGHT_H_

#ifndef ADAATTN_SERVER_PROCESS_STATS_H_
#define ADAATTN_SERVER_PROCESS_STATS_H_

#include <cstdint>

namespace adaattn {

// What /proc says of this process; 0 where it does not say.
struct ProcessStats {
  double cpu_seconds = 0;
  int64_t resident_bytes = 0;
  int64_t virtual_bytes = 0;
  int64_t open_fds = 0;
  int64_t threads = 0;
  double start_time = 0;  // Unix time, seconds
};

ProcessStats ReadProcessStats();

}  // namespace adaattn

#endif  // ADAATTN_SERVER_PROCESS_STATS_H_

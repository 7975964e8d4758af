#ifndef ADAATTN_CLIENT_CLI_PROGRESS_H_
#define ADAATTN_CLIENT_CLI_PROGRESS_H_

#include <cstdint>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace adaattn::client {

// A bar on stderr, where that is a terminal; elsewhere nothing. Threads: any.
class Progress {
 public:
  Progress(std::string label, int64_t total);
  ~Progress();  // clears the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Advance(int64_t by = 1);

 private:
  void Draw() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::string label_;
  const int64_t total_;
  const bool shown_;
  absl::Mutex mutex_;
  int64_t done_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Time last_drawn_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
};

}  // namespace adaattn::client

#endif  // ADAATTN_CLIENT_CLI_PROGRESS_H_

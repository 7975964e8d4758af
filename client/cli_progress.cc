#include "client/cli_progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

#include "absl/time/clock.h"

namespace adaattn::client {
namespace {

constexpr int kBarWidth = 30;
constexpr absl::Duration kRedraw = absl::Milliseconds(100);

}  // namespace

Progress::Progress(std::string label, int64_t total)
    : label_(std::move(label)), total_(std::max<int64_t>(1, total)), shown_(isatty(2) == 1) {
  absl::MutexLock lock(&mutex_);
  if (shown_) Draw();
}

Progress::~Progress() {
  if (shown_) std::fputs("\r\033[K", stderr);
}

void Progress::Advance(int64_t by) {
  if (!shown_) return;
  absl::MutexLock lock(&mutex_);
  done_ += by;
  if (absl::Now() - last_drawn_ >= kRedraw) Draw();
}

void Progress::Draw() {
  last_drawn_ = absl::Now();
  const int filled = static_cast<int>(std::min(done_, total_) * kBarWidth / total_);
  const std::string bar(filled, '=');
  std::fprintf(stderr, "\r\033[K%s [%-*s] %3d%%", label_.c_str(), kBarWidth, bar.c_str(),
               static_cast<int>(std::min(done_, total_) * 100 / total_));
}

}  // namespace adaattn::client

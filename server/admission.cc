#include "server/admission.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace adaattn {

struct AdmissionTicket::Client {
  std::atomic<int64_t> bytes{0};
  std::atomic<int32_t> streams{0};
};

AdmissionTicket& AdmissionTicket::operator=(AdmissionTicket&& other) noexcept {
  if (this != &other) {
    Release();
    admission_ = std::exchange(other.admission_, nullptr);
    client_ = std::move(other.client_);
    bytes_ = std::exchange(other.bytes_, 0);
    streams_ = std::exchange(other.streams_, 0);
  }
  return *this;
}

void AdmissionTicket::Release() {
  if (admission_ == nullptr) return;
  client_->bytes.fetch_sub(bytes_, std::memory_order_relaxed);
  client_->streams.fetch_sub(streams_, std::memory_order_relaxed);
  admission_->inflight_bytes_.fetch_sub(bytes_, std::memory_order_relaxed);
  admission_ = nullptr;
  client_.reset();
}

std::shared_ptr<AdmissionTicket::Client> Admission::FindClient(absl::string_view client) {
  MutexLock lock(&mutex_);
  std::shared_ptr<AdmissionTicket::Client> found = clients_[client].lock();
  if (found == nullptr) {
    // Peers come and go: drop those that hold nothing before the map grows without end.
    if (clients_.size() > sweep_above_) {
      absl::erase_if(clients_, [](const auto& entry) { return entry.second.expired(); });
      sweep_above_ = 2 * clients_.size() + 64;
    }
    found = std::make_shared<AdmissionTicket::Client>();
    clients_[client] = found;
  }
  return found;
}

absl::StatusOr<AdmissionTicket> Admission::AdmitBytes(absl::string_view client, int64_t bytes) {
  if (draining()) return absl::UnavailableError("draining: this server takes no new work");
  std::shared_ptr<AdmissionTicket::Client> counts = FindClient(client);
  AdmissionTicket ticket;
  ticket.admission_ = this;
  ticket.client_ = counts;
  ticket.bytes_ = bytes;
  const int64_t of_client = counts->bytes.fetch_add(bytes, std::memory_order_relaxed);
  const int64_t of_all = inflight_bytes_.fetch_add(bytes, std::memory_order_relaxed);
  if (of_client + bytes > options_.max_client_inflight_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("in-flight bytes of this client: ", of_client,
                                                     " and ", bytes, " more, at most ",
                                                     options_.max_client_inflight_bytes));
  }
  if (of_all + bytes > options_.max_inflight_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat("in-flight bytes: ", of_all, " and ", bytes,
                                                     " more, at most ",
                                                     options_.max_inflight_bytes));
  }
  return ticket;
}

absl::StatusOr<AdmissionTicket> Admission::AdmitStream(absl::string_view client) {
  if (draining()) return absl::UnavailableError("draining: this server takes no new work");
  std::shared_ptr<AdmissionTicket::Client> counts = FindClient(client);
  AdmissionTicket ticket;
  ticket.admission_ = this;
  ticket.client_ = counts;
  ticket.streams_ = 1;
  const int32_t streams = counts->streams.fetch_add(1, std::memory_order_relaxed);
  if (streams >= options_.max_client_streams) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "streams of this client: ", streams, " are open, at most ", options_.max_client_streams));
  }
  return ticket;
}

}  // namespace adaattn

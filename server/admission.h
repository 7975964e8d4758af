#ifndef ADAATTN_SERVER_ADMISSION_H_
#define ADAATTN_SERVER_ADMISSION_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/mutex.h"

namespace adaattn {

struct AdmissionOptions {
  // Per client: a peer address without a certificate, else the tenant. All must be > 0.
  int64_t max_client_inflight_bytes = int64_t{256} << 20;
  int32_t max_client_streams = 256;
  int64_t max_inflight_bytes = int64_t{2} << 30;  // of all clients
};

class Admission;

// What one client has in flight; hands its share back when it ends. Movable.
class AdmissionTicket {
 public:
  AdmissionTicket() = default;
  AdmissionTicket(AdmissionTicket&& other) noexcept { *this = std::move(other); }
  AdmissionTicket& operator=(AdmissionTicket&& other) noexcept;
  ~AdmissionTicket() { Release(); }

 private:
  friend class Admission;
  struct Client;
  void Release();

  Admission* admission_ = nullptr;
  std::shared_ptr<Client> client_;
  int64_t bytes_ = 0;
  int32_t streams_ = 0;
};

// Limits on what clients may have in flight, before anything is parsed. Threads: any.
class Admission {
 public:
  explicit Admission(const AdmissionOptions& options) : options_(options) {}

  // kResourceExhausted naming the limit. Outlives its tickets.
  absl::StatusOr<AdmissionTicket> AdmitBytes(absl::string_view client, int64_t bytes);
  absl::StatusOr<AdmissionTicket> AdmitStream(absl::string_view client);

  // Refuses everything from here on with kUnavailable.
  void StartDraining() { draining_.store(true, std::memory_order_relaxed); }
  bool draining() const { return draining_.load(std::memory_order_relaxed); }
  int64_t inflight_bytes() const { return inflight_bytes_.load(std::memory_order_relaxed); }

 private:
  friend class AdmissionTicket;
  std::shared_ptr<AdmissionTicket::Client> FindClient(absl::string_view client);

  const AdmissionOptions options_;
  std::atomic<bool> draining_{false};
  std::atomic<int64_t> inflight_bytes_{0};
  Mutex mutex_;
  size_t sweep_above_ ABSL_GUARDED_BY(mutex_) = 64;  // clients in the map
  absl::flat_hash_map<std::string, std::weak_ptr<AdmissionTicket::Client>> clients_
      ABSL_GUARDED_BY(mutex_);
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_ADMISSION_H_

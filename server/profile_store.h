#ifndef ADAATTN_SERVER_PROFILE_STORE_H_
#define ADAATTN_SERVER_PROFILE_STORE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/mutex.h"
#include "server/model_profile.h"

namespace adaattn {

// Uploaded profiles by tenant and name. Threads: any.
class ProfileStore {
 public:
  // `max_tenant_bytes` of host memory per tenant, > 0.
  explicit ProfileStore(int64_t max_tenant_bytes) : max_tenant_bytes_(max_tenant_bytes) {}

  // Replaces one of the same name; sessions that have it keep it. kResourceExhausted: the quota.
  absl::Status Put(absl::string_view tenant, std::shared_ptr<const ModelProfile> profile);
  // Null when there is none.
  std::shared_ptr<const ModelProfile> Get(absl::string_view tenant, absl::string_view name) const;

 private:
  using Key = std::pair<std::string, std::string>;

  const int64_t max_tenant_bytes_;
  mutable Mutex mutex_;
  absl::flat_hash_map<Key, std::shared_ptr<const ModelProfile>> profiles_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<std::string, int64_t> tenant_bytes_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_PROFILE_STORE_H_

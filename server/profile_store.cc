#include "server/profile_store.h"

#include "absl/strings/str_cat.h"

namespace adaattn {

absl::Status ProfileStore::Put(absl::string_view tenant,
                               std::shared_ptr<const ModelProfile> profile) {
  MutexLock lock(&mutex_);
  int64_t& held = tenant_bytes_[tenant];
  const Key key(std::string(tenant), profile->name);
  const auto found = profiles_.find(key);
  const int64_t replaced = found == profiles_.end() ? 0 : found->second->bytes();
  if (held - replaced + profile->bytes() > max_tenant_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat("profiles: the tenant's hold ", held, " of ",
                                                     max_tenant_bytes_, " bytes, this one needs ",
                                                     profile->bytes()));
  }
  held += profile->bytes() - replaced;
  profiles_[key] = std::move(profile);
  return absl::OkStatus();
}

std::shared_ptr<const ModelProfile> ProfileStore::Get(absl::string_view tenant,
                                                      absl::string_view name) const {
  MutexLock lock(&mutex_);
  const auto found = profiles_.find(Key(std::string(tenant), std::string(name)));
  return found == profiles_.end() ? nullptr : found->second;
}

}  // namespace adaattn

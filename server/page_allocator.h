#ifndef ADAATTN_SERVER_PAGE_ALLOCATOR_H_
#define ADAATTN_SERVER_PAGE_ALLOCATOR_H_

// Divides the backend's pool, and its exact tier in host memory, into pages. Owns ranges, not
// memory: a page id is an offset, the tier's begin behind the pool's.
//
// The pool is cut into slabs. A size class (page size and state) takes runs of slabs on demand and
// gives a run back when its last page goes, so that any mix of shapes shares one pool. Pages are
// counted by references, because forked sessions share them.
//
// Threads: one (the engine's), except stats() and free_bytes(), which any thread may call.

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/format/page_layout.h"

namespace adaattn {

// kExact pages lie in the tier, all others in the pool.
enum class PageState : uint8_t { kDense = 0, kSealed = 1, kBasis = 2, kExact = 3 };
inline constexpr int kNumPageStates = 4;
const char* PageStateName(PageState state);  // "dense", "sealed", "basis", "exact"

// A tenant's number, given by the session table, small and never reused; 0 is nobody.
enum class TenantId : uint32_t {};

struct PageAllocatorOptions {
  int64_t pool_bytes = 0;
  int64_t slab_bytes = int64_t{1} << 20;  // a multiple of kPageAlignment; larger = fewer, longer
                                          // runs but more memory held by a class with few pages
  // Slabs that only sealing may take: when dense pages fill the pool, sealing can still start, and
  // it frees more than it takes. Lowered to a quarter of a small pool.
  int32_t reserved_slabs = 8;
  int64_t max_tenant_bytes = 0;  // of the pool that one tenant may hold; must be > 0
  int64_t exact_tier_begin = 0;  // page offset of the tier, a multiple of kPageAlignment; it lies
                                 // behind the pool
  int64_t exact_tier_bytes = 0;  // 0 = no tier
  int64_t max_tenant_exact_bytes = 0;  // of the tier; must be > 0 where there is one
};

struct PageRequest {
  int64_t bytes = 0;  // a multiple of kPageAlignment
  PageState state = PageState::kDense;
  TenantId tenant{0};
  int32_t count = 1;
  // Sealing: the pool's quota does not hold it up either, since it frees more. The tier's does.
  bool may_use_reserve = false;
};

struct PageStats {
  std::array<int64_t, kNumPageStates> pages{};  // in use, by state
  std::array<int64_t, kNumPageStates> bytes{};
  int64_t free_bytes = 0;             // in no slab run of any class
  int64_t pool_bytes = 0;             // whole slabs of the pool
  int64_t exact_tier_free_bytes = 0;  // of the tier, likewise
  int64_t exact_tier_bytes = 0;
  int64_t total_pages() const { return pages[0] + pages[1] + pages[2] + pages[3]; }
};

class PageAllocator;

// Pages reserved and not yet committed to a page table: gone with the lease unless taken.
class PageLease {
 public:
  PageLease() = default;
  PageLease(PageLease&& other) noexcept;
  PageLease& operator=(PageLease&& other) noexcept;
  ~PageLease() { Release(); }

  absl::Span<const PageId> pages() const { return pages_; }  // in the order of the requests
  // Those whose bytes another tenant wrote: zero them before use.
  absl::Span<const std::pair<PageId, int64_t>> pages_to_zero() const { return pages_to_zero_; }
  // The caller owns one reference to each page from here on.
  std::vector<PageId> Take();

 private:
  friend class PageAllocator;
  void Release();

  PageAllocator* allocator_ = nullptr;
  std::vector<PageId> pages_;
  std::vector<std::pair<PageId, int64_t>> pages_to_zero_;
};

class PageAllocator {
 public:
  explicit PageAllocator(const PageAllocatorOptions& options);
  PageAllocator(const PageAllocator&) = delete;
  PageAllocator& operator=(const PageAllocator&) = delete;
  ~PageAllocator();

  // All pages of all requests, which are one tenant's, each with one reference, or none. The pool's
  // requests come first.
  // Errors: kResourceExhausted naming the pool, the exact tier or the tenant's quota of either,
  // with what was asked and left.
  absl::StatusOr<PageLease> Reserve(absl::Span<const PageRequest> requests);

  // One more reference to a page in use; held by the tenant that reserved it.
  void AddRef(PageId page);
  // One reference less; the last one frees the page.
  void Release(PageId page);
  int32_t ref_count(PageId page) const;
  int64_t page_bytes(PageId page) const;

  int64_t tenant_bytes(TenantId tenant) const;        // of the pool
  int64_t tenant_exact_bytes(TenantId tenant) const;  // of the exact tier
  PageStats stats() const;
  int64_t free_bytes() const { return pool_.free_bytes.load(std::memory_order_relaxed); }

 private:
  struct Run;
  struct SizeClass;
  // Slabs in a row: the pool's, then the tier's. They share one numbering, in which runs stay
  // inside of their region.
  struct Region {
    const char* name = "";
    int64_t begin = 0;  // page offset of its first slab
    int32_t first_slab = 0;
    int32_t num_slabs = 0;
    int32_t reserved_slabs = 0;
    int32_t free_slabs = 0;
    int64_t max_tenant_bytes = 0;
    std::atomic<int64_t> free_bytes{0};
    std::vector<int64_t> tenant_bytes;  // by TenantId
  };

  void InitRegion(int64_t begin, int64_t bytes, Region* region);
  Region& RegionOf(PageState state) { return state == PageState::kExact ? tier_ : pool_; }
  int32_t SlabOf(PageId page) const;
  absl::Status CheckQuota(absl::Span<const PageRequest> requests, Region* region) const;
  absl::Status NoRoom(absl::Span<const PageRequest> requests, const Region& region) const;

  SizeClass& FindClass(int64_t bytes, PageState state);
  bool AddRun(SizeClass& size_class, bool may_use_reserve);
  bool AddRunOf(int32_t count, SizeClass& size_class, bool may_use_reserve);
  void DropRun(SizeClass& size_class, Run* run);
  int32_t FindFreeSlabs(int32_t count, const Region& region) const;
  bool AllocateOne(const PageRequest& request, PageLease* lease);
  Run* FindRun(PageId page) const;

  const PageAllocatorOptions options_;
  Region pool_, tier_;
  std::array<std::atomic<int64_t>, kNumPageStates> pages_{};
  std::array<std::atomic<int64_t>, kNumPageStates> bytes_{};
  std::vector<Run*> slab_runs_;         // by slab; null = free
  std::vector<TenantId> slab_tenants_;  // who wrote it last; kManyTenants when several
  std::vector<std::unique_ptr<SizeClass>> classes_;
};

}  // namespace adaattn

#endif  // ADAATTN_SERVER_PAGE_ALLOCATOR_H_

#include "server/page_allocator.h"

#include <algorithm>
#include <cassert>

#include "absl/strings/str_cat.h"

namespace adaattn {
namespace {

// Bytes written by more than one tenant: every next one gets them zeroed.
constexpr TenantId kManyTenants{0xffffffffu};
constexpr TenantId kNobody{0};

// Slabs of one run: at least one page, and at most an eighth of the run lost behind the last one.
int32_t SlabsPerRun(int64_t page_bytes, int64_t slab_bytes) {
  const int64_t least = (page_bytes + slab_bytes - 1) / slab_bytes;
  for (int64_t slabs = least; slabs < least + 8; ++slabs) {
    if (slabs * slab_bytes % page_bytes * 8 <= slabs * slab_bytes) {
      return static_cast<int32_t>(slabs);
    }
  }
  return static_cast<int32_t>(least);
}

// Bytes that the requests want of the tier, or of the pool.
int64_t BytesOf(absl::Span<const PageRequest> requests, bool of_tier) {
  int64_t bytes = 0;
  for (const PageRequest& request : requests) {
    if ((request.state == PageState::kExact) == of_tier) bytes += request.bytes * request.count;
  }
  return bytes;
}

TenantId MergeTenants(TenantId a, TenantId b) {
  if (a == kNobody) return b;
  return b == kNobody || a == b ? a : kManyTenants;
}

}  // namespace

const char* PageStateName(PageState state) {
  switch (state) {
    case PageState::kDense:
      return "dense";
    case PageState::kSealed:
      return "sealed";
    case PageState::kBasis:
      return "basis";
    case PageState::kExact:
      return "exact";
  }
  return "unknown";
}

// Slabs in a row, cut into pages of one size class.
struct PageAllocator::Run {
  SizeClass* size_class = nullptr;
  int64_t offset = 0;  // of its first page
  int32_t first_slab = 0;
  int32_t num_slabs = 0;
  int32_t num_used = 0;
  std::vector<int32_t> refs;      // by page; 0 = free
  std::vector<TenantId> tenants;  // by page: who had it last
  std::vector<int32_t> free;      // page numbers, the next one last
};

struct PageAllocator::SizeClass {
  int64_t page_bytes = 0;
  PageState state = PageState::kDense;
  int32_t slabs_per_run = 0;
  int32_t least_slabs = 0;  // of a run where free slabs lie scattered
  std::vector<std::unique_ptr<Run>> runs;
  std::vector<Run*> open;  // runs with a free page
};

PageLease::PageLease(PageLease&& other) noexcept
    : allocator_(std::exchange(other.allocator_, nullptr)),
      pages_(std::move(other.pages_)),
      pages_to_zero_(std::move(other.pages_to_zero_)) {
  other.pages_.clear();
}

PageLease& PageLease::operator=(PageLease&& other) noexcept {
  if (this != &other) {
    Release();
    allocator_ = std::exchange(other.allocator_, nullptr);
    pages_ = std::move(other.pages_);
    pages_to_zero_ = std::move(other.pages_to_zero_);
    other.pages_.clear();
  }
  return *this;
}

void PageLease::Release() {
  for (PageId page : pages_) allocator_->Release(page);
  pages_.clear();
}

std::vector<PageId> PageLease::Take() {
  std::vector<PageId> pages;
  pages.swap(pages_);
  return pages;
}

PageAllocator::PageAllocator(const PageAllocatorOptions& options) : options_(options) {
  pool_.name = "page pool";
  InitRegion(0, options.pool_bytes, &pool_);
  pool_.reserved_slabs = std::min(options.reserved_slabs, pool_.num_slabs / 4);
  pool_.max_tenant_bytes = options.max_tenant_bytes;
  assert(options.exact_tier_bytes == 0 || options.exact_tier_begin >= options.pool_bytes);
  tier_.name = "exact tier";
  tier_.first_slab = pool_.num_slabs;
  InitRegion(options.exact_tier_begin, options.exact_tier_bytes, &tier_);
  tier_.max_tenant_bytes = options.max_tenant_exact_bytes;
}

void PageAllocator::InitRegion(int64_t begin, int64_t bytes, Region* region) {
  region->begin = begin;
  region->num_slabs = static_cast<int32_t>(bytes / options_.slab_bytes);
  region->free_slabs = region->num_slabs;
  region->free_bytes = region->num_slabs * options_.slab_bytes;
  slab_runs_.resize(slab_runs_.size() + static_cast<size_t>(region->num_slabs), nullptr);
  slab_tenants_.resize(slab_runs_.size(), kNobody);
}

PageAllocator::~PageAllocator() = default;

PageAllocator::SizeClass& PageAllocator::FindClass(int64_t bytes, PageState state) {
  for (const auto& size_class : classes_) {
    if (size_class->page_bytes == bytes && size_class->state == state) return *size_class;
  }
  auto size_class = std::make_unique<SizeClass>();
  size_class->page_bytes = bytes;
  size_class->state = state;
  size_class->slabs_per_run = SlabsPerRun(bytes, options_.slab_bytes);
  size_class->least_slabs =
      static_cast<int32_t>((bytes + options_.slab_bytes - 1) / options_.slab_bytes);
  classes_.push_back(std::move(size_class));
  return *classes_.back();
}

int32_t PageAllocator::FindFreeSlabs(int32_t count, const Region& region) const {
  int32_t length = 0;
  for (int32_t slab = region.first_slab; slab < region.first_slab + region.num_slabs; ++slab) {
    length = slab_runs_[slab] == nullptr ? length + 1 : 0;
    if (length == count) return slab - count + 1;
  }
  return -1;
}

bool PageAllocator::AddRun(SizeClass& size_class, bool may_use_reserve) {
  return AddRunOf(size_class.slabs_per_run, size_class, may_use_reserve) ||
         AddRunOf(size_class.least_slabs, size_class, may_use_reserve);
}

bool PageAllocator::AddRunOf(int32_t count, SizeClass& size_class, bool may_use_reserve) {
  Region& region = RegionOf(size_class.state);
  if (region.free_slabs - (may_use_reserve ? 0 : region.reserved_slabs) < count) return false;
  const int32_t first = FindFreeSlabs(count, region);
  if (first < 0) return false;
  auto run = std::make_unique<Run>();
  run->size_class = &size_class;
  run->offset = region.begin + (first - region.first_slab) * options_.slab_bytes;
  run->first_slab = first;
  run->num_slabs = count;
  const auto num_pages = static_cast<int32_t>(count * options_.slab_bytes / size_class.page_bytes);
  run->refs.assign(num_pages, 0);
  run->tenants.resize(num_pages);
  for (int32_t page = 0; page < num_pages; ++page) {
    const int64_t begin = page * size_class.page_bytes;
    TenantId tenant = kNobody;
    for (int64_t slab = begin / options_.slab_bytes;
         slab <= (begin + size_class.page_bytes - 1) / options_.slab_bytes; ++slab) {
      tenant = MergeTenants(tenant, slab_tenants_[first + slab]);
    }
    run->tenants[page] = tenant;
  }
  for (int32_t page = num_pages - 1; page >= 0; --page) run->free.push_back(page);
  for (int32_t slab = first; slab < first + count; ++slab) slab_runs_[slab] = run.get();
  region.free_slabs -= count;
  region.free_bytes = region.free_slabs * options_.slab_bytes;
  size_class.open.push_back(run.get());
  size_class.runs.push_back(std::move(run));
  return true;
}

void PageAllocator::DropRun(SizeClass& size_class, Run* run) {
  TenantId tenant = kNobody;
  for (TenantId of_page : run->tenants) tenant = MergeTenants(tenant, of_page);
  for (int32_t slab = run->first_slab; slab < run->first_slab + run->num_slabs; ++slab) {
    slab_runs_[slab] = nullptr;
    // What lies behind the last page of a run keeps its former owner.
    slab_tenants_[slab] = MergeTenants(slab_tenants_[slab], tenant);
  }
  Region& region = RegionOf(size_class.state);
  region.free_slabs += run->num_slabs;
  region.free_bytes = region.free_slabs * options_.slab_bytes;
  auto& open = size_class.open;
  open.erase(std::remove(open.begin(), open.end(), run), open.end());
  auto& runs = size_class.runs;
  runs.erase(std::find_if(runs.begin(), runs.end(),
                          [run](const std::unique_ptr<Run>& r) { return r.get() == run; }));
}

bool PageAllocator::AllocateOne(const PageRequest& request, PageLease* lease) {
  SizeClass& size_class = FindClass(request.bytes, request.state);
  if (size_class.open.empty() && !AddRun(size_class, request.may_use_reserve)) return false;
  Run* const run = size_class.open.back();
  const int32_t page = run->free.back();
  run->free.pop_back();
  if (run->free.empty()) size_class.open.pop_back();
  ++run->num_used;
  run->refs[page] = 1;
  const int64_t offset = run->offset + page * request.bytes;
  const PageId id{static_cast<uint32_t>(offset / kPageAlignment)};
  lease->pages_.push_back(id);
  const TenantId last = run->tenants[page];
  if (last != kNobody && last != request.tenant) {
    lease->pages_to_zero_.emplace_back(id, request.bytes);
  }
  run->tenants[page] = request.tenant;
  const auto state = static_cast<size_t>(request.state);
  pages_[state].fetch_add(1, std::memory_order_relaxed);
  bytes_[state].fetch_add(request.bytes, std::memory_order_relaxed);
  RegionOf(request.state).tenant_bytes[static_cast<size_t>(request.tenant)] += request.bytes;
  return true;
}

absl::Status PageAllocator::CheckQuota(absl::Span<const PageRequest> requests,
                                       Region* region) const {
  const auto tenant = static_cast<size_t>(requests.front().tenant);
  if (tenant >= region->tenant_bytes.size()) region->tenant_bytes.resize(tenant + 1, 0);
  if (requests.front().may_use_reserve && region == &pool_) return absl::OkStatus();
  const int64_t wanted = BytesOf(requests, region == &tier_);
  if (wanted == 0 || region->tenant_bytes[tenant] + wanted <= region->max_tenant_bytes) {
    return absl::OkStatus();
  }
  return absl::ResourceExhaustedError(
      absl::StrCat(region == &tier_ ? "exact tier quota" : "KV quota", ": the tenant holds ",
                   region->tenant_bytes[tenant], " of ", region->max_tenant_bytes,
                   " bytes, this needs ", wanted, " more; close or truncate sessions"));
}

absl::Status PageAllocator::NoRoom(absl::Span<const PageRequest> requests,
                                   const Region& region) const {
  return absl::ResourceExhaustedError(
      absl::StrCat(region.name, ": ", BytesOf(requests, &region == &tier_),
                   " bytes are needed and ", region.free_bytes.load(std::memory_order_relaxed),
                   " of ", region.num_slabs * options_.slab_bytes,
                   " are free; close or truncate sessions, or ask later"));
}

absl::StatusOr<PageLease> PageAllocator::Reserve(absl::Span<const PageRequest> requests) {
  PageLease lease;
  lease.allocator_ = this;
  if (requests.empty()) return lease;
  for (Region* const region : {&pool_, &tier_}) {
    absl::Status status = CheckQuota(requests, region);
    if (!status.ok()) return status;
  }
  for (const PageRequest& request : requests) {
    assert(request.bytes > 0 && request.bytes % kPageAlignment == 0);
    assert(request.tenant == requests.front().tenant);
    for (int32_t i = 0; i < request.count; ++i) {
      if (!AllocateOne(request, &lease)) return NoRoom(requests, RegionOf(request.state));
    }
  }
  return lease;
}

int32_t PageAllocator::SlabOf(PageId page) const {
  const int64_t offset = PageOffset(page);
  const Region& region = tier_.num_slabs > 0 && offset >= tier_.begin ? tier_ : pool_;
  return region.first_slab + static_cast<int32_t>((offset - region.begin) / options_.slab_bytes);
}

PageAllocator::Run* PageAllocator::FindRun(PageId page) const {
  const int32_t slab = SlabOf(page);
  assert(slab < static_cast<int32_t>(slab_runs_.size()) && slab_runs_[slab] != nullptr);
  return slab_runs_[slab];
}

namespace {

template <typename Run>
int32_t PageNumber(const Run& run, PageId page, int64_t page_bytes) {
  return static_cast<int32_t>((PageOffset(page) - run.offset) / page_bytes);
}

}  // namespace

void PageAllocator::AddRef(PageId page) {
  Run* const run = FindRun(page);
  int32_t& refs = run->refs[PageNumber(*run, page, page_bytes(page))];
  assert(refs > 0);
  ++refs;
}

void PageAllocator::Release(PageId page) {
  Run* const run = FindRun(page);
  SizeClass& size_class = *run->size_class;
  const int32_t number = PageNumber(*run, page, size_class.page_bytes);
  assert(run->refs[number] > 0);
  if (--run->refs[number] > 0) return;
  const auto state = static_cast<size_t>(size_class.state);
  pages_[state].fetch_sub(1, std::memory_order_relaxed);
  bytes_[state].fetch_sub(size_class.page_bytes, std::memory_order_relaxed);
  RegionOf(size_class.state).tenant_bytes[static_cast<size_t>(run->tenants[number])] -=
      size_class.page_bytes;
  if (run->free.empty()) size_class.open.push_back(run);
  run->free.push_back(number);
  if (--run->num_used == 0) DropRun(size_class, run);
}

int32_t PageAllocator::ref_count(PageId page) const {
  const Run* const run = FindRun(page);
  return run->refs[PageNumber(*run, page, page_bytes(page))];
}

int64_t PageAllocator::page_bytes(PageId page) const {
  return FindRun(page)->size_class->page_bytes;
}

int64_t PageAllocator::tenant_bytes(TenantId tenant) const {
  const auto index = static_cast<size_t>(tenant);
  return index < pool_.tenant_bytes.size() ? pool_.tenant_bytes[index] : 0;
}

int64_t PageAllocator::tenant_exact_bytes(TenantId tenant) const {
  const auto index = static_cast<size_t>(tenant);
  return index < tier_.tenant_bytes.size() ? tier_.tenant_bytes[index] : 0;
}

PageStats PageAllocator::stats() const {
  PageStats stats;
  for (int state = 0; state < kNumPageStates; ++state) {
    stats.pages[state] = pages_[state].load(std::memory_order_relaxed);
    stats.bytes[state] = bytes_[state].load(std::memory_order_relaxed);
  }
  stats.free_bytes = free_bytes();
  stats.pool_bytes = pool_.num_slabs * options_.slab_bytes;
  stats.exact_tier_free_bytes = tier_.free_bytes.load(std::memory_order_relaxed);
  stats.exact_tier_bytes = tier_.num_slabs * options_.slab_bytes;
  return stats;
}

}  // namespace adaattn

#include "server/page_allocator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>

#include "absl/strings/match.h"

namespace adaattn {
namespace {

constexpr TenantId kAlice{1};
constexpr TenantId kBob{2};

PageAllocatorOptions SmallPool(int64_t slabs = 16) {
  PageAllocatorOptions options;
  options.slab_bytes = 4096;
  options.pool_bytes = slabs * options.slab_bytes;
  options.reserved_slabs = 0;
  options.max_tenant_bytes = 2 * options.pool_bytes;
  return options;
}

PageRequest Dense(int64_t bytes, int32_t count, TenantId tenant = kAlice) {
  PageRequest request;
  request.bytes = bytes;
  request.count = count;
  request.tenant = tenant;
  return request;
}

absl::StatusOr<PageLease> Reserve(PageAllocator* allocator, const PageRequest& request) {
  return allocator->Reserve({&request, 1});
}

TEST(PageAllocatorTest, ReturnsPagesWhenLeaseEnds) {
  PageAllocator allocator(SmallPool());
  {
    absl::StatusOr<PageLease> lease = Reserve(&allocator, Dense(1024, 5));
    ASSERT_TRUE(lease.ok()) << lease.status();
    EXPECT_EQ(lease->pages().size(), 5u);
    EXPECT_EQ(allocator.stats().total_pages(), 5);
    EXPECT_EQ(allocator.tenant_bytes(kAlice), 5 * 1024);
  }
  EXPECT_EQ(allocator.stats().total_pages(), 0);
  EXPECT_EQ(allocator.tenant_bytes(kAlice), 0);
  EXPECT_EQ(allocator.free_bytes(), 16 * 4096);
}

TEST(PageAllocatorTest, MovedLeaseReleasesOnce) {
  PageAllocator allocator(SmallPool());
  {
    PageLease first = *Reserve(&allocator, Dense(256, 3));
    PageLease second = std::move(first);
    first = *Reserve(&allocator, Dense(512, 1));
    EXPECT_EQ(allocator.stats().total_pages(), 4);
    second = std::move(first);
    EXPECT_EQ(allocator.stats().total_pages(), 1);
  }
  EXPECT_EQ(allocator.stats().total_pages(), 0);
}

TEST(PageAllocatorTest, PagesDoNotOverlapWhateverTheirSizes) {
  PageAllocator allocator(SmallPool(64));
  std::mt19937 random(7);
  std::vector<std::pair<PageId, int64_t>> held;
  for (int step = 0; step < 2000; ++step) {
    if (!held.empty() && random() % 3 == 0) {
      const size_t victim = random() % held.size();
      allocator.Release(held[victim].first);
      held.erase(held.begin() + static_cast<int64_t>(victim));
      continue;
    }
    PageRequest request = Dense((1 + random() % 40) * kPageAlignment, 1);
    request.state = static_cast<PageState>(random() % 3);
    absl::StatusOr<PageLease> lease = Reserve(&allocator, request);
    if (!lease.ok()) continue;
    held.emplace_back(lease->Take().front(), request.bytes);
    EXPECT_EQ(allocator.page_bytes(held.back().first), request.bytes);
  }
  std::sort(held.begin(), held.end());
  ASSERT_GT(held.size(), 10u);
  for (size_t i = 0; i + 1 < held.size(); ++i) {
    ASSERT_LE(PageOffset(held[i].first) + held[i].second, PageOffset(held[i + 1].first));
  }
  ASSERT_LE(PageOffset(held.back().first) + held.back().second, 64 * 4096);
  for (const auto& [page, bytes] : held) allocator.Release(page);
  EXPECT_EQ(allocator.stats().total_pages(), 0);
  EXPECT_EQ(allocator.free_bytes(), 64 * 4096);
}

TEST(PageAllocatorTest, ReservesAllRequestsOrNone) {
  PageAllocator allocator(SmallPool(4));
  const std::vector<PageRequest> requests = {Dense(4096, 3), Dense(2048, 3)};
  const absl::StatusOr<PageLease> lease = allocator.Reserve(requests);
  EXPECT_EQ(lease.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(absl::StrContains(lease.status().message(), "18432 bytes are needed"))
      << lease.status();
  EXPECT_EQ(allocator.stats().total_pages(), 0);
  EXPECT_EQ(allocator.free_bytes(), 4 * 4096);
}

TEST(PageAllocatorTest, PagesLargerThanASlabTakeSeveral) {
  PageAllocator allocator(SmallPool(4));
  PageLease lease = *Reserve(&allocator, Dense(3 * 4096, 1));
  EXPECT_EQ(allocator.free_bytes(), 4096);
  EXPECT_FALSE(Reserve(&allocator, Dense(2 * 4096, 1)).ok());
  lease = PageLease();
  EXPECT_TRUE(Reserve(&allocator, Dense(4 * 4096, 1)).ok());
}

TEST(PageAllocatorTest, SharedPagesLiveUntilTheLastReference) {
  PageAllocator allocator(SmallPool());
  const PageId page = Reserve(&allocator, Dense(1024, 1))->Take().front();
  allocator.AddRef(page);
  EXPECT_EQ(allocator.ref_count(page), 2);
  allocator.Release(page);
  EXPECT_EQ(allocator.stats().total_pages(), 1);
  allocator.Release(page);
  EXPECT_EQ(allocator.stats().total_pages(), 0);
}

TEST(PageAllocatorTest, CountsPagesByState) {
  PageAllocator allocator(SmallPool());
  PageRequest sealed = Dense(512, 2);
  sealed.state = PageState::kSealed;
  PageRequest basis = Dense(256, 1);
  basis.state = PageState::kBasis;
  const absl::StatusOr<PageLease> lease = allocator.Reserve({Dense(1024, 3), sealed, basis});
  ASSERT_TRUE(lease.ok());
  const PageStats stats = allocator.stats();
  EXPECT_EQ(stats.pages[0], 3);
  EXPECT_EQ(stats.pages[1], 2);
  EXPECT_EQ(stats.pages[2], 1);
  EXPECT_EQ(stats.bytes[1], 1024);
}

TEST(PageAllocatorTest, AnotherTenantsPagesAreToBeZeroed) {
  PageAllocator allocator(SmallPool(1));
  std::set<PageId> alices;
  {
    const PageLease lease = *Reserve(&allocator, Dense(1024, 4, kAlice));
    EXPECT_TRUE(lease.pages_to_zero().empty());
    alices.insert(lease.pages().begin(), lease.pages().end());
  }
  {
    const PageLease again = *Reserve(&allocator, Dense(1024, 4, kAlice));
    EXPECT_TRUE(again.pages_to_zero().empty());
  }
  // Another size class in the same slab is still Alice's memory.
  const PageLease bobs = *Reserve(&allocator, Dense(2048, 2, kBob));
  ASSERT_EQ(bobs.pages_to_zero().size(), 2u);
  EXPECT_EQ(bobs.pages_to_zero()[0].second, 2048);
}

TEST(PageAllocatorTest, SlabsOfSeveralTenantsAreZeroedForAll) {
  PageAllocator allocator(SmallPool(1));
  {
    const PageLease alices = *Reserve(&allocator, Dense(2048, 1, kAlice));
    const PageLease bobs = *Reserve(&allocator, Dense(2048, 1, kBob));
    EXPECT_TRUE(bobs.pages_to_zero().empty());
  }
  const PageLease lease = *Reserve(&allocator, Dense(4096, 1, kAlice));
  EXPECT_EQ(lease.pages_to_zero().size(), 1u);
}

TEST(PageAllocatorTest, TenantsHaveQuotas) {
  PageAllocatorOptions options = SmallPool();
  options.max_tenant_bytes = 4096;
  PageAllocator allocator(options);
  const PageLease held = *Reserve(&allocator, Dense(1024, 3, kAlice));
  const absl::Status refused = Reserve(&allocator, Dense(1024, 2, kAlice)).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(absl::StrContains(refused.message(), "3072 of 4096")) << refused;
  EXPECT_TRUE(Reserve(&allocator, Dense(1024, 2, kBob)).ok());
  EXPECT_EQ(allocator.tenant_bytes(kAlice), 3072);
}

TEST(PageAllocatorTest, OnlySealingTakesTheReserve) {
  PageAllocatorOptions options = SmallPool(16);
  options.reserved_slabs = 2;
  PageAllocator allocator(options);
  const PageLease dense = *Reserve(&allocator, Dense(4096, 14));
  EXPECT_FALSE(Reserve(&allocator, Dense(4096, 1)).ok());
  PageRequest sealed = Dense(2048, 4);
  sealed.state = PageState::kSealed;
  sealed.may_use_reserve = true;
  EXPECT_TRUE(Reserve(&allocator, sealed).ok());
}

// A pool and, some way behind it, a tier.
PageAllocatorOptions WithTier(int64_t pool_slabs, int64_t tier_slabs) {
  PageAllocatorOptions options = SmallPool(pool_slabs);
  options.exact_tier_begin = options.pool_bytes + 3 * kPageAlignment;
  options.exact_tier_bytes = tier_slabs * options.slab_bytes;
  options.max_tenant_exact_bytes = options.exact_tier_bytes;
  return options;
}

PageRequest Exact(int64_t bytes, int32_t count, TenantId tenant = kAlice) {
  PageRequest request = Dense(bytes, count, tenant);
  request.state = PageState::kExact;
  request.may_use_reserve = true;
  return request;
}

TEST(PageAllocatorTest, TheTierHasPagesOfItsOwn) {
  const PageAllocatorOptions options = WithTier(2, 3);
  PageAllocator allocator(options);
  const PageLease lease = *allocator.Reserve({Dense(2048, 4), Exact(1024, 12)});
  for (size_t i = 0; i < 16; ++i) {
    const int64_t offset = PageOffset(lease.pages()[i]);
    EXPECT_EQ(offset >= options.exact_tier_begin, i >= 4) << i;
    EXPECT_LE(offset + (i < 4 ? 2048 : 1024),
              i < 4 ? options.pool_bytes : options.exact_tier_begin + options.exact_tier_bytes);
    EXPECT_EQ(allocator.page_bytes(lease.pages()[i]), i < 4 ? 2048 : 1024);
  }
  EXPECT_EQ(allocator.tenant_bytes(kAlice), 8192);
  EXPECT_EQ(allocator.tenant_exact_bytes(kAlice), 12288);
  EXPECT_EQ(allocator.stats().bytes[3], 12288);
  EXPECT_EQ(allocator.stats().exact_tier_free_bytes, 0);
  EXPECT_EQ(allocator.stats().free_bytes, 0);
}

TEST(PageAllocatorTest, AFullTierTakesNothingOfThePool) {
  PageAllocator allocator(WithTier(4, 1));
  const PageLease held = *Reserve(&allocator, Exact(1024, 3));
  const absl::Status refused = allocator.Reserve({Dense(1024, 2), Exact(1024, 2)}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(absl::StrContains(refused.message(), "exact tier quota")) << refused;
  const absl::Status no_room = Reserve(&allocator, Exact(1024, 2, kBob)).status();
  EXPECT_TRUE(absl::StrContains(no_room.message(), "exact tier: 2048 bytes are needed")) << no_room;
  EXPECT_EQ(allocator.stats().total_pages(), 3);
  EXPECT_EQ(allocator.tenant_bytes(kAlice), 0);
  EXPECT_EQ(allocator.tenant_exact_bytes(kBob), 0);
}

TEST(PageAllocatorTest, TheTiersQuotaHoldsForSealingToo) {
  PageAllocatorOptions options = WithTier(4, 4);
  options.max_tenant_exact_bytes = 2048;
  PageAllocator allocator(options);
  const PageLease held = *Reserve(&allocator, Exact(1024, 2));
  const absl::Status refused = Reserve(&allocator, Exact(1024, 1)).status();
  EXPECT_TRUE(absl::StrContains(refused.message(), "2048 of 2048")) << refused;
  EXPECT_TRUE(Reserve(&allocator, Exact(1024, 1, kBob)).ok());
}

TEST(PageAllocatorTest, AnotherTenantsTierPagesAreToBeZeroed) {
  PageAllocator allocator(WithTier(1, 1));
  { const PageLease lease = *Reserve(&allocator, Exact(1024, 4, kAlice)); }
  const PageLease bobs = *Reserve(&allocator, Exact(2048, 2, kBob));
  EXPECT_EQ(bobs.pages_to_zero().size(), 2u);
}

}  // namespace
}  // namespace adaattn

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "kernels/cuda/page_ring.h"

namespace adaattn {
namespace {

// Pages of `sizes` through a ring of `ring_bytes`, each fetched as soon as there is room.
void Stream(const std::vector<int>& sizes, int ring_bytes) {
  PageRing ring;
  RingPage pages[kRingDepth];
  const int count = static_cast<int>(sizes.size());
  while (ring.done < count) {
    while (ring.fetched < count && ring.MakeRoom(sizes[ring.fetched], ring_bytes, pages)) {
      const RingPage page = ring.Next();
      const int end = page.offset + sizes[ring.fetched];
      ASSERT_LE(end, ring_bytes);
      for (int i = ring.done; i < ring.fetched; ++i) {
        const int begin = pages[i % kRingDepth].offset;
        ASSERT_TRUE(end <= begin || begin + sizes[i] <= page.offset)
            << "page " << ring.fetched << " over page " << i;
      }
      pages[ring.fetched % kRingDepth] = page;
      ring.Add(sizes[ring.fetched]);
    }
    ASSERT_GT(ring.fetched, ring.done);  // one page always fits
    ASSERT_LE(ring.fetched - ring.done, kRingDepth);
    ++ring.done;
  }
}

TEST(PageRingTest, KeepsPagesApartAndInside) {
  std::mt19937 random(7);
  for (const int ring_bytes : {2048, 10752, 21504}) {
    for (const int unit : {16, 128, 256}) {
      for (int i = 0; i < 500; ++i) {
        std::vector<int> sizes(60);
        std::uniform_int_distribution<int> length(1, ring_bytes / unit);
        for (int& size : sizes) size = unit * length(random);
        ASSERT_NO_FATAL_FAILURE(Stream(sizes, ring_bytes)) << ring_bytes << " " << unit;
      }
    }
  }
}

TEST(PageRingTest, WrapsWherePagesEndWithTheRing) {
  Stream({512, 512, 256, 512, 512, 256}, 1024);
  Stream({256, 768, 512, 512, 1024, 128}, 1024);
}

TEST(PageRingTest, UsesWhatThereIsRoomFor) {
  PageRing ring;
  RingPage pages[kRingDepth];
  for (int i = 0; i < kRingDepth; ++i) {
    ASSERT_TRUE(ring.MakeRoom(100, 1000, pages)) << i;
    pages[i] = ring.Next();
    ring.Add(100);
  }
  EXPECT_FALSE(ring.MakeRoom(100, 1000, pages));
  ++ring.done;
  EXPECT_TRUE(ring.MakeRoom(100, 1000, pages));
}

}  // namespace
}  // namespace adaattn

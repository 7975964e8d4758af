#ifndef ADAATTN_KERNELS_CUDA_PAGE_RING_H_
#define ADAATTN_KERNELS_CUDA_PAGE_RING_H_

// Room for pages of different lengths that come and go in order: where each lies in a ring of so
// many bytes. A page never wraps: what is left at the end is skipped.

#include <cstdint>

#include "kernels/host_device.h"

namespace adaattn {

inline constexpr int kRingDepth = 4;  // pages of a ring, at most

struct RingPage {
  int offset;    // in the ring
  int position;  // likewise, counted on from turn to turn
};

struct PageRing {
  int fetched = 0, done = 0;     // pages that came, pages that went
  int offset = 0, position = 0;  // of the next one

  // Whether there is room for `bytes` more (at most `ring_bytes`), which then stand at `offset`.
  // `pages` [kRingDepth]: what Next() said of page i at i % kRingDepth.
  ADAATTN_HD bool MakeRoom(int bytes, int ring_bytes, const RingPage* pages) {
    if (fetched == done) {
      offset = 0;
      return true;
    }
    if (fetched - done == kRingDepth) return false;
    const bool wraps = offset + bytes > ring_bytes;
    const int skipped = wraps ? ring_bytes - offset : 0;  // 0, too, where pages end with the ring
    if (position + skipped + bytes - pages[done % kRingDepth].position > ring_bytes) return false;
    position += skipped;
    if (wraps) offset = 0;
    return true;
  }
  ADAATTN_HD RingPage Next() const { return RingPage{offset, position}; }
  ADAATTN_HD void Add(int bytes) {
    offset += bytes;
    position += bytes;
    ++fetched;
  }
};

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_CUDA_PAGE_RING_H_

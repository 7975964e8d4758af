#include "server/head_sums.h"

#include <algorithm>

namespace adaattn {

HeadSums SumHead(const HeadDecision& head, int32_t head_dim) {
  int64_t pages = 0, key_bits = 0, ranks = 0, value_bits = 0, value_pages = 0;
  for (int32_t i = 0; i < kNumKeyDepths; ++i) {
    pages += head.key_pages[i];
    key_bits += int64_t{head.key_pages[i]} * KeyDepthBits(i);
    ranks += int64_t{head.key_pages[i]} * ChunkedRank(head_dim, KeyDepthChunks(i));
  }
  for (int32_t i = 0; i < kNumValueDepths; ++i) {
    value_pages += head.value_pages[i];
    value_bits += int64_t{head.value_pages[i]} * 2 * i;
  }
  HeadSums sums;
  sums.sealed_pages = pages;
  sums.rank = head_dim;
  if (value_pages > 0) {
    sums.value_bits = static_cast<double>(value_bits) / static_cast<double>(value_pages);
  }
  if (pages == 0) return sums;
  sums.key_bits = static_cast<double>(key_bits) / static_cast<double>(pages);
  sums.rank = static_cast<double>(ranks) / static_cast<double>(pages);
  const int64_t full = pages * head_dim;
  sums.rank_quarter = std::clamp<int64_t>((kRankQuarters * ranks + full - 1) / full - 1, 0, 3);
  return sums;
}

}  // namespace adaattn

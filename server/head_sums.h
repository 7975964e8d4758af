#ifndef ADAATTN_SERVER_HEAD_SUMS_H_
#define ADAATTN_SERVER_HEAD_SUMS_H_

#include <cstdint>

#include "kernels/attention.h"

namespace adaattn {

inline constexpr int64_t kRankQuarters = 4;

// One kv head's step, over its sealed pages.
struct HeadSums {
  int64_t sealed_pages = 0;
  double key_bits = 16;  // means; what dense pages have where nothing is sealed
  double value_bits = 16;
  double rank = 0;
  int64_t rank_quarter = kRankQuarters - 1;  // of head_dim, into which the mean rank falls
};

HeadSums SumHead(const HeadDecision& head, int32_t head_dim);

}  // namespace adaattn

#endif  // ADAATTN_SERVER_HEAD_SUMS_H_

#ifndef ADAATTN_KERNELS_FORMAT_PLANES_H_
#define ADAATTN_KERNELS_FORMAT_PLANES_H_

// Where the bits of one element stand inside a tile of 64 tokens x 16 channels. Sealing happens
// once in 64 tokens and reading in every step, so each backend stores tiles in the order its
// kernels want; a pool holds one order only.
//
// Three kinds of tiles: keys' first four bits (kKeyTileBytes), keys' 2-bit refinements and values'
// 2-bit planes (kPlaneTileBytes each). Plane p of the values holds code bits 7-2p and 6-2p; the key
// refinements hold bits 3-2, then 1-0.

#include <cstdint>

#include "kernels/format/page_layout.h"
#include "kernels/host_device.h"

namespace adaattn {

enum class TileOrder : uint8_t {
  // Little-endian words of 32 bits, one per token (keys) or channel (values), that pair neighbours
  // of the summed dimension 16 bits apart: shift and mask give both factors of a 16-bit multiply
  // and add (pmaddwd), a lane per token or channel.
  //   key nibbles      word 64*(c/8) + token: channel c at bit 16*(c&1) + 4*(c%8/2)
  //   key refinements  word token: channel c at bit 16*(c&1) + 2*(c/2)
  //   value planes     word 16*(token/16) + c: token t at bit 16*(t&1) + 2*(t%16/2)
  kLanes = 0,
  // The A fragments of mma.m16n8k16 (lane = 4g + q; element a_e at row g + 8*(e>>1 & 1), column
  // 2q + (e & 1) + 8*(e >> 2)); the two elements of one register stand 16 bits apart.
  //   key nibbles      rows = tokens 16t..16t+15, columns = channels. Lane owns bytes 16*lane..+15:
  //                    word t, a_2j at bit 4j, a_2j+1 at bit 16+4j
  //   key refinements  likewise; lane owns bytes 8*lane..+7: word t/2, a_2j at bit 8*(t&1)+2j,
  //                    a_2j+1 at bit 16+8*(t&1)+2j
  //   value planes     as the key refinements, but rows = channels, columns = tokens 16t..16t+15
  kMma = 1,
};

// Bits shift.. of byte `byte`, least significant first.
struct BitPosition {
  int32_t byte = 0;
  int32_t shift = 0;
};

namespace internal {
struct FragmentPosition {
  int32_t lane = 0;
  int32_t element = 0;  // e of a_e
};
ADAATTN_HD constexpr FragmentPosition FragmentOf(int32_t row, int32_t column) {
  return FragmentPosition{(row % 8) * 4 + (column % 8) / 2,
                          (column / 8) * 4 + (row / 8) * 2 + column % 2};
}
// Bit `bit` of word `word`.
ADAATTN_HD constexpr BitPosition WordPosition(int32_t word, int32_t bit) {
  return BitPosition{4 * word + bit / 8, bit % 8};
}
ADAATTN_HD constexpr BitPosition MmaPlanePosition(int32_t row, int32_t column, int32_t step) {
  const FragmentPosition at = FragmentOf(row, column);
  const int32_t bit = 8 * (step % 2) + 2 * (at.element / 2) + 16 * (at.element % 2);
  return BitPosition{8 * at.lane + 4 * (step / 2) + bit / 8, bit % 8};
}
}  // namespace internal

// `token` is in [0, 64), `channel` in [0, 16) of the tile.
ADAATTN_HD constexpr BitPosition KeyNibblePosition(TileOrder order, int32_t token,
                                                   int32_t channel) {
  if (order == TileOrder::kLanes) {
    return internal::WordPosition(64 * (channel / 8) + token,
                                  16 * (channel % 2) + 4 * (channel % 8 / 2));
  }
  const internal::FragmentPosition at = internal::FragmentOf(token % 16, channel);
  const int32_t bit = 4 * (at.element / 2) + 16 * (at.element % 2);
  return BitPosition{16 * at.lane + 4 * (token / 16) + bit / 8, bit % 8};
}

ADAATTN_HD constexpr BitPosition KeyFinePosition(TileOrder order, int32_t token, int32_t channel) {
  if (order == TileOrder::kLanes) {
    return internal::WordPosition(token, 16 * (channel % 2) + 2 * (channel / 2));
  }
  return internal::MmaPlanePosition(token % 16, channel, token / 16);
}

ADAATTN_HD constexpr BitPosition ValuePlanePosition(TileOrder order, int32_t token,
                                                    int32_t channel) {
  if (order == TileOrder::kLanes) {
    return internal::WordPosition(16 * (token / 16) + channel,
                                  16 * (token % 2) + 2 * (token % 16 / 2));
  }
  return internal::MmaPlanePosition(channel, token % 16, token / 16);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_FORMAT_PLANES_H_

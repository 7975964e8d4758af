#include <gtest/gtest.h>

#include <set>
#include <string>

#include "kernels/format/planes.h"

namespace adaattn {
namespace {

using Position = BitPosition (*)(TileOrder, int32_t, int32_t);

struct PlaneCase {
  const char* name;
  Position position;
  int32_t bits;
  int32_t tile_bytes;
};

BitPosition NibblePosition(TileOrder order, int32_t token, int32_t channel) {
  return KeyNibblePosition(order, token, channel);
}
BitPosition FinePosition(TileOrder order, int32_t token, int32_t channel) {
  return KeyFinePosition(order, token, channel);
}
BitPosition ValuePosition(TileOrder order, int32_t token, int32_t channel) {
  return ValuePlanePosition(order, token, channel);
}

constexpr PlaneCase kPlanes[] = {
    {"key nibbles", NibblePosition, 4, kKeyTileBytes},
    {"key refinements", FinePosition, 2, kPlaneTileBytes},
    {"value planes", ValuePosition, 2, kPlaneTileBytes},
};

TEST(PlanesTest, EveryElementHasItsOwnBitsAndNoBitIsLeft) {
  for (const TileOrder order : {TileOrder::kLanes, TileOrder::kMma}) {
    for (const PlaneCase& plane : kPlanes) {
      std::set<int32_t> used;
      for (int32_t token = 0; token < kPageTokens; ++token) {
        for (int32_t channel = 0; channel < kTileChannels; ++channel) {
          const BitPosition at = plane.position(order, token, channel);
          ASSERT_GE(at.byte, 0) << plane.name;
          ASSERT_LT(at.byte, plane.tile_bytes) << plane.name;
          ASSERT_EQ(at.shift % plane.bits, 0) << plane.name;
          ASSERT_LE(at.shift + plane.bits, 8) << plane.name;
          for (int32_t bit = 0; bit < plane.bits; ++bit) {
            ASSERT_TRUE(used.insert(8 * at.byte + at.shift + bit).second)
                << plane.name << " token " << token << " channel " << channel;
          }
        }
      }
      EXPECT_EQ(used.size(), static_cast<size_t>(8 * plane.tile_bytes)) << plane.name;
    }
  }
}

// Where bit `bit` of little-endian word `word` of a lane with `words` words lies.
BitPosition InWord(int32_t lane, int32_t words, int32_t word, int32_t bit) {
  return BitPosition{4 * (lane * words + word) + bit / 8, bit % 8};
}

void ExpectAt(BitPosition actual, BitPosition expected) {
  EXPECT_EQ(actual.byte, expected.byte);
  EXPECT_EQ(actual.shift, expected.shift);
}

TEST(PlanesTest, MmaTilesHoldFragmentsAsTheInstructionWantsThem) {
  for (int32_t lane = 0; lane < 32; ++lane) {
    for (int32_t e = 0; e < 8; ++e) {
      const int32_t row = lane / 4 + 8 * ((e >> 1) & 1);
      const int32_t column = 2 * (lane % 4) + (e & 1) + 8 * (e >> 2);
      for (int32_t t = 0; t < 4; ++t) {
        const int32_t nibble = e % 2 == 0 ? 4 * (e / 2) : 16 + 4 * (e / 2);
        ExpectAt(KeyNibblePosition(TileOrder::kMma, 16 * t + row, column),
                 InWord(lane, 4, t, nibble));
        const int32_t pair = (e % 2 == 0 ? 0 : 16) + 8 * (t & 1) + 2 * (e / 2);
        ExpectAt(KeyFinePosition(TileOrder::kMma, 16 * t + row, column),
                 InWord(lane, 2, t / 2, pair));
        ExpectAt(ValuePlanePosition(TileOrder::kMma, 16 * t + column, row),
                 InWord(lane, 2, t / 2, pair));
      }
    }
  }
}

TEST(PlanesTest, LaneTilesPairNeighboursOfTheSummedDimensionInOneWord) {
  for (int32_t token = 0; token < kPageTokens; ++token) {
    for (int32_t c = 0; c < kTileChannels; ++c) {
      ExpectAt(KeyNibblePosition(TileOrder::kLanes, token, c),
               InWord(0, 1, 64 * (c / 8) + token, 16 * (c & 1) + 4 * (c % 8 / 2)));
      ExpectAt(KeyFinePosition(TileOrder::kLanes, token, c),
               InWord(0, 1, token, 16 * (c & 1) + 2 * (c / 2)));
      ExpectAt(ValuePlanePosition(TileOrder::kLanes, token, c),
               InWord(0, 1, 16 * (token / 16) + c, 16 * (token & 1) + 2 * (token % 16 / 2)));
    }
  }
}

TEST(PageLayoutTest, SectionsFollowEachOtherAndAddUpToTheReadBytes) {
  for (const int32_t head_dim : {64, 80, 96, 128, 256}) {
    for (const int32_t stored_bits : {4, 6, 8}) {
      const AttentionShape shape{6, 3, head_dim};
      const PageLayout layout = MakePageLayout(shape, stored_bits);
      int64_t end = 0, keys = 0, values = 0;
      const auto follow = [&end](const PageLayout::Section& section, int64_t* total) {
        EXPECT_EQ(section.offset, end);
        end += 3 * section.bytes;
        *total += section.bytes;
      };
      follow(layout.key_scales, &keys);
      follow(layout.value_summary, &values);
      for (int32_t chunk = 0; chunk < layout.num_chunks; ++chunk) {
        follow(layout.key_base[chunk], &keys);
        EXPECT_EQ(keys, KeyReadBytes(head_dim, 4, chunk + 1));
      }
      for (int32_t p = 0; p < (stored_bits - 4) / 2; ++p) follow(layout.key_fine[p], &keys);
      EXPECT_EQ(keys, KeyReadBytes(head_dim, stored_bits, layout.num_chunks));
      EXPECT_EQ(values, ValueReadBytes(head_dim, 0));
      follow(layout.value_scales, &values);
      for (int32_t p = 0; p < stored_bits / 2; ++p) {
        follow(layout.value_plane[p], &values);
        EXPECT_EQ(values, ValueReadBytes(head_dim, 2 * (p + 1)));
      }
      EXPECT_LE(end, layout.page_bytes);
      EXPECT_LT(layout.page_bytes - end, kPageAlignment);
    }
  }
}

}  // namespace
}  // namespace adaattn

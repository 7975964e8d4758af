#ifndef ADAATTN_KERNELS_POLICY_COUNTER_RANDOM_H_
#define ADAATTN_KERNELS_POLICY_COUNTER_RANDOM_H_

// Random numbers by their place: a function of seed, index and stream, so that any number of
// threads, on the host or a device, draw the same ones in any order. Philox4x32-10 (Salmon, Moraes,
// Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011), index and stream its counter.

#include <cmath>
#include <cstdint>

#include "kernels/host_device.h"

namespace adaattn {

// Of .975 of the normal distribution: half of a 95 % interval, in standard errors.
inline constexpr double kNormalQuantile = 1.959964;

struct RandomBlock {
  uint32_t word[4];
};

ADAATTN_HD RandomBlock RandomBlockAt(uint64_t seed, uint64_t index, uint64_t stream) {
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  RandomBlock x{{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32),
                 static_cast<uint32_t>(stream), static_cast<uint32_t>(stream >> 32)}};
  for (int32_t round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xd2511f53u} * x.word[0];
    const uint64_t second = uint64_t{0xcd9e8d57u} * x.word[2];
    x = RandomBlock{
        {static_cast<uint32_t>(second >> 32) ^ x.word[1] ^ key[0], static_cast<uint32_t>(second),
         static_cast<uint32_t>(first >> 32) ^ x.word[3] ^ key[1], static_cast<uint32_t>(first)}};
    key[0] += 0x9e3779b9u;
    key[1] += 0xbb67ae85u;
  }
  return x;
}

// 53 bits of [0, 1).
ADAATTN_HD double UnitFromWords(uint32_t high, uint32_t low) {
  return (static_cast<double>(high >> 5) * 67108864.0 + static_cast<double>(low >> 6)) /
         9007199254740992.0;
}

// Uniform in [0, 1).
ADAATTN_HD double UniformAt(uint64_t seed, uint64_t index, uint64_t stream) {
  const RandomBlock x = RandomBlockAt(seed, index, stream);
  return UnitFromWords(x.word[0], x.word[1]);
}

// 1 or -1.
ADAATTN_HD double SignAt(uint64_t seed, uint64_t index, uint64_t stream) {
  return (RandomBlockAt(seed, index, stream).word[0] & 1u) == 0 ? 1.0 : -1.0;
}

// Standard normal (Box and Muller, 1958).
ADAATTN_HD double NormalAt(uint64_t seed, uint64_t index, uint64_t stream) {
  const RandomBlock x = RandomBlockAt(seed, index, stream);
  const double radius = 1.0 - UnitFromWords(x.word[0], x.word[1]);  // (0, 1]
  const double turn = UnitFromWords(x.word[2], x.word[3]);
  return sqrt(-2.0 * log(radius)) * cos(6.283185307179586 * turn);
}

}  // namespace adaattn

#endif  // ADAATTN_KERNELS_POLICY_COUNTER_RANDOM_H_

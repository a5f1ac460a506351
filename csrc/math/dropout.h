// Which elements a dropout keeps: a function of the seed and the place alone, the same on every device. The place is
// that of the batch: the row's number in it, whichever rows of it a process has.
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace d2net::math {

// The n-th number of the generator SplitMix64 (Steele, Lea, Flood 2014) that begins at `seed`.
D2NET_HD inline uint64_t split_mix(uint64_t seed, uint64_t n) {
  uint64_t z = seed + (n + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

// An element is dropped where its 16 random bits are below the threshold.
struct Dropout {
  uint32_t threshold;  // of 65536
  double scale;        // of what is kept: 1 / the share that is

  D2NET_HD explicit Dropout(double share) {
    const double rounded = share * 65536 + 0.5;
    threshold = rounded < 65535 ? uint32_t(rounded) : 65535;
    scale = 65536.0 / double(65536 - threshold);
  }

  // Bits of the 8 elements of byte `place`, the row's number times its bytes plus that in it: 1 where they are kept.
  D2NET_HD uint32_t kept(uint64_t seed, uint64_t place) const {
    uint32_t bits = 0;
    for (uint32_t half = 0; half < 2; ++half) {
      const uint64_t random = split_mix(seed, 2 * place + half);
      for (uint32_t i = 0; i < 4; ++i) {
        bits |= uint32_t((uint32_t(random >> 16 * i) & 0xffffu) >= threshold) << (4 * half + i);
      }
    }
    return bits;
  }
};

}  // namespace d2net::math

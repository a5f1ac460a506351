// A set of positions in [0, n) as a bitmap with a bitmap over its words, and so on up to one word: 64 neighbours share
// a word, so a neighbour is found in one or two steps, and in log n / log 64 at the worst.
#pragma once

#include <cstdint>
#include <vector>

#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace d2net::cpu {

class PositionSet {
 public:
  bool empty() const { return n_ == 0; }
  void clear() { n_ = 0; }

  // Adds to a set over [0, n), n the same until the next clear().
  void insert(int64_t position, int64_t n) {
    if (empty()) allocate(n);
    for (const Level& level : levels_) {
      words_[level.first + (position >> 6)] |= uint64_t(1) << (position & 63);
      position >>= 6;
    }
  }

  // Largest member below `position` and smallest member from `position` on; -1 where there is none.
  int64_t before(int64_t position) const {
    for (std::size_t l = 0; l < levels_.size(); ++l) {
      const uint64_t lower = words_[levels_[l].first + (position >> 6)] & ((uint64_t(1) << (position & 63)) - 1);
      position >>= 6;
      if (lower == 0) continue;
      position = position << 6 | highest(lower);
      while (l-- > 0) position = position << 6 | highest(words_[levels_[l].first + position]);
      return position;
    }
    return -1;
  }
  int64_t from(int64_t position) const {
    for (std::size_t l = 0; l < levels_.size(); ++l) {
      if (position >= levels_[l].n) return -1;
      const uint64_t upper = words_[levels_[l].first + (position >> 6)] & (~uint64_t(0) << (position & 63));
      position >>= 6;
      if (upper == 0) {
        ++position;
        continue;
      }
      position = position << 6 | lowest(upper);
      while (l-- > 0) position = position << 6 | lowest(words_[levels_[l].first + position]);
      return position;
    }
    return -1;
  }

 private:
  struct Level {
    int64_t first;  // word
    int64_t n;      // positions
  };

  void allocate(int64_t n) {
    n_ = n;
    levels_.clear();
    int64_t words = 0;
    for (int64_t left = n;; left = (left + 63) / 64) {
      levels_.push_back({words, left});
      words += (left + 63) / 64;
      if (left <= 64) break;
    }
    words_.assign(words, 0);
  }

#if defined(_MSC_VER)
  static int64_t highest(uint64_t word) {
    unsigned long bit;
    _BitScanReverse64(&bit, word);
    return bit;
  }
  static int64_t lowest(uint64_t word) {
    unsigned long bit;
    _BitScanForward64(&bit, word);
    return bit;
  }
#else
  static int64_t highest(uint64_t word) { return 63 - __builtin_clzll(word); }
  static int64_t lowest(uint64_t word) { return __builtin_ctzll(word); }
#endif

  int64_t n_ = 0;
  std::vector<Level> levels_;
  std::vector<uint64_t> words_;
};

}  // namespace d2net::cpu

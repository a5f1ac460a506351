// Sorts indices by float or integer keys: a radix sort, linear, stable, and several times faster than a comparison sort
// that reads its keys through indices.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu/common/pages.h"

namespace d2net::cpu {

// Unsigned integers in the order of the floats. -0.0 and 0.0 have the same key; the order of NaN is not defined.
inline uint32_t ordered_key(float x) {
  x += 0.0f;  // -0.0 becomes 0.0
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
inline uint64_t ordered_key(double x) {
  x += 0.0;
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits >> 63 ? ~bits : bits | uint64_t(1) << 63;
}

// Keeps its memory between calls.
class Order {
 public:
  // The indices 0 … n - 1 by rising key(i), which is uint32_t or uint64_t; equal keys by index. Valid until the next
  // call.
  template <typename Key>
  const HugeVector<uint32_t>& by(int64_t n, Key key) {
    if (n > std::numeric_limits<uint32_t>::max()) {
      throw std::length_error("cannot sort " + std::to_string(n) + " items, 4294967295 at most");
    }
    // A word holds the upper 32 bits of an item's key above its index, so that a pass reads and writes memory in order.
    constexpr int kLower = std::is_same_v<decltype(key(int64_t(0))), uint64_t> ? 32 : 0;
    words_.resize(n);
    for (int64_t i = 0; i < n; ++i) words_[i] = uint64_t(uint32_t(key(i) >> kLower)) << 32 | uint64_t(i);
    sort_words();
    if constexpr (kLower > 0) {
      // Few doubles agree in their upper half, so sorting those runs costs little.
      for (auto first = words_.begin(); first != words_.end();) {
        auto last = first + 1;
        while (last != words_.end() && *last >> 32 == *first >> 32) ++last;
        if (last - first > 1) {
          std::sort(first, last, [&](uint64_t a, uint64_t b) {
            const auto key_a = key(uint32_t(a)), key_b = key(uint32_t(b));
            return key_a != key_b ? key_a < key_b : a < b;
          });
        }
        first = last;
      }
    }
    order_.resize(n);
    for (int64_t i = 0; i < n; ++i) order_[i] = uint32_t(words_[i]);
    return order_;
  }

 private:
  void sort_words() {
    const std::size_t n = words_.size();
    if (n < kFewWords) {
      std::sort(words_.begin(), words_.end());
      return;
    }
    std::array<std::array<uint32_t, 256>, 4> count{};
    for (const uint64_t word : words_) {
      for (int byte = 0; byte < 4; ++byte) ++count[byte][word >> (32 + 8 * byte) & 255];
    }
    spare_.resize(n);
    for (int byte = 0; byte < 4; ++byte) {
      const int shift = 32 + 8 * byte;
      if (count[byte][words_[0] >> shift & 255] == n) continue;  // all equal
      uint32_t sum = 0;
      for (uint32_t& c : count[byte]) {
        const uint32_t here = c;
        c = sum;
        sum += here;
      }
      for (const uint64_t word : words_) spare_[count[byte][word >> shift & 255]++] = word;
      words_.swap(spare_);
    }
  }

  static constexpr std::size_t kFewWords = 300;
  HugeVector<uint64_t> words_, spare_;
  HugeVector<uint32_t> order_;
};

}  // namespace d2net::cpu

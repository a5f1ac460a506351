// Integer keys in the order of the floating-point numbers they stand for: comparing keys compares numbers, except that
// NaN (any) has one key above that of +Inf. -0 and +0 have the same key.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "math/host_device.h"

namespace d2net::math {

// Key: as wide as the number. kNaN leaves room for one key above it and kMinusInf for one below.
template <typename T>
struct Ordered;
template <>
struct Ordered<float> {
  using Key = int32_t;
  static constexpr Key kNaN = std::numeric_limits<Key>::max() - 1;
  static constexpr Key kMinusInf = Key(0xff800000u ^ 0x7fffffffu);
};
template <>
struct Ordered<double> {
  using Key = int64_t;
  static constexpr Key kNaN = std::numeric_limits<Key>::max() - 1;
  static constexpr Key kMinusInf = Key(0xfff0000000000000u ^ 0x7fffffffffffffffu);
};

template <typename Key>
constexpr Key kLargest = std::numeric_limits<Key>::max();

// The bits of a negative number grow as it falls: flip all but the sign. Its own inverse.
template <typename Key>
D2NET_HD inline Key flip_negative(Key bits) {
  return bits ^ ((bits >> (8 * sizeof(Key) - 1)) & kLargest<Key>);
}

template <typename T>
D2NET_HD inline typename Ordered<T>::Key ordered_key(T x) {
  const T unsigned_zero = x + T(0);
  typename Ordered<T>::Key bits;
  std::memcpy(&bits, &unsigned_zero, sizeof bits);
  return x != x ? Ordered<T>::kNaN : flip_negative(bits);
}

template <typename T>
D2NET_HD inline T ordered_value(typename Ordered<T>::Key key) {
  const typename Ordered<T>::Key bits = flip_negative(key);
  T x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace d2net::math

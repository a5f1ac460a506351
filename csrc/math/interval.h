// Two segments and their IoU, for host and device.
#pragma once

#include <limits>

#include "math/host_device.h"

namespace d2net {

// A segment that ends where it starts, or before, is [0, 0): no ends of infinity are then subtracted from each other.
// NaN in either end is NaN in the length, and so in every IoU.
template <typename T>
struct Interval {
  static constexpr T kLargest = std::numeric_limits<T>::max();
  T start, end, length;
};

template <typename T>
D2NET_HD inline Interval<T> interval_of(T start, T end) {
  const bool empty = end <= start;
  return {empty ? T(0) : start, empty ? T(0) : end, empty ? T(0) : end - start};
}

// In [0, 1], and the same with a and b exchanged. An intersection is never longer than one of the two, so that the
// union is 0 only where both are empty. The intersection is kept finite, so that lengths that add up to infinity give
// 0.
template <typename T>
D2NET_HD inline T iou_of(const Interval<T>& a, const Interval<T>& b) {
  const T end = a.end < b.end ? a.end : b.end, start = a.start > b.start ? a.start : b.start;
  const T finite = end - start < Interval<T>::kLargest ? end - start : Interval<T>::kLargest;
  const T intersection = finite > T(0) ? finite : T(0);
  const T union_length = a.length + b.length - intersection;
  return intersection / (union_length == T(0) ? T(1) : union_length);
}

}  // namespace d2net

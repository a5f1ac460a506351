// Which entries of a column count among its k largest; shared by the forward and backward of all backends.
#pragma once

#include "math/ordered_float.h"
#include "math/rows.h"

namespace d2net::math {

// k = max(1, ceil(length / divisor)).
D2NET_HD inline int64_t topk_count(int64_t length, int64_t divisor) {
  const int64_t k = length / divisor + (length % divisor != 0);
  return k < 1 ? 1 : k;
}

// Whether entry x of time step `row` comes no later than the k-th, (kth, last), in the order of falling value and then
// rising time. kth as its key.
template <typename T>
D2NET_HD inline bool among_topk(T x, int32_t row, typename Ordered<T>::Key kth, int32_t last) {
  return ordered_key(x) >= kth + (row > last);  // no overflow: no key is the largest integer
}

}  // namespace d2net::math

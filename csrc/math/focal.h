// One class of one recording in Eq. 4, for host and device.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace d2net {

template <typename T>
struct Focal {
  T loss, to_score, to_weight;  // and its gradient to the pooled score and to the weight of Eq. 3
};

// -log(q) (1 - q + weight)^beta, with q = p for a class of the recording and 1 - p for others;
// p is `score` clamped to [floor, 1 - floor], with gradient 0 outside.
template <typename T>
D2NET_HD inline Focal<T> focal(T score, bool positive, T weight, T beta, T floor) {
  const T lowest = floor, highest = T(1) - floor;
  const bool inside = !(score < lowest || score > highest);  // NaN stays
  const T p = inside ? score : score < lowest ? lowest : highest;
  const T q = positive ? p : T(1) - p, sign = positive ? T(1) : T(-1);
  const T surprise = -std::log(q);
  if (beta == T(0)) return {surprise, inside ? -sign / q : T(0), T(0)};
  const T miss = (positive ? T(1) - p : p) + weight;
  const T power = beta == T(2) ? miss * miss : std::pow(miss, beta);
  const T slope = surprise * (beta == T(2) ? T(2) * miss : beta * std::pow(miss, beta - T(1)));
  return {surprise * power, inside ? -sign * (power / q + slope) : T(0), slope};
}

}  // namespace d2net

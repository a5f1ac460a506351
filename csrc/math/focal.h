// One class of one recording in Eq. 4, for host and device.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace d2net {

template <typename T>
struct Focal {
  T loss;
  T grad_score, grad_weight;  // with respect to the pooled score and to the weight of Eq. 3
};

// -log(q) (1 - q + weight)^beta, with q = p for a class of the recording and 1 - p for others;
// p is `score` clamped to [eps, 1 - eps], with gradient 0 outside.
template <typename T>
D2NET_HD inline Focal<T> focal(T score, bool positive, T weight, T beta, T eps) {
  const T lowest = eps, highest = T(1) - eps;
  const bool inside = !(score < lowest || score > highest);  // NaN stays
  const T p = inside ? score : score < lowest ? lowest : highest;
  const T q = positive ? p : T(1) - p, sign = positive ? T(1) : T(-1);
  const T nll = -std::log(q);
  if (beta == T(0)) return {nll, inside ? -sign / q : T(0), T(0)};
  const T base = (positive ? T(1) - p : p) + weight;
  const T factor = beta == T(2) ? base * base : std::pow(base, beta);
  const T slope = nll * (beta == T(2) ? T(2) * base : beta * std::pow(base, beta - T(1)));
  return {nll * factor, inside ? -sign * (factor / q + slope) : T(0), slope};
}

}  // namespace d2net

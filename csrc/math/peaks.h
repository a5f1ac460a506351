// The scores of one recording in P_2 (Eq. 10), for host and device.
#pragma once

#include "math/host_device.h"

namespace d2net {

// Without a share (below 0): the clamped scores. With one: those above that share of the best, over their sum. compare
// every score, then add every score, then ask. One NaN makes the scores that are kept NaN.
template <typename T>
struct Peaks {
  T floor, share, best;
  double sum = 0;

  D2NET_HD Peaks(T floor_, T share_) : floor(floor_), share(share_), best(T(0)) {}

  D2NET_HD bool inside(T score) const { return !(score < floor || score > T(1) - floor); }  // where the clamp is off
  D2NET_HD T clamped(T score) const { return inside(score) ? score : score < floor ? floor : T(1) - floor; }
  D2NET_HD bool kept(T score) const { return share < T(0) || !(clamped(score) <= share * best); }

  D2NET_HD void compare(T score) {
    const T p = clamped(score);
    if (p > best) best = p;
  }
  D2NET_HD void add(T score) { sum += kept(score) ? double(clamped(score)) : 0.0; }

  D2NET_HD T value(T score) const {
    if (share < T(0)) return clamped(score);
    return kept(score) ? T(clamped(score) / sum) : T(0);
  }
  // To the score, from `grad` to its value and `along`, the sum of all gradients times their values.
  D2NET_HD T gradient(T score, T grad, double along) const {
    if (!inside(score) || !kept(score)) return T(0);
    return share < T(0) ? grad : T((grad - along) / sum);
  }
};

}  // namespace d2net

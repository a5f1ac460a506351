// The scores of one recording in P_2 (Eq. 10), for host and device.
#pragma once

#include "math/host_device.h"

namespace d2net {

// Scores are clamped to [eps, 1 - eps]. fraction below 0: these are the values. Otherwise those above that fraction of
// the largest are kept and divided by their sum, and the others are 0. Call compare() with every score, then add() with
// every score, then the rest. One NaN makes the scores that are kept NaN.
template <typename T>
struct KeptScores {
  T eps, fraction, largest;
  double sum = 0;

  D2NET_HD KeptScores(T eps_, T fraction_) : eps(eps_), fraction(fraction_), largest(T(0)) {}

  D2NET_HD bool inside(T score) const { return !(score < eps || score > T(1) - eps); }  // not clamped
  D2NET_HD T clamped(T score) const { return inside(score) ? score : score < eps ? eps : T(1) - eps; }
  D2NET_HD bool kept(T score) const { return fraction < T(0) || !(clamped(score) <= fraction * largest); }

  D2NET_HD void compare(T score) {
    const T p = clamped(score);
    if (p > largest) largest = p;
  }
  D2NET_HD void add(T score) { sum += kept(score) ? double(clamped(score)) : 0.0; }

  D2NET_HD T value(T score) const {
    if (fraction < T(0)) return clamped(score);
    return kept(score) ? T(clamped(score) / sum) : T(0);
  }
  // The gradient with respect to a score. grad: with respect to its value; dot: the sum over all scores of grad times
  // value.
  D2NET_HD T gradient(T score, T grad, double dot) const {
    if (!inside(score) || !kept(score)) return T(0);
    return fraction < T(0) ? grad : T((grad - dot) / sum);
  }
};

}  // namespace d2net

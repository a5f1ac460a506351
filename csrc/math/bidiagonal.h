// Extreme singular triplets of an upper bidiagonal matrix B (n x n).
//
// They are eigenpairs of the symmetric tridiagonal matrix of order 2n that has a zero diagonal and beside it the
// entries of B in their order, b = (d_0, e_0, d_1, ..., e_{n-2}, d_{n-1}): its eigenvalues are the singular values and
// their negatives, and the eigenvector of sigma is (v_0, u_0, v_1, u_1, ...) / sqrt(2). Unlike B^T B it keeps the
// relative accuracy of small singular values. Entries are expected to be of order 1 or smaller.
#pragma once

#include <cmath>

#include "math/host_device.h"

namespace d2net {

// Numbers smaller than this are taken for zero, so that no quotient overflows.
constexpr double kNegligible = 1e-280;

// Householder reflector H = I - tau v v^T with v_0 = 1 that maps x to (beta, 0, ..., 0).
struct Reflector {
  double beta, tau;
  double scale;  // v_i = scale * x_i for i > 0
};

// x_0 and the sum of the squares of the other x_i, which are taken for zeros when the sum is negligible: a reflector
// made of denormal numbers would not be orthogonal.
[[gnu::always_inline]] D2NET_HD inline Reflector reflector(double x0, double squares) {
  if (!(squares > kNegligible)) return {x0, 0, 0};
  const double beta = x0 > 0 ? -std::sqrt(x0 * x0 + squares) : std::sqrt(x0 * x0 + squares);
  return {beta, (beta - x0) / beta, 1 / (x0 - beta)};
}

// For each of kShifts positive x: how many singular values are >= x (Sturm count). squares: b_i^2, 2n - 1 of them.
template <int kShifts>
[[gnu::always_inline]] D2NET_HD inline void count_at_least(const double* squares, int n, const double* x, int* count) {
  double pivot[kShifts], least[kShifts];
  for (int s = 0; s < kShifts; ++s) {
    pivot[s] = -x[s];
    least[s] = 0;
  }
  for (int i = 0; i < 2 * n - 1; ++i) {
    for (int s = 0; s < kShifts; ++s) {
      double next = -x[s] - squares[i] / pivot[s];
      next = std::fabs(next) < kNegligible ? -kNegligible : next;
      least[s] += next > 0 ? 1.0 : 0.0;
      pivot[s] = next;
    }
  }
  for (int s = 0; s < kShifts; ++s) count[s] = int(least[s]);
}

// The largest singular value and the `rank`-th largest, both known to be in [low, high). Each round looks at kShifts
// points, half of them for either, all at once: a count is a chain of divisions, and a few chains side by side cost
// hardly more than one. Ends at a relative error of `precision` or after a fixed number of rounds.
template <int kShifts>
[[gnu::always_inline]] D2NET_HD inline void largest_and_smallest(const double* squares, int n, int rank, double low,
                                                                 double high, double precision, double sigma[2]) {
  constexpr int kHalf = kShifts / 2;
  double lows[2] = {low, low}, highs[2] = {high, high};
  const auto wide = [&](int side) { return highs[side] - lows[side] > precision * highs[side]; };
  for (int round = 0; round < 50 && (wide(0) || wide(1)); ++round) {
    double x[kShifts];
    int count[kShifts];
    for (int s = 0; s < kShifts; ++s) {
      const int side = s < kHalf ? 0 : 1;
      x[s] = lows[side] + (s % kHalf + 1) * ((highs[side] - lows[side]) / (kHalf + 1));
    }
    count_at_least<kShifts>(squares, n, x, count);
    for (int side = 0; side < 2; ++side) {
      const double* points = x + side * kHalf;
      int below = 0;  // how many of the points the singular value reaches
      while (below < kHalf && count[side * kHalf + below] >= (side == 0 ? 1 : rank)) ++below;
      if (below < kHalf) highs[side] = points[below];
      if (below > 0) lows[side] = points[below - 1];
    }
  }
  for (int side = 0; side < 2; ++side) sigma[side] = 0.5 * (lows[side] + highs[side]);
}

// Singular vectors u, v (n each, of unit length) of the singular value sigma > 0 by inverse iteration; work: 12 n.
// For a repeated sigma one of its pairs, with B v = sigma u and B^T u = sigma v like any other.
[[gnu::always_inline]] D2NET_HD inline void singular_vectors(const double* b, int n, double sigma, double* work,
                                                             double* u, double* v) {
  const int size = 2 * n;
  double *inverse = work, *above = inverse + size, *above2 = above + size, *factor = above2 + size,
         *swapped = factor + size, *x = swapped + size;
  // Tridiagonal - sigma I = L U with partial pivoting. A pivot that vanishes (the last one does) becomes tiny.
  const double tiny = 1e-17 * sigma + 1e-100;
  double diagonal = -sigma, beside = b[0];
  for (int i = 0; i < size - 1; ++i) {
    const double below = b[i], next_beside = i + 1 < size - 1 ? b[i + 1] : 0;
    const bool swap = std::fabs(below) > std::fabs(diagonal);
    double pivot = swap ? below : diagonal;
    if (std::fabs(pivot) < tiny) pivot = tiny;
    inverse[i] = 1 / pivot;
    factor[i] = (swap ? diagonal : below) * inverse[i];
    swapped[i] = swap;
    above[i] = swap ? -sigma : beside;
    above2[i] = swap ? next_beside : 0;
    diagonal = swap ? beside + factor[i] * sigma : -sigma - factor[i] * beside;
    beside = swap ? -factor[i] * next_beside : next_beside;
  }
  inverse[size - 1] = 1 / (std::fabs(diagonal) < tiny ? tiny : diagonal);
  above[size - 1] = above2[size - 1] = 0;

  // Any start with a share of the eigenvector will do; a fixed one keeps results the same from run to run.
  unsigned random = 12345;
  for (int i = 0; i < size; ++i) {
    random = random * 1664525u + 1013904223u;
    x[i] = (random >> 8) * (1.0 / 16777216) + 0.5;
  }
  for (int round = 0; round < 3; ++round) {
    if (round > 0) {
      for (int i = 0; i < size - 1; ++i) {
        const double first = x[i], second = x[i + 1];
        x[i] = swapped[i] != 0 ? second : first;
        x[i + 1] = swapped[i] != 0 ? first - factor[i] * second : second - factor[i] * first;
      }
    }
    double one = 0, two = 0, largest = 0;  // x_{i+1}, x_{i+2}
    for (int i = size - 1; i >= 0; --i) {
      double now = (x[i] - above[i] * one - above2[i] * two) * inverse[i];
      if (std::fabs(now) > 1e100) {  // several pivots vanish together
        for (int j = 0; j < size; ++j) x[j] *= 1e-100;
        now *= 1e-100;
        one *= 1e-100;
        largest *= 1e-100;
      }
      x[i] = now;
      two = one;
      one = now;
      largest = std::fabs(now) > largest ? std::fabs(now) : largest;
    }
    const double scale = largest > 0 ? 1 / largest : 0;
    for (int i = 0; i < size; ++i) x[i] *= scale;
  }
  double left = 0, right = 0;
  for (int i = 0; i < n; ++i) {
    right += x[2 * i] * x[2 * i];
    left += x[2 * i + 1] * x[2 * i + 1];
  }
  right = right > 0 ? 1 / std::sqrt(right) : 0;
  left = left > 0 ? 1 / std::sqrt(left) : 0;
  for (int i = 0; i < n; ++i) {
    v[i] = x[2 * i] * right;
    u[i] = x[2 * i + 1] * left;
  }
}

}  // namespace d2net

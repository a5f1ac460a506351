#include "cpu/common/bidiagonal_svd.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/householder.h"
#include "cpu/common/simd.h"
#include "math/reflector.h"

namespace d2net::cpu {
namespace {

// For each of `shifts` positive x: how many singular values are >= x (Sturm count). squares (entries, own): b_i^2, for
// all shifts or for each its own.
template <int shifts, int own>
[[gnu::always_inline]] inline void count_at_least(const double* squares, int64_t entries, const double* x,
                                                  double* count) {
  double pivot[shifts], least[shifts];
  for (int s = 0; s < shifts; ++s) {
    pivot[s] = -x[s];
    least[s] = 0;
  }
  for (int64_t i = 0; i < entries; ++i) {
#pragma omp simd
    for (int s = 0; s < shifts; ++s) {
      const double next = -x[s] - squares[i * own + (own == 1 ? 0 : s)] / pivot[s];
      least[s] += next >= kNegligible ? 1.0 : 0.0;
      pivot[s] = std::fabs(next) < kNegligible ? -kNegligible : next;
    }
  }
  for (int s = 0; s < shifts; ++s) count[s] = least[s];
}

// The largest singular value and the smallest above rank_tol of bidiagonal matrices b (2 n, group). Each round looks at
// `points` points for either of each matrix, all at once: a count is a chain of divisions, and a few chains side by
// side cost hardly more than one. squares: scratch, 2 n, or for a group 2 n of every shift.
template <int group, int points>
[[gnu::always_inline]] inline void extreme_values(const double* b, int64_t n, const double* rank_tol, double precision,
                                                  double* squares, double* sigma, bool* proper) {
  constexpr int kSides = 2 * group, kShifts = kSides * points, kOwn = group == 1 ? 1 : kShifts;
  const int64_t entries = 2 * n - 1;
  double largest[group] = {}, bound[group] = {};  // every singular value is below it (Gershgorin)
  for (int64_t i = 0; i < entries; ++i) {
    for (int g = 0; g < group; ++g) {
      const double entry = std::fabs(b[i * group + g]);
      largest[g] = std::max(largest[g], entry);
      bound[g] = std::max(bound[g], entry + (i > 0 ? std::fabs(b[(i - 1) * group + g]) : 0));
      for (int s = g; s < kOwn; s += group) squares[i * kOwn + s] = entry * entry;
    }
  }
  // Side 0 is sigma_1, side 1 the rank-th: both in [low, high).
  double low[kSides], high[kSides], rank[kSides], x[kShifts], count[kShifts];
  for (int g = 0; g < group; ++g) {
    low[g] = low[group + g] = std::max(rank_tol[g], kNegligible);
    high[g] = high[group + g] = 1.001 * bound[g];
  }
  for (int s = 0; s < kShifts; ++s) x[s] = low[s % group];
  count_at_least<kShifts, kOwn>(squares, entries, x, count);
  for (int g = 0; g < group; ++g) {
    rank[g] = 1;
    rank[group + g] = count[g];
    proper[g] = low[g] < high[g] && count[g] >= 2;
    low[g] = std::max(low[g], 0.999 * largest[g]);
    if (!proper[g]) high[g] = low[g] = high[group + g] = low[group + g] = 1;
  }
  const auto wide = [&](int side) { return high[side] - low[side] > precision * high[side]; };
  for (int round = 0; round < 200; ++round) {
    bool any = false;
    for (int side = 0; side < kSides; ++side) {
      // Equal steps, or equal factors while it is about the magnitude.
      double* point = x + side / group * points * group + side % group;
      if (high[side] > 4 * low[side]) {
        const double ratio = high[side] / low[side];
        const double factor = points == 1 ? std::sqrt(ratio) : std::exp(std::log(ratio) / (points + 1));
        for (int p = 0; p < points; ++p)
          point[p * group] = p > 0 ? point[(p - 1) * group] * factor : low[side] * factor;
      } else {
        const double step = (high[side] - low[side]) / (points + 1);
        for (int p = 0; p < points; ++p) point[p * group] = low[side] + (p + 1) * step;
      }
      any |= wide(side);
    }
    if (!any) break;
    count_at_least<kShifts, kOwn>(squares, entries, x, count);
    for (int side = 0; side < kSides; ++side) {
      if (!wide(side)) continue;  // whatever the others still need
      const int first = side / group * points * group + side % group;
      int reached = 0;
      while (reached < points && count[first + reached * group] >= rank[side]) ++reached;
      if (reached < points) high[side] = x[first + reached * group];
      if (reached > 0) low[side] = x[first + (reached - 1) * group];
    }
  }
  for (int side = 0; side < kSides; ++side) sigma[side] = 0.5 * (low[side] + high[side]);
}

// Of `lanes` bidiagonal matrices b (2 n, lanes), whose last entries are 0, to one singular value sigma > 0 each, by
// inverse iteration. Those of lane l go to u + l, v + l, n each, of unit length and `group` apart, the lanes beyond a
// group u_side and v_side after it. For a repeated sigma one of its pairs, with B v = sigma u and B^T u = sigma v like
// any other. work: 12 n of every lane.
template <int lanes, int group>
[[gnu::always_inline]] inline void singular_vectors(const double* b, int64_t n, const double* sigma, double* work,
                                                    double* u, int64_t u_side, double* v, int64_t v_side) {
  const int64_t size = 2 * n, all = size * lanes;
  double *inverse = work, *above = inverse + all, *above2 = above + all, *factor = above2 + all,
         *swapped = factor + all, *x = swapped + all;
  // Tridiagonal - sigma I = L U with partial pivoting. A pivot that vanishes (the last one does) becomes tiny.
  double tiny[lanes], diagonal[lanes], beside[lanes];
  for (int l = 0; l < lanes; ++l) {
    tiny[l] = 1e-17 * sigma[l] + 1e-100;
    diagonal[l] = -sigma[l];
    beside[l] = b[l];
  }
  for (int64_t i = 0; i < size; ++i) {
    const bool last = i == size - 1;
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const int64_t at = i * lanes + l;
      const double below = b[at], next_beside = last ? 0 : b[at + lanes];
      const bool swap = std::fabs(below) > std::fabs(diagonal[l]);
      const double other = swap ? diagonal[l] : below;
      double pivot = swap ? below : diagonal[l];
      pivot = std::fabs(pivot) < tiny[l] ? tiny[l] : pivot;
      const double by = 1 / pivot, f = other * by;
      inverse[at] = by;
      factor[at] = f;
      swapped[at] = swap ? 1 : 0;
      above[at] = swap ? -sigma[l] : beside[l];
      above2[at] = swap ? next_beside : 0;
      diagonal[l] = swap ? beside[l] + f * sigma[l] : -sigma[l] - f * beside[l];
      beside[l] = swap ? -f * next_beside : next_beside;
    }
  }

  // Any start with a share of the eigenvector will do; a fixed one keeps results the same from run to run.
  unsigned random = 12345;
  for (int64_t i = 0; i < size; ++i) {
    random = random * 1664525u + 1013904223u;
    std::fill_n(x + i * lanes, lanes, (random >> 8) * (1.0 / 16777216) + 0.5);
  }
  for (int round = 0; round < 3; ++round) {
    for (int64_t i = 0; i < size - 1 && round > 0; ++i) {
#pragma omp simd
      for (int l = 0; l < lanes; ++l) {
        const int64_t at = i * lanes + l;
        const double first = x[at], second = x[at + lanes];
        const double upper = swapped[at] != 0 ? second : first, lower = swapped[at] != 0 ? first : second;
        x[at] = upper;
        x[at + lanes] = lower - factor[at] * upper;
      }
    }
    double one[lanes] = {}, two[lanes] = {}, largest[lanes] = {};  // x_{i+1}, x_{i+2}
    for (int64_t i = size - 1; i >= 0; --i) {
      double most = 0;
#pragma omp simd reduction(max : most)
      for (int l = 0; l < lanes; ++l) {
        const int64_t at = i * lanes + l;
        const double now = (x[at] - above[at] * one[l] - above2[at] * two[l]) * inverse[at];
        x[at] = now;
        two[l] = one[l];
        one[l] = now;
        largest[l] = std::max(largest[l], std::fabs(now));
        most = std::max(most, std::fabs(now));
      }
      if (most <= 1e100) continue;
      for (int l = 0; l < lanes; ++l) {  // several pivots vanish together
        if (std::fabs(one[l]) <= 1e100) continue;
        for (int64_t j = 0; j < size; ++j) x[j * lanes + l] *= 1e-100;
        one[l] *= 1e-100;
        two[l] *= 1e-100;
        largest[l] *= 1e-100;
      }
    }
    for (int l = 0; l < lanes; ++l) largest[l] = largest[l] > 0 ? 1 / largest[l] : 0;
    for (int64_t i = 0; i < size; ++i) {
#pragma omp simd
      for (int l = 0; l < lanes; ++l) x[i * lanes + l] *= largest[l];
    }
  }
  double left[lanes] = {}, right[lanes] = {};
  for (int64_t i = 0; i < n; ++i) {
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const double *even = x + 2 * i * lanes, *odd = even + lanes;
      right[l] += even[l] * even[l];
      left[l] += odd[l] * odd[l];
    }
  }
  for (int l = 0; l < lanes; ++l) {
    right[l] = right[l] > 0 ? 1 / std::sqrt(right[l]) : 0;
    left[l] = left[l] > 0 ? 1 / std::sqrt(left[l]) : 0;
    double *to_u = u + l / group * u_side + l % group, *to_v = v + l / group * v_side + l % group;
    for (int64_t i = 0; i < n; ++i) {
      to_v[i * group] = x[2 * i * lanes + l] * right[l];
      to_u[i * group] = x[(2 * i + 1) * lanes + l] * left[l];
    }
  }
}
constexpr int kPoints = 8;

}  // namespace

D2NET_SIMD void extreme_values_of_one(const double* b, int64_t n, const double* rank_tol, double precision,
                                      double* squares, double* sigma, bool* proper) {
  extreme_values<1, kPoints>(b, n, rank_tol, precision, squares, sigma, proper);
}

D2NET_SIMD void extreme_values_of_group(const double* b, int64_t n, const double* rank_tol, double precision,
                                        double* squares, double* sigma, bool* proper) {
  extreme_values<kGroup, 1>(b, n, rank_tol, precision, squares, sigma, proper);
}

D2NET_SIMD void singular_vectors_of_one(const double* b, int64_t n, const double* sigma, double* work, double* u,
                                        int64_t u_side, double* v, int64_t v_side) {
  singular_vectors<2, 1>(b, n, sigma, work, u, u_side, v, v_side);
}

D2NET_SIMD void singular_vectors_of_group(const double* b, int64_t n, const double* sigma, double* work, double* u,
                                          int64_t u_side, double* v, int64_t v_side) {
  singular_vectors<2 * kGroup, kGroup>(b, n, sigma, work, u, u_side, v, v_side);
}

}  // namespace d2net::cpu

// Householder reflections make a matrix bidiagonal, B = L^T A R. Bisection finds the two singular values of B, inverse
// iteration their vectors, and the reflections bring these back. Of everything there is a version for one matrix and
// one for kGroup of them, in arrays whose last dimension is the matrix.
//
// Singular triplets of B are eigenpairs of the symmetric tridiagonal matrix of order 2n that has a zero diagonal and
// beside it the entries of B in their order, b = (d_0, e_0, d_1, ..., e_{n-2}, d_{n-1}): its eigenvalues are the
// singular values and their negatives, and the eigenvector of sigma is (v_0, u_0, v_1, u_1, ...) / sqrt(2). Unlike
// B^T B it keeps the relative accuracy of small singular values. Entries are of order 1 or smaller.
#include "cpu/common/extreme_svd.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "cpu/common/householder.h"
#include "cpu/common/simd.h"

namespace d2net::cpu {
namespace {

constexpr int kLanes = 8;  // arrays begin at multiples of it: vectors that cross a cache line are slow
constexpr int kPanel = 8;  // see extreme_svd.h

inline int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// ---- to bidiagonal form

// A panel of A (m, kPanel), less u w^T + x v^T, from row k on; sum = A^T next_u.
[[gnu::always_inline]] inline void update_panel(double* panel, int64_t k, int64_t m, const double* u, const double* w,
                                                const double* x, const double* v, const double* next_u, double* sum) {
  double by_u[kPanel], by_x[kPanel], total[kPanel] = {};
  for (int l = 0; l < kPanel; ++l) {
    by_u[l] = w[l];
    by_x[l] = v[l];
  }
  for (int64_t i = k; i < m; ++i) {
    double* row = panel + i * kPanel;
    const double u_i = u[i], x_i = x[i], next_i = next_u[i];
#pragma omp simd
    for (int l = 0; l < kPanel; ++l) {
      const double now = row[l] - (u_i * by_u[l] + x_i * by_x[l]);
      row[l] = now;
      total[l] += next_i * now;
    }
  }
  for (int l = 0; l < kPanel; ++l) sum[l] = total[l];
}

// y += A z for one or two panels of A, from row k on; y in kPart parts, to be added up.
constexpr int kPart = 4;
template <int panels>
[[gnu::always_inline]] inline void add_products(const double* panel, int64_t k, int64_t m, const double* z, double* y) {
  double by[panels * kPanel];
  for (int l = 0; l < panels * kPanel; ++l) by[l] = z[l];
  for (int64_t i = k; i < m; ++i) {
    const double *row = panel + i * kPanel, *row2 = row + (panels - 1) * m * kPanel, *by2 = by + (panels - 1) * kPanel;
#pragma omp simd
    for (int l = 0; l < kPart; ++l) {
      const double one = row[l] * by[l] + row[l + kPart] * by[l + kPart];
      const double two = panels == 1 ? 0 : row2[l] * by2[l] + row2[l + kPart] * by2[l + kPart];
      y[i * kPart + l] += one + two;
    }
  }
}

// Of one matrix in panels (see ExtremeSvd); the padding is 0. b: the entries of B. Left reflectors come as rows of
// `left` (n, m), the right ones as rows of `right` (n, stride), with their tau. w (stride), x (m), y (m, 4): scratch.
//
// Step k maps A to A - u w^T - x v^T, with u of column k, w = tau_u A^T u, v of row k less w, x = tau_v (A v - u w^T
// v). It waits until step k + 1, which reads and writes every panel once: it brings the panel up to date, adds up its
// part of the next w, which gives its part z of the row that v is made of, and adds up A z. A v follows from it, as v
// is z - beta e_0 but for a factor.
D2NET_SIMD void bidiagonalize(double* a, int64_t m, int64_t n, int64_t stride, double* b, double* left,
                              double* left_tau, double* right, double* right_tau, double* w, double* x, double* y) {
  std::fill_n(w, stride, 0.0);
  std::fill_n(x, m, 0.0);
  const double *u = x, *v = w;  // of the step before; at first there is none
  for (int64_t k = 0; k < n; ++k) {
    double* next_u = left + k * m;
    const double *column = a + k / kPanel * m * kPanel + k % kPanel, w_k = w[k], v_k = v[k];
    for (int64_t i = k; i < m; ++i) next_u[i] = column[i * kPanel] - (u[i] * w_k + x[i] * v_k);
    const Reflector h = reflect(next_u + k, m - k);
    b[2 * k] = h.beta;
    left_tau[k] = h.tau;
    right_tau[k] = 0;
    if (k + 1 == n) return;

    double* z = right + k * stride;
    std::fill(y + k * kPart, y + m * kPart, 0.0);
    for (int64_t first = (k + 1) / kPanel * kPanel, end; first < stride; first = end) {
      end = std::min(first + 2 * kPanel, stride);
      for (int64_t p = first; p < end; p += kPanel) {
        double *panel = a + p * m, sum[kPanel];
        update_panel(panel, k, m, u, w + p, x, v + p, next_u, sum);
        for (int l = 0; l < kPanel; ++l) {
          const bool done = p + l <= k;  // a column of an earlier step
          w[p + l] = done ? 0 : h.tau * sum[l];
          z[p + l] = done ? 0 : panel[k * kPanel + l] - w[p + l];
        }
      }
      const double* panel = a + first * m;
      end - first == kPanel ? add_products<1>(panel, k + 1, m, z + first, y)
                            : add_products<2>(panel, k + 1, m, z + first, y);
    }
    const int64_t from = k + 1;
    const double wz = dot(w + from, z + from, stride - from);
    const Reflector g = reflect(z + from, stride - from);
    b[2 * k + 1] = g.beta;
    right_tau[k] = g.tau;
    const double wv = g.scale * (wz - g.beta * w[from]);
    column = a + from / kPanel * m * kPanel + from % kPanel;
    for (int64_t i = from; i < m; ++i) {
      const double* part = y + i * kPart;
      const double az = (part[0] + part[2]) + (part[1] + part[3]);
      x[i] = g.tau * (g.scale * (az - g.beta * column[i * kPanel]) - next_u[i] * wv);
    }
    u = next_u;
    v = z;
  }
}

// Turns x (n, kGroup) into the reflectors' vectors.
[[gnu::always_inline]] inline void reflect_group(double* x, int64_t n, double* beta, double* tau) {
  double squares[kGroup] = {}, scale[kGroup];
  for (int64_t i = 1; i < n; ++i) {
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) squares[g] += x[i * kGroup + g] * x[i * kGroup + g];
  }
#pragma omp simd
  for (int g = 0; g < kGroup; ++g) {
    const Reflector h = reflector(x[g], squares[g]);
    beta[g] = h.beta;
    tau[g] = h.tau;
    scale[g] = h.scale;
    x[g] = 1;
  }
  for (int64_t i = 1; i < n; ++i) {
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) x[i * kGroup + g] *= scale[g];
  }
}

// w = tau A^T u for `columns` columns of A.
template <int columns>
[[gnu::always_inline]] inline void multiply_columns(const double* a, int64_t stride, int64_t rows, const double* u,
                                                    const double* tau, double* w) {
  double sum[columns][kGroup] = {};
  for (int64_t i = 0; i < rows; ++i) {
    for (int c = 0; c < columns; ++c) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) sum[c][g] += u[i * kGroup + g] * a[i * stride + c * kGroup + g];
    }
  }
  for (int c = 0; c < columns; ++c) {
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) w[c * kGroup + g] = tau[g] * sum[c][g];
  }
}

// A -= u w^T + tau (A v - u w^T v) v^T for `rows` rows of A.
template <int rows>
[[gnu::always_inline]] inline void update_rows(double* a, int64_t stride, int64_t columns, const double* u,
                                               const double* w, const double* v, const double* wv, const double* tau) {
  double x[rows][kGroup] = {};
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < rows; ++r) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) x[r][g] += a[r * stride + j * kGroup + g] * v[j * kGroup + g];
    }
  }
  for (int r = 0; r < rows; ++r) {
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) x[r][g] = tau[g] * (x[r][g] - u[r * kGroup + g] * wv[g]);
  }
  for (int64_t j = 0; j < columns; ++j) {
    for (int r = 0; r < rows; ++r) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) {
        a[r * stride + j * kGroup + g] -= u[r * kGroup + g] * w[j * kGroup + g] + x[r][g] * v[j * kGroup + g];
      }
    }
  }
}

// Of a group (m, n, kGroup): the same, step by step.
D2NET_SIMD void bidiagonalize_group(double* a, int64_t m, int64_t n, double* b, double* left, double* left_tau,
                                    double* right, double* right_tau, double* w) {
  const int64_t stride = n * kGroup;
  for (int64_t k = 0; k < n; ++k) {
    const int64_t rows = m - k, columns = n - k - 1;
    double *rest = a + k * stride + k * kGroup, *u = left + (k * m + k) * kGroup;
    double *tau_u = left_tau + k * kGroup, *tau_v = right_tau + k * kGroup;
    for (int64_t i = 0; i < rows; ++i) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) u[i * kGroup + g] = rest[i * stride + g];
    }
    reflect_group(u, rows, b + 2 * k * kGroup, tau_u);
    std::fill_n(tau_v, kGroup, 0.0);
    if (columns == 0) return;

    rest += kGroup;
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) multiply_columns<4>(rest + j * kGroup, stride, rows, u, tau_u, w + j * kGroup);
    for (; j < columns; ++j) multiply_columns<1>(rest + j * kGroup, stride, rows, u, tau_u, w + j * kGroup);

    double* v = right + (k * n + k + 1) * kGroup;
#pragma omp simd
    for (int64_t l = 0; l < columns * kGroup; ++l) v[l] = rest[l] - w[l];
    reflect_group(v, columns, b + (2 * k + 1) * kGroup, tau_v);
    double wv[kGroup] = {};
    for (j = 0; j < columns; ++j) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) wv[g] += w[j * kGroup + g] * v[j * kGroup + g];
    }
    int64_t i = 1;
    for (; i + 4 <= rows; i += 4) update_rows<4>(rest + i * stride, stride, columns, u + i * kGroup, w, v, wv, tau_v);
    for (; i < rows; ++i) update_rows<1>(rest + i * stride, stride, columns, u + i * kGroup, w, v, wv, tau_v);
  }
}

// ---- singular values

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
constexpr int kPoints = 8;
D2NET_SIMD void extreme_values_of_one(const double* b, int64_t n, const double* rank_tol, double precision,
                                      double* squares, double* sigma, bool* proper) {
  extreme_values<1, kPoints>(b, n, rank_tol, precision, squares, sigma, proper);
}
D2NET_SIMD void extreme_values_of_group(const double* b, int64_t n, const double* rank_tol, double precision,
                                        double* squares, double* sigma, bool* proper) {
  extreme_values<kGroup, 1>(b, n, rank_tol, precision, squares, sigma, proper);
}

// ---- singular vectors

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
D2NET_SIMD void singular_vectors_of_one(const double* b, int64_t n, const double* sigma, double* work, double* u,
                                        int64_t u_side, double* v, int64_t v_side) {
  singular_vectors<2, 1>(b, n, sigma, work, u, u_side, v, v_side);
}
D2NET_SIMD void singular_vectors_of_group(const double* b, int64_t n, const double* sigma, double* work, double* u,
                                          int64_t u_side, double* v, int64_t v_side) {
  singular_vectors<2 * kGroup, kGroup>(b, n, sigma, work, u, u_side, v, v_side);
}

// apply_reflectors for a group: x (2, length, kGroup), reflectors (n, stride, kGroup).
D2NET_SIMD void apply_reflectors_group(const double* v, const double* tau, int64_t n, int64_t stride, int64_t offset,
                                       int64_t length, double* x) {
  double* x2 = x + length * kGroup;
  for (int64_t k = n - 1; k >= 0; --k) {
    const double* y = v + k * stride * kGroup;
    double first[kGroup] = {}, second[kGroup] = {};
    for (int64_t i = k + offset; i < length; ++i) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) {
        first[g] += y[i * kGroup + g] * x[i * kGroup + g];
        second[g] += y[i * kGroup + g] * x2[i * kGroup + g];
      }
    }
#pragma omp simd
    for (int g = 0; g < kGroup; ++g) {
      first[g] *= tau[k * kGroup + g];
      second[g] *= tau[k * kGroup + g];
    }
    for (int64_t i = k + offset; i < length; ++i) {
#pragma omp simd
      for (int g = 0; g < kGroup; ++g) {
        x[i * kGroup + g] -= first[g] * y[i * kGroup + g];
        x2[i * kGroup + g] -= second[g] * y[i * kGroup + g];
      }
    }
  }
}

// ---- scale

// Largest magnitude of the elements of x (n, group), and whether none is NaN or infinite.
template <int group>
[[gnu::always_inline]] inline void magnitudes(const double* x, int64_t n, double* largest, bool* finite) {
  constexpr int kWide = group == 1 ? kLanes : group;
  double most[kWide] = {}, broken[kWide] = {};
  for (int64_t i = 0; i < n * group; i += kWide) {
#pragma omp simd
    for (int l = 0; l < kWide; ++l) {
      most[l] = std::max(most[l], std::fabs(x[i + l]));
      broken[l] += x[i + l] - x[i + l];
    }
  }
  for (int g = 0; g < group; ++g) {
    largest[g] = most[g];
    for (int l = g + group; l < kWide; l += group) {
      largest[g] = std::max(largest[g], most[l]);
      broken[g] += broken[l];
    }
    finite[g] = broken[g] == 0;
  }
}
D2NET_SIMD void magnitudes_of_one(const double* x, int64_t n, double* largest, bool* finite) {
  magnitudes<1>(x, n, largest, finite);
}
D2NET_SIMD void magnitudes_of_group(const double* x, int64_t n, double* largest, bool* finite) {
  magnitudes<kGroup>(x, n, largest, finite);
}

}  // namespace

D2NET_SIMD void apply_reflectors(const double* v, const double* tau, int64_t n, int64_t stride, int64_t offset,
                                 int64_t length, double* x) {
  double* x2 = x + length;
  for (int64_t k = n - 1; k >= 0; --k) {
    const double* y = v + k * stride;
    double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int64_t i = k + offset; i < length; ++i) {
      first += y[i] * x[i];
      second += y[i] * x2[i];
    }
    first *= tau[k];
    second *= tau[k];
#pragma omp simd
    for (int64_t i = k + offset; i < length; ++i) {
      x[i] -= first * y[i];
      x2[i] -= second * y[i];
    }
  }
}

template <int group>
ExtremeSvd<group>::ExtremeSvd(int64_t m, int64_t n, double precision)
    : m_(m), n_(n), stride_(group == 1 ? padded(n, kPanel) : n), precision_(precision) {
  struct {
    double** pointer;
    int64_t size;
  } const parts[] = {{&a_, m * stride_},
                     {&left_reflectors_, n * m},
                     {&right_reflectors_, n * stride_},
                     {&left_tau_, n},
                     {&right_tau_, n},
                     {&b_, 2 * n},
                     {&squares_, 4 * n},
                     {&work_, 28 * n},
                     {&w_, stride_},
                     {&x_, m},
                     {&y_, 4 * m},
                     {&left, 2 * m},
                     {&right, 2 * n}};
  int64_t size = kLanes;
  for (const auto& part : parts) size += padded(part.size * group, kLanes);
  memory_.resize(size);
  void* next = memory_.data();
  size_t space = size * sizeof(double);
  double* aligned = static_cast<double*>(std::align(kLanes * sizeof(double), sizeof(double), next, space));
  for (const auto& part : parts) *part.pointer = std::exchange(aligned, aligned + padded(part.size * group, kLanes));
}

template <int group>
void ExtremeSvd<group>::run(const double (&rank_tol)[group]) {
  // Divided by the power of two that brings the largest magnitude into [0.5, 1), so that squares neither overflow nor
  // vanish.
  double largest[group], half[group], rest[group], tolerance[group], sigma[2 * group];
  int exponent[group];
  const int64_t elements = m_ * stride_;
  group == 1 ? magnitudes_of_one(a_, elements, largest, finite) : magnitudes_of_group(a_, elements, largest, finite);
  for (int g = 0; g < group; ++g) {
    exponent[g] = 0;
    if (finite[g]) std::frexp(largest[g], &exponent[g]);
    tolerance[g] = std::ldexp(rank_tol[g], -exponent[g]);
    // In two steps: the power itself may overflow.
    half[g] = std::ldexp(1, -exponent[g] / 2);
    rest[g] = std::ldexp(1, -exponent[g] - -exponent[g] / 2);
  }
  for (int64_t i = 0; i < elements; ++i) {
    for (int g = 0; g < group; ++g) a_[i * group + g] = finite[g] ? a_[i * group + g] * half[g] * rest[g] : 0;
  }

  const auto expand = [&](double* entries) {  // b for both sides
    for (int64_t i = 0; i < 2 * n_; ++i) {
      for (int l = 0; l < 2 * group; ++l) entries[i * 2 * group + l] = b_[i * group + l % group];
    }
  };
  std::fill_n(b_ + (2 * n_ - 1) * group, group, 0.0);
  double* entries = work_ + 24 * n_ * group;
  const int64_t left_side = m_ * group, right_side = n_ * group;
  if constexpr (group == 1) {
    bidiagonalize(a_, m_, n_, stride_, b_, left_reflectors_, left_tau_, right_reflectors_, right_tau_, w_, x_, y_);
    extreme_values_of_one(b_, n_, tolerance, precision_, squares_, sigma, proper);
    if (!proper[0]) return;
    expand(entries);
    singular_vectors_of_one(entries, n_, sigma, work_, left, left_side, right, right_side);
  } else {
    bidiagonalize_group(a_, m_, n_, b_, left_reflectors_, left_tau_, right_reflectors_, right_tau_, w_);
    extreme_values_of_group(b_, n_, tolerance, precision_, squares_, sigma, proper);
    expand(entries);
    singular_vectors_of_group(entries, n_, sigma, work_, left, left_side, right, right_side);
  }
  for (int s = 0; s < 2; ++s) std::fill(left + s * left_side + right_side, left + (s + 1) * left_side, 0.0);
  const auto apply = group == 1 ? apply_reflectors : apply_reflectors_group;
  apply(left_reflectors_, left_tau_, n_, m_, 0, m_, left);
  apply(right_reflectors_, right_tau_, n_ - 1, stride_, 1, n_, right);
  for (int g = 0; g < group; ++g) {
    proper[g] &= finite[g];
    log_condition[g] = std::max(0.0, std::log(sigma[g] / sigma[group + g]));  // equal ones may differ in their last bit
    for (int s = 0; s < 2; ++s) inverse[s][g] = std::ldexp(1 / sigma[s * group + g], -exponent[g]);
  }
}

template class ExtremeSvd<1>;
template class ExtremeSvd<kGroup>;

}  // namespace d2net::cpu

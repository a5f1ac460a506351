// Singular values of one small matrix by one block, with one-sided Jacobi: plane rotations make the columns of A
// orthogonal. Their norms are then the singular values, and the columns divided by them the left vectors. The right
// vectors are v = A^T u / sigma, so that no rotation is stored.
//
// Columns are paired like the players of a round-robin tournament: every pair meets once a sweep, and the pairs of one
// round have different columns. A few lanes rotate a pair; they hold short columns in registers for the round. Up to 16
// columns are rotated by one warp, whose rounds need no barrier of the block. Everything is in double, the order of all
// operations is fixed, and the number of sweeps is limited, so that every launch ends without the host.
//
// From 17 columns or rows on, A = Q R is factored first and the columns of R^T are rotated (Drmac and Veselic, SIAM J.
// Matrix Anal. Appl. 2008). That costs about as much as one sweep and saves some: a few as a rule, more than half of
// them where singular values spread over many decades. And a tall matrix becomes square.
//
// One matrix is one chain of dependent operations, so latency decides: loads are issued together, sums take three
// shuffles, and square roots and quotients start from the approximations of the hardware.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/common/block.h"
#include "math/reflector.h"

namespace d2net::cuda {

constexpr int kGroup = 8;         // lanes for a column, or for a pair of columns
constexpr int kBatch = 4;         // elements of a column that a lane loads together
constexpr int kWarpColumns = 16;  // most columns and rows that one warp rotates
constexpr int kSweeps = 40;       // 5 to 10 are usual

// Columns begin at odd multiples of eight doubles, so that those of neighbouring groups lie in different banks.
inline __host__ __device__ int64_t column_stride(int64_t length) {
  const int64_t eights = (length + 7) / 8;
  return 8 * (eights + (eights + 1) % 2);
}

// The least number of threads for `columns` columns: 32 to 512 for up to 128.
inline int64_t jacobi_threads(int64_t columns) { return ((columns + 1) / 2 * kGroup + 31) / 32 * 32; }

// Whether the columns are those of R^T, so that divided by the singular values they are right vectors of A.
inline __host__ __device__ bool factored_first(int64_t length, int64_t columns) {
  return max(length, columns) > kWarpColumns;
}

// ---- numbers

// For normal x, to about 20 bits, in tests without a GPU too.
__device__ __forceinline__ double approx_reciprocal(double x) {
#ifdef D2NET_SIMT
  return __longlong_as_double(__double_as_longlong(1 / x) & ~0xffffffffll);
#else
  double y;
  asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  return y;
#endif
}
__device__ __forceinline__ double approx_rsqrt(double x) {
#ifdef D2NET_SIMT
  return __longlong_as_double(__double_as_longlong(1 / sqrt(x)) & ~0xffffffffll);
#else
  double y;
  asm("rsqrt.approx.ftz.f64 %0, %1;" : "=d"(y) : "d"(x));
  return y;
#endif
}

// The same to an error of about one in the last place: an error e becomes e^3.
__device__ __forceinline__ double fast_reciprocal(double x) {
  const double y = approx_reciprocal(x), e = fma(-x, y, 1.0);
  return fma(y, fma(e, e, e), y);
}
__device__ __forceinline__ double fast_rsqrt(double x) {
  const double y = approx_rsqrt(x), e = fma(-x * y, y, 1.0);
  return fma(y * e, fma(e, 0.375, 0.5), y);
}

// Multiplies by 2^exponent, in two steps because that power itself may overflow. |exponent| <= 2044.
struct PowerOfTwo {
  __device__ __forceinline__ explicit PowerOfTwo(int exponent)
      : half(power(exponent / 2)), rest(power(exponent - exponent / 2)) {}
  template <typename T>
  __device__ __forceinline__ double operator()(T x) const {
    return double(x) * half * rest;
  }
  static __device__ __forceinline__ double power(int exponent) {
    return __longlong_as_double((long long)(exponent + 1023) << 52);
  }
  double half, rest;
};

// The upper half of |x|, which grows with it. From kNotFinite on x is infinite or NaN.
constexpr int kNotFinite = 0x7ff00000;
__device__ __forceinline__ int magnitude(double x) { return int(__double_as_longlong(x) >> 32) & 0x7fffffff; }

// The exponent for which |x| / 2^exponent is in [0.5, 1), or below, if x is no normal number.
__device__ __forceinline__ int exponent_of(int magnitude_of_x) { return max(magnitude_of_x >> 20, 1) - 1022; }

// The exponent of the largest of |x(0)|, ..., |x(n - 1)|. False, for every thread of the block, if one is NaN or
// infinite.
template <typename Element>
__device__ __forceinline__ bool block_exponent(int64_t n, Element x, int* exponent) {
  int largest = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) largest = max(largest, magnitude(double(x(i))));
  largest = block_reduce(largest, Max{});
  *exponent = exponent_of(largest);
  return largest < kNotFinite;
}

// ---- sums

// Over `lanes` neighbouring lanes.
template <int lanes = kGroup>
__device__ __forceinline__ double group_sum(double x) {
#pragma unroll
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// store(i, term(i, 0) + ... + term(i, length - 1)) for every i < n, a group for each i.
template <typename Term, typename Store>
__device__ __forceinline__ void group_sums(int64_t n, int64_t length, Term term, Store store) {
  const int lane = threadIdx.x % kGroup;
  for (int64_t base = 0; base < n; base += blockDim.x / kGroup) {  // the lanes of a warp stay together
    const int64_t i = base + threadIdx.x / kGroup;
    double sum = 0;
#pragma unroll 1
    for (int64_t first = lane; i < n && first < length; first += 2 * kGroup) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {  // more at a time would take too many registers
        const int64_t k = first + e * kGroup;
        sum += k < length ? term(i, k) : 0.0;
      }
    }
    sum = group_sum(sum);
    if (lane == 0 && i < n) store(i, sum);
  }
}

// ---- QR

// A Householder reflector H = I - tau v v^T is kept in the column that it maps to (beta, 0, ..., 0): v from the
// diagonal on (v_0 is not 1: no element needs scaling).

// One lane's part of a column below row k: the sum of its squares from row k + 2 on, and row k + 1.
struct Below {
  double squares, top;
};

// x = H_k x by a group: element i of x belongs to lane i % 8. v: the column of H_k. All lanes of the warp must call;
// those of a group without work with length 0.
__device__ __forceinline__ Below reflect(const double* v, double tau, double* x, int k, int length) {
  const int begin = k / kGroup * kGroup, lane = threadIdx.x % kGroup;
  double dot = 0;
#pragma unroll 1
  for (int first = begin; first < length; first += kBatch * kGroup) {
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      const int i = first + e * kGroup + lane;
      dot += i >= k && i < length ? v[i] * x[i] : 0.0;
    }
  }
  dot = tau * group_sum(dot);
  Below below = {0, 0};
#pragma unroll 1
  for (int first = begin; first < length; first += kBatch * kGroup) {
#pragma unroll
    for (int e = 0; e < kBatch; ++e) {
      const int i = first + e * kGroup + lane;
      if (i < k || i >= length) continue;
      const double xi = x[i] - dot * v[i];
      x[i] = xi;
      if (i == k + 1) below.top = xi;
      if (i > k + 1) below.squares += xi * xi;
    }
  }
  return below;
}

// Makes the reflector of row k from column x, by the lane that has that row; `squares`: of the rows below. They are
// treated as zeros where the sum is negligible: a reflector made of denormal numbers would not be orthogonal.
__device__ __forceinline__ void make_reflector(double* x, int k, double top, double squares, double* tau,
                                               double* beta) {
  const double total = top * top + squares, length = total * fast_rsqrt(total);
  const bool none = !(squares > kNegligible);
  x[k] = none ? 0.0 : top > 0 ? top + length : top - length;
  *tau = none ? 0.0 : fast_reciprocal(fma(length, fabs(top), total));  // 2 / v^T v
  *beta = none ? top : top > 0 ? -length : length;
}

// QR of `count` (at most 2) matrices of n columns, `length` long, that lie one behind the other; R above the diagonal,
// its diagonal in `diagonal`. A group has a column at a time, and the one whose column is next makes its reflector:
// one barrier a step. Ends with a barrier.
__device__ __forceinline__ void factor(double* columns, int count, int length, int n, int64_t stride, double* tau,
                                       double* diagonal) {
  const int lane = threadIdx.x % kGroup, group = threadIdx.x / kGroup, groups = blockDim.x / kGroup;
  if (threadIdx.x < 32) {
    double* x = columns + group * n * stride;
    double squares = 0;
    for (int i = lane; group < count && i < length; i += kGroup) squares += i > 0 ? x[i] * x[i] : 0.0;
    squares = group_sum(squares);
    if (group < count && lane == 0) make_reflector(x, 0, x[0], squares, tau + group * n, diagonal + group * n);
  }
  __syncthreads();
  for (int k = 0; k < n - 1; ++k) {
    const int rest = n - k - 1;
    for (int base = 0; base < count * rest; base += groups) {  // the lanes of a warp stay together
      const int j = base + group, of = j >= rest ? 1 : 0, column = of * n + k + 1 + j - of * rest;
      const bool works = j < count * rest, is_next = works && column == of * n + k + 1;
      const int at = works ? of * n + k : 0;
      double* x = columns + (works ? column : 0) * stride;
      const Below below = reflect(columns + at * stride, tau[at], x, k, works ? length : 0);
      if (__any_sync(kAllLanes, is_next)) {
        const double squares = group_sum(below.squares);
        if (is_next && lane == (k + 1) % kGroup) {
          make_reflector(x, k + 1, below.top, squares, tau + column, diagonal + column);
        }
      }
    }
    __syncthreads();
  }
}

// Replaces n columns, `length` long, by those of R^T, n long. tau, diagonal: n of scratch each. Ends with a barrier.
__device__ __forceinline__ void replace_by_factor(double* a, int length, int n, int64_t stride, double* tau,
                                                  double* diagonal) {
  factor(a, 1, length, n, stride, tau, diagonal);
  for (int column = threadIdx.x / kGroup; column < n; column += blockDim.x / kGroup) {  // of R
    for (int row = threadIdx.x % kGroup; row <= column; row += kGroup) {
      double* x = a + column * stride + row;
      if (row == column) {
        *x = diagonal[row];
      } else {
        a[row * stride + column] = *x;
        *x = 0;
      }
    }
  }
  __syncthreads();
}

// ---- rotations

// The rotation that makes two columns orthogonal, from their squares and product: x = c x - s y, y = s x + c y with
// |s| <= c. The angle has some 20 bits, as many as the cosine of the columns then loses; but c^2 + s^2 = 1 to rounding,
// so that no norm changes.
struct Rotation {
  double c, s;
};
__device__ __forceinline__ Rotation rotation(double xx, double yy, double xy) {
  // Short columns are scaled, so that the square of the larger of h and r is a number; that of the other may be 0
  // beside it.
  const double scale = max(xx, yy) > 1e-100 ? 1 : 0x1p500, h = scale * (yy - xx), r = scale * (2 * xy);
  // Twice the angle has the cosine |h| / sqrt(h^2 + r^2) and the sine r / sqrt(h^2 + r^2).
  const double inverse = approx_rsqrt(h * h + r * r), squared = fma(0.5 * fabs(h), inverse, 0.5);
  const double inverse_c = approx_rsqrt(squared), sine = 0.5 * (h < 0 ? -r : r) * inverse;
  const double c = squared * inverse_c, s = sine * inverse_c;
  const double e = fma(-s, s, fma(-c, c, 1.0)), correction = fma(e, 0.375, 0.5);
  return {fma(c * e, correction, c), fma(s * e, correction, s)};
}

// orthogonalize() with so many lanes for a pair, which load so many elements of a column together. whole: these are all
// of them, and stay in registers. one_warp: called by one warp only.
template <int lanes, int elements, bool whole, bool one_warp>
__device__ __forceinline__ void rotate_columns(double* a, int length, int count, int stride, double tolerance,
                                               double noise) {
  constexpr int kStep = lanes * elements;
  const int lane = threadIdx.x % lanes, pair = threadIdx.x / lanes;
  const int players = count + count % 2, rounds = players - 1;  // one has no partner if the number is odd
  const bool real = pair < players / 2 && (pair > 0 || count % 2 == 0);
  const int here = real ? length - lane : 0;  // the lane's elements are 0, lanes, 2 lanes, ... < here, from its first
  const bool busy = one_warp || int(threadIdx.x) / 32 * 32 < players / 2 * lanes;  // others only wait
  // A sweep whose cosines and angles were all below `enough` leaves only cosines of the order of its square, times
  // their number, and of its product with the error of the angles: both below tolerance, so that none is needed to see.
  const double enough = min(sqrt(tolerance / (4 * count)), 1e5 * tolerance);
  // Round-robin: the last player stays, the others move on by one place; after `rounds` rounds they are back.
  int p = pair == 0 ? rounds : pair, q = pair == 0 ? 0 : rounds - pair;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool again = false;
    for (int round = 0; round < rounds; ++round) {
      if (busy) {
        double *to_x = a + (real ? p * stride : 0) + lane, *to_y = a + (real ? q * stride : 0) + lane;
        double x[elements], y[elements];
        double xx = 0, yy = 0, xy = 0;
        const auto load = [&](int first) {
#pragma unroll
          for (int e = 0; e < elements; ++e) {
            const int i = first + e * lanes;
            x[e] = i < here ? to_x[i] : 0.0;
            y[e] = i < here ? to_y[i] : 0.0;
          }
        };
#pragma unroll 1
        for (int first = 0; first < (whole ? kStep : length); first += kStep) {
          load(first);
#pragma unroll
          for (int e = 0; e < elements; ++e) {
            xx += x[e] * x[e];
            yy += y[e] * y[e];
            xy += x[e] * y[e];
          }
        }
        xx = group_sum<lanes>(xx);
        yy = group_sum<lanes>(yy);
        xy = group_sum<lanes>(xy);
        const Rotation by = rotation(xx, yy, xy);
        // The cosine, squared. (A product too small for a double is 0, and then of columns too short to matter.)
        const double square = xy * xy, squares = xx * yy;
        const bool rotates =
            max(xx, yy) > noise && min(xx, yy) > kNegligible && square > tolerance * tolerance * squares;
        again = again || (rotates && (square > enough * enough * squares || fabs(by.s) > enough));
        // Without a branch where it takes longer than what it saves.
        if (whole || __any_sync(kAllLanes, rotates)) {
          const double c = rotates ? by.c : 1, s = rotates ? by.s : 0;
#pragma unroll 1
          for (int first = 0; first < (whole ? kStep : length); first += kStep) {
            if (!whole) load(first);
#pragma unroll
            for (int e = 0; e < elements; ++e) {
              const int i = first + e * lanes;
              if (i >= here) continue;
              to_x[i] = c * x[e] - s * y[e];
              to_y[i] = s * x[e] + c * y[e];
            }
          }
        }
      }
      if (pair > 0) p = p + 1 == rounds ? 0 : p + 1;
      q = q + 1 == rounds ? 0 : q + 1;
      if (one_warp) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    }
    if (!(one_warp ? __any_sync(kAllLanes, again) : __syncthreads_or(again))) return;
  }
}

// Rotates the `count` columns of a, `length` long, until the cosine between any two is at most `tolerance`, but leaves
// two alone that are both no longer than rank_tol / sqrt(count): all such columns together are a matrix of a norm up to
// rank_tol, whose singular values count as zero. (Deficient ranks would else cost sweeps that only turn noise.)
// The largest element should be of order 1. Ends with a barrier.
__device__ __forceinline__ void orthogonalize(double* a, int length, int count, int stride, double tolerance,
                                              double rank_tol) {
  const double noise = rank_tol * rank_tol / count;
  if (max(length, count) <= kWarpColumns) {
    if (threadIdx.x < 32) rotate_columns<4, kWarpColumns / 4, true, true>(a, length, count, stride, tolerance, noise);
  } else if (length <= kBatch * kGroup) {
    rotate_columns<kGroup, kBatch, true, false>(a, length, count, stride, tolerance, noise);
  } else {
    rotate_columns<kGroup, kBatch, false, false>(a, length, count, stride, tolerance, noise);
  }
  __syncthreads();
}

// The columns of the largest norm and of the smallest one above rank_tol (the lower index among equals).
struct Extremes {
  int column[2];
  double sigma[2];
};

// The same for all threads; false if fewer than two columns are above. norms: `count` of scratch.
__device__ __forceinline__ bool extreme_columns(const double* a, int length, int count, int stride, double rank_tol,
                                                double* norms, Extremes* found) {
  group_sums(
      count, length, [=](int64_t j, int64_t i) { return a[j * stride + i] * a[j * stride + i]; },
      [=](int64_t j, double squares) { norms[j] = sqrt(squares); });
  __syncthreads();
  const double least = max(rank_tol, 1e-140);  // squares of smaller ones have no digits
  int rank = 0, first = count, last = count;   // every warp finds them for itself
  double largest = 0, smallest = DBL_MAX;
  const auto compare = [&](double large, int large_at, double small, int small_at) {
    if (large > largest || (large == largest && large_at < first)) {
      largest = large;
      first = large_at;
    }
    if (small < smallest || (small == smallest && small_at < last)) {
      smallest = small;
      last = small_at;
    }
  };
  for (int j = threadIdx.x % 32; j < count; j += 32) {
    if (!(norms[j] > least)) continue;
    ++rank;
    compare(norms[j], j, norms[j], j);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    rank += __shfl_xor_sync(kAllLanes, rank, step);
    compare(__shfl_xor_sync(kAllLanes, largest, step), __shfl_xor_sync(kAllLanes, first, step),
            __shfl_xor_sync(kAllLanes, smallest, step), __shfl_xor_sync(kAllLanes, last, step));
  }
  *found = {{first, last}, {largest, smallest}};
  return rank > 1;
}

}  // namespace d2net::cuda

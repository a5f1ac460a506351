// Singular values of one small matrix by one block, with one-sided Jacobi: plane rotations turn the columns of A until
// they are orthogonal; their norms are the singular values and the columns, divided by them, the left vectors. The
// right ones follow as v = A^T u / sigma, so that no rotation is stored.
//
// Columns are paired like the players of a round-robin tournament: every pair meets once a sweep, and the pairs of one
// round touch different columns. A pair belongs to eight lanes. Everything is in double, the order of all operations
// is fixed, and the number of sweeps is limited, so nothing waits for the host and nothing can go on for ever.
//
// From 17 columns on, A = Q R is factored first and the columns of R^T are turned (Drmac and Veselic, SIAM J. Matrix
// Anal. Appl. 2008). That costs about as much as one sweep and saves some: a few as a rule, more than half of them
// where singular values spread over many decades. And a tall matrix becomes square.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/block.h"
#include "math/reflector.h"

namespace d2net::cuda {

constexpr int kGroup = 8;    // lanes for a pair of columns
constexpr int kSweeps = 40;  // 5 to 10 are usual

// Columns begin at odd multiples of eight doubles, so that those of neighbouring groups lie in different banks.
inline __host__ __device__ int64_t column_stride(int64_t length) {
  const int64_t eights = (length + 7) / 8;
  return 8 * (eights + (eights + 1) % 2);
}

// The least number of threads for `columns` columns: 32 to 512 for up to 128.
inline int64_t jacobi_threads(int64_t columns) { return ((columns + 1) / 2 * kGroup + 31) / 32 * 32; }

// Multiplies by 2^exponent, in two steps because that power itself may overflow.
struct PowerOfTwo {
  __device__ __forceinline__ explicit PowerOfTwo(int exponent)
      : half(ldexp(1.0, exponent / 2)), rest(ldexp(1.0, exponent - exponent / 2)) {}
  template <typename T>
  __device__ __forceinline__ double operator()(T x) const {
    return double(x) * half * rest;
  }
  double half, rest;
};

// Whether the columns are those of R^T, so that divided by the singular values they are right vectors of A.
inline __host__ __device__ bool factored_first(int64_t columns) { return columns > 16; }

// The exponent for which |x(0)|, ..., |x(n - 1)|, divided by 2^exponent, have their largest in [0.5, 1).
// False, for every thread of the block, if one is NaN or infinite.
template <typename Element>
__device__ __forceinline__ bool block_exponent(int64_t n, Element x, int* exponent) {
  double largest = 0;
  bool broken = false;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const double magnitude = fabs(double(x(i)));
    broken = broken || !(magnitude <= DBL_MAX);
    largest = max(largest, magnitude);
  }
  if (__syncthreads_or(broken)) return false;
  frexp(block_reduce(largest, Max{}), exponent);
  return true;
}

// Over the eight lanes of a group.
__device__ __forceinline__ double group_sum(double x) {
#pragma unroll
  for (int step = kGroup / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// store(i, term(i, 0) + ... + term(i, length - 1)) for every i < n, a group for each i.
template <typename Term, typename Store>
__device__ __forceinline__ void group_sums(int64_t n, int64_t length, Term term, Store store) {
  const int lane = threadIdx.x % kGroup;
  for (int64_t base = 0; base < n; base += blockDim.x / kGroup) {  // the lanes of a warp stay together
    const int64_t i = base + threadIdx.x / kGroup;
    double sum = 0;
    for (int64_t k = lane; i < n && k < length; k += kGroup) sum += term(i, k);
    sum = group_sum(sum);
    if (lane == 0 && i < n) store(i, sum);
  }
}

// QR of `count` matrices of n columns, `length` long, that lie one behind the other. A column becomes the reflector's
// vector from the diagonal on, with R above; R's diagonal goes to `diagonal`. A warp has a column at a time and each
// lane always the same elements of it, so that only other warps need to wait. Ends with a barrier.
__device__ __forceinline__ void factor(double* columns, int count, int length, int n, int64_t stride, double* tau,
                                       double* diagonal) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int k = 0; k < n; ++k) {
    const int begin = k / 32 * 32 + lane;
    for (int m = warp; m < count; m += warps) {
      double* v = columns + (m * n + k) * stride;
      double squares = 0, top = 0;
      for (int i = begin; i < length; i += 32) {
        if (i == k) top = v[i];
        if (i > k) squares += v[i] * v[i];
      }
      const Reflector h = reflector(__shfl_sync(kAllLanes, top, k % 32), warp_reduce(squares, Sum{}));
      for (int i = begin; i < length; i += 32) {
        if (i >= k) v[i] = i == k ? 1 : v[i] * h.scale;
      }
      if (lane == 0) {
        tau[m * n + k] = h.tau;
        diagonal[m * n + k] = h.beta;
      }
    }
    __syncthreads();
    const int rest = n - k - 1;
    for (int j = warp; j < count * rest; j += warps) {
      const int m = j / rest;
      const double* v = columns + (m * n + k) * stride;
      double* x = columns + (m * n + k + 1 + j % rest) * stride;
      double dot = 0;
      for (int i = begin; i < length; i += 32) {
        if (i >= k) dot += v[i] * x[i];
      }
      dot = tau[m * n + k] * warp_reduce(dot, Sum{});
      for (int i = begin; i < length; i += 32) {
        if (i >= k) x[i] -= dot * v[i];
      }
    }
    __syncthreads();
  }
}

// Replaces n columns, `length` long, by those of R^T, n long. tau, diagonal: n of scratch each. Ends with a barrier.
__device__ __forceinline__ void replace_by_factor(double* a, int length, int n, int64_t stride, double* tau,
                                                  double* diagonal) {
  factor(a, 1, length, n, stride, tau, diagonal);
  for (int k = threadIdx.x; k < n * n; k += blockDim.x) {
    const int row = k % n, column = k / n;  // of R
    double* x = a + column * stride + row;
    if (row == column) *x = diagonal[row];
    if (row < column) {
      a[row * stride + column] = *x;
      *x = 0;
    }
  }
  __syncthreads();
}

// Rotates the `count` columns of a, `length` long, until the cosine between any two is at most `tolerance`, but leaves
// two alone that are both no longer than rank_tol / sqrt(count): all such columns together are a matrix of a norm up to
// rank_tol, whose singular values count as zero. (Deficient ranks would else cost sweeps that only turn noise.)
// The largest element should be of order 1. Ends with a barrier.
__device__ __forceinline__ void orthogonalize(double* a, int length, int count, int stride, double tolerance,
                                              double rank_tol) {
  const double noise = rank_tol * rank_tol / count;
  const int lane = threadIdx.x % kGroup, pair = threadIdx.x / kGroup;
  const int players = count + count % 2;  // one has no partner if the number is odd
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    bool turned = false;
    for (int round = 0; round < players - 1; ++round) {
      int p = players - 1, q = round;  // the last player stays, the others move on around the table
      if (pair > 0) {
        p = round + pair;
        q = round - pair;
        if (p >= players - 1) p -= players - 1;
        if (q < 0) q += players - 1;
      }
      const bool real = pair < players / 2 && p < count && q < count;
      double *x = a + (real ? p * stride : 0), *y = a + (real ? q * stride : 0);
      double xx = 0, yy = 0, xy = 0;
      for (int i = lane; real && i < length; i += kGroup) {
        xx += x[i] * x[i];
        yy += y[i] * y[i];
        xy += x[i] * y[i];
      }
      xx = group_sum(xx);
      yy = group_sum(yy);
      xy = group_sum(xy);
      // The cosine, squared: two square roots would take longer than the sums. (A product too small for a double is 0,
      // and then of columns too short to matter.)
      if (max(xx, yy) > noise && min(xx, yy) > kNegligible && xy * xy > tolerance * tolerance * xx * yy) {
        turned = true;
        // The smaller root of r t^2 + 2 h t = r is the tangent of the angle. Short columns are scaled, so that the
        // square of the larger of h and r is a number; that of the other may be 0 beside it.
        const double scale = max(xx, yy) > 1e-100 ? 1 : 0x1p500, h = scale * (yy - xx), r = scale * (2 * xy);
        const double t = (h < 0 ? -r : r) / (fabs(h) + sqrt(h * h + r * r));
        const double c = rsqrt(1 + t * t), s = c * t;
        for (int i = lane; i < length; i += kGroup) {
          const double xi = x[i], yi = y[i];
          x[i] = c * xi - s * yi;
          y[i] = s * xi + c * yi;
        }
      }
      __syncthreads();
    }
    if (!__syncthreads_or(turned)) return;
  }
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
  int rank = 0, first = 0, last = 0;
  double largest = 0, smallest = DBL_MAX;
  for (int j = 0; j < count; ++j) {
    const double sigma = norms[j];
    if (!(sigma > least)) continue;
    ++rank;
    if (sigma > largest) {
      largest = sigma;
      first = j;
    }
    if (sigma < smallest) {
      smallest = sigma;
      last = j;
    }
  }
  *found = {{first, last}, {largest, smallest}};
  return rank > 1;
}

}  // namespace d2net::cuda

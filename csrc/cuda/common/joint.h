// log(sigma_1 / sigma_r) of a product P Y by one block, and its gradient; see condition_number.h.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/common/jacobi.h"

namespace d2net::cuda {

// Cosine of columns that count as orthogonal: results of type T do not show it.
template <typename T>
double orthogonality(int64_t length) {
  return sizeof(T) == 4 ? 1e-12 : 1e-15 * std::sqrt(double(length));
}

// Where things lie in the memory of a block, in doubles.
struct JointLayout {
  int64_t p, y, stride;         // columns of P and Y^T and their stride, if they are factored
  int64_t tau, diagonal;        // of both factors
  int64_t small, small_stride;  // the matrix that is decomposed
  int64_t rest;                 // two a column: norms, or what is left of its factorization
  int64_t left, right, by_p;    // u and v (2, classes), P^T u (2, items)
  int64_t total;

  __host__ __device__ JointLayout(int64_t classes, int64_t items) {
    const bool reduce = items < classes;
    const int64_t order = reduce ? items : classes, factored = reduce ? items : 0;
    stride = column_stride(classes);
    small_stride = column_stride(order);
    p = 0;
    y = p + factored * stride;
    tau = y + factored * stride;
    diagonal = tau + 2 * factored;
    small = diagonal + 2 * factored;
    rest = small + order * small_stride;
    left = rest + 2 * order;
    right = left + 2 * classes;
    by_p = right + 2 * classes;
    total = by_p + 2 * items;
  }
};

// x[m] = H_0 ... H_{n-1} x[m] for two vectors, each by a group of the first warp; see reflect().
__device__ __forceinline__ void apply_reflectors(const double* columns, const double* tau, int length, int n,
                                                 int64_t stride, double* x) {
  const int group = threadIdx.x / kGroup;
  x += group < 2 ? group * length : 0;
  for (int k = n - 1; k >= 0; --k) reflect(columns + k * stride, tau[k], x, k, group < 2 ? length : 0);
}

// With fewer items than classes, QR of both, P = Q_p R_p and Y^T = Q_y R_y, leaves the small R_p R_y^T with the same
// singular values; else the product itself is small. Of its vectors only u is needed: u^T P (which R_p gives without
// Q_p), v^T = u^T P Y / sigma and Y v follow. p, y and results as of one matrix in condition_number.h, y_left and
// y_right null where they are not wanted; memory: as JointLayout says.
template <typename T>
__device__ __forceinline__ void joint_condition_number(const T* p, const T* y, int classes, int items, double rank_tol,
                                                       double tolerance, T* value, T* p_left, T* p_right, T* y_left,
                                                       T* y_right, double* memory) {
  const JointLayout at(classes, items);
  const bool reduce = items < classes;
  const int order = reduce ? items : classes, stride = int(at.small_stride);
  const bool factored = factored_first(order, order);  // the matrix is transposed then: its right vectors are found
  double *a = memory + at.small, *u = memory + at.left, *v = memory + at.right, *by_p = memory + at.by_p;
  double *ps = memory + at.p, *ys = memory + at.y, *diagonal = memory + at.diagonal, *rest = memory + at.rest;
  const int64_t size = int64_t(classes) * items;
  const int lane = threadIdx.x % kGroup, group = threadIdx.x / kGroup, groups = blockDim.x / kGroup;
  int largest[2] = {};
  for (int64_t k = threadIdx.x; k < size; k += blockDim.x) {
    largest[0] = max(largest[0], magnitude(double(p[k])));
    largest[1] = max(largest[1], magnitude(double(y[k])));
  }
  block_reduce(largest, Max{});
  const bool finite = max(largest[0], largest[1]) < kNotFinite;
  const int p_exponent = exponent_of(largest[0]), y_exponent = exponent_of(largest[1]);
  const PowerOfTwo p_scaled(-p_exponent), y_scaled(-y_exponent);
  int exponent = 0;
  Extremes found;
  bool proper = false;
  if (finite) {
    if (reduce) {
      for (int r = group; r < classes; r += groups) {
        for (int c = lane; c < items; c += kGroup) ps[c * at.stride + r] = p_scaled(p[int64_t(r) * items + c]);
      }
      for (int r = group; r < items; r += groups) {
        for (int c = lane; c < classes; c += kGroup) ys[r * at.stride + c] = y_scaled(y[int64_t(r) * classes + c]);
      }
      __syncthreads();
      factor(ps, 2, classes, items, at.stride, memory + at.tau, diagonal);
      for (int k = threadIdx.x; k < order * order; k += blockDim.x) {
        const int r = k % order, c = k / order, first = max(r, c);
        const double *of_p = ps + r, *of_y = ys + c;
        double sum = (r == first ? diagonal[first] : of_p[first * at.stride]) *
                     (c == first ? diagonal[items + first] : of_y[first * at.stride]);
        for (int l = first + 1; l < order; ++l) sum += of_p[l * at.stride] * of_y[l * at.stride];
        a[factored ? r * stride + c : c * stride + r] = sum;
      }
    } else {
      for (int k = threadIdx.x; k < order * order; k += blockDim.x) {
        const int r = k / order, c = k % order;
        double sum = 0;
        for (int64_t l = 0; l < items; ++l) sum += p_scaled(p[r * int64_t(items) + l]) * y_scaled(y[l * classes + c]);
        a[factored ? r * stride + c : c * stride + r] = sum;
      }
    }
    __syncthreads();
    // Of order 1, but for a product that nearly vanishes: its squares would have no digits.
    block_exponent(order * order, [=](int64_t k) { return a[int(k) / order * stride + int(k) % order]; }, &exponent);
    if (exponent > -100) {
      exponent = 0;
    } else {
      const PowerOfTwo scaled(-exponent);
      for (int k = threadIdx.x; k < order * order; k += blockDim.x) {
        double* x = a + k / order * stride + k % order;
        *x = scaled(*x);
      }
      __syncthreads();
    }
    const double least = ldexp(rank_tol, -exponent - p_exponent - y_exponent);
    if (factored) replace_by_factor(a, order, order, stride, rest, rest + order);
    orthogonalize(a, order, order, stride, tolerance, least);
    proper = extreme_columns(a, order, order, stride, least, rest, &found);
  }
  if (!proper) {
    const T none = T(finite ? 0 : NAN);
    if (threadIdx.x == 0) *value = none;
    for (int k = threadIdx.x; k < 2 * classes; k += blockDim.x) p_left[k] = none;
    for (int k = threadIdx.x; k < 2 * items; k += blockDim.x) p_right[k] = none;
    for (int k = threadIdx.x; y_left != nullptr && k < 2 * items; k += blockDim.x) y_left[k] = none;
    for (int k = threadIdx.x; y_right != nullptr && k < 2 * classes; k += blockDim.x) y_right[k] = none;
    return;
  }
  // u, of P Y or of the small matrix, and P^T u.
  const double by_first = 1 / found.sigma[0], by_last = 1 / found.sigma[1];
  const double *first = a + found.column[0] * stride, *last = a + found.column[1] * stride;
  for (int k = threadIdx.x; k < classes; k += blockDim.x) {
    u[k] = k < order ? first[k] * by_first : 0;
    u[classes + k] = k < order ? last[k] * by_last : 0;
  }
  const PowerOfTwo scaled(-exponent);
  const double inverse_first = scaled(by_first), inverse_last = -scaled(by_last);  // of P Y, both scaled; `left` has -u
  group_sums(
      2 * int64_t(items), order,
      [=](int64_t k, int64_t l) {
        const bool is_last = k >= items;
        const int64_t item = is_last ? k - items : k;
        double of_p = 0;
        if (!reduce) {
          of_p = p_scaled(p[l * items + item]);
        } else if (l <= item) {
          of_p = l == item ? diagonal[l] : ps[item * at.stride + l];
        }
        return of_p * (is_last ? last : first)[l];
      },
      [=](int64_t k, double sum) {
        sum *= k < items ? by_first : by_last;
        by_p[k] = sum;
        if (y_left != nullptr) y_left[k] = T(y_scaled(sum * (k < items ? inverse_first : inverse_last)));
      });
  __syncthreads();
  group_sums(
      2 * int64_t(classes), items,
      [=](int64_t c, int64_t k) {
        const int64_t s = c >= classes;
        return y_scaled(y[k * classes + c - s * classes]) * by_p[s * items + k];
      },
      [=](int64_t c, double sum) {
        v[c] = sum * (c < classes ? inverse_first : -inverse_last);
        if (y_right != nullptr) y_right[c] = T(v[c]);
      });
  __syncthreads();
  group_sums(
      2 * int64_t(items), classes,
      [=](int64_t k, int64_t c) {
        const int64_t s = k >= items;
        return y_scaled(y[(k - s * items) * classes + c]) * v[s * classes + c];
      },
      [=](int64_t k, double sum) { p_right[k] = T(p_scaled(sum * (k < items ? inverse_first : inverse_last))); });
  // The logarithm by another warp than the reflectors, of which neither is needed by the sums.
  if (threadIdx.x == blockDim.x - 1) *value = T(max(0.0, log(found.sigma[0] / found.sigma[1])));
  if (threadIdx.x >= 32) return;
  if (reduce) {
    apply_reflectors(ps, memory + at.tau, classes, items, at.stride, u);
    __syncwarp();
  }
  for (int k = threadIdx.x; k < 2 * classes; k += 32) p_left[k] = T(u[k]);
}

inline int64_t joint_threads(int64_t classes, int64_t items) {
  const int64_t threads = jacobi_threads(items < classes ? items : classes);
  return threads < 256 ? 256 : threads;
}

}  // namespace d2net::cuda

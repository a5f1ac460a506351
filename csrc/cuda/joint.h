// log(sigma_1 / sigma_r) of a product P Y by one block, and its gradient; see condition_number.h.
#pragma once

#include <cfloat>
#include <cmath>

#include "cuda/jacobi.h"

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

// x = H_0 ... H_{n-1} x, by one warp whose lanes own the elements as in factor().
__device__ __forceinline__ void apply_reflectors(const double* columns, const double* tau, int length, int n,
                                                 int64_t stride, double* x) {
  const int lane = threadIdx.x % 32;
  for (int k = n - 1; k >= 0; --k) {
    const double* v = columns + k * stride;
    const int begin = k / 32 * 32 + lane;
    double dot = 0;
    for (int i = begin; i < length; i += 32) {
      if (i >= k) dot += v[i] * x[i];
    }
    dot = tau[k] * warp_reduce(dot, Sum{});
    for (int i = begin; i < length; i += 32) {
      if (i >= k) x[i] -= dot * v[i];
    }
  }
}

// With fewer items than classes, QR of both, P = Q_p R_p and Y^T = Q_y R_y, leaves the small R_p R_y^T with the same
// singular values; else the product itself is small. Of its vectors only u is needed: u^T P, v^T = u^T P Y / sigma and
// Y v follow from the inputs. p, y and results as of one matrix in condition_number.h, y_left and y_right null where
// they are not wanted; memory: as JointLayout says. Begins with a barrier.
template <typename T>
__device__ __forceinline__ void joint_condition_number(const T* p, const T* y, int classes, int items, double rank_tol,
                                                       double tolerance, T* value, T* p_left, T* p_right, T* y_left,
                                                       T* y_right, double* memory) {
  const JointLayout at(classes, items);
  const bool reduce = items < classes;
  const int order = reduce ? items : classes, stride = int(at.small_stride);
  const bool factored = factored_first(order);  // the matrix is transposed then: its right vectors are found
  double *a = memory + at.small, *u = memory + at.left, *v = memory + at.right, *by_p = memory + at.by_p;
  const int64_t size = int64_t(classes) * items;
  int p_exponent = 0, y_exponent = 0, exponent = 0;  // the barrier for these also parts two products
  const bool p_finite = block_exponent(size, [=](int64_t k) { return p[k]; }, &p_exponent);
  const bool finite = block_exponent(size, [=](int64_t k) { return y[k]; }, &y_exponent) && p_finite;
  const PowerOfTwo p_scaled(-p_exponent), y_scaled(-y_exponent);
  Extremes found;
  bool proper = false;
  if (finite) {
    if (reduce) {
      double *ps = memory + at.p, *ys = memory + at.y, *diagonal = memory + at.diagonal;
      for (int64_t k = threadIdx.x; k < size; k += blockDim.x) {
        ps[k % items * at.stride + k / items] = p_scaled(p[k]);
        ys[k / classes * at.stride + k % classes] = y_scaled(y[k]);
      }
      __syncthreads();
      factor(ps, 2, classes, items, at.stride, memory + at.tau, diagonal);
      for (int k = threadIdx.x; k < order * order; k += blockDim.x) {
        const int r = k % order, c = k / order;
        double sum = 0;
        for (int l = max(r, c); l < order; ++l) {
          sum +=
              (l == r ? diagonal[l] : ps[l * at.stride + r]) * (l == c ? diagonal[items + l] : ys[l * at.stride + c]);
        }
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
    block_exponent(order * order, [=](int64_t k) { return a[k / order * stride + k % order]; }, &exponent);
    const PowerOfTwo scaled(-exponent);
    for (int k = threadIdx.x; k < order * order; k += blockDim.x) {
      double* x = a + k / order * stride + k % order;
      *x = scaled(*x);
    }
    __syncthreads();
    const double least = ldexp(rank_tol, -exponent - p_exponent - y_exponent);
    double* rest = memory + at.rest;
    if (factored) replace_by_factor(a, order, order, stride, rest, rest + order);
    orthogonalize(a, order, order, stride, tolerance, least);
    proper = extreme_columns(a, order, order, stride, least, rest, &found);
  }
  if (threadIdx.x == 0) {
    *value = proper ? T(max(0.0, log(found.sigma[0] / found.sigma[1]))) : T(finite ? 0 : NAN);
  }
  if (!proper) {
    const T none = T(finite ? 0 : NAN);
    for (int k = threadIdx.x; k < 2 * classes; k += blockDim.x) p_left[k] = none;
    for (int k = threadIdx.x; k < 2 * items; k += blockDim.x) p_right[k] = none;
    for (int k = threadIdx.x; y_left != nullptr && k < 2 * items; k += blockDim.x) y_left[k] = none;
    for (int k = threadIdx.x; y_right != nullptr && k < 2 * classes; k += blockDim.x) y_right[k] = none;
    return;
  }
  const int warp = threadIdx.x / 32;
  if (warp < 2) {
    const double* column = a + (warp == 0 ? found.column[0] : found.column[1]) * stride;
    const double inverse = 1 / (warp == 0 ? found.sigma[0] : found.sigma[1]);
    double* x = u + warp * classes;
    for (int k = threadIdx.x % 32; k < classes; k += 32) x[k] = k < order ? column[k] * inverse : 0;
    if (reduce) apply_reflectors(memory + at.p, memory + at.tau, classes, items, at.stride, x);
  }
  __syncthreads();
  // 1 / sigma of P Y, both scaled.
  const double inverse_first = ldexp(1 / found.sigma[0], -exponent);
  const double inverse_last = ldexp(1 / found.sigma[1], -exponent);
  for (int k = threadIdx.x; k < 2 * classes; k += blockDim.x) p_left[k] = T(u[k]);
  group_sums(
      2 * int64_t(items), classes,
      [=](int64_t k, int64_t c) {
        const int64_t s = k >= items;
        return p_scaled(p[c * items + k - s * items]) * u[s * classes + c];
      },
      [=](int64_t k, double sum) {
        by_p[k] = sum;
        if (y_left != nullptr) y_left[k] = T(ldexp(k < items ? sum * inverse_first : -sum * inverse_last, -y_exponent));
      });
  __syncthreads();
  group_sums(
      2 * int64_t(classes), items,
      [=](int64_t c, int64_t k) {
        const int64_t s = c >= classes;
        return y_scaled(y[k * classes + c - s * classes]) * by_p[s * items + k];
      },
      [=](int64_t c, double sum) {
        v[c] = sum * (c < classes ? inverse_first : inverse_last);
        if (y_right != nullptr) y_right[c] = T(v[c]);
      });
  __syncthreads();
  group_sums(
      2 * int64_t(items), classes,
      [=](int64_t k, int64_t c) {
        const int64_t s = k >= items;
        return y_scaled(y[(k - s * items) * classes + c]) * v[s * classes + c];
      },
      [=](int64_t k, double sum) {
        p_right[k] = T(ldexp(k < items ? sum * inverse_first : -sum * inverse_last, -p_exponent));
      });
}

inline int64_t joint_threads(int64_t classes, int64_t items) {
  const int64_t threads = jacobi_threads(items < classes ? items : classes);
  return threads < 128 ? 128 : threads;
}

}  // namespace d2net::cuda

#include "condition_number.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "math/bidiagonal.h"
#include "math/svd2x2.h"
#include "parallel.h"
#include "simd.h"

// Everything is computed in double, so that float32 inputs lose nothing on the way.
namespace d2net::cpu {
namespace {

constexpr int64_t kLanes = 8;  // rows are padded to whole vectors, so that no loop over columns has a remainder
constexpr int kShifts = 32;    // enough for gcc not to unroll the loop over them, which would keep it from vectorising

inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

[[gnu::always_inline]] inline double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// x -= by * y
[[gnu::always_inline]] inline void subtract(double* x, const double* y, double by, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] -= by * y[i];
}

// Turns x[0..n) into the reflector's vector v and returns its beta and tau.
[[gnu::always_inline]] inline Reflector reflect(double* x, int64_t n) {
  const Reflector h = reflector(x[0], dot(x + 1, x + 1, n - 1));
  for (int64_t i = 1; i < n; ++i) x[i] *= h.scale;
  x[0] = 1;
  return h;
}

// B = L^T A R of a (m, n), m >= n, whose rows are `stride` apart, with products L and R of Householder reflections.
// b: the entries of B in their order d_0, e_0, d_1, ... Left reflectors come as rows of `left` (n, m), the right ones
// as rows of `right` (n, stride), with their tau. `a` is destroyed; its padding must be 0.
D2NET_SIMD void bidiagonalize(double* a, int64_t m, int64_t n, int64_t stride, double* b, double* left,
                              double* left_tau, double* right, double* right_tau, double* w) {
  for (int64_t k = 0; k < n; ++k) {
    // Columns before k are 0 from row k on, so vectors may start where they are aligned.
    const int64_t from = k / kLanes * kLanes, wide = stride - from;
    double* u = left + k * m;
    for (int64_t i = k; i < m; ++i) {
      u[i] = a[i * stride + k];
      a[i * stride + k] = 0;
    }
    const Reflector h = reflect(u + k, m - k);
    b[2 * k] = h.beta;
    left_tau[k] = h.tau;
    double* v = right + k * stride;
    right_tau[k] = 0;
    if (k + 1 == n) return;

    std::fill(w + from, w + stride, 0.0);
    int64_t i = k;
    for (; i + 4 <= m; i += 4) {  // four rows at a time: w is read and written less often
      const double* row = a + i * stride;
      const double u0 = u[i], u1 = u[i + 1], u2 = u[i + 2], u3 = u[i + 3];
#pragma omp simd
      for (int64_t j = from; j < stride; ++j) {
        w[j] += u0 * row[j] + u1 * row[stride + j] + u2 * row[2 * stride + j] + u3 * row[3 * stride + j];
      }
    }
    for (; i < m; ++i) subtract(w + from, a + i * stride + from, -u[i], wide);
    for (int64_t j = from; j < stride; ++j) w[j] *= h.tau;
    subtract(a + k * stride + from, w + from, 1, wide);

    std::copy(a + k * stride + from, a + (k + 1) * stride, v + from);
    const Reflector g = reflect(v + k + 1, n - k - 1);
    b[2 * k + 1] = g.beta;
    right_tau[k] = g.tau;
    const double wv = dot(w + from, v + from, wide);
    for (i = k + 1; i < m; ++i) {
      double* row = a + i * stride;
      const double by_w = u[i], by_v = g.tau * (dot(row + from, v + from, wide) - u[i] * wv);
#pragma omp simd
      for (int64_t j = from; j < stride; ++j) row[j] -= by_w * w[j] + by_v * v[j];
    }
  }
}

// Singular values of the bidiagonal matrix b (of order n): the largest and the smallest above rank_tol.
// False for rank <= 1. precision: their relative error. squares: 2 n of scratch.
D2NET_SIMD bool extreme_values(const double* b, int64_t n, double rank_tol, double precision, double* squares,
                               double sigma[2]) {
  double high = 0;  // every singular value is below it (Gershgorin)
  for (int64_t i = 0; i < 2 * n - 1; ++i) {
    squares[i] = b[i] * b[i];
    high = std::max(high, std::fabs(b[i]) + (i > 0 ? std::fabs(b[i - 1]) : 0));
  }
  high *= 1.001;
  const double low = std::max(rank_tol, kNegligible);
  if (!(low < high)) return false;
  int rank;
  count_at_least<1>(squares, int(n), &low, &rank);
  if (rank < 2) return false;
  largest_and_smallest<kShifts>(squares, int(n), rank, low, high, precision, sigma);
  return true;
}

// x = H_0 H_1 ... H_{n-1} x for reflectors in rows of `v`, `stride` apart; that of H_k begins at element k + offset.
D2NET_SIMD void apply_reflectors(const double* v, const double* tau, int64_t n, int64_t stride, int64_t offset,
                                 int64_t length, double* x) {
  for (int64_t k = n - 1; k >= 0; --k) {
    const int64_t from = k + offset;
    if (tau[k] == 0) continue;
    const double* y = v + k * stride + from;
    subtract(x + from, y, tau[k] * dot(y, x + from, length - from), length - from);
  }
}

// QR of the (m, n) matrix, m >= n, that is given by columns, one after the other: R goes to r (n, n), by columns too,
// and the columns become the reflectors of Q.
D2NET_SIMD void factor(double* columns, int64_t m, int64_t n, double* tau, double* r) {
  std::fill(r, r + n * n, 0.0);
  for (int64_t k = 0; k < n; ++k) {
    double* v = columns + k * m;
    std::copy(v, v + k, r + k * n);
    const Reflector h = reflect(v + k, m - k);
    r[k * n + k] = h.beta;
    tau[k] = h.tau;
    for (int64_t j = k + 1; j < n; ++j) {
      double* x = columns + j * m + k;
      subtract(x, v + k, h.tau * dot(v + k, x, m - k), m - k);
    }
  }
}

// c (n, n; rows `stride` apart) = a b^T of matrices (n, k) that are given by columns.
D2NET_SIMD void multiply(const double* a, const double* b, int64_t n, int64_t k, double* c, int64_t stride) {
  std::fill(c, c + n * stride, 0.0);
  for (int64_t l = 0; l < k; ++l) {
    for (int64_t i = 0; i < n; ++i) subtract(c + i * stride, b + l * n, -a[l * n + i], n);
  }
}

// Divides x by the power of two that brings its largest magnitude into [0.5, 1), so that squares neither overflow nor
// vanish, and returns that power's exponent. False if an element is NaN or infinite.
D2NET_SIMD bool normalize(double* x, int64_t n, int* exponent) {
  double largest = 0, broken = 0;
#pragma omp simd reduction(max : largest) reduction(+ : broken)
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    broken += x[i] - x[i];
  }
  if (broken != 0) return false;
  std::frexp(largest, exponent);
  // In two steps: the power itself may overflow.
  const double half = std::ldexp(1, -*exponent / 2), rest = std::ldexp(1, -*exponent - -*exponent / 2);
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * half * rest;
  return true;
}

// Extreme singular triplets of one (m, n) matrix after the other, m >= n.
class Decomposition {
 public:
  // precision: largest relative error of the singular values.
  Decomposition(int64_t m, int64_t n, double precision) : stride(padded(n)), m_(m), n_(n), precision_(precision) {
    struct {
      double** pointer;
      int64_t size;
    } const parts[] = {{&a, m * stride},
                       {&left_reflectors_, n * m},
                       {&right_reflectors_, n * stride},
                       {&left_tau_, n},
                       {&right_tau_, n},
                       {&b_, 2 * n},
                       {&squares_, 2 * n},
                       {&work_, 12 * n},
                       {&w_, stride},
                       {&left, 2 * m},
                       {&right, 2 * n}};
    int64_t size = kLanes;
    for (const auto& part : parts) size += padded(part.size);
    memory_.resize(size);
    // Vectors that cross a cache line are slow.
    void* next = memory_.data();
    size_t space = size * sizeof(double);
    double* aligned = static_cast<double*>(std::align(kLanes * sizeof(double), sizeof(double), next, space));
    for (const auto& part : parts) *part.pointer = std::exchange(aligned, aligned + padded(part.size));
  }

  // False for rank <= 1: nothing is set then. False in `finite` if the matrix is not.
  bool run(double rank_tol) {
    int exponent = 0;
    finite = normalize(a, m_ * stride, &exponent);
    if (!finite) return false;
    bidiagonalize(a, m_, n_, stride, b_, left_reflectors_, left_tau_, right_reflectors_, right_tau_, w_);
    double sigma[2];
    if (!extreme_values(b_, n_, std::ldexp(rank_tol, -exponent), precision_, squares_, sigma)) return false;
    log_condition = std::max(0.0, std::log(sigma[0] / sigma[1]));  // equal ones may differ in their last bit
    for (int s = 0; s < 2; ++s) {
      double *u = left + s * m_, *v = right + s * n_;
      singular_vectors(b_, int(n_), sigma[s], work_, u, v);
      std::fill(u + n_, u + m_, 0.0);
      apply_reflectors(left_reflectors_, left_tau_, n_, m_, 0, m_, u);
      apply_reflectors(right_reflectors_, right_tau_, n_ - 1, stride, 1, n_, v);
      inverse[s] = std::ldexp(1 / sigma[s], -exponent);
    }
    return true;
  }

  double* a;  // the matrix, destroyed by run(): rows `stride` apart, the rest of each row 0
  const int64_t stride;
  bool finite;
  double log_condition;  // log(sigma_1 / sigma_r)
  double inverse[2];     // 1 / sigma_1, 1 / sigma_r
  double *left, *right;  // (2, m) and (2, n) their vectors

 private:
  const int64_t m_, n_;
  const double precision_;
  std::vector<double> memory_;
  double *left_reflectors_, *right_reflectors_, *left_tau_, *right_tau_, *b_, *squares_, *work_, *w_;
};

// Relative error of singular values that results of type T do not show.
template <typename T>
constexpr double kPrecision = sizeof(T) == 4 ? 2e-10 : 4.5e-16;

// x (classes) = Q u, u (order): Q of reflectors, or the identity where there was no need to factor.
void expand(const double* u, int64_t order, const double* reflectors, const double* tau, bool factored, int64_t classes,
            double* x) {
  std::copy(u, u + order, x);
  std::fill(x + order, x + classes, 0.0);
  if (factored) apply_reflectors(reflectors, tau, order, classes, 0, classes, x);
}

// x (n) = by * y
template <typename T>
void scaled(const double* y, int64_t n, double by, T* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = T(by * y[i]);
}

// grad[i] left[i]^T right[i]
template <typename T>
[[gnu::always_inline]] inline void outer_product(T grad, const T* left, const T* right, int64_t rows, int64_t cols,
                                                 T* gradient) {
  for (int64_t r = 0; r < rows; ++r) {
    const T one = grad * left[r], two = grad * left[rows + r];
    for (int64_t c = 0; c < cols; ++c) gradient[r * cols + c] = one * right[c] + two * right[cols + c];
  }
}
template <typename T>
[[gnu::always_inline]] inline void outer_products(const T* grad, const T* left, const T* right, int64_t begin,
                                                  int64_t end, int64_t rows, int64_t cols, T* gradient) {
  if (rows == 2 && cols == 2) {  // by far the most frequent, and too short for loops of a length not known
    for (int64_t i = begin; i < end; ++i) outer_product(grad[i], left + 4 * i, right + 4 * i, 2, 2, gradient + 4 * i);
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    outer_product(grad[i], left + 2 * rows * i, right + 2 * cols * i, rows, cols, gradient + rows * cols * i);
  }
}
D2NET_SIMD void outer(const float* grad, const float* left, const float* right, int64_t begin, int64_t end,
                      int64_t rows, int64_t cols, float* gradient) {
  outer_products(grad, left, right, begin, end, rows, cols, gradient);
}
D2NET_SIMD void outer(const double* grad, const double* left, const double* right, int64_t begin, int64_t end,
                      int64_t rows, int64_t cols, double* gradient) {
  outer_products(grad, left, right, begin, end, rows, cols, gradient);
}

// Matrices of order 2, in closed form. Their gradient is written as its product with the identity.
template <typename T>
[[gnu::always_inline]] inline void two_by_two(const T* u, int64_t begin, int64_t end, double rank_tol, T* value,
                                              T* left, T* right) {
  for (int64_t i = begin; i < end; ++i) {
    const Condition2x2 x = condition_2x2(u[4 * i], u[4 * i + 1], u[4 * i + 2], u[4 * i + 3], rank_tol);
    value[i] = T(x.excess);
    left[4 * i] = T(x.da), left[4 * i + 1] = T(x.dc), left[4 * i + 2] = T(x.db), left[4 * i + 3] = T(x.dd);
    right[4 * i] = right[4 * i + 3] = 1, right[4 * i + 1] = right[4 * i + 2] = 0;
  }
  for (int64_t i = begin; i < end; ++i) value[i] = std::log1p(value[i]);
}
D2NET_SIMD void two_by_two_range(const float* u, int64_t begin, int64_t end, double rank_tol, float* value, float* left,
                                 float* right) {
  two_by_two(u, begin, end, rank_tol, value, left, right);
}
D2NET_SIMD void two_by_two_range(const double* u, int64_t begin, int64_t end, double rank_tol, double* value,
                                 double* left, double* right) {
  two_by_two(u, begin, end, rank_tol, value, left, right);
}

// How many (m, n) matrices make about 10 us of work.
int64_t matrices_per_range(int64_t m, int64_t n) { return 1 + 40000 / (m * n * n + 2000 * n); }

}  // namespace

template <typename T>
void log_condition_number(const T* u, int64_t n, int64_t rows, int64_t cols, double rank_tol, T* value, T* left,
                          T* right, int threads) {
  if (rows == 2 && cols == 2) {
    parallel_for(n, 1024, threads,
                 [&](int64_t begin, int64_t end) { two_by_two_range(u, begin, end, rank_tol, value, left, right); });
    return;
  }
  const bool transpose = rows < cols;
  const int64_t longer = std::max(rows, cols), shorter = std::min(rows, cols);
  parallel_for(n, matrices_per_range(longer, shorter), threads, [&](int64_t begin, int64_t end) {
    Decomposition svd(longer, shorter, kPrecision<T>);
    for (int64_t i = begin; i < end; ++i) {
      const T* x = u + i * rows * cols;
      for (int64_t r = 0; r < longer; ++r) {
        double* row = svd.a + r * svd.stride;
        for (int64_t c = 0; c < shorter; ++c) row[c] = transpose ? x[c * cols + r] : x[r * cols + c];
        std::fill(row + shorter, row + svd.stride, 0.0);
      }
      T *l = left + i * 2 * rows, *r = right + i * 2 * cols;
      if (svd.run(rank_tol)) {
        value[i] = T(svd.log_condition);
        scaled(transpose ? svd.right : svd.left, rows, svd.inverse[0], l);
        scaled((transpose ? svd.right : svd.left) + rows, rows, -svd.inverse[1], l + rows);
        scaled(transpose ? svd.left : svd.right, 2 * cols, 1, r);
      } else {
        value[i] = svd.finite ? T(0) : std::numeric_limits<T>::quiet_NaN();
        std::fill(l, l + 2 * rows, value[i]);
        std::fill(r, r + 2 * cols, value[i]);
      }
    }
  });
}

// With P^T = (p_1 ... ) given by items, U = sum over items of p_k y_k^T. With fewer items than classes, QR of both,
// P = Q_p R_p and Y^T = Q_y R_y, leaves U = Q_p (R_p R_y^T) Q_y^T: the small product has the same singular values, and
// is again a sum over items, of columns of R_p and R_y. A Gram matrix would be cheaper, but squares sigma.
template <typename T>
void joint_log_condition_number(const T* p, const T* y, int64_t n, int64_t classes, int64_t items, double rank_tol,
                                T* value, T* p_left, T* p_right, T* y_left, T* y_right, int threads) {
  const bool reduce = items < classes;
  const int64_t order = std::min(items, classes), size = items * classes;
  const int64_t grain = matrices_per_range(std::max(items, classes), order);
  parallel_for(n, grain, threads, [&](int64_t begin, int64_t end) {
    Decomposition svd(order, order, kPrecision<T>);
    const int64_t square = reduce ? items * items : 0;
    std::vector<double> memory(2 * (size + square + items) + classes);
    double *p_items = memory.data(), *y_items = p_items + size, *p_r = y_items + size, *y_r = p_r + square,
           *p_tau = y_r + square, *y_tau = p_tau + items, *x = y_tau + items;
    const double *p_small = reduce ? p_r : p_items, *y_small = reduce ? y_r : y_items;
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t k = 0; k < items; ++k) {
        for (int64_t c = 0; c < classes; ++c) {
          p_items[k * classes + c] = p[i * size + c * items + k];
          y_items[k * classes + c] = y[i * size + k * classes + c];
        }
      }
      T *pl = p_left + i * 2 * classes, *pr = p_right + i * 2 * items;
      T *yl = y_left + i * 2 * items, *yr = y_right + i * 2 * classes;
      int p_exponent = 0, y_exponent = 0;
      const bool finite = normalize(p_items, size, &p_exponent) && normalize(y_items, size, &y_exponent);
      bool proper = false;
      if (finite) {
        if (reduce) {
          factor(p_items, classes, items, p_tau, p_r);
          factor(y_items, classes, items, y_tau, y_r);
        }
        multiply(p_small, y_small, order, items, svd.a, svd.stride);
        proper = svd.run(std::ldexp(rank_tol, -p_exponent - y_exponent));
      }
      if (!proper) {
        value[i] = finite ? T(0) : std::numeric_limits<T>::quiet_NaN();
        std::fill(pl, pl + 2 * classes, value[i]);
        std::fill(pr, pr + 2 * items, value[i]);
        std::fill(yl, yl + 2 * items, value[i]);
        std::fill(yr, yr + 2 * classes, value[i]);
        continue;
      }
      value[i] = T(svd.log_condition);
      for (int s = 0; s < 2; ++s, pl += classes, pr += items, yl += items, yr += classes) {
        const double *u = svd.left + s * order, *v = svd.right + s * order;
        const double by = (s == 0 ? 1 : -1) * svd.inverse[s];
        // The gradient of u^T P Y v is u (Y v)^T for P and (P^T u) v^T for Y.
        const double by_p = std::ldexp(by, -p_exponent), by_y = std::ldexp(by, -y_exponent);
        for (int64_t k = 0; k < items; ++k) {
          pr[k] = T(by_p * dot(y_small + k * order, v, order));
          yl[k] = T(by_y * dot(p_small + k * order, u, order));
        }
        expand(u, order, p_items, p_tau, reduce, classes, x);
        scaled(x, classes, 1, pl);
        expand(v, order, y_items, y_tau, reduce, classes, x);
        scaled(x, classes, 1, yr);
      }
    }
  });
}

template <typename T>
void log_condition_number_backward(const T* grad, const T* left, const T* right, int64_t n, int64_t rows, int64_t cols,
                                   T* gradient, int threads) {
  const int64_t grain = 1 + 32768 / (rows * cols);
  parallel_for(n, grain, threads,
               [&](int64_t begin, int64_t end) { outer(grad, left, right, begin, end, rows, cols, gradient); });
}

#define D2NET_INSTANTIATE(T)                                                                                         \
  template void log_condition_number<T>(const T*, int64_t, int64_t, int64_t, double, T*, T*, T*, int);               \
  template void joint_log_condition_number<T>(const T*, const T*, int64_t, int64_t, int64_t, double, T*, T*, T*, T*, \
                                              T*, int);                                                              \
  template void log_condition_number_backward<T>(const T*, const T*, const T*, int64_t, int64_t, int64_t, T*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu

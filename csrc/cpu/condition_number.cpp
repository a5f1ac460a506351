#include "condition_number.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/common/extreme_svd.h"
#include "cpu/common/householder.h"
#include "cpu/common/parallel.h"
#include "cpu/common/simd.h"
#include "math/svd2x2.h"

// All computation is in double: the smallest singular values of float32 inputs would be lost in rounding.
namespace d2net::cpu {
namespace {

// QR of an (m, n) matrix, m >= n, stored by columns. R goes to r (n, n), by columns too; the columns become the
// reflectors of Q.
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

// c (n, n) = a b^T of matrices (n, k) stored by columns.
D2NET_SIMD void multiply(const double* a, const double* b, int64_t n, int64_t k, double* c) {
  std::fill(c, c + n * n, 0.0);
  for (int64_t l = 0; l < k; ++l) {
    for (int64_t i = 0; i < n; ++i) subtract(c + i * n, b + l * n, -a[l * n + i], n);
  }
}

// Divides x by the power of two that brings its largest magnitude into [0.5, 1), so that squares neither overflow nor
// vanish, and returns that power's exponent. False if an element is NaN or infinite.
D2NET_SIMD bool normalize(double* x, int64_t n, int* exponent) {
  double largest = 0, nan_or_0 = 0;
#pragma omp simd reduction(max : largest) reduction(+ : nan_or_0)
  for (int64_t i = 0; i < n; ++i) {
    largest = std::max(largest, std::fabs(x[i]));
    nan_or_0 += x[i] - x[i];
  }
  if (nan_or_0 != 0) return false;
  std::frexp(largest, exponent);
  // In two steps: the power itself may overflow.
  const double half = std::ldexp(1, -*exponent / 2), rest = std::ldexp(1, -*exponent - -*exponent / 2);
  for (int64_t i = 0; i < n; ++i) x[i] = x[i] * half * rest;
  return true;
}

constexpr int64_t kLeastMatrices = 3, kMostElements = 48 * 48;  // see in_groups()

// Relative error of singular values that does not change results of type T.
template <typename T>
constexpr double kPrecision = sizeof(T) == 4 ? 2e-10 : 4.5e-16;

// x (n) = by * y, whose elements are `stride` apart.
template <typename T>
void scaled(const double* y, int64_t stride, int64_t n, double by, T* x) {
  for (int64_t i = 0; i < n; ++i) x[i] = T(by * y[i * stride]);
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
  if (rows == 2 && cols == 2) {  // by far the most frequent; the compiler unrolls loops of known length
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

// 2 x 2 matrices, in closed form. left is the gradient, transposed; right the identity.
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

// Whether `matrices` matrices (m, n) are decomposed kGroup at a time: if there are enough of them to use several lanes,
// and if a group fits in the L2 cache.
bool in_groups(int64_t matrices, int64_t m, int64_t n) { return matrices >= kLeastMatrices && m * n <= kMostElements; }

// How many groups of (m, n) matrices make about 10 us of work.
template <int group>
int64_t groups_per_range(int64_t m, int64_t n) {
  return 1 + (group == 1 ? 40000 / (m * n * n + 2000 * n) : 20000 / (m * n * n + 400 * n));
}

template <int group, typename T>
void condition_numbers(const LogConditionNumber<T>& x, int threads) {
  const int64_t n = x.n, rows = x.rows, cols = x.cols;
  const bool transpose = rows < cols;
  const int64_t longer = std::max(rows, cols), shorter = std::min(rows, cols), size = rows * cols;
  double tolerance[group];
  std::fill_n(tolerance, group, x.rank_tol);
  const int64_t groups = (n + group - 1) / group;
  parallel_for(groups, groups_per_range<group>(longer, shorter), threads, [&](int64_t begin, int64_t end) {
    ExtremeSvd<group> svd(longer, shorter, kPrecision<T>);
    for (int64_t first = begin * group; first < std::min(n, end * group); first += group) {
      const int held = int(std::min<int64_t>(group, n - first));
      for (int g = 0; g < group; ++g) {
        const T* u = x.u + (first + g) * size;
        if (g >= held) {
          svd.clear(g);
        } else if (transpose) {
          for (int64_t r = 0; r < longer; ++r) svd.set_row(r, g, u + r, cols);
        } else {
          for (int64_t r = 0; r < longer; ++r) svd.set_row(r, g, u + r * cols, 1);
        }
      }
      svd.run(tolerance);
      for (int g = 0; g < held; ++g) {
        const int64_t i = first + g;
        T *l = x.left + i * 2 * rows, *r = x.right + i * 2 * cols;
        if (svd.proper[g]) {
          x.value[i] = T(svd.log_condition[g]);
          const double *row_vectors = (transpose ? svd.right : svd.left) + g,
                       *col_vectors = (transpose ? svd.left : svd.right) + g;
          scaled(row_vectors, group, rows, svd.inverse[0][g], l);
          scaled(row_vectors + rows * group, group, rows, -svd.inverse[1][g], l + rows);
          scaled(col_vectors, group, 2 * cols, 1, r);
        } else {
          x.value[i] = svd.finite[g] ? T(0) : std::numeric_limits<T>::quiet_NaN();
          std::fill_n(l, 2 * rows, x.value[i]);
          std::fill_n(r, 2 * cols, x.value[i]);
        }
      }
    }
  });
}

// U = P Y is the sum over items k of p_k y_k^T, where p_k is column k of P and y_k row k of Y. With fewer items than
// classes, the QR factorizations P = Q_p R_p and Y^T = Q_y R_y give U = Q_p (R_p R_y^T) Q_y^T: the small product has
// the same singular values, and is again a sum over items, of columns of R_p and R_y. A Gram matrix would be cheaper,
// but squares sigma.
class Product {
 public:
  Product(int64_t classes, int64_t items)
      : order_(std::min(items, classes)),
        classes_(classes),
        items_(items),
        memory_(2 * classes * items + 2 * order_ * items + 2 * items + order_ * order_ + 2 * classes) {
    p_items_ = memory_.data();
    y_items_ = p_items_ + classes * items;
    p_r_ = y_items_ + classes * items;
    y_r_ = p_r_ + order_ * items;
    p_tau_ = y_r_ + order_ * items;
    y_tau_ = p_tau_ + items;
    small = y_tau_ + items;
    x_ = small + order_ * order_;
  }

  Product(Product&&) = default;  // a copy would point into the original's memory

  // Computes `small` and `exponent`; false if p (classes, items) or y (items, classes) is not finite.
  template <typename T>
  bool set(const T* p, const T* y) {
    for (int64_t k = 0; k < items_; ++k) {
      for (int64_t c = 0; c < classes_; ++c) {
        p_items_[k * classes_ + c] = p[c * items_ + k];
        y_items_[k * classes_ + c] = y[k * classes_ + c];
      }
    }
    const int64_t size = classes_ * items_;
    if (!normalize(p_items_, size, &p_exponent_) || !normalize(y_items_, size, &y_exponent_)) return false;
    exponent = p_exponent_ + y_exponent_;
    if (reduced()) {
      factor(p_items_, classes_, items_, p_tau_, p_r_);
      factor(y_items_, classes_, items_, y_tau_, y_r_);
    }
    multiply(p_small(), y_small(), order_, items_, small);
    return true;
  }

  // The gradient of u^T P Y v is u (Y v)^T with respect to P and (P^T u) v^T with respect to Y. u, v (2, order) and
  // 1 / sigma are those of `small`; its scale is divided out.
  template <typename T>
  void gradients(const double* u, const double* v, const double* inverse, T* p_left, T* p_right, T* y_left,
                 T* y_right) {
    for (int s = 0; s < 2; ++s) {
      const double signed_inverse = s == 0 ? inverse[0] : -inverse[1];
      const double by_p = std::ldexp(signed_inverse, -p_exponent_), by_y = std::ldexp(signed_inverse, -y_exponent_);
      for (int64_t k = 0; k < items_; ++k) {
        p_right[s * items_ + k] = T(by_p * dot(y_small() + k * order_, v + s * order_, order_));
        y_left[s * items_ + k] = T(by_y * dot(p_small() + k * order_, u + s * order_, order_));
      }
    }
    expand(u, p_items_, p_tau_, p_left);
    expand(v, y_items_, y_tau_, y_right);
  }

  double* small;  // (order, order): the product, or one with its singular values, times 2^-exponent
  int exponent;

 private:
  bool reduced() const { return items_ < classes_; }
  const double* p_small() const { return reduced() ? p_r_ : p_items_; }
  const double* y_small() const { return reduced() ? y_r_ : y_items_; }

  // result (2, classes) = Q vectors (2, order)
  template <typename T>
  void expand(const double* vectors, const double* reflectors, const double* tau, T* result) {
    for (int s = 0; s < 2; ++s) {
      std::copy_n(vectors + s * order_, order_, x_ + s * classes_);
      std::fill(x_ + s * classes_ + order_, x_ + (s + 1) * classes_, 0.0);
    }
    if (reduced()) apply_reflectors(reflectors, tau, order_, classes_, 0, classes_, x_);
    scaled(x_, 1, 2 * classes_, 1, result);
  }

  const int64_t order_, classes_, items_;
  std::vector<double> memory_;
  double *p_items_, *y_items_, *p_r_, *y_r_, *p_tau_, *y_tau_, *x_;
  int p_exponent_, y_exponent_;
};

template <int group, typename T>
void joint_condition_numbers(const JointLogConditionNumber<T>& x, int threads) {
  const int64_t n = x.n, classes = x.classes, items = x.items;
  const int64_t order = std::min(items, classes), size = items * classes, groups = (n + group - 1) / group;
  const int64_t grain = groups_per_range<group>(std::max(items, classes), order);
  parallel_for(groups, grain, threads, [&](int64_t begin, int64_t end) {
    ExtremeSvd<group> svd(order, order, kPrecision<T>);
    std::vector<Product> products;
    for (int g = 0; g < group; ++g) products.emplace_back(classes, items);
    std::vector<double> vectors(4 * order);
    double tolerance[group];
    for (int64_t first = begin * group; first < std::min(n, end * group); first += group) {
      const int held = int(std::min<int64_t>(group, n - first));
      bool finite[group];
      for (int g = 0; g < group; ++g) {
        Product& product = products[g];
        finite[g] = g < held && product.set(x.p + (first + g) * size, x.y + (first + g) * size);
        tolerance[g] = finite[g] ? std::ldexp(x.rank_tol, -product.exponent) : 0;
        if (!finite[g]) svd.clear(g);
        for (int64_t r = 0; r < order && finite[g]; ++r) svd.set_row(r, g, product.small + r * order, 1);
      }
      svd.run(tolerance);
      for (int g = 0; g < held; ++g) {
        const int64_t i = first + g;
        T *pl = x.p_left + i * 2 * classes, *pr = x.p_right + i * 2 * items;
        T *yl = x.y_left + i * 2 * items, *yr = x.y_right + i * 2 * classes;
        if (!finite[g] || !svd.proper[g]) {
          x.value[i] = finite[g] ? T(0) : std::numeric_limits<T>::quiet_NaN();
          std::fill_n(pl, 2 * classes, x.value[i]);
          std::fill_n(pr, 2 * items, x.value[i]);
          std::fill_n(yl, 2 * items, x.value[i]);
          std::fill_n(yr, 2 * classes, x.value[i]);
          continue;
        }
        x.value[i] = T(svd.log_condition[g]);
        double *u = vectors.data(), *v = u + 2 * order;
        scaled(svd.left + g, group, 2 * order, 1, u);
        scaled(svd.right + g, group, 2 * order, 1, v);
        const double inverse[2] = {svd.inverse[0][g], svd.inverse[1][g]};
        products[g].gradients(u, v, inverse, pl, pr, yl, yr);
      }
    }
  });
}

}  // namespace

template <typename T>
void log_condition_number(const LogConditionNumber<T>& x, int threads) {
  if (x.rows == 2 && x.cols == 2) {
    parallel_for(x.n, 1024, threads, [&](int64_t begin, int64_t end) {
      two_by_two_range(x.u, begin, end, x.rank_tol, x.value, x.left, x.right);
    });
    return;
  }
  const auto run = in_groups(x.n, x.rows, x.cols) ? condition_numbers<kGroup, T> : condition_numbers<1, T>;
  run(x, threads);
}

template <typename T>
void joint_log_condition_number(const JointLogConditionNumber<T>& x, int threads) {
  const int64_t order = std::min(x.classes, x.items);
  const auto run = in_groups(x.n, order, order) ? joint_condition_numbers<kGroup, T> : joint_condition_numbers<1, T>;
  run(x, threads);
}

template <typename T>
void log_condition_number_backward(const LogConditionNumber<T>& x, int threads) {
  const int64_t grain = 1 + 32768 / (x.rows * x.cols);
  parallel_for(x.n, grain, threads, [&](int64_t begin, int64_t end) {
    outer(x.grad_value, x.left, x.right, begin, end, x.rows, x.cols, x.grad_u);
  });
}

D2NET_INSTANTIATE_CPU(log_condition_number, LogConditionNumber)
D2NET_INSTANTIATE_CPU(log_condition_number_backward, LogConditionNumber)
D2NET_INSTANTIATE_CPU(joint_log_condition_number, JointLogConditionNumber)

}  // namespace d2net::cpu

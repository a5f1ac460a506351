#include <algorithm>
#include <limits>
#include <string>

#include "check.h"
#include "condition_number.h"
#include "math/svd2x2.h"

namespace {

constexpr double kTolerance = 1e-5;

// Singular values of a (m, n), falling, by one-sided Jacobi: slow, simple and accurate.
std::vector<double> singular_values(std::vector<double> a, int64_t m, int64_t n) {
  for (int sweep = 0; sweep < 60; ++sweep) {
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        double pp = 0, qq = 0, pq = 0;
        for (int64_t i = 0; i < m; ++i) {
          pp += a[i * n + p] * a[i * n + p];
          qq += a[i * n + q] * a[i * n + q];
          pq += a[i * n + p] * a[i * n + q];
        }
        if (std::abs(pq) <= 1e-17 * std::sqrt(pp * qq)) continue;
        const double angle = 0.5 * std::atan2(2 * pq, pp - qq), c = std::cos(angle), s = std::sin(angle);
        for (int64_t i = 0; i < m; ++i) {
          const double x = a[i * n + p], y = a[i * n + q];
          a[i * n + p] = c * x + s * y;
          a[i * n + q] = c * y - s * x;
        }
      }
    }
  }
  std::vector<double> sigma(n, 0.0);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) sigma[j] += a[i * n + j] * a[i * n + j];
  }
  for (double& s : sigma) s = std::sqrt(s);
  std::sort(sigma.rbegin(), sigma.rend());
  return sigma;
}

double expected(const std::vector<double>& u, int64_t rows, int64_t cols) {
  const std::vector<double> sigma = singular_values(u, rows, cols);
  double last = 0;
  for (double s : sigma) last = s > kTolerance ? s : last;
  return last > 0 ? std::log(sigma[0] / last) : 0;
}

template <typename T>
struct Result {
  std::vector<T> value, left, right, gradient;
};

template <typename T>
Result<T> run(const std::vector<T>& u, int64_t n, int64_t rows, int64_t cols, int threads) {
  Result<T> r{std::vector<T>(n), std::vector<T>(2 * n * rows), std::vector<T>(2 * n * cols),
              std::vector<T>(n * rows * cols)};
  const std::vector<T> ones(n, T(1));
  const d2net::LogConditionNumber<T> x{
      kTolerance,  u.data(),         n, rows, cols, r.value.data(), r.left.data(), r.right.data(), nullptr,
      ones.data(), r.gradient.data()};
  d2net::cpu::log_condition_number(x, threads);
  d2net::cpu::log_condition_number_backward(x, threads);
  return r;
}

template <typename T>
void check_matrices(const std::vector<T>& u, int64_t n, int64_t rows, int64_t cols, double tolerance) {
  const Result<T> first = run(u, n, rows, cols, 1);
  for (int threads : check::kThreads) {
    const Result<T> r = run(u, n, rows, cols, threads);
    CHECK(r.value == first.value && r.left == first.left && r.right == first.right && r.gradient == first.gradient);
  }
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> one(u.begin() + i * rows * cols, u.begin() + (i + 1) * rows * cols);
    CHECK(check::close(double(first.value[i]), expected(one, rows, cols), tolerance, tolerance));
  }
}

}  // namespace

TEST(condition_number_equals_jacobi) {
  for (auto [rows, cols] : {std::pair<int64_t, int64_t>{2, 2}, {3, 3}, {5, 9}, {9, 5}, {1, 4}, {4, 1}, {24, 24}}) {
    const int64_t n = 40;
    check_matrices(check::uniform<double>(n * rows * cols, 1, -1, 1), n, rows, cols, 1e-9);
    check_matrices(check::uniform<float>(n * rows * cols, 2, -1, 1), n, rows, cols, 1e-4);
  }
}

TEST(condition_number_of_structured_matrices) {
  for (int64_t n : {2, 3, 8, 17, 40}) {
    std::vector<double> u(7 * n * n, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      double* row = u.data() + i * n;
      row[i] = 1;                                              // identity
      row[n * n + n - 1 - i] = -2;                             // reversed
      row[2 * n * n + i] = std::pow(10.0, 3 - 5.0 * i / n);    // graded
      for (int64_t j = 0; j < n; ++j) row[3 * n * n + j] = 1;  // rank 1
      row[4 * n * n + i / 2 * 2] = 1;                          // every second column 0
      if (i > 0) row[5 * n * n + i - 1] = 1;                   // nilpotent
    }  // the last one is zero
    check_matrices(u, 7, n, n, 1e-9);
  }
}

// Eight small matrices are decomposed at once; each result is the same whatever lies in the other lanes.
TEST(condition_number_of_a_matrix_does_not_depend_on_its_neighbours) {
  for (auto [rows, cols] : {std::pair<int64_t, int64_t>{3, 3}, {20, 20}, {4, 9}, {9, 4}, {48, 48}, {60, 60}}) {
    const int64_t n = 11, size = rows * cols;
    std::vector<double> u = check::uniform<double>(n * size, 7, -1, 1);
    for (int64_t i = 0; i < size; ++i) {
      u[i] = 1;                                                            // rank 1
      u[size + i] = i / cols == i % cols ? 1 : 0;                          // all singular values alike
      u[2 * size + i] *= i / cols == i % cols ? std::pow(10, -i % 5) : 0;  // converges at once, or never
      u[3 * size + i] *= 1e200;
      u[4 * size + i] = 0;
    }
    u[5 * size + 1] = std::numeric_limits<double>::quiet_NaN();
    const Result<double> all = run(u, n, rows, cols, 1);
    const auto bits = [](const std::vector<double>& x, int64_t begin, int64_t count) {
      return std::string(reinterpret_cast<const char*>(x.data() + begin), count * sizeof(double));
    };
    for (int64_t shift = 1; shift < n; ++shift) {
      std::vector<double> turned(u.begin() + shift * size, u.end());
      turned.insert(turned.end(), u.begin(), u.begin() + shift * size);
      const Result<double> r = run(turned, n, rows, cols, 1);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t to = (i + n - shift) % n;
        CHECK(bits(r.value, to, 1) == bits(all.value, i, 1));
        CHECK(bits(r.left, to * 2 * rows, 2 * rows) == bits(all.left, i * 2 * rows, 2 * rows));
        CHECK(bits(r.right, to * 2 * cols, 2 * cols) == bits(all.right, i * 2 * cols, 2 * cols));
      }
    }
  }
}

TEST(condition_number_gradient_is_the_difference_quotient) {
  for (auto [rows, cols] : {std::pair<int64_t, int64_t>{2, 2}, {4, 4}, {6, 3}, {3, 6}}) {
    const std::vector<double> u = check::uniform<double>(rows * cols, 5, -1, 1);
    const Result<double> r = run(u, 1, rows, cols, 1);
    for (int64_t i = 0; i < rows * cols; ++i) {
      const double h = 1e-6;
      std::vector<double> more = u, less = u;
      more[i] += h;
      less[i] -= h;
      const double slope = (run(more, 1, rows, cols, 1).value[0] - run(less, 1, rows, cols, 1).value[0]) / (2 * h);
      CHECK(check::close(r.gradient[i], slope, 1e-5, 1e-7));
    }
  }
}

// Whatever the values: no read or write out of range, no endless loop, and NaN only from NaN or infinity.
TEST(condition_number_of_ugly_values) {
  using Limits = std::numeric_limits<double>;
  const double values[] = {0.0,
                           -0.0,
                           1.0,
                           Limits::denorm_min(),
                           Limits::min(),
                           1e-160,
                           1e160,
                           Limits::max(),
                           -Limits::max(),
                           Limits::quiet_NaN(),
                           Limits::infinity(),
                           -Limits::infinity()};
  std::mt19937 generator(3);
  for (auto [rows, cols] : {std::pair<int64_t, int64_t>{2, 2}, {3, 3}, {7, 4}, {4, 7}, {20, 20}}) {
    for (int kinds : {4, 9, 12}) {  // the first ones only
      const int64_t n = 60, size = rows * cols;
      std::vector<double> u(n * size);
      for (double& x : u) x = values[generator() % kinds];
      for (double rank_tol : {0.0, 1e-5, 1e300}) {
        std::vector<double> value(n), left(2 * n * rows), right(2 * n * cols);
        d2net::cpu::log_condition_number(d2net::LogConditionNumber<double>{rank_tol, u.data(), n, rows, cols,
                                                                           value.data(), left.data(), right.data()},
                                         2);
        for (int64_t i = 0; i < n; ++i) {
          const bool finite =
              std::all_of(u.begin() + i * size, u.begin() + (i + 1) * size, [](double x) { return std::isfinite(x); });
          CHECK(std::isnan(value[i]) == !finite);
          CHECK(!finite || value[i] >= 0);
        }
      }
    }
  }
}

TEST(joint_condition_number_is_that_of_the_product) {
  for (auto [classes, items] : {std::pair<int64_t, int64_t>{9, 4}, {4, 9}, {5, 5}, {1, 3}, {3, 1}, {30, 2}}) {
    const int64_t n = 30;
    std::vector<double> p = check::uniform<double>(n * classes * items, 1), y = p;
    for (int64_t i = 0; i < n * items * classes; ++i) y[i] = double(i * 2654435761u % 7 == 0);  // labels: rank varies
    std::vector<double> first;
    for (int threads : check::kThreads) {
      std::vector<double> value(n), pl(2 * n * classes), pr(2 * n * items), yl(2 * n * items), yr(2 * n * classes);
      const d2net::JointLogConditionNumber<double> x{kTolerance,   p.data(),  y.data(),  n,         classes,  items,
                                                     value.data(), pl.data(), pr.data(), yl.data(), yr.data()};
      d2net::cpu::joint_log_condition_number(x, threads);
      if (first.empty()) first = value;
      CHECK(value == first);
    }
    for (int64_t i = 0; i < n; ++i) {
      std::vector<double> u(classes * classes, 0.0);
      for (int64_t a = 0; a < classes; ++a) {
        for (int64_t b = 0; b < classes; ++b) {
          for (int64_t k = 0; k < items; ++k) {
            u[a * classes + b] += p[(i * classes + a) * items + k] * y[(i * items + k) * classes + b];
          }
        }
      }
      CHECK(check::close(first[i], expected(u, classes, classes), 1e-9, 1e-9));
    }
  }
}

TEST(joint_condition_number_of_ugly_values) {
  using Limits = std::numeric_limits<float>;
  const float values[] = {0, 1, Limits::denorm_min(), Limits::max(), Limits::quiet_NaN(), Limits::infinity()};
  std::mt19937 generator(4);
  for (auto [classes, items] : {std::pair<int64_t, int64_t>{6, 3}, {3, 6}, {1, 1}}) {
    const int64_t n = 50, size = classes * items;
    std::vector<float> p(n * size), y(n * size), value(n), pl(2 * n * classes), pr(2 * n * items), yl(2 * n * items),
        yr(2 * n * classes);
    for (int kinds : {4, 6}) {
      for (float& x : p) x = values[generator() % kinds];
      for (float& x : y) x = values[generator() % kinds];
      const d2net::JointLogConditionNumber<float> x{kTolerance,   p.data(),  y.data(),  n,         classes,  items,
                                                    value.data(), pl.data(), pr.data(), yl.data(), yr.data()};
      d2net::cpu::joint_log_condition_number(x, 2);
      for (int64_t i = 0; i < n; ++i) {
        const auto finite = [i, size](const std::vector<float>& x) {
          return std::all_of(x.begin() + i * size, x.begin() + (i + 1) * size,
                             [](float v) { return std::isfinite(v); });
        };
        CHECK(std::isnan(value[i]) == !(finite(p) && finite(y)));
      }
    }
  }
}

TEST(condition_number_of_nothing) {
  const d2net::LogConditionNumber<float> x{kTolerance, nullptr, 0, 3, 3, nullptr, nullptr, nullptr};
  d2net::cpu::log_condition_number(x, 2);
  d2net::cpu::log_condition_number_backward(x, 2);
  const d2net::JointLogConditionNumber<float> joint{kTolerance, nullptr, nullptr, 0,       3,      3,
                                                    nullptr,    nullptr, nullptr, nullptr, nullptr};
  d2net::cpu::joint_log_condition_number(joint, 2);
}

TEST(condition_2x2_in_closed_form) {
  const d2net::Condition2x2 singular = d2net::condition_2x2(1.0, 2.0, 2.0, 4.0, 0.0);
  CHECK(singular.excess == 0 && singular.da == 0 && singular.dd == 0);
  const d2net::Condition2x2 diagonal = d2net::condition_2x2(4.0f, 0.0f, 0.0f, -1.0f, kTolerance);
  CHECK(check::close(diagonal.excess, 3.0, 1e-15, 0));
  CHECK(check::close(diagonal.da, 0.25, 1e-15, 0) && check::close(diagonal.dd, 1.0, 1e-15, 0));
  CHECK(diagonal.db == 0 && diagonal.dc == 0);
  // Nearly singular: determinant 3 tiny, squares of the singular values that add up to 50 + 4 tiny.
  const double tiny = std::ldexp(1.0, -40);
  CHECK(check::close(d2net::condition_2x2(3.0, 1.0, 6.0, 2 + tiny, 0.0).excess, (50 + 4 * tiny) / (3 * tiny) - 1, 1e-11,
                     0));
  // Nearly orthogonal: q = 5, 2 r = tiny; subtracting 1 from the ratio would leave 10 bits.
  CHECK(check::close(d2net::condition_2x2(3 + tiny, -4.0, 4.0, 3.0, kTolerance).excess, tiny / 5, 1e-11, 0));
  const d2net::Condition2x2 turned = d2net::condition_2x2(0.0, -3.0, 3.0, 0.0, kTolerance);
  CHECK(turned.excess == 0 && turned.da == 0 && turned.db == 0);
}

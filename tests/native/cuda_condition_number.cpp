#include <limits>

#include "check.h"
#include "condition_number.h"
#include "simt/simt.h"

namespace {

using Values = std::vector<double>;
constexpr double kTolerance = 1e-5;

bool same(const Values& a, const Values& b) {
  double largest = 1;
  for (double x : b) largest = std::isfinite(x) ? std::max(largest, std::abs(x)) : largest;
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isnan(a[i]) != std::isnan(b[i]) || std::abs(a[i] - b[i]) > 1e-8 * largest) return false;
  }
  return a.size() == b.size();
}

// value, and the gradient of one factor
Values matrix(const Values& u, int64_t n, int64_t rows, int64_t cols, bool on_device) {
  Values value(n), left(2 * n * rows), right(2 * n * cols), gradient(n * rows * cols), ones(n, 1.0);
  d2net::LogConditionNumber<double> x{kTolerance,  u.data(),     n,       rows,        cols,           value.data(),
                                      left.data(), right.data(), nullptr, ones.data(), gradient.data()};
  if (on_device) {
    Values scratch(d2net::cuda::log_condition_number_scratch(n, rows, cols, 0, nullptr));
    x.scratch = scratch.empty() ? nullptr : scratch.data();
    d2net::cuda::log_condition_number(x, 0, nullptr);
    d2net::cuda::log_condition_number_backward(x, 0, nullptr);
  } else {
    d2net::cpu::log_condition_number(x, 1);
    d2net::cpu::log_condition_number_backward(x, 1);
  }
  value.insert(value.end(), gradient.begin(), gradient.end());
  return value;
}

Values joint(const Values& p, const Values& y, int64_t n, int64_t classes, int64_t items, bool on_device) {
  Values value(n), pl(2 * n * classes), pr(2 * n * items), yl(2 * n * items), yr(2 * n * classes);
  d2net::JointLogConditionNumber<double> x{kTolerance,   p.data(),  y.data(),  n,         classes,  items,
                                           value.data(), pl.data(), pr.data(), yl.data(), yr.data()};
  if (on_device) {
    Values scratch(d2net::cuda::joint_log_condition_number_scratch(n, classes, items, 0, nullptr));
    x.scratch = scratch.empty() ? nullptr : scratch.data();
    d2net::cuda::joint_log_condition_number(x, 0, nullptr);
  } else {
    d2net::cpu::joint_log_condition_number(x, 1);
  }
  Values of_p(n * classes * items), of_y(of_p), ones(n, 1.0);
  const auto backward = [&](int64_t rows, int64_t cols, Values& left, Values& right, Values& gradient) {
    d2net::cpu::log_condition_number_backward(
        d2net::LogConditionNumber<double>{0, nullptr, n, rows, cols, nullptr, left.data(), right.data(), nullptr,
                                          ones.data(), gradient.data()},
        1);
  };
  backward(classes, items, pl, pr, of_p);
  backward(items, classes, yl, yr, of_y);
  value.insert(value.end(), of_p.begin(), of_p.end());
  value.insert(value.end(), of_y.begin(), of_y.end());
  return value;
}

}  // namespace

TEST(cuda_condition_number_equals_the_cpu) {
  for (auto [rows, cols] : {std::pair<int64_t, int64_t>{2, 2}, {3, 3}, {4, 9}, {9, 4}, {1, 5}, {17, 16}}) {
    const int64_t n = 9;  // one more than the blocks that share scratch memory
    Values u = check::uniform<double>(n * rows * cols, 1, -1, 1);
    for (int64_t k = 0; k < rows * cols; ++k) u[rows * cols + k] = 1;  // rank 1
    u[2 * rows * cols] = std::numeric_limits<double>::quiet_NaN();
    const Values expected = matrix(u, n, rows, cols, false);
    for (int64_t limit : {227 * 1024, 1024}) {
      d2net::simt::set_shared_memory_limit(limit);
      CHECK(same(matrix(u, n, rows, cols, true), expected));
    }
    d2net::simt::set_shared_memory_limit(227 * 1024);
  }
}

TEST(cuda_joint_condition_number_equals_the_cpu) {
  for (auto [classes, items] : {std::pair<int64_t, int64_t>{9, 4}, {4, 9}, {5, 5}, {1, 3}, {3, 1}, {40, 5}}) {
    const int64_t n = 9;
    Values p = check::uniform<double>(n * classes * items, 1), y = check::uniform<double>(n * classes * items, 2);
    p[classes * items] = std::numeric_limits<double>::infinity();
    for (int64_t k = 0; k < classes * items; ++k) y[2 * classes * items + k] = 0;
    const Values expected = joint(p, y, n, classes, items, false);
    for (int64_t limit : {227 * 1024, 1024}) {
      d2net::simt::set_shared_memory_limit(limit);
      CHECK(same(joint(p, y, n, classes, items, true), expected));
    }
    d2net::simt::set_shared_memory_limit(227 * 1024);
  }
}

// Whatever the values: no read or write out of range, no endless loop, and NaN only from NaN or infinity.
TEST(cuda_condition_number_of_ugly_values) {
  using Limits = std::numeric_limits<double>;
  const double values[] = {0.0, -0.0, 1.0, Limits::denorm_min(), 1e-160, Limits::max(), Limits::quiet_NaN()};
  std::mt19937 generator(3);
  for (auto [rows, cols] : {std::pair<int64_t, int64_t>{2, 2}, {3, 3}, {7, 4}}) {
    const int64_t n = 30, size = rows * cols;
    for (unsigned kinds : {6, 7}) {
      Values u(n * size), value(n), left(2 * n * rows), right(2 * n * cols);
      for (double& x : u) x = values[generator() % kinds];
      for (double rank_tol : {0.0, 1e-5, 1e300}) {
        d2net::cuda::log_condition_number(d2net::LogConditionNumber<double>{rank_tol, u.data(), n, rows, cols,
                                                                            value.data(), left.data(), right.data()},
                                          0, nullptr);
        for (int64_t i = 0; i < n; ++i) {
          bool finite = true;
          for (int64_t k = i * size; k < (i + 1) * size; ++k) finite = finite && std::isfinite(u[k]);
          CHECK(std::isnan(value[i]) == !finite);
          CHECK(!finite || value[i] >= 0);
        }
      }
    }
  }
}

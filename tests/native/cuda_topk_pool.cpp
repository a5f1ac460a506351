#include <algorithm>
#include <limits>

#include "check.h"
#include "topk_pool.h"

namespace {

template <typename T>
void check_equals_the_cpu(const std::vector<T>& x, const std::vector<int64_t>& lengths, int64_t t, int64_t c,
                          int64_t divisor) {
  const int64_t b = int64_t(lengths.size());
  const auto grad = check::uniform<T>(b * c, 7);
  std::vector<T> pooled(b * c), kth(b * c), grad_x(b * t * c, T(-1)), expected(b * c), value(b * c), wanted(b * t * c);
  std::vector<int32_t> last(b * c), until(b * c);
  d2net::TopkPool<T> pool{x.data(), lengths.data(), b,          t,           c,       divisor,     nullptr,
                          nullptr,  pooled.data(),  kth.data(), last.data(), nullptr, grad.data(), grad_x.data()};
  d2net::cuda::topk_pool(pool, 0, nullptr);
  d2net::cuda::topk_pool_backward(pool, 0, nullptr);
  pool.pooled = expected.data(), pool.kth = value.data(), pool.last = until.data(), pool.grad_x = wanted.data();
  d2net::cpu::topk_pool(pool, 1);
  d2net::cpu::topk_pool_backward(pool, 1);
  for (int64_t i = 0; i < b * c; ++i) {
    CHECK(check::close(pooled[i], expected[i], 1e-7, 1e-300) || (pooled[i] != pooled[i] && expected[i] != expected[i]));
    CHECK(kth[i] == value[i] || (kth[i] != kth[i] && value[i] != value[i]));
  }
  CHECK(last == until);
  CHECK(grad_x == wanted);
}

}  // namespace

TEST(cuda_topk_pool_of_random_columns) {
  for (int64_t c : {1, 3, 8, 20}) {
    for (int64_t t : {1, 70, 300}) {
      check_equals_the_cpu(check::uniform<float>(3 * t * c, unsigned(c + t), -2, 3), {t, t / 2, -1}, t, c, 8);
    }
  }
  check_equals_the_cpu(check::uniform<float>(2100 * 9, 1, -2, 3), {2099}, 2100, 9, 8);
  check_equals_the_cpu(check::uniform<double>(8200, 2, -2, 3), {8300}, 8200, 1, 8);  // more than registers hold
}

TEST(cuda_topk_pool_of_ties_and_special_values) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double values[] = {0.0, -0.0, 1.0, -1.0, inf, -inf, nan, 5e-324, 1e-40, -1e-40, 1e300, -nan};
  const int64_t t = 50, c = 11;
  for (int kinds : {1, 2, 6, 12}) {
    std::vector<double> wide;
    for (double u : check::uniform<double>(t * c, unsigned(kinds))) wide.push_back(values[int(u * kinds)]);
    check_equals_the_cpu(wide, {t - 3}, t, c, 3);
    check_equals_the_cpu(std::vector<float>(wide.begin(), wide.end()), {t - 3}, t, c, 3);
    check_equals_the_cpu(wide, {t}, t, c, 1);
  }
}

TEST(cuda_topk_pool_of_nothing) {
  using Pool = d2net::TopkPool<float>;
  const auto pool = [](const Pool& x) { d2net::cuda::topk_pool(x, 0, nullptr); };
  pool({nullptr, nullptr, 0, 0, 0, 8, nullptr, nullptr, nullptr, nullptr, nullptr});
  pool({nullptr, nullptr, 2, 3, 0, 8, nullptr, nullptr, nullptr, nullptr, nullptr});
  float pooled = 1, kth = 1;
  int32_t last = 0;
  pool({nullptr, nullptr, 1, 0, 1, 8, nullptr, nullptr, &pooled, &kth, &last});
  CHECK(pooled == 0 && kth == 0 && last == -1);
}

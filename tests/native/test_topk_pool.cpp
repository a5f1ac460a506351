#include <algorithm>
#include <limits>

#include "check.h"
#include "topk_pool.h"

namespace {

const double kNaN = std::numeric_limits<double>::quiet_NaN(), kInf = std::numeric_limits<double>::infinity();

// The k largest by a stable sort, NaN first: sum, and value and index of the k-th.
template <typename T>
void check_column(const std::vector<T>& column, int64_t k, T pooled, T kth, int32_t last) {
  std::vector<int32_t> order(column.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int32_t(i);
  std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) {
    const T x = column[i], y = column[j];
    return x > y || (x != x && y == y);
  });
  double sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += column[order[i]];
  const T expected = T(sum / k), wanted = column[order[k - 1]];
  CHECK(check::close(pooled, expected, sizeof(T) == 4 ? 1e-6 : 1e-13, 1e-300) || (pooled != pooled && sum != sum));
  CHECK(kth == wanted || (kth != kth && wanted != wanted));
  CHECK(last == order[k - 1]);
}

template <typename T>
void check_all(const std::vector<T>& x, const std::vector<int64_t>& lengths, int64_t t, int64_t c, int64_t divisor) {
  const int64_t b = int64_t(lengths.size());
  const std::vector<T> grad(b * c, T(1));
  for (int threads : check::kThreads) {
    std::vector<T> pooled(b * c), kth(b * c), grad_x(b * t * c, T(-1));
    std::vector<int32_t> last(b * c);
    const d2net::TopkPool<T> pool{
        x.data(), lengths.data(), b,          t,           c,       divisor,     nullptr,
        nullptr,  pooled.data(),  kth.data(), last.data(), nullptr, grad.data(), grad_x.data()};
    d2net::cpu::topk_pool(pool, threads);
    d2net::cpu::topk_pool_backward(pool, threads);
    for (int64_t i = 0; i < b * c; ++i) {
      const int64_t recording = i / c, length = std::clamp<int64_t>(lengths[recording], 0, t);
      const int64_t k = std::max<int64_t>(1, (length + divisor - 1) / divisor);
      std::vector<T> column;
      int64_t taken = 0;
      for (int64_t row = 0; row < t; ++row) {
        const int64_t at = (recording * t + row) * c + i % c;
        if (row < length) column.push_back(x[at]);
        CHECK(grad_x[at] == 0 || (row < length && grad_x[at] == T(1) / k));
        taken += grad_x[at] != 0;
      }
      if (length == 0) {
        CHECK(pooled[i] == 0 && last[i] == -1 && taken == 0);
      } else {
        CHECK(taken == k);
        check_column(column, k, pooled[i], kth[i], last[i]);
      }
    }
  }
}

}  // namespace

TEST(topk_pool_of_random_columns) {
  for (int64_t c : {1, 2, 3, 4, 7, 8, 16, 20, 37}) {
    for (int64_t t : {1, 5, 64, 1100}) {
      const auto x = check::uniform<float>(3 * t * c, unsigned(c * 10000 + t), -2, 3);
      check_all(x, {t, t / 2, t + 9}, t, c, 8);
    }
  }
}

TEST(topk_pool_of_ties_and_special_values) {
  const double values[] = {0.0, -0.0, 1.0, -1.0, kInf, -kInf, kNaN, 5e-324, 1e-40, -1e-40, 1e300, -kNaN};
  for (int kinds : {1, 2, 4, 6, 12}) {
    for (int64_t t : {3, 40, 900}) {
      const int64_t c = 19;
      std::vector<double> wide;
      for (double u : check::uniform<double>(2 * t * c, unsigned(kinds))) wide.push_back(values[int(u * kinds)]);
      check_all(wide, {t, t - 2}, t, c, 3);
      check_all(std::vector<float>(wide.begin(), wide.end()), {t, t - 2}, t, c, 3);
    }
  }
}

// A tile holds columns of several recordings, each with its own length; from 512 rows on it asks a sample.
TEST(topk_pool_of_tiles_that_span_recordings) {
  for (int64_t c : {1, 2, 3, 5, 20}) {
    for (int64_t t : {30, 1300}) {
      const std::vector<int64_t> lengths{t, 0, 1, t / 3, t - 1, 2, 0, t, t / 2, t, 9, t - 5, 0, 0, t, 17, t / 7, t};
      const int64_t size = int64_t(lengths.size()) * t * c;
      check_all(check::uniform<float>(size, unsigned(c), -2, 3), lengths, t, c, 8);
      check_all(std::vector<float>(size, 0.5f), lengths, t, c, 8);
    }
  }
}

// Where a sample misleads the search: repeated with its step, or with all large values between the sampled ones.
TEST(topk_pool_of_periodic_columns) {
  for (int64_t c : {1, 16}) {
    const int64_t t = 4096;
    std::vector<float> x(t * c);
    for (int64_t i = 0; i < t * c; ++i) x[i] = float(i / c % 16 == 0 ? -1000 - i : i % 977);
    check_all(x, {t}, t, c, 8);
    for (int64_t i = 0; i < t * c; ++i) x[i] = i / c % 16 == 0 ? float(1000 + i) : -float(i);
    check_all(x, {t}, t, c, 8);
  }
}

TEST(topk_pool_takes_all_or_one) {
  const auto x = check::uniform<float>(2 * 70 * 5, 3);
  check_all(x, {70, 33}, 70, 5, 1);
  check_all(x, {70, 0}, 70, 5, std::numeric_limits<int64_t>::max() / 2);
  check_all(x, {-5, 1000}, 70, 5, 8);
}

TEST(topk_pool_of_nothing) {
  using Pool = d2net::TopkPool<float>;
  d2net::cpu::topk_pool(Pool{nullptr, nullptr, 0, 0, 0, 8, nullptr, nullptr, nullptr, nullptr, nullptr}, 2);
  float pooled = 1, kth = 1;
  int32_t last = 0;
  d2net::cpu::topk_pool(Pool{nullptr, nullptr, 1, 0, 1, 8, nullptr, nullptr, &pooled, &kth, &last}, 2);
  CHECK(pooled == 0 && kth == 0 && last == -1);
}

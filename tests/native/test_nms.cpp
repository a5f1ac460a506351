#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check.h"
#include "nms.h"

namespace {

template <typename T>
struct Case {
  std::vector<T> segments, scores;
  std::vector<int64_t> groups;
  int64_t n() const { return int64_t(scores.size()); }
};

// Starts in [0, span), lengths over many octaves, from a grid where `grid` > 0 so that ties and copies are common.
template <typename T>
Case<T> random_case(int64_t n, unsigned seed, double span, double octaves, double grid, double scale = 1) {
  const auto a = check::uniform<double>(n, seed, 0, span), b = check::uniform<double>(n, seed + 1, -1, octaves),
             c = check::uniform<double>(n, seed + 2), d = check::uniform<double>(n, seed + 3, -3, 4);
  Case<T> x;
  for (int64_t i = 0; i < n; ++i) {
    double start = a[i], end = a[i] + std::exp2(b[i]) - 0.6, score = c[i];
    if (grid > 0) {
      start = std::floor(start / grid) * grid;
      end = std::floor(end / grid) * grid;
      score = std::floor(4 * score);
    }
    x.segments.push_back(T(scale * start));
    x.segments.push_back(T(scale * end));
    x.scores.push_back(T(score));
    x.groups.push_back(int64_t(std::floor(d[i])) * (int64_t(1) << 40));
  }
  return x;
}

template <typename T>
bool collide(const T* a, const T* b, T threshold) {
  const T shared = std::min(a[1], b[1]) - std::max(a[0], b[0]);
  // Where lengths overflow T the IoU counts as 0, also where it is inf / inf.
  return shared > 0 && (threshold == 0 || shared / ((a[1] - a[0]) + (b[1] - b[0]) - shared) >= threshold);
}

template <typename T>
std::vector<int64_t> naive(const Case<T>& x, double threshold, bool grouped) {
  std::vector<int64_t> order(x.n()), kept;
  std::iota(order.begin(), order.end(), int64_t(0));
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x.scores[a] > x.scores[b]; });
  for (const int64_t i : order) {
    const bool goes = std::any_of(kept.begin(), kept.end(), [&](int64_t k) {
      return (!grouped || x.groups[i] == x.groups[k]) && collide(&x.segments[2 * k], &x.segments[2 * i], T(threshold));
    });
    if (!goes) kept.push_back(i);
  }
  return kept;
}

template <typename T>
void compare(const Case<T>& x, double threshold) {
  const std::vector<int64_t> expected = naive(x, threshold, false), of_groups = naive(x, threshold, true);
  for (const int threads : check::kThreads) {
    std::vector<int64_t> keep(x.n());
    keep.resize(d2net::cpu::nms_1d(x.segments.data(), x.scores.data(), x.n(), threshold, keep.data(), threads));
    CHECK(keep == expected);
    keep.resize(x.n());
    keep.resize(d2net::cpu::batched_nms_1d(x.segments.data(), x.scores.data(), x.groups.data(), x.n(), threshold,
                                           keep.data(), threads));
    CHECK(keep == of_groups);
  }
}

template <typename T>
void compare_all() {
  for (const double threshold : {0.0, 1e-4, 0.1, 0.5, 0.8, 0.97, 1.0}) {
    for (const int64_t n : {1, 40, 1500}) {
      compare(random_case<T>(n, 1, 40, 6, 0), threshold);
      compare(random_case<T>(n, 2, 1000, 1, 0), threshold);
      compare(random_case<T>(n, 3, 60, 5, 1), threshold);
    }
    compare(random_case<T>(1000, 4, 4000, 20, 0, std::numeric_limits<T>::max() / 1.06e6), threshold);
    compare(random_case<T>(1000, 5, 300, 9, 1, double(std::numeric_limits<T>::denorm_min())), threshold);
  }
}

}  // namespace

TEST(nms_equals_its_definition) {
  compare_all<float>();
  compare_all<double>();
}

TEST(nms_of_lengths_that_overflow) {
  for (const double threshold : {0.0, 0.5, 1.0}) {
    Case<float> x = random_case<float>(600, 6, 100, 6, 0);
    for (int64_t i = 0; i < x.n(); i += 3) {
      x.segments[2 * i] = -3e38f;
      if (i % 2) x.segments[2 * i + 1] = 3e38f;
    }
    compare(x, threshold);
  }
}

TEST(nms_of_many_groups) {
  // Small groups and one that spans the ranges of several threads.
  Case<float> x = random_case<float>(9000, 7, 20000, 4, 0);
  for (int64_t i = 0; i < x.n(); ++i) x.groups[i] = i % 3 ? i % 701 : -5;
  std::vector<std::vector<int64_t>> results;
  for (const int threads : check::kThreads) {
    std::vector<int64_t> keep(x.n());
    keep.resize(d2net::cpu::batched_nms_1d(x.segments.data(), x.scores.data(), x.groups.data(), x.n(), 0.3, keep.data(),
                                           threads));
    results.push_back(keep);
  }
  CHECK(results[0] == naive(x, 0.3, true));
  for (const auto& result : results) CHECK(result == results[0]);
}

TEST(nms_refuses_what_is_not_finite) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  for (const double bad : {nan, infinity, -infinity}) {
    for (const int64_t at : {0, 3, 9}) {
      Case<double> x = random_case<double>(10, 9, 5, 2, 0);
      x.segments[2 * at + at % 2] = bad;
      int64_t keep[10] = {7};
      double scores[10];
      CHECK(d2net::cpu::nms_1d(x.segments.data(), x.scores.data(), 10, 0.5, keep, 2) == -1 - at);
      CHECK(d2net::cpu::batched_nms_1d(x.segments.data(), x.scores.data(), x.groups.data(), 10, 0.5, keep, 2) ==
            -1 - at);
      CHECK(d2net::cpu::soft_nms_1d(x.segments.data(), x.scores.data(), 10, 0.5, 0.5, 0, true, keep, scores, 2) ==
            -1 - at);
      CHECK(keep[0] == 7);
    }
  }
  Case<double> x = random_case<double>(10, 9, 5, 2, 0);
  x.scores[4] = infinity;
  int64_t keep[10];
  CHECK(d2net::cpu::nms_1d(x.segments.data(), x.scores.data(), 10, 0.5, keep, 2) > 0 && keep[0] == 4);
  x.scores[6] = nan;
  CHECK(d2net::cpu::nms_1d(x.segments.data(), x.scores.data(), 10, 0.5, keep, 2) == -7);
}

TEST(nms_of_nothing) {
  CHECK(d2net::cpu::nms_1d<float>(nullptr, nullptr, 0, 0.5, nullptr, 2) == 0);
  CHECK(d2net::cpu::batched_nms_1d<float>(nullptr, nullptr, nullptr, 0, 0.5, nullptr, 2) == 0);
  CHECK(d2net::cpu::soft_nms_1d<float>(nullptr, nullptr, 0, 0.5, 0.5, 0, true, nullptr, nullptr, 2) == 0);
}

template <typename T>
void compare_soft(const Case<T>& x, double threshold, double sigma, double floor, bool gaussian, double tolerance) {
  const int64_t n = x.n();
  std::vector<int64_t> keep(n);
  std::vector<T> found(n);
  const int64_t count = d2net::cpu::soft_nms_1d(x.segments.data(), x.scores.data(), n, threshold, sigma, floor,
                                                gaussian, keep.data(), found.data(), 2);
  std::vector<T> score = x.scores;
  std::vector<char> alive(n);
  for (int64_t i = 0; i < n; ++i) alive[i] = score[i] >= T(floor);
  int64_t expected = 0;
  for (;; ++expected) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (alive[i] && (best < 0 || score[i] > score[best])) best = i;
    }
    if (best < 0) break;
    CHECK(expected < count && keep[expected] == best && check::close(found[expected], score[best], tolerance, 1e-300));
    if (expected >= count || keep[expected] != best) return;
    alive[best] = 0;
    const T *a = &x.segments[2 * best], a_length = a[1] - a[0];
    for (int64_t i = 0; i < n; ++i) {
      const T* b = &x.segments[2 * i];
      const T shared = std::min(a[1], b[1]) - std::max(a[0], b[0]);
      if (!alive[i] || !(shared > 0)) continue;
      const T v = shared / (a_length + (b[1] - b[0]) - shared);
      score[i] *= gaussian ? std::exp(-(v * v) / T(sigma)) : v >= T(threshold) ? 1 - v : T(1);
      alive[i] = score[i] >= T(floor);
    }
  }
  CHECK(count == expected);
}

TEST(soft_nms_equals_its_definition) {
  for (const double floor : {0.0, 0.02}) {
    for (const int64_t n : {1, 60, 900}) {
      // Gaussian in double only: the last bit of exp must not swap two nearly equal scores.
      for (const double sigma : {0.5, 1e-3}) {
        compare_soft(random_case<double>(n, 11, 100, 6, 0), 0, sigma, floor, true, 1e-12);
      }
      for (const double threshold : {0.0, 0.3, 0.9, 1.0}) {
        compare_soft(random_case<float>(n, 12, 100, 6, 0), threshold, 1, floor, false, 0);
        compare_soft(random_case<double>(n, 13, 60, 5, 1), threshold, 1, floor, false, 0);
      }
    }
  }
  const double huge = std::numeric_limits<double>::max() / 1.06e6, tiny = std::numeric_limits<double>::denorm_min();
  compare_soft(random_case<double>(300, 14, 4000, 20, 0, huge), 0.3, 1, 0, false, 0);
  compare_soft(random_case<double>(300, 15, 300, 9, 1, tiny), 0.3, 1, 0, false, 0);
}

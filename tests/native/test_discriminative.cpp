#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "check.h"
#include "cpu/discriminative.h"

namespace {

// Eq. 3 and 4, written out.
template <typename T>
struct Batch {
  int64_t b, c, d;
  std::vector<T> pooled, labels, x;  // x: (2, b, d), x_fg and x_bg
  std::vector<int64_t> counted;
  std::vector<int64_t> partner, source;
  std::unique_ptr<bool[]> valid;

  Batch(int64_t b_, int64_t c_, int64_t d_)
      : b(b_),
        c(c_),
        d(d_),
        pooled(check::uniform<T>(b * c, 1, 0.1, 0.9)),
        labels(check::uniform<T>(b * c, 2)),
        x(check::uniform<T>(2 * b * d, 3, -1)),
        counted(b),
        partner(3 * b),
        source(b),
        valid(new bool[2 * b]) {
    for (T& y : labels) y = y > T(0.6);
    for (int64_t i = 0; i < b; ++i) counted[i] = i % 4 != 1;
    for (int64_t i = 0; i < 3 * b; ++i) partner[i] = i * 7 % (b + 3) - 1;  // also out of range on both sides
    for (int64_t i = 0; i < b; ++i) source[i] = (i * 5 + 1) % b;
    for (int64_t i = 0; i < 2 * b; ++i) valid[i] = i % 7 != 3;
  }

  double cosine(const T* u, const T* v) const {
    double uv = 0, uu = 1e-12, vv = 1e-12;
    for (int64_t k = 0; k < d; ++k) uv += double(u[k]) * v[k], uu += double(u[k]) * u[k], vv += double(v[k]) * v[k];
    return uv / std::sqrt(uu * vv);
  }

  d2net::Pairs pairs() const { return {partner.data(), source.data(), valid.get(), b}; }
  d2net::LossSettings settings() const {
    d2net::LossSettings with = {};
    with.beta = 2, with.gamma = 0.3, with.probability_floor = 1e-6;
    return with;
  }

  // The cosine of rows u and v of x, or nothing.
  bool compared(int64_t u, int64_t v, int64_t first, int64_t other, double* cosine) const {
    if (other < 0 || other >= b || !valid[u * b + first] || !valid[v * b + other]) return false;
    *cosine = this->cosine(&x[(u * b + first) * d], &x[(v * b + other) * d]);
    return true;
  }

  double expected(int64_t i, double gamma) const {
    if (!counted[i]) return 0;
    double of = 0;
    const double w_fb = compared(0, 1, source[i], partner[i], &of) ? std::max(0.0, of) : 0;
    const double w_fg = compared(0, 0, i, partner[b + i], &of) ? gamma * (1 - of) : 0;
    const double w_bg = compared(1, 1, i, partner[2 * b + i], &of) ? gamma * (1 - of) : 0;
    double sum = 0;
    for (int64_t k = i * c; k < (i + 1) * c; ++k) {
      const double p = pooled[k];
      sum -= labels[k] > 0 ? std::pow(1 - p + w_fg + w_fb, 2) * std::log(p)
                           : std::pow(p + w_bg + w_fb, 2) * std::log(1 - p);
    }
    return sum;
  }

  std::vector<T> terms(int threads, std::vector<T>* to_pooled, std::vector<T>* saved) const {
    std::vector<T> result(b);
    to_pooled->assign(b * c, 0);
    saved->assign(d2net::kPairsSaved * b, 0);
    d2net::cpu::discriminative_terms(pooled.data(), labels.data(), counted.data(), x.data(), pairs(), b, c, d,
                                     settings(), result.data(), to_pooled->data(), saved->data(), threads);
    return result;
  }
};

}  // namespace

TEST(partners_are_the_next_ones_that_have_the_embedding) {
  for (int64_t b : {0, 1, 2, 50}) {
    auto keys = check::uniform<float>(3 * b, 1);
    for (int64_t i = 0; i < 3 * b; i += 4) keys[i] = std::numeric_limits<float>::quiet_NaN();
    std::unique_ptr<bool[]> valid(new bool[2 * b]);
    for (int64_t i = 0; i < b; ++i) valid[i] = i % 3 != 0, valid[b + i] = i % 5 != 1;
    std::vector<int64_t> partner(3 * b, 99);
    d2net::cpu::different_partners(keys.data(), valid.get(), b, partner.data());
    for (int kind = 0; kind < 3; ++kind) {
      const bool* has = valid.get() + (kind == 1 ? 0 : b);
      // Whether j follows i in the order of the keys, in which NaN is last.
      const auto follows = [&](int64_t i, int64_t j) {
        const float a = keys[kind * b + i], c = keys[kind * b + j];
        if (std::isnan(a) || std::isnan(c)) return std::isnan(c) && (!std::isnan(a) || j > i);
        return c > a || (c == a && j > i);
      };
      for (int64_t i = 0; i < b; ++i) {
        int64_t expected = -1;
        for (int64_t j = 0; j < b; ++j) {
          if (!has[j]) continue;
          const bool nearer =
              expected < 0 || (follows(i, j) != follows(i, expected) ? follows(i, j) : follows(j, expected));
          if (nearer) expected = j;
        }
        CHECK(partner[kind * b + i] == expected);
      }
    }
  }
}

TEST(discriminative_terms_equal_their_definition) {
  for (int64_t d : {1, 33, 700}) {
    const Batch<double> x(9, 7, d);
    std::vector<double> to_pooled, saved;
    for (int threads : check::kThreads) {
      const auto terms = x.terms(threads, &to_pooled, &saved);
      for (int64_t i = 0; i < x.b; ++i) CHECK(check::close(terms[i], x.expected(i, 0.3), 1e-10, 1e-10));
    }
  }
}

TEST(discriminative_terms_gradient_equals_differences) {
  Batch<double> x(6, 4, 5);
  const auto grad = check::uniform<double>(x.b, 9);
  std::vector<double> to_pooled, saved, unused, grad_pooled(x.b * x.c), grad_x(2 * x.b * x.d);
  x.terms(2, &to_pooled, &saved);
  d2net::cpu::discriminative_terms_backward(grad.data(), to_pooled.data(), saved.data(), x.x.data(), x.pairs(), x.b,
                                            x.c, x.d, grad_pooled.data(), grad_x.data(), 2);
  const auto total = [&] {
    const auto terms = x.terms(1, &unused, &saved);
    double sum = 0;
    for (int64_t i = 0; i < x.b; ++i) sum += grad[i] * terms[i];
    return sum;
  };
  const auto compare = [&](std::vector<double>& leaf, const std::vector<double>& gradient) {
    for (size_t k = 0; k < leaf.size(); ++k) {
      const double kept = leaf[k], step = 1e-6;
      leaf[k] = kept + step;
      const double above = total();
      leaf[k] = kept - step;
      const double below = total();
      leaf[k] = kept;
      CHECK(check::close((above - below) / (2 * step), gradient[k], 1e-6, 1e-7));
    }
  };
  compare(x.pooled, grad_pooled);
  compare(x.x, grad_x);
}

TEST(discriminative_terms_of_ugly_values) {
  using Limits = std::numeric_limits<float>;
  const float values[] = {0, 1, Limits::denorm_min(), Limits::max(), -1, Limits::quiet_NaN(), Limits::infinity()};
  Batch<float> x(8, 5, 6);
  std::mt19937 generator(3);
  for (auto* leaf : {&x.pooled, &x.x, &x.labels}) {
    for (float& v : *leaf) v = values[generator() % 7];
  }
  std::vector<float> to_pooled, saved, grad(x.b, 1.0f), a(x.b * x.c), f(2 * x.b * x.d);
  x.terms(2, &to_pooled, &saved);
  d2net::cpu::discriminative_terms_backward(grad.data(), to_pooled.data(), saved.data(), x.x.data(), x.pairs(), x.b,
                                            x.c, x.d, a.data(), f.data(), 2);
}

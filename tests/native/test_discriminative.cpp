#include <algorithm>
#include <limits>
#include <memory>

#include "check.h"
#include "discriminative.h"

namespace {

// Eq. 3 and 4, written out.
template <typename T>
struct Batch {
  int64_t b, c, d;
  std::vector<T> pooled, labels, x_fg, x_bg;
  std::vector<int64_t> counted;
  std::vector<int64_t> partner, source;

  Batch(int64_t b_, int64_t c_, int64_t d_)
      : b(b_),
        c(c_),
        d(d_),
        pooled(check::uniform<T>(b * c, 1, 0.1, 0.9)),
        labels(check::uniform<T>(b * c, 2)),
        x_fg(check::uniform<T>(b * d, 3, -1)),
        x_bg(check::uniform<T>(b * d, 4, -1)),
        counted(b),
        partner(3 * b),
        source(b) {
    for (T& y : labels) y = y > T(0.6);
    for (int64_t i = 0; i < b; ++i) counted[i] = i % 4 != 1;
    for (int64_t i = 0; i < 3 * b; ++i) partner[i] = i * 7 % (b + 3) - 1;  // also out of range on both sides
    for (int64_t i = 0; i < b; ++i) source[i] = (i * 5 + 1) % b;
  }

  double cosine(const T* u, const T* v) const {
    double uv = 0, uu = 1e-12, vv = 1e-12;
    for (int64_t k = 0; k < d; ++k) uv += double(u[k]) * v[k], uu += double(u[k]) * u[k], vv += double(v[k]) * v[k];
    return uv / std::sqrt(uu * vv);
  }

  bool usable(int64_t j) const { return j >= 0 && j < b; }

  double expected(int64_t i, double gamma) const {
    if (!counted[i]) return 0;
    const int64_t fb = partner[i], fg = partner[b + i], bg = partner[2 * b + i];
    double w_fb = usable(fb) ? std::max(0.0, cosine(&x_fg[source[i] * d], &x_bg[fb * d])) : 0;
    double w_fg = usable(fg) ? gamma * (1 - cosine(&x_fg[i * d], &x_fg[fg * d])) : 0;
    double w_bg = usable(bg) ? gamma * (1 - cosine(&x_bg[i * d], &x_bg[bg * d])) : 0;
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
    saved->assign(d2net::kDiscriminativeSaved * b, 0);
    d2net::cpu::discriminative_terms(pooled.data(), labels.data(), counted.data(), x_fg.data(), x_bg.data(),
                                     partner.data(), source.data(), b, c, d, 2.0, 0.3, 1e-6, false, false,
                                     result.data(), to_pooled->data(), saved->data(), threads);
    return result;
  }
};

}  // namespace

TEST(partners_form_cycles) {
  for (int64_t b : {0, 1, 2, 50}) {
    auto keys = check::uniform<float>(3 * b, 1);
    for (int64_t i = 0; i < 3 * b; i += 4) keys[i] = std::numeric_limits<float>::quiet_NaN();
    std::unique_ptr<bool[]> fg(new bool[b]), bg(new bool[b]);
    for (int64_t i = 0; i < b; ++i) fg[i] = i % 3 != 0, bg[i] = i % 5 != 1;
    std::vector<int64_t> partner(3 * b, 99);
    d2net::cpu::different_partners(keys.data(), fg.get(), bg.get(), b, partner.data(), 1);
    for (int kind = 1; kind < 3; ++kind) {
      const bool* valid = kind == 1 ? fg.get() : bg.get();
      const int64_t members = std::count(valid, valid + b, true);
      std::vector<int64_t> met(b, 0);
      for (int64_t i = 0; i < b; ++i) {
        const int64_t j = partner[kind * b + i];
        CHECK((j >= 0) == (valid[i] && members > 1));
        if (j >= 0) CHECK(j < b && j != i && valid[j] && ++met[j] == 1);
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
  std::vector<double> to_pooled, saved, unused, grad_pooled(x.b * x.c), grad_fg(x.b * x.d), grad_bg(x.b * x.d);
  x.terms(2, &to_pooled, &saved);
  d2net::cpu::discriminative_terms_backward(grad.data(), to_pooled.data(), saved.data(), x.x_fg.data(), x.x_bg.data(),
                                            x.partner.data(), x.source.data(), x.b, x.c, x.d, grad_pooled.data(),
                                            grad_fg.data(), grad_bg.data(), 2);
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
  compare(x.x_fg, grad_fg);
  compare(x.x_bg, grad_bg);
}

TEST(discriminative_terms_of_ugly_values) {
  using Limits = std::numeric_limits<float>;
  const float values[] = {0, 1, Limits::denorm_min(), Limits::max(), -1, Limits::quiet_NaN(), Limits::infinity()};
  Batch<float> x(8, 5, 6);
  std::mt19937 generator(3);
  for (auto* leaf : {&x.pooled, &x.x_fg, &x.x_bg, &x.labels}) {
    for (float& v : *leaf) v = values[generator() % 7];
  }
  std::vector<float> to_pooled, saved, grad(x.b, 1.0f), a(x.b * x.c), f(x.b * x.d), g(x.b * x.d);
  x.terms(2, &to_pooled, &saved);
  d2net::cpu::discriminative_terms_backward(grad.data(), to_pooled.data(), saved.data(), x.x_fg.data(), x.x_bg.data(),
                                            x.partner.data(), x.source.data(), x.b, x.c, x.d, a.data(), f.data(),
                                            g.data(), 2);
}

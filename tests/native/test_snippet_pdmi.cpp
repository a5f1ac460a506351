#include <algorithm>
#include <limits>
#include <memory>

#include "check.h"
#include "snippet_pdmi.h"

namespace {

// By Eq. 9, snippet by snippet; singular values of the 2x2 matrix from its Frobenius norm and determinant.
template <typename T>
double expected(const T* attention, const T* scores, int64_t length, bool per_class, bool* valid) {
  double u[4] = {}, n[2] = {};
  for (int64_t i = 0; i < length; ++i) {
    for (int side = 0; side < 2; ++side) {
      if (side == 0 ? scores[i] > T(0.6) : scores[i] < T(0.4)) {
        n[side] += 1;
        u[side] += attention[i];
        u[2 + side] += 1 - attention[i];
      }
    }
  }
  *valid = n[0] > 0 && n[1] > 0;
  if (!*valid) return 0;
  for (int i = 0; i < 4; ++i) u[i] /= per_class ? n[i % 2] : n[0] + n[1];
  const double squares = u[0] * u[0] + u[1] * u[1] + u[2] * u[2] + u[3] * u[3];
  const double determinant = std::abs(u[0] * u[3] - u[1] * u[2]);
  const double first =
      std::sqrt((squares + std::sqrt(std::max(0.0, squares * squares - 4 * determinant * determinant))) / 2);
  return determinant / first > 1e-5 ? std::log(first * first / determinant) : 0;
}

template <typename T>
void check_batch(int64_t b, int64_t t, double tolerance) {
  const auto attention = check::uniform<T>(b * t, 1), scores = check::uniform<T>(b * t, 2);
  std::vector<int64_t> lengths(b);
  for (int64_t i = 0; i < b; ++i) lengths[i] = i * 37 % (t + 3) - 1;  // also negative and past the end
  for (bool per_class : {false, true}) {
    for (const int64_t* given : {static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(lengths.data())}) {
      std::vector<T> first;
      for (int threads : check::kThreads) {
        std::vector<T> loss(b), weights(2 * b), grad(b, T(1)), gradient(b * t, T(7));
        auto valid = std::make_unique<bool[]>(b);
        const d2net::SnippetPdmi<T> x{
            0.6, 0.4, 0,           1e-5,        per_class,      attention.data(), scores.data(),  given,
            b,   t,   loss.data(), valid.get(), weights.data(), grad.data(),      gradient.data()};
        d2net::cpu::snippet_pdmi(x, threads);
        d2net::cpu::snippet_pdmi_backward(x, threads);
        if (first.empty()) first = loss;
        CHECK(loss == first);
        for (int64_t i = 0; i < b; ++i) {
          const int64_t length = given == nullptr ? t : std::min(std::max<int64_t>(given[i], 0), t);
          bool has_both;
          const double e = expected(attention.data() + i * t, scores.data() + i * t, length, per_class, &has_both);
          CHECK(valid[i] == has_both);
          CHECK(check::close(double(loss[i]), e, tolerance, tolerance));
          for (int64_t k = 0; k < t; ++k) {
            const T s = scores[i * t + k];
            const T w = k >= length ? T(0) : s > T(0.6) ? weights[2 * i] : s < T(0.4) ? weights[2 * i + 1] : T(0);
            CHECK(gradient[i * t + k] == w);
          }
        }
      }
    }
  }
}

}  // namespace

TEST(snippet_pdmi_equals_its_definition) {
  for (int64_t t : {1, 2, 9, 500}) {
    check_batch<double>(23, t, 1e-7);
    check_batch<float>(23, t, 1e-4);
  }
}

TEST(snippet_pdmi_of_ugly_values) {
  using Limits = std::numeric_limits<float>;
  const float values[] = {0, 1, Limits::denorm_min(), Limits::max(), -1, Limits::quiet_NaN(), Limits::infinity()};
  std::mt19937 generator(3);
  const int64_t b = 40, t = 11;
  std::vector<float> attention(b * t), scores(b * t), loss(b), weights(2 * b), gradient(b * t);
  auto valid = std::make_unique<bool[]>(b);
  for (float& x : attention) x = values[generator() % 7];
  for (float& x : scores) x = values[generator() % 7];
  const d2net::SnippetPdmi<float> x{
      0.5, 0.5,         0,           1e-5,           0,           attention.data(), scores.data(), nullptr, b,
      t,   loss.data(), valid.get(), weights.data(), loss.data(), gradient.data()};
  d2net::cpu::snippet_pdmi(x, 2);
  d2net::cpu::snippet_pdmi_backward(x, 2);
  for (int64_t i = 0; i < b; ++i) {
    bool broken = false;
    for (int64_t k = i * t; k < (i + 1) * t; ++k) {
      broken = broken || ((scores[k] > 0.5f || scores[k] < 0.5f) && !std::isfinite(attention[k]));
    }
    CHECK(!valid[i] || std::isnan(loss[i]) == broken);
  }
}

TEST(snippet_pdmi_of_nothing) {
  using Pdmi = d2net::SnippetPdmi<float>;
  d2net::cpu::snippet_pdmi(Pdmi{0.5, 0.5, 0, 1e-5, 0, nullptr, nullptr, nullptr, 0, 5, nullptr, nullptr, nullptr}, 2);
  float loss = 1, weights[2] = {1, 1};
  bool valid = true;
  const Pdmi x{0.5, 0.5, 0, 1e-5, 0, nullptr, nullptr, nullptr, 1, 0, &loss, &valid, weights, &loss, nullptr};
  d2net::cpu::snippet_pdmi(x, 2);
  CHECK(loss == 0 && !valid && weights[0] == 0 && weights[1] == 0);
  d2net::cpu::snippet_pdmi_backward(x, 2);
}

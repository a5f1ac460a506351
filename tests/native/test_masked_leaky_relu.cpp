#include <limits>

#include "check.h"
#include "masked_leaky_relu.h"

namespace {

template <typename T>
void check_both_directions(bool time_last) {
  const int64_t b = 3, t = 700, d = 33;
  const std::vector<int64_t> lengths = {t + 5, 41, -1};  // clamped
  const auto x = check::uniform<T>(b * t * d, 1, -1, 1), grad_y = check::uniform<T>(b * t * d, 2);
  for (int threads : check::kThreads) {
    std::vector<T> y(b * t * d, T(-1)), grad_x(b * t * d, T(-1));
    const d2net::MaskedLeakyRelu<T> g{
        0.25, b, t, d, time_last, lengths.data(), x.data(), y.data(), grad_y.data(), grad_x.data()};
    d2net::cpu::masked_leaky_relu(g, threads);
    d2net::cpu::masked_leaky_relu_backward(g, threads);
    for (int64_t i = 0; i < b * t * d; ++i) {
      const int64_t step = time_last ? i % t : i / d % t;
      const bool inside = step < std::min(lengths[i / (t * d)], t);
      CHECK(y[i] == (inside ? x[i] > 0 ? x[i] : T(0.25) * x[i] : T(0)));
      CHECK(grad_x[i] == (inside ? x[i] > 0 ? grad_y[i] : T(0.25) * grad_y[i] : T(0)));
    }
  }
}

}  // namespace

TEST(masked_leaky_relu_equals_its_definition) {
  for (bool time_last : {false, true}) {
    check_both_directions<float>(time_last);
    check_both_directions<double>(time_last);
  }
}

TEST(masked_leaky_relu_of_nothing) {
  for (int64_t b : {0, 2}) {
    for (int64_t t : {0, 3}) {
      d2net::cpu::masked_leaky_relu(d2net::MaskedLeakyRelu<float>{0.2, b, t, 0, 0, nullptr, nullptr, nullptr}, 2);
      d2net::cpu::masked_leaky_relu(d2net::MaskedLeakyRelu<float>{0.2, b, 0, t, 1, nullptr, nullptr, nullptr}, 2);
    }
  }
}

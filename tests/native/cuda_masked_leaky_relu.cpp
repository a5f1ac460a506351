#include <cstring>

#include "check.h"
#include "masked_leaky_relu.h"

namespace {

// offset: how many numbers x lies behind an aligned address.
template <typename T>
void compare(int64_t t, int64_t d, bool time_last, int64_t offset = 0) {
  const int64_t b = 3, n = b * t * d;
  const std::vector<int64_t> lengths = {t, t / 3, 0};
  const auto x = check::uniform<T>(offset + n, 1, -1, 1), grad_y = check::uniform<T>(n, 2);
  std::vector<T> y[2], grad_x[2];
  for (int cuda : {0, 1}) {
    y[cuda].resize(n, T(-1));
    grad_x[cuda].resize(n, T(-1));
    const d2net::MaskedLeakyRelu<T> g{
        0.2, b, t, d, time_last, lengths.data(), x.data() + offset, y[cuda].data(), grad_y.data(), grad_x[cuda].data()};
    if (cuda) {
      d2net::cuda::masked_leaky_relu(g, 0, nullptr);
      d2net::cuda::masked_leaky_relu_backward(g, 0, nullptr);
    } else {
      d2net::cpu::masked_leaky_relu(g, 1);
      d2net::cpu::masked_leaky_relu_backward(g, 1);
    }
  }
  CHECK(std::memcmp(y[0].data(), y[1].data(), n * sizeof(T)) == 0);
  CHECK(std::memcmp(grad_x[0].data(), grad_x[1].data(), n * sizeof(T)) == 0);
}

}  // namespace

TEST(cuda_masked_leaky_relu_equals_the_cpu) {
  for (bool time_last : {false, true}) {
    for (int64_t t : {1, 37, 128}) {
      for (int64_t d : {1, 7, 32}) {
        compare<float>(t, d, time_last);
        compare<double>(t, d, time_last);
      }
    }
    compare<float>(64, 32, time_last, 1);
  }
  d2net::cuda::masked_leaky_relu(d2net::MaskedLeakyRelu<float>{0.2, 0, 3, 4, 0, nullptr, nullptr, nullptr}, 0, nullptr);
  d2net::cuda::masked_leaky_relu(d2net::MaskedLeakyRelu<float>{0.2, 2, 0, 4, 0, nullptr, nullptr, nullptr}, 0, nullptr);
}

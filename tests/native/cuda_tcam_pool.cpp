#include <limits>

#include "check.h"
#include "topk_pool.h"

namespace {

template <typename T>
bool same(const std::vector<T>& got, const std::vector<T>& wanted, double relative) {
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] != got[i] && wanted[i] != wanted[i]) continue;
    if (!check::close(got[i], wanted[i], relative, 0)) return false;
  }
  return true;
}

// offset: how many numbers the input lies behind an aligned address.
template <typename T>
void check_equals_the_cpu(int64_t b, int64_t t, int64_t c, int64_t offset = 0) {
  const int64_t divisor = 8, n = b * t * c;
  const std::vector<int64_t> lengths = {t, t / 3, 0};
  auto tcam = check::uniform<T>(offset + n, 1);
  tcam[offset + n / 2] = std::numeric_limits<T>::quiet_NaN();
  tcam[offset + n / 3] = std::numeric_limits<T>::infinity();
  const auto grad_attention = check::uniform<T>(b * t, 4), grad_pooled = check::uniform<T>(b * c, 5);

  std::vector<T> attention[2], pooled[2], kth[2], grad[2];
  std::vector<int32_t> argmax[2], last[2];
  for (int cuda : {0, 1}) {
    grad[cuda].resize(n, T(-1));
    for (auto* x : {pooled, kth}) x[cuda].resize(b * c);
    attention[cuda].resize(b * t);
    argmax[cuda].resize(b * t);
    last[cuda].resize(b * c);
    const d2net::TopkPool<T> x{tcam.data() + offset,
                               lengths.data(),
                               b,
                               t,
                               c,
                               divisor,
                               attention[cuda].data(),
                               argmax[cuda].data(),
                               pooled[cuda].data(),
                               kth[cuda].data(),
                               last[cuda].data(),
                               grad_attention.data(),
                               grad_pooled.data(),
                               grad[cuda].data()};
    if (cuda) {
      d2net::cuda::tcam_pool(x, 0, nullptr);
      d2net::cuda::topk_pool_backward(x, 0, nullptr);
    } else {
      d2net::cpu::tcam_pool(x, 1);
      d2net::cpu::topk_pool_backward(x, 1);
    }
  }
  const double relative = sizeof(T) == 4 ? 0 : 1e-13;  // the order of sums may differ for double
  CHECK(same(attention[1], attention[0], 0) && same(kth[1], kth[0], 0));
  CHECK(same(pooled[1], pooled[0], sizeof(T) == 4 ? 1e-7 : relative) && same(grad[1], grad[0], relative));
  CHECK(argmax[1] == argmax[0] && last[1] == last[0]);
}

}  // namespace

TEST(cuda_tcam_pool_equals_the_cpu) {
  for (int64_t c : {1, 7, 20, 132}) {
    check_equals_the_cpu<float>(3, 50, c);
    check_equals_the_cpu<double>(2, 20, c);
  }
  check_equals_the_cpu<float>(2, 50, 8, 1);
  check_equals_the_cpu<double>(1, 8200, 1);  // more than registers hold
}

TEST(cuda_an_argmax_that_is_no_class_gets_no_gradient) {
  constexpr int32_t kLargest = std::numeric_limits<int32_t>::max(), kLowest = std::numeric_limits<int32_t>::min();
  for (int64_t c : {3, 4}) {
    std::vector<int32_t> argmax = {0, -1, int32_t(c), 2, kLargest, kLowest, 1 << 20, -(1 << 20)}, last(c, kLargest);
    const int64_t t = int64_t(argmax.size());
    const std::vector<float> tcam(t * c, 0.5f), ones(t, 1.0f);
    std::vector<float> grad(t * c, -1.0f), kth(c, 0.5f);
    d2net::cuda::topk_pool_backward(
        d2net::TopkPool<float>{tcam.data(), nullptr, 1, t, c, 8, nullptr, argmax.data(), nullptr, kth.data(),
                               last.data(), ones.data(), nullptr, grad.data()},
        0, nullptr);
    for (int64_t i = 0; i < t * c; ++i) CHECK(grad[i] == (i == 0 || i == 3 * c + 2 ? 1.0f : 0.0f));
  }
}

TEST(cuda_tcam_without_classes) {
  std::vector<float> attention(4, 1.0f);
  std::vector<int32_t> argmax(4, 0);
  d2net::TopkPool<float> pool{nullptr, nullptr, 2, 2, 0, 8, attention.data(), argmax.data(), nullptr, nullptr, nullptr};
  d2net::cuda::tcam_pool(pool, 0, nullptr);
  for (int i = 0; i < 4; ++i) CHECK(attention[i] == 0 && argmax[i] == -1);
  pool.grad_attention = attention.data();
  d2net::cuda::topk_pool_backward(pool, 0, nullptr);
}

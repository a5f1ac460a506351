#include <limits>

#include "check.h"
#include "topk_pool.h"

namespace {

template <typename T>
void check_both_directions(int64_t c) {
  const int64_t b = 3, t = 130, divisor = 8;
  const std::vector<int64_t> lengths = {t, 41, 0};
  auto tcam = check::uniform<T>(b * t * c, 1);
  for (int64_t i = 41 * c; i < t * c; ++i) tcam[t * c + i] = std::numeric_limits<T>::quiet_NaN();  // padding
  const auto grad_attention = check::uniform<T>(b * t, 4), grad_pooled = check::uniform<T>(b * c, 5);
  for (int threads : check::kThreads) {
    std::vector<T> attention(b * t), pooled(b * c), kth(b * c), grad(b * t * c);
    std::vector<int32_t> argmax(b * t), last(b * c);
    const d2net::TopkPool<T> x{tcam.data(),
                               lengths.data(),
                               b,
                               t,
                               c,
                               divisor,
                               attention.data(),
                               argmax.data(),
                               pooled.data(),
                               kth.data(),
                               last.data(),
                               grad_attention.data(),
                               grad_pooled.data(),
                               grad.data()};
    d2net::cpu::tcam_pool(x, threads);
    d2net::cpu::topk_pool_backward(x, threads);
    std::vector<T> expected_pooled(b * c), again(b * c), grad_alone(b * t * c);
    std::vector<int32_t> until(b * c);
    const d2net::TopkPool<T> alone{tcam.data(),
                                   lengths.data(),
                                   b,
                                   t,
                                   c,
                                   divisor,
                                   nullptr,
                                   nullptr,
                                   expected_pooled.data(),
                                   again.data(),
                                   until.data(),
                                   nullptr,
                                   grad_pooled.data(),
                                   grad_alone.data()};
    d2net::cpu::topk_pool(alone, 1);
    d2net::cpu::topk_pool_backward(alone, 1);
    CHECK(pooled == expected_pooled);
    for (int64_t row = 0; row < b * t; ++row) {
      const bool valid = row % t < lengths[row / t];
      int64_t best = 0;
      for (int64_t j = 1; j < c; ++j) best = tcam[row * c + j] > tcam[row * c + best] ? j : best;
      CHECK(attention[row] == (valid ? tcam[row * c + best] : 0));
      CHECK(argmax[row] == (valid ? best : -1));
      for (int64_t j = 0; j < c; ++j) {
        const int64_t i = row * c + j;
        CHECK(grad[i] == (valid ? grad_alone[i] + (j == best ? grad_attention[row] : 0) : 0));
      }
    }
  }
}

}  // namespace

TEST(tcam_pool_forward_and_backward) {
  for (int64_t c : {1, 3, 20, 65}) {
    check_both_directions<float>(c);
    check_both_directions<double>(c);
  }
}

TEST(tcam_pool_takes_the_lowest_of_equal_classes) {
  const int64_t t = 33, c = 6;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> tcam(t * c, 0.5f), attention(t), pooled(c), kth(c), grad(t * c);
  tcam[4 * c + 2] = 0.75f;
  tcam[7 * c + 5] = tcam[7 * c + 3] = nan;
  tcam[9 * c] = -0.0f;
  for (int64_t j = 1; j < c; ++j) tcam[9 * c + j] = 0.0f;
  std::vector<int32_t> argmax(t), last(c);
  const std::vector<float> ones(t, 1.0f);
  for (int threads : check::kThreads) {
    const d2net::TopkPool<float> pool{
        tcam.data(),   nullptr,       1,          t,           c,           8,       attention.data(),
        argmax.data(), pooled.data(), kth.data(), last.data(), ones.data(), nullptr, grad.data()};
    d2net::cpu::tcam_pool(pool, threads);
    d2net::cpu::topk_pool_backward(pool, threads);
    for (int64_t row = 0; row < t; ++row) {
      const int64_t wanted = row == 4 ? 2 : row == 7 ? 3 : 0;
      CHECK(argmax[row] == wanted);
      for (int64_t j = 0; j < c; ++j) CHECK(grad[row * c + j] == (j == wanted ? 1.0f : 0.0f));
    }
    CHECK(std::isnan(attention[7]) && attention[4] == 0.75f && attention[9] == 0);
  }
}

TEST(an_argmax_that_is_no_class_gets_no_gradient) {
  const int64_t t = 8, c = 3;
  constexpr int32_t kLargest = std::numeric_limits<int32_t>::max(), kLowest = std::numeric_limits<int32_t>::min();
  std::vector<int32_t> argmax = {0, -1, 3, 2, kLargest, kLowest, 1 << 20, -(1 << 20)}, last = {kLargest, kLowest, 0};
  const std::vector<float> tcam(t * c, 0.5f), ones(t, 1.0f);
  std::vector<float> kth(c, 0.5f);
  for (int threads : check::kThreads) {
    std::vector<float> grad(t * c, -1.0f);
    d2net::cpu::topk_pool_backward(
        d2net::TopkPool<float>{tcam.data(), nullptr, 1, t, c, 8, nullptr, argmax.data(), nullptr, kth.data(),
                               last.data(), ones.data(), nullptr, grad.data()},
        threads);
    for (int64_t i = 0; i < t * c; ++i) CHECK(grad[i] == (i == 0 || i == 3 * c + 2 ? 1.0f : 0.0f));
  }
}

TEST(tcam_without_classes_or_recordings) {
  std::vector<float> attention(4, 1.0f);
  std::vector<int32_t> argmax(4, 0);
  d2net::TopkPool<float> pool{nullptr, nullptr, 2, 2, 0, 8, attention.data(), argmax.data(), nullptr, nullptr, nullptr};
  d2net::cpu::tcam_pool(pool, 2);
  for (int i = 0; i < 4; ++i) CHECK(attention[i] == 0 && argmax[i] == -1);
  const float ones[4] = {1, 1, 1, 1};
  pool.grad_attention = ones;
  d2net::cpu::topk_pool_backward(pool, 2);
  d2net::cpu::tcam_pool(d2net::TopkPool<float>{}, 2);
}

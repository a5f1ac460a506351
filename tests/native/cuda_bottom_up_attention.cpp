#include <limits>

#include "bottom_up_attention.h"
#include "check.h"
#include "cuda/common/device.h"

namespace {

template <typename T>
void compare(int64_t t, int64_t d, double tolerance) {
  using A = d2net::accumulator_t<T>;
  const int64_t b = 2, lengths[b] = {t + 1, t - 1};
  const auto x_ref = check::uniform<A>(d, 2, -1, 1);
  auto values = check::uniform<float>(b * t * d, 1, -1, 1);
  const bool half = sizeof(T) < sizeof(A);
  // Snippets whose squares leave the range of a float, beside others; one is zero, one NaN.
  for (int64_t j = 0; j < d && !half; ++j) values[j] *= 1e-30f, values[2 * d + j] *= 1e30f;
  for (int64_t j = 0; j < d; ++j) values[d + j] = 0;
  values[3 * d + d / 2] = std::numeric_limits<float>::quiet_NaN();
  std::vector<T> x;
  std::vector<A> wide, norms(b * t), expected_norms(b * t), expected(b * t);
  for (float v : values) {
    x.push_back(d2net::cuda::from_float<T>(v));
    wide.push_back(d2net::cuda::to_float(x.back()));
  }
  std::vector<d2net::accumulator_t<T>> attention(b * t);
  d2net::cpu::bottom_up_attention(
      d2net::BottomUpAttention<A>{wide.data(), x_ref.data(), lengths, b, t, d, expected.data(), expected_norms.data()},
      1);
  d2net::cuda::bottom_up_attention(
      d2net::BottomUpAttention<T>{x.data(), x_ref.data(), lengths, b, t, d, attention.data(), norms.data()}, 0,
      nullptr);
  for (int64_t row = 0; row < b * t; ++row) {
    const double got = attention[row];
    CHECK(row == 3 ? got != got : check::close(got, double(expected[row]), 0, tolerance));
    CHECK(row == 3 || check::close(double(norms[row]), double(expected_norms[row]), 1e-5, 0));
  }
}

}  // namespace

TEST(cuda_bottom_up_attention_equals_the_cpu) {
  for (const auto& [t, d] : {std::pair<int64_t, int64_t>{34, 7}, {6, 268}}) {
    compare<float>(t, d, 1e-6);
    compare<double>(t, d, 1e-13);
    compare<d2net::float16>(t, d, 1e-6);
    compare<d2net::bfloat16>(t, d, 1e-6);
  }
}

TEST(cuda_bottom_up_attention_of_ugly_vectors) {
  const float infinity = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  float attention = 0, norm = 0;
  for (float ugly : {infinity, nan}) {
    const float first[2] = {ugly, 0}, last[2] = {0, ugly}, fine[2] = {1, 0};
    for (const float* v : {first, last}) {
      d2net::cuda::bottom_up_attention(d2net::BottomUpAttention<float>{v, fine, nullptr, 1, 1, 2, &attention, &norm}, 0,
                                       nullptr);
      CHECK(attention != attention);
      d2net::cuda::bottom_up_attention(d2net::BottomUpAttention<float>{fine, v, nullptr, 1, 1, 2, &attention, &norm}, 0,
                                       nullptr);
      CHECK(attention != attention);
    }
  }
  for (float magnitude : {1e-45f, 1e-30f, 3e38f}) {  // squares that a float cannot hold
    const float x[2] = {magnitude, magnitude}, x_ref[2] = {magnitude, -0.0f}, zero[2] = {0, 0};
    d2net::cuda::bottom_up_attention(d2net::BottomUpAttention<float>{x, x_ref, nullptr, 1, 1, 2, &attention, &norm}, 0,
                                     nullptr);
    CHECK(check::close(double(attention), 0.5 * (1 - std::sqrt(0.5)), 1e-6, 0) && norm > 0);
    d2net::cuda::bottom_up_attention(d2net::BottomUpAttention<float>{x, zero, nullptr, 1, 1, 2, &attention, &norm}, 0,
                                     nullptr);
    CHECK(attention == 0.5f && norm == 0);
  }
}

TEST(cuda_bottom_up_attention_of_nothing) {
  float attention[2] = {0, 0}, norms[2] = {1, 1};
  d2net::cuda::bottom_up_attention(
      d2net::BottomUpAttention<float>{nullptr, nullptr, nullptr, 0, 2, 3, nullptr, nullptr}, 0, nullptr);
  d2net::cuda::bottom_up_attention(
      d2net::BottomUpAttention<float>{nullptr, nullptr, nullptr, 1, 2, 0, attention, norms}, 0, nullptr);
  CHECK(attention[0] == 0.5f && attention[1] == 0.5f && norms[0] == 0 && norms[1] == 0);
}

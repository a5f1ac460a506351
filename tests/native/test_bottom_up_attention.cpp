#include <limits>

#include "bottom_up_attention.h"
#include "check.h"

TEST(bottom_up_attention_equals_its_definition) {
  const int64_t b = 3, t = 90, d = 37;
  const int64_t lengths[b] = {t + 9, 70, -1};  // clamped
  auto x = check::uniform<float>(b * t * d, 1, -1, 1);
  const auto x_ref = check::uniform<float>(d, 2, -1, 1);
  for (int64_t j = 0; j < d; ++j) x[j] = 0;  // a zero vector
  for (int threads : check::kThreads) {
    for (float magnitude : {1.0f, 1e-30f, 1e30f}) {
      std::vector<float> scaled = x, attention(b * t), norms(b * t);
      for (float& v : scaled) v *= magnitude;
      d2net::cpu::bottom_up_attention(d2net::BottomUpAttention<float>{scaled.data(), x_ref.data(), lengths, b, t, d,
                                                                      attention.data(), norms.data()},
                                      threads);
      for (int64_t row = 0; row < b * t; ++row) {
        double dot = 0, xx = 0, rr = 0;
        for (int64_t j = 0; j < d; ++j) {
          dot += double(scaled[row * d + j]) * x_ref[j];
          xx += double(scaled[row * d + j]) * scaled[row * d + j];
          rr += double(x_ref[j]) * x_ref[j];
        }
        const bool counts = row % t < lengths[row / t] && xx > 0;
        CHECK(check::close(double(attention[row]), counts ? 0.5 * (1 - dot / std::sqrt(xx * rr)) : 0.5, 0, 1e-6));
        CHECK(check::close(double(norms[row]), counts ? std::sqrt(xx) : 0.0, 1e-6, 0));
      }
    }
  }
}

TEST(bottom_up_attention_of_ugly_values) {
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  double attention = 0, norm = 0;
  for (double ugly : {infinity, nan}) {
    const double first[2] = {ugly, 0}, last[2] = {0, ugly}, fine[2] = {1, 0};
    for (const double* v : {first, last}) {
      d2net::cpu::bottom_up_attention(d2net::BottomUpAttention<double>{v, fine, nullptr, 1, 1, 2, &attention, &norm},
                                      2);
      CHECK(attention != attention);
      d2net::cpu::bottom_up_attention(d2net::BottomUpAttention<double>{fine, v, nullptr, 1, 1, 2, &attention, &norm},
                                      2);
      CHECK(attention != attention);
    }
  }
  for (double magnitude : {5e-324, 1e-200, 1e200, 1.7e308}) {  // squares that a double cannot hold
    const double x[2] = {magnitude, magnitude}, x_ref[2] = {magnitude, -0.0};
    d2net::cpu::bottom_up_attention(d2net::BottomUpAttention<double>{x, x_ref, nullptr, 1, 1, 2, &attention, &norm}, 2);
    CHECK(check::close(attention, 0.5 * (1 - std::sqrt(0.5)), 1e-12, 0));
    CHECK(norm > 0);
  }
}

TEST(bottom_up_attention_of_nothing) {
  d2net::cpu::bottom_up_attention(d2net::BottomUpAttention<float>{nullptr, nullptr, nullptr, 0, 0, 0, nullptr, nullptr},
                                  2);
  float attention[2] = {0, 0}, norms[2] = {1, 1};
  d2net::cpu::bottom_up_attention(d2net::BottomUpAttention<float>{nullptr, nullptr, nullptr, 1, 2, 0, attention, norms},
                                  2);
  CHECK(attention[0] == 0.5f && attention[1] == 0.5f && norms[0] == 0 && norms[1] == 0);
}

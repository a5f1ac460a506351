#include <limits>
#include <memory>

#include "attention_pool.h"
#include "check.h"

namespace {

struct Result {
  std::vector<float> fg, bg, grad_x, grad_attention;
  std::unique_ptr<bool[]> valid_fg, valid_bg;
};

Result run(const std::vector<float>& x, const std::vector<float>& attention, const int64_t* lengths, int64_t b,
           int64_t t, int64_t d, double threshold, double background_threshold, bool mean, int threads) {
  const std::vector<float> gf(b * d, 1.0f), gb(b * d, 2.0f);
  Result r{std::vector<float>(b * d),
           std::vector<float>(b * d),
           std::vector<float>(b * t * d),
           std::vector<float>(b * t),
           std::unique_ptr<bool[]>(new bool[b]),
           std::unique_ptr<bool[]>(new bool[b])};
  const d2net::AttentionPool<float> pool{threshold,
                                         background_threshold,
                                         mean,
                                         x.data(),
                                         attention.data(),
                                         lengths,
                                         b,
                                         t,
                                         d,
                                         r.fg.data(),
                                         r.bg.data(),
                                         r.valid_fg.get(),
                                         r.valid_bg.get(),
                                         nullptr,
                                         nullptr,
                                         gf.data(),
                                         gb.data(),
                                         r.grad_x.data(),
                                         r.grad_attention.data()};
  d2net::cpu::attention_pool(pool, threads);
  d2net::cpu::attention_pool_backward(pool, threads);
  return r;
}

}  // namespace

TEST(attention_pool_equals_its_definition) {
  const int64_t b = 3, t = 150, d = 37;
  const int64_t lengths[b] = {t + 9, 70, -1};  // clamped
  const auto x = check::uniform<float>(b * t * d, 1, -1, 1), attention = check::uniform<float>(b * t, 2);
  for (int threads : check::kThreads) {
    for (double threshold : {0.5, 0.3}) {
      for (bool mean : {false, true}) {
        const Result r = run(x, attention, lengths, b, t, d, threshold, threshold, mean, threads);
        for (int64_t i = 0; i < b; ++i) {
          const int64_t length = std::min(std::max<int64_t>(lengths[i], 0), t);
          for (int side : {0, 1}) {
            double total = 0;
            std::vector<double> sum(d);
            for (int64_t s = 0; s < length; ++s) {
              const float lambda = attention[i * t + s], weight = side == 0 ? lambda : 1 - lambda;
              if (!(weight > float(threshold))) continue;
              total += weight;
              for (int64_t j = 0; j < d; ++j) sum[j] += double(weight) * x[(i * t + s) * d + j];
            }
            const float* pooled = (side == 0 ? r.fg : r.bg).data() + i * d;
            for (int64_t j = 0; j < d; ++j) {
              CHECK(check::close(double(pooled[j]), sum[j] / (mean && total > 0 ? total : 1), 1e-5, 1e-5));
            }
            CHECK((side == 0 ? r.valid_fg : r.valid_bg)[i] == (total > 0));
          }
          for (int64_t s = length; s < t; ++s) {
            CHECK(r.grad_attention[i * t + s] == 0);
            for (int64_t j = 0; j < d; ++j) CHECK(r.grad_x[(i * t + s) * d + j] == 0);
          }
        }
        // Sums over b, t of attention * gradient and x * gradient are both that of pooled * gradient for "sum".
        if (!mean && threshold == 0.5) {
          double of_pooled = 0, of_x = 0;
          for (int64_t j = 0; j < b * d; ++j) of_pooled += r.fg[j] + 2.0 * r.bg[j];
          for (int64_t j = 0; j < b * t * d; ++j) of_x += double(x[j]) * r.grad_x[j];
          CHECK(check::close(of_x, of_pooled, 1e-4, 1e-3));
        }
        // Change of one lambda.
        for (int64_t row : {int64_t(3), t + 5}) {
          auto nudged = attention;
          const float step = attention[row] < 0.5f ? 1e-3f : -1e-3f;
          nudged[row] += step;
          if ((nudged[row] > threshold) != (attention[row] > threshold)) continue;
          if ((1 - nudged[row] > threshold) != (1 - attention[row] > threshold)) continue;
          const Result other = run(x, nudged, lengths, b, t, d, threshold, threshold, mean, threads);
          double change = 0;
          for (int64_t j = 0; j < b * d; ++j) change += other.fg[j] - r.fg[j] + 2.0 * (other.bg[j] - r.bg[j]);
          CHECK(check::close(change / step, double(r.grad_attention[row]), 0.05, 0.05));
        }
      }
    }
  }
}

TEST(attention_pool_is_the_same_for_any_number_of_threads) {
  const int64_t b = 1, t = 1000, d = 33;
  const auto x = check::uniform<float>(b * t * d, 3, -1, 1), attention = check::uniform<float>(b * t, 4);
  const Result expected = run(x, attention, nullptr, b, t, d, 0.4, 0.4, true, 1);
  for (int threads : check::kThreads) {
    const Result r = run(x, attention, nullptr, b, t, d, 0.4, 0.4, true, threads);
    CHECK(r.fg == expected.fg && r.bg == expected.bg);
    CHECK(r.grad_x == expected.grad_x && r.grad_attention == expected.grad_attention);
  }
}

TEST(attention_pool_of_ugly_values) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (float ugly : {nan, infinity, -infinity, -0.0f, 1e-42f}) {
    std::vector<float> x(2 * 70 * 3, ugly), attention(2 * 70, ugly);
    for (bool mean : {false, true}) run(x, attention, nullptr, 2, 70, 3, 0.5, 0.5, mean, 2);
    const std::vector<float> nowhere(2 * 70, 0.5f);
    const Result r = run(x, nowhere, nullptr, 2, 70, 3, 0.5, 0.5, false, 2);
    for (float v : r.fg) CHECK(v == 0);
    for (float v : r.grad_x) CHECK(v == 0);
    CHECK(!r.valid_fg[0] && !r.valid_bg[1]);
  }
}

TEST(attention_pool_of_nothing_and_without_gradients) {
  bool valid[2] = {true, true};
  using Pool = d2net::AttentionPool<float>;
  Pool pool{};
  pool.mean = 1;
  d2net::cpu::attention_pool(pool, 2);
  float fg[4] = {1, 1, 1, 1}, bg[4] = {1, 1, 1, 1};
  d2net::cpu::attention_pool(
      Pool{0.5, 0.5, 1, nullptr, nullptr, nullptr, 2, 0, 2, fg, bg, valid, valid, nullptr, nullptr}, 2);
  for (int j = 0; j < 4; ++j) CHECK(fg[j] == 0 && bg[j] == 0);
  CHECK(!valid[0] && !valid[1]);
  const float x[2] = {1, 2}, attention[2] = {0.9f, 0.2f}, g[1] = {3};
  float grad_x[2], grad_attention[2];
  // Only one gradient wanted: x is then not read for grad_x, and the results not without `mean`.
  pool = {0.5, 0.5, 1, nullptr, attention, nullptr, 1, 2, 1, nullptr, nullptr, nullptr, nullptr};
  pool.grad_fg = pool.grad_bg = g;
  pool.grad_x = grad_x;
  d2net::cpu::attention_pool_backward(pool, 2);
  CHECK(check::close(grad_x[0], 3.0f, 1e-6, 0) && check::close(grad_x[1], 3.0f, 1e-6, 0));
  pool.mean = 0, pool.x = x;
  pool.grad_x = nullptr, pool.grad_attention = grad_attention;
  d2net::cpu::attention_pool_backward(pool, 2);
  CHECK(grad_attention[0] == 3 && grad_attention[1] == -6);
}

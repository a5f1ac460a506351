#include <limits>
#include <memory>

#include "attention_pool.h"
#include "check.h"
#include "cuda/common/device.h"

namespace {

// What one backend makes of one case, in double.
struct Result {
  std::vector<double> fg, bg, grad_x, grad_attention;
  std::vector<bool> valid;
};

template <typename T>
struct Case {
  int64_t b, t, d;
  std::vector<T> x;
  std::vector<d2net::accumulator_t<T>> grad_fg, grad_bg, attention;
  std::vector<int64_t> lengths;
  double threshold;
  bool mean;
};

template <typename T>
std::vector<double> to_double(const std::vector<T>& values) {
  std::vector<double> result;
  for (const T& v : values) result.push_back(double(d2net::cuda::to_float(v)));
  return result;
}

template <typename T>
Result on_cuda(const Case<T>& c, bool want_x, bool want_attention) {
  using A = d2net::accumulator_t<T>;
  const int64_t chunks = (c.t + d2net::cuda::kPoolChunk - 1) / d2net::cuda::kPoolChunk;
  std::vector<A> partial(c.b * chunks * 2 * c.d), terms(4 * c.b), grad_attention(want_attention ? c.b * c.t : 0);
  std::vector<unsigned> arrived(c.b * (c.d / 32 + 1));
  std::vector<A> fg(c.b * c.d), bg(c.b * c.d);
  std::vector<T> grad_x(want_x ? c.b * c.t * c.d : 0);
  const std::unique_ptr<bool[]> valid(new bool[2 * c.b]);
  d2net::AttentionPool<T> pool{
      c.threshold, c.threshold, c.mean,    c.x.data(),  c.attention.data(), c.lengths.data(), c.b,           c.t,
      c.d,         fg.data(),   bg.data(), valid.get(), valid.get() + c.b,  partial.data(),   arrived.data()};
  d2net::cuda::attention_pool(pool, 0, nullptr);
  // Of what is read for the gradient of attention alone, nothing is given without it.
  if (!want_attention) pool.x = nullptr;
  if (!want_attention || !c.mean) pool.x_fg = pool.x_bg = nullptr;
  pool.grad_fg = c.grad_fg.data(), pool.grad_bg = c.grad_bg.data();
  pool.terms = c.mean ? terms.data() : nullptr;
  pool.grad_x = want_x ? grad_x.data() : nullptr;
  pool.grad_attention = want_attention ? grad_attention.data() : nullptr;
  d2net::cuda::attention_pool_backward(pool, 0, nullptr);
  return {to_double(fg), to_double(bg), to_double(grad_x), to_double(grad_attention),
          std::vector<bool>(valid.get(), valid.get() + 2 * c.b)};
}

template <typename T>
Result on_cpu(const Case<T>& c) {
  const auto x = to_double(c.x), attention = to_double(c.attention), grad_fg = to_double(c.grad_fg),
             grad_bg = to_double(c.grad_bg);
  Result r{std::vector<double>(c.b * c.d),
           std::vector<double>(c.b * c.d),
           std::vector<double>(c.b * c.t * c.d),
           std::vector<double>(c.b * c.t),
           {}};
  const std::unique_ptr<bool[]> valid(new bool[2 * c.b]);
  const d2net::AttentionPool<double> pool{c.threshold,
                                          c.threshold,
                                          c.mean,
                                          x.data(),
                                          attention.data(),
                                          c.lengths.data(),
                                          c.b,
                                          c.t,
                                          c.d,
                                          r.fg.data(),
                                          r.bg.data(),
                                          valid.get(),
                                          valid.get() + c.b,
                                          nullptr,
                                          nullptr,
                                          grad_fg.data(),
                                          grad_bg.data(),
                                          r.grad_x.data(),
                                          r.grad_attention.data()};
  d2net::cpu::attention_pool(pool, 1);
  d2net::cpu::attention_pool_backward(pool, 1);
  r.valid.assign(valid.get(), valid.get() + 2 * c.b);
  return r;
}

template <typename T>
std::vector<T> random(int64_t n, unsigned seed) {
  std::vector<T> values;
  for (float v : check::uniform<float>(n, seed, -1, 1)) values.push_back(d2net::cuda::from_float<T>(v));
  return values;
}

template <typename T>
Case<T> make(int64_t t, int64_t d, bool mean) {
  const int64_t b = 3;
  return {b,
          t,
          d,
          random<T>(b * t * d, 1),
          random<d2net::accumulator_t<T>>(b * d, 2),
          random<d2net::accumulator_t<T>>(b * d, 3),
          check::uniform<d2net::accumulator_t<T>>(b * t, 4),
          {t + 9, t - 2, -1},
          mean ? 0.4 : 0.55,
          mean};
}

bool close(const std::vector<double>& a, const std::vector<double>& b, double tolerance) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!check::close(a[i], b[i], tolerance, tolerance)) return false;
  }
  return true;
}

template <typename T>
void compare(double tolerance) {
  for (bool mean : {false, true}) {
    // In packs, over more than a block's columns in double, and one by one; parts of blocks of snippets.
    for (const auto& [t, d] : {std::pair<int64_t, int64_t>{35, 516}, {18, 7}, {3, 4}}) {
      const Case<T> c = make<T>(t, d, mean);
      const Result expected = on_cpu(c), got = on_cuda(c, true, true);
      CHECK(got.valid == expected.valid);
      CHECK(close(got.fg, expected.fg, tolerance) && close(got.bg, expected.bg, tolerance));
      CHECK(close(got.grad_x, expected.grad_x, tolerance));
      CHECK(close(got.grad_attention, expected.grad_attention, tolerance));
      if (t != 18) continue;
      CHECK(on_cuda(c, true, false).grad_x == got.grad_x);
      CHECK(on_cuda(c, false, true).grad_attention == got.grad_attention);
    }
  }
}

}  // namespace

TEST(cuda_attention_pool_equals_the_cpu) {
  compare<float>(1e-4);
  compare<double>(1e-12);
  compare<d2net::float16>(1e-2);
  compare<d2net::bfloat16>(5e-2);
}

TEST(cuda_attention_pool_of_ugly_values) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  for (float ugly : {nan, infinity, -infinity, -0.0f}) {
    Case<float> c = make<float>(17, 5, true);
    c.attention.assign(c.attention.size(), ugly);
    on_cuda(c, true, true);
    c.x.assign(c.x.size(), ugly);
    c.attention.assign(c.attention.size(), 0.5f);
    c.threshold = 0.5;  // selected nowhere, read nowhere
    const Result r = on_cuda(c, true, true);
    for (double v : r.fg) CHECK(v == 0);
    for (double v : r.grad_x) CHECK(v == 0);
    for (double v : r.grad_attention) CHECK(v == 0);
    for (bool v : r.valid) CHECK(!v);
  }
}

TEST(cuda_attention_pool_of_nothing) {
  on_cuda(Case<float>{}, true, true);
  const Case<float> no_time{2, 0, 3, {}, std::vector<float>(6), std::vector<float>(6), {}, {0, 0}, 0.5, true};
  for (double v : on_cuda(no_time, true, true).fg) CHECK(v == 0);
  const Case<float> no_columns{1, 2, 0, {}, {}, {}, {0.9f, 0.9f}, {2}, 0.5, true};
  const Result r = on_cuda(no_columns, true, true);
  CHECK(r.valid[0] && !r.valid[1]);
  for (double v : r.grad_attention) CHECK(v == 0);
}

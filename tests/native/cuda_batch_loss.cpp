#include <memory>

#include "batch_loss.h"
#include "check.h"

namespace {

template <typename T>
void check_close(const std::vector<T>& found, const std::vector<T>& expected) {
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 1e-12;
  for (size_t i = 0; i < found.size(); ++i) {
    CHECK(check::close(double(found[i]), double(expected[i]), tolerance, tolerance));
  }
}

std::unique_ptr<bool[]> flags(int64_t n, int64_t step) {
  std::unique_ptr<bool[]> result(new bool[n]);
  for (int64_t i = 0; i < n; ++i) result[i] = i % step != 1;
  return result;
}

std::vector<int64_t> lengths(int64_t n, int64_t step) {
  std::vector<int64_t> result(n);
  for (int64_t i = 0; i < n; ++i) result[i] = i % step == 1 ? 0 : i + 1;
  return result;
}

template <typename T>
void factors_equal_the_cpu(int64_t b, int64_t c, double peak_share, bool per_class) {
  const auto pooled = check::uniform<T>(b * c, 1, -0.1, 1.1), labels = check::uniform<T>(b * c, 2);
  const auto grad = check::uniform<T>(b * c, 3, -1);
  const auto counted = lengths(b, 4);
  std::vector<T> p(b * c), y(b * c), e_p(b * c), e_y(b * c), g(b * c), e_g(b * c);
  d2net::cuda::video_factors(pooled.data(), labels.data(), counted.data(), b, c, 1e-3, peak_share, per_class, p.data(),
                             y.data(), 0, nullptr);
  d2net::cpu::video_factors(pooled.data(), labels.data(), counted.data(), b, c, 1e-3, peak_share, per_class, e_p.data(),
                            e_y.data(), 1);
  d2net::cuda::video_factors_backward(grad.data(), pooled.data(), b, c, 1e-3, peak_share, g.data(), 0, nullptr);
  d2net::cpu::video_factors_backward(grad.data(), pooled.data(), b, c, 1e-3, peak_share, e_g.data(), 1);
  check_close(p, e_p);
  check_close(y, e_y);
  check_close(g, e_g);
}

template <typename T>
void total_equals_the_cpu(int64_t b, bool all_terms) {
  const auto dis = check::uniform<T>(b, 1), snippet = check::uniform<T>(b, 2), video = check::uniform<T>(2, 3);
  const auto counted = lengths(b, 4);
  const auto valid = flags(b, 3);
  const T *s = all_terms ? snippet.data() : nullptr, *v = all_terms ? video.data() : nullptr;
  std::vector<T> out(5), e_out(5), g(2 * b + 2), e_g(2 * b + 2);
  d2net::cuda::total_loss(dis.data(), counted.data(), s, valid.get(), v, v, b, 0.2, 0.3, 0.4, &out[0], &out[1], &out[2],
                          &out[3], &out[4], 0, nullptr);
  d2net::cpu::total_loss(dis.data(), counted.data(), s, valid.get(), v, v, b, 0.2, 0.3, 0.4, &e_out[0], &e_out[1],
                         &e_out[2], &e_out[3], &e_out[4], 1);
  check_close(out, e_out);
  const T *to = all_terms ? &video[1] : nullptr, *total = video.data();
  const auto backward = [&](auto&& function, std::vector<T>& into, auto... where) {
    function(total, to, to, to, to, counted.data(), valid.get(), b, 0.2, 0.3, 0.4, &into[0],
             all_terms ? &into[b] : static_cast<T*>(nullptr), all_terms ? &into[2 * b] : static_cast<T*>(nullptr),
             all_terms ? &into[2 * b + 1] : static_cast<T*>(nullptr), where...);
  };
  backward(d2net::cuda::total_loss_backward<T>, g, 0, static_cast<void*>(nullptr));
  backward(d2net::cpu::total_loss_backward<T>, e_g, 1);
  check_close(g, e_g);
}

}  // namespace

TEST(cuda_video_factors_equal_the_cpu) {
  for (double peak_share : {-1.0, 0.2}) {
    factors_equal_the_cpu<float>(10, 20, peak_share, true);
    factors_equal_the_cpu<double>(3, 300, peak_share, false);
    factors_equal_the_cpu<double>(270, 2, peak_share, true);
  }
}

TEST(cuda_total_loss_equals_the_cpu) {
  for (int64_t b : {1, 10, 300}) {
    for (bool all_terms : {false, true}) {
      total_equals_the_cpu<float>(b, all_terms);
      total_equals_the_cpu<double>(b, all_terms);
    }
  }
}

TEST(cuda_update_reference_equals_the_cpu) {
  const int64_t b = 5, d = 300;
  const auto background = check::uniform<float>(b * d, 1), reference = check::uniform<float>(d, 2);
  for (bool some : {true, false}) {
    const auto valid = flags(b, 2);
    for (int64_t i = 0; i < b; ++i) valid[i] = valid[i] && some;
    std::vector<float> found = reference, expected = reference;
    d2net::cuda::update_reference(found.data(), background.data(), valid.get(), b, d, 0.9, 0, nullptr);
    d2net::cpu::update_reference(expected.data(), background.data(), valid.get(), b, d, 0.9, 1);
    CHECK(some == (found != reference));
    check_close(found, expected);
  }
}

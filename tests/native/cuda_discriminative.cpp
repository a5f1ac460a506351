#include <limits>
#include <memory>

#include "check.h"
#include "discriminative.h"

namespace {

template <typename T>
void equals_the_cpu(int64_t b, int64_t c, int64_t d, bool with_embeddings) {
  const auto pooled = check::uniform<T>(b * c, 1), labels = check::uniform<T>(b * c, 2, -1);
  const auto x_fg = check::uniform<T>(b * d, 3, -1), x_bg = check::uniform<T>(b * d, 4, -1),
             grad = check::uniform<T>(b, 5);
  std::vector<int64_t> partner(3 * b), source(b), counted(b);
  for (int64_t i = 0; i < b; ++i) counted[i] = i % 4 != 1 ? i + 1 : 0, source[i] = (i * 5 + 1) % b;
  for (int64_t i = 0; i < 3 * b; ++i) partner[i] = i * 7 % (b + 3) - 1;  // also out of range on both sides
  const int64_t* partners = with_embeddings ? partner.data() : nullptr;
  std::vector<T> found[6], expected[6];
  for (auto* out : {found, expected}) {
    const int64_t sizes[] = {b, b * c, 8 * b, b * c, b * d, b * d};
    for (int k = 0; k < 6; ++k) out[k].assign(sizes[k], T(0));
  }
  const auto inputs = [&](auto&& function, std::vector<T>* out, auto... where) {
    function(pooled.data(), labels.data(), counted.data(), x_fg.data(), x_bg.data(), partners, source.data(), b, c, d,
             1.5, 0.3, 1e-6, true, true, out[0].data(), out[1].data(), out[2].data(), where...);
  };
  inputs(d2net::cuda::discriminative_terms<T>, found, 0, static_cast<void*>(nullptr));
  inputs(d2net::cpu::discriminative_terms<T>, expected, 1);
  const auto backward = [&](auto&& function, std::vector<T>* out, auto... where) {
    function(grad.data(), expected[1].data(), expected[2].data(), x_fg.data(), x_bg.data(), partners, source.data(), b,
             c, d, out[3].data(), out[4].data(), out[5].data(), where...);
  };
  backward(d2net::cuda::discriminative_terms_backward<T>, found, 0, static_cast<void*>(nullptr));
  backward(d2net::cpu::discriminative_terms_backward<T>, expected, 1);
  const double tolerance = sizeof(T) == 4 ? 1e-4 : 1e-10;
  for (int k = 0; k < 6; ++k) {
    for (size_t i = 0; i < found[k].size(); ++i) {
      CHECK(check::close(double(found[k][i]), double(expected[k][i]), tolerance, tolerance));
    }
  }
}

}  // namespace

TEST(cuda_discriminative_terms_equal_the_cpu) {
  for (bool with_embeddings : {true, false}) {
    equals_the_cpu<float>(5, 3, 300, with_embeddings);
    equals_the_cpu<double>(3, 270, 17, with_embeddings);
  }
}

TEST(cuda_partners_equal_the_cpu) {
  for (int64_t b : {1, 2, 100}) {
    auto keys = check::uniform<float>(3 * b, 1);
    if (b > 2) keys[1] = keys[0];
    for (int64_t i = 5; i < 3 * b; i += 7) keys[i] = std::numeric_limits<float>::quiet_NaN();
    std::unique_ptr<bool[]> fg(new bool[b]), bg(new bool[b]);
    for (int64_t i = 0; i < b; ++i) fg[i] = i % 3 != 1, bg[i] = i % 5 != 2;
    std::vector<int64_t> found(3 * b), expected(3 * b);
    d2net::cuda::different_partners(keys.data(), fg.get(), bg.get(), b, found.data(), 0, nullptr);
    d2net::cpu::different_partners(keys.data(), fg.get(), bg.get(), b, expected.data(), 1);
    CHECK(found == expected);
  }
}

#include <memory>

#include "check.h"
#include "snippet_pdmi.h"

namespace {

template <typename T>
void equals_the_cpu(int64_t b, int64_t t, int64_t offset) {
  // Rows at any address: `offset` elements into the arrays.
  auto attention = check::uniform<T>(offset + b * t, 1), scores = check::uniform<T>(offset + b * t, 2);
  attention[offset + b * t / 2] = T(NAN);
  std::vector<int64_t> lengths(b);
  for (int64_t i = 0; i < b; ++i) lengths[i] = i * 37 % (t + 3) - 1;  // also negative and past the end
  for (const int64_t* given : {static_cast<const int64_t*>(nullptr), static_cast<const int64_t*>(lengths.data())}) {
    std::vector<T> loss(b), weights(2 * b), gradient(b * t), e_loss(b), e_weights(2 * b), e_gradient(b * t);
    auto valid = std::make_unique<bool[]>(b), e_valid = std::make_unique<bool[]>(b);
    const T *a = attention.data() + offset, *s = scores.data() + offset;
    const std::vector<T> grad(b, T(2));
    d2net::SnippetPdmi<T> x{0.6, 0.4, 0, 1e-5, 0, a, s, given, b, t, loss.data(), valid.get(), weights.data()};
    d2net::cuda::snippet_pdmi(x, 0, nullptr);
    x.loss = e_loss.data(), x.valid = e_valid.get(), x.side_grad = e_weights.data();
    d2net::cpu::snippet_pdmi(x, 1);
    for (int64_t i = 0; i < b; ++i) {
      CHECK(valid[i] == e_valid[i]);
      CHECK(std::isnan(loss[i]) ? std::isnan(e_loss[i]) : check::close(loss[i], e_loss[i], 1e-4, 1e-4));
    }
    x.grad_loss = grad.data(), x.grad_attention = gradient.data();
    d2net::cuda::snippet_pdmi_backward(x, 0, nullptr);
    x.grad_attention = e_gradient.data();
    d2net::cpu::snippet_pdmi_backward(x, 1);
    for (int64_t k = 0; k < b * t; ++k) {
      CHECK(std::isnan(gradient[k]) ? std::isnan(e_gradient[k]) : gradient[k] == e_gradient[k]);
    }
  }
}

}  // namespace

TEST(cuda_snippet_pdmi_equals_the_cpu) {
  for (int64_t t : {1, 8, 13, 1030}) {
    for (int64_t offset : {0, 1}) {
      equals_the_cpu<float>(4, t, offset);
      equals_the_cpu<double>(4, t, offset);
    }
  }
}

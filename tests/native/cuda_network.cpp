#include "network_case.h"

namespace {

// Of rounding of the results, each once, to T.
template <typename T>
double rounding() {
  return sizeof(T) == 8 ? 1e-14 : sizeof(T) == 4 ? 1e-6 : 1e-2;
}

template <typename A, typename B>
bool same(const check::Memory<A>& found, const check::Memory<B>& expected, double by) {
  const int64_t size = int64_t(found.all.size()) - found.offset;
  for (int64_t i = 0; i < size; ++i) {
    if (!check::close(found[i], expected[i], by, by)) return false;
  }
  return size == int64_t(expected.all.size()) - expected.offset;
}

template <typename T>
void compare_layers(int64_t n, int64_t d, int64_t offset = 0) {
  using A = d2net::accumulator_t<T>;
  const double by = rounding<T>();
  const check::Layer<A> wide({}, n, d);
  const check::Layer<T> given({}, n, d, offset);
  for (const check::LayerParts parts : check::every_layer()) {
    check::Layer<A> expected = wide;
    check::Layer<T> found = given;
    expected.parts = found.parts = parts;
    d2net::cpu::stream_layer(expected.call(), 1);
    d2net::cuda::stream_layer(found.call(), 0, nullptr);
    CHECK(found.signs == expected.signs && found.kept == expected.kept);
    CHECK(same(found.activated(), expected.activated(), by));
    if (parts.dropout) CHECK(same(found.dropped, expected.dropped, by));
    if (parts.mean) CHECK(same(found.mean, expected.mean, by));
    d2net::cpu::stream_layer_backward(expected.call(), 1);
    d2net::cuda::stream_layer_backward(found.call(), 0, nullptr);
    CHECK(same(found.gradient(), expected.gradient(), by));
    if (parts.residual) CHECK(same(found.grad_residual, expected.grad_residual, by));
    // Sums are of what is not rounded yet.
    CHECK(same(found.partial, expected.partial, sizeof(A) == 4 ? 1e-5 : by));
  }
}

template <typename T>
void compare_heads(int64_t n, int64_t c, int64_t k, int64_t dilation, int64_t streams) {
  using A = d2net::accumulator_t<T>;
  const double exact = sizeof(A) == 4 ? 1e-6 : 1e-14;
  const check::Head<A> wide(n, c, k, dilation, streams);
  const check::Head<T> given(n, c, k, dilation, streams);
  for (int gradients = 0; gradients < 8; ++gradients) {
    check::Head<A> expected = wide;
    check::Head<T> found = given;
    d2net::cpu::class_head(expected.call(gradients), 1);
    d2net::cuda::class_head(found.call(gradients), 0, nullptr);
    CHECK(same(found.logits_a, expected.logits_a, exact) && same(found.logits_b, expected.logits_b, exact));
    CHECK(same(found.tcam, expected.tcam, exact));
    d2net::cpu::class_head_backward(expected.call(gradients), 1);
    d2net::cuda::class_head_backward(found.call(gradients), 0, nullptr);
    CHECK(same(found.grad_products, expected.grad_products, rounding<T>()));
    CHECK(same(found.partial, expected.partial, sizeof(A) == 4 ? 1e-5 : 1e-14));
  }
}

template <typename T>
void compare_sums(int64_t blocks, int64_t d, int64_t c) {
  for (int64_t streams : {1, 2}) {
    check::Sums<T> expected(streams, blocks, d, c), found(streams, blocks, d, c);
    d2net::cpu::bias_sums(expected.call(), 1);
    d2net::cuda::bias_sums(found.call(), 0, nullptr);
    CHECK(same(found.sums, expected.sums, sizeof(T) == 4 ? 1e-5 : 1e-14));
  }
}

template <typename T>
void compare_all() {
  // Below and above the 512 columns and 16 rows of a block of the backward, with packs of 8 and without.
  for (int64_t d : {1, 7, 16, 37, 520, 523}) compare_layers<T>(d > 500 ? 19 : 50, d);
  compare_layers<T>(20, 16, 1);  // no aligned address
  for (int64_t streams : {1, 2}) {
    compare_heads<T>(40, 5, 1, 1, streams);
    compare_heads<T>(40, 21, 3, 2, streams);
  }
}

}  // namespace

TEST(cuda_network_equals_the_cpu_in_float32) { compare_all<float>(); }
TEST(cuda_network_equals_the_cpu_in_float64) { compare_all<double>(); }
TEST(cuda_network_equals_the_cpu_in_bfloat16) { compare_all<d2net::bfloat16>(); }

TEST(cuda_sums_of_the_gradients_of_biases_equal_the_cpu) {
  for (int64_t blocks : {0, 1, 7, 40}) {
    compare_sums<float>(blocks, 37, 5);
    compare_sums<double>(blocks, 5, 70);
  }
}

TEST(cuda_network_of_nothing) {
  for (int64_t n : {0, 5}) {
    check::Layer<float> layer({true, true, true, true, false}, n, n == 0 ? 3 : 0);
    d2net::cuda::stream_layer(layer.call(), 0, nullptr);
    d2net::cuda::stream_layer_backward(layer.call(), 0, nullptr);
    check::Head<float> head(n, n == 0 ? 3 : 0, 3, 1, 2);
    d2net::cuda::class_head(head.call(7), 0, nullptr);
    d2net::cuda::class_head_backward(head.call(7), 0, nullptr);
  }
}

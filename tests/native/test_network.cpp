#include "math/dropout.h"
#include "network_case.h"

namespace {

template <typename T>
bool near(double found, double expected) {
  return check::close(found, expected, sizeof(T) == 4 ? 1e-6 : 1e-14, sizeof(T) == 4 ? 1e-6 : 1e-14);
}

// Every element on its own, from the inputs of a layer that was not run.
template <typename T>
void check_layer(check::Layer<T>& given, const check::Layer<T>& found) {
  const check::LayerParts parts = given.parts;
  const d2net::math::Dropout dropout(given.kDropout);
  const int64_t d = given.d;
  std::vector<double> of_bias(check::blocks_of(given.n) * d, 0);
  for (int64_t i = 0; i < given.n * d; ++i) {
    const int64_t row = i / d, column = i % d, byte = row * given.bytes + column / 8;
    const bool inside = given.mask[row], positive = inside && given.y[i] + given.bias[column] > 0;
    const uint64_t number = uint64_t(parts.numbers ? given.numbers[row] : row);
    const uint64_t place = number * uint64_t(given.bytes) + uint64_t(column / 8);
    const bool passed = (dropout.kept(uint64_t(given.seed) + 1, place) >> column % 8 & 1) != 0;
    const double factor = !parts.dropout ? 1 : passed ? 1 / (1 - given.kDropout) : 0;
    double x = 0, grad = 0;
    if (inside) {
      x = (given.y[i] + given.bias[column]) * (positive ? 1 : given.kSlope) + (parts.residual ? given.residual[i] : 0);
      const double of_mean = parts.mean ? 0.5 * given.grad_mean[i] : 0;
      grad = factor * (given.grad_dropped[i] + (parts.mean_of_dropped ? of_mean : 0));
      grad += parts.mean_of_dropped ? 0 : of_mean;
    }
    const double grad_y = (positive ? 1 : given.kSlope) * grad;
    of_bias[row / d2net::kBlockRows * d + column] += grad_y;
    CHECK(near<T>(found.activated()[i], x));
    CHECK((found.signs[byte] >> column % 8 & 1) == positive);
    if (parts.dropout) {
      CHECK((found.kept[byte] >> column % 8 & 1) == (inside && passed));
      CHECK(near<T>(found.dropped[i], factor * x));
    }
    if (parts.mean) {
      const double mean = inside ? 0.5 * ((parts.mean_of_dropped ? factor : 1) * x + given.other[i]) : 0;
      CHECK(near<T>(found.mean[i], mean));
    }
    CHECK(near<T>(found.gradient()[i], grad_y));
    if (parts.residual) CHECK(near<T>(found.grad_residual[i], grad));
  }
  for (int64_t i = 0; i < check::blocks_of(given.n) * given.width; ++i) {
    const int64_t column = i % given.width;
    CHECK(near<T>(found.partial[i], column < d ? of_bias[i / given.width * d + column] : given.partial[i]));
  }
}

template <typename T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <typename T>
void check_layers(int64_t n, int64_t d) {
  check::Layer<T> given({}, n, d), first = given;
  for (const check::LayerParts parts : check::every_layer()) {
    given.parts = parts;
    for (int threads : check::kThreads) {
      check::Layer<T> found = given;
      d2net::cpu::stream_layer(found.call(), threads);
      if (!parts.dropout) CHECK(found.kept == given.kept && same_bits(found.dropped.all, given.dropped.all));
      d2net::cpu::stream_layer_backward(found.call(), threads);
      if (threads == check::kThreads[0]) {
        check_layer(given, found);
        first = std::move(found);
        continue;
      }
      CHECK(same_bits(found.x.all, first.x.all) && same_bits(found.mean.all, first.mean.all));
      CHECK(same_bits(found.dropped.all, first.dropped.all) && same_bits(found.grad_y.all, first.grad_y.all));
      CHECK(same_bits(found.grad_residual.all, first.grad_residual.all));
      CHECK(same_bits(found.partial.all, first.partial.all));
      CHECK(found.signs == first.signs && found.kept == first.kept);
    }
  }
}

template <typename T>
void check_head(int64_t c, int64_t k, int64_t dilation, int64_t streams) {
  const int64_t n = 300;
  const check::Head<T> given(n, c, k, dilation, streams);
  for (int gradients = 0; gradients < 8; ++gradients) {
    check::Head<T> first = given;
    for (int threads : check::kThreads) {
      check::Head<T> x = given;
      d2net::cpu::class_head(x.call(gradients), threads);
      d2net::cpu::class_head_backward(x.call(gradients), threads);
      if (threads != check::kThreads[0]) {
        CHECK(same_bits(x.logits_a.all, first.logits_a.all) && same_bits(x.logits_b.all, first.logits_b.all));
        CHECK(same_bits(x.tcam.all, first.tcam.all) && same_bits(x.grad_products.all, first.grad_products.all));
        CHECK(same_bits(x.partial.all, first.partial.all));
        continue;
      }
      const auto inside = [&](int64_t row) { return row >= 0 && row < n && x.mask[row]; };
      for (int64_t i = 0; i < n * c; ++i) {
        double tcam = 0;
        for (int64_t s = 0; s < streams; ++s) {
          double logit = (s == 0 ? x.bias_a : x.bias_b)[i % c];
          for (int64_t j = 0; j < k; ++j) {
            const int64_t from = i / c + (j - k / 2) * dilation;
            if (from >= 0 && from < n) logit += x.products[(s * n + from) * x.row + i % c * k + j];
          }
          CHECK(near<T>((s == 0 ? x.logits_a : x.logits_b)[i], inside(i / c) ? logit : 0));
          tcam += 1 / (1 + std::exp(-logit)) / double(streams);
        }
        CHECK(near<T>(x.tcam[i], inside(i / c) ? tcam : 0));
      }
      const int64_t of_stream = x.call(0).partial_stride;
      std::vector<double> of_bias(streams * of_stream, -7);
      for (int64_t i = 0; i < streams * of_stream; ++i) {
        if (i % of_stream / x.width < check::blocks_of(n) && i % x.width < c) of_bias[i] = 0;
      }
      for (int64_t i = 0; i < streams * n * x.row; ++i) {
        const int64_t s = i / (n * x.row), of = i % x.row / k, j = i % x.row % k;
        const int64_t row = i / x.row % n - (j - k / 2) * dilation;
        double grad = 0;
        if (of < c && inside(row)) {
          const int64_t at = row * c + of;
          const double p = 1 / (1 + std::exp(-(s == 0 ? x.logits_a : x.logits_b)[at]));
          if ((gradients & 1) != 0) grad += x.grad_tcam[at] / double(streams) * p * (1 - p);
          if ((gradients & (s == 0 ? 2 : 4)) != 0) grad += (s == 0 ? x.grad_a : x.grad_b)[at];
        }
        CHECK(near<T>(x.grad_products[i], grad));
        if (j == k / 2 && of < c) of_bias[s * of_stream + row / d2net::kBlockRows * x.width + of] += grad;
      }
      for (int64_t i = 0; i < streams * of_stream; ++i) CHECK(near<T>(x.partial[i], of_bias[i]));
      first = std::move(x);
    }
  }
}

}  // namespace

TEST(a_layer_of_a_stream_equals_its_definition) {
  for (int64_t d : {1, 8, 37}) {
    check_layers<float>(200, d);
    check_layers<double>(200, d);
  }
  check_layers<float>(40, 3000);  // a row is work enough for a thread
}

TEST(the_head_of_the_classifier_equals_its_definition) {
  for (int64_t streams : {1, 2}) {
    for (int64_t k : {1, 3, 5}) {
      check_head<float>(5, k, 1, streams);
      check_head<double>(21, k, 2, streams);
    }
  }
}

TEST(sums_of_the_gradients_of_biases) {
  for (int64_t streams : {1, 2}) {
    for (int64_t c : {5, 40}) {
      for (int threads : check::kThreads) {
        check::Sums<double> x(streams, 70, 37, c);
        d2net::cpu::bias_sums(x.call(), threads);
        for (int64_t i = 0; i < streams * 3 * x.width; ++i) {
          const int64_t which = i / x.width, column = i % x.width;
          double sum = column < x.columns(which) ? 0 : -7;
          for (int64_t block = 0; block < 70 && column < x.columns(which); ++block) {
            sum += x.partial[(which * 70 + block) * x.width + column];
          }
          CHECK(x.sums[i] == sum);
        }
      }
    }
  }
}

TEST(a_layer_without_rows_or_columns) {
  for (const check::LayerParts parts : check::every_layer()) {
    for (int64_t n : {0, 5}) {
      check::Layer<float> x(parts, n, n == 0 ? 3 : 0);
      d2net::cpu::stream_layer(x.call(), 2);
      d2net::cpu::stream_layer_backward(x.call(), 2);
    }
  }
  for (int64_t n : {0, 5}) {
    check::Head<float> x(n, n == 0 ? 3 : 0, 3, 1, 2);
    d2net::cpu::class_head(x.call(7), 2);
    d2net::cpu::class_head_backward(x.call(7), 2);
    check::Sums<float> sums(2, n, 3, 4);
    d2net::cpu::bias_sums(sums.call(), 2);
    for (int64_t i = 0; n == 0 && i < 3; ++i) CHECK(sums.sums[i] == 0);
  }
}

// What a layer of another call left is not needed: a training without gradients has no signs.
TEST(a_layer_that_keeps_no_bits) {
  check::Layer<float> found({true, true, true, true, false}, 100, 20),
      expected({true, true, true, true, false}, 100, 20);
  d2net::cpu::stream_layer(expected.call(), 1);
  auto g = found.call();
  g.signs = g.kept = nullptr;
  d2net::cpu::stream_layer(g, 2);
  CHECK(same_bits(found.x.all, expected.x.all) && same_bits(found.dropped.all, expected.dropped.all));
  CHECK(same_bits(found.mean.all, expected.mean.all));
}

TEST(dropout_draws_the_numbers_of_split_mix_64) {
  const uint64_t published[] = {6457827717110365317u, 3203168211198807973u, 9817491932198370423u, 4593380528125082431u,
                                16408922859458223821u};
  for (uint64_t i = 0; i < 5; ++i) CHECK(d2net::math::split_mix(1234567, i) == published[i]);
}

TEST(dropout_of_every_share) {
  for (double share : {0.0, 1e-9, 0.25, 0.7, 1 - 1e-9}) {
    const d2net::math::Dropout dropout(share);
    int64_t kept = 0;
    for (uint64_t place = 0; place < 20000; ++place) {
      for (uint32_t bits = dropout.kept(3, place); bits != 0; bits &= bits - 1) ++kept;
    }
    CHECK(check::close(kept / 160000.0, 1 - share, 0, 0.006));
    CHECK(dropout.threshold <= 65535 && dropout.scale == 65536.0 / (65536 - dropout.threshold));
    if (share < 1e-8) CHECK(kept == 160000 && dropout.scale == 1);
  }
}

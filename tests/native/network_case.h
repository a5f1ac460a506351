// A layer of a stream and the head of the classifier with all their memory, for the tests of both devices.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>

#include "check.h"
#include "network.h"

namespace check {

// Numbers drawn for these tests are numbers of bfloat16, and so of every type.
template <typename T>
T number(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits &= 0xffff0000u;
  if constexpr (sizeof(T) == 2) {
    return T{uint16_t(bits >> 16)};
  } else {
    std::memcpy(&x, &bits, 4);
    return T(x);
  }
}

template <typename T>
double value(T x) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  } else {
    return x;
  }
}

inline bool is_gap(int64_t row) { return row % 9 < 2; }

inline int64_t blocks_of(int64_t n) { return (n + d2net::kBlockRows - 1) / d2net::kBlockRows; }

inline std::shared_ptr<bool[]> mask_of(int64_t n) {
  std::shared_ptr<bool[]> mask(new bool[n]);
  for (int64_t row = 0; row < n; ++row) mask[row] = !is_gap(row);
  return mask;
}

// `size` numbers behind an aligned address.
template <typename T>
struct Memory {
  std::vector<T> all;
  int64_t offset;

  Memory(int64_t size, int64_t offset) : all(offset + size, number<T>(-7)), offset(offset) {}
  T* data() { return all.data() + offset; }
  double operator[](int64_t i) const { return value(all[offset + i]); }

  void draw(unsigned seed) {
    const auto drawn = uniform<float>(int64_t(all.size()) - offset, seed, -1, 1);
    for (size_t i = 0; i < drawn.size(); ++i) data()[i] = number<T>(drawn[i]);
  }
  void draw_rows(unsigned seed, int64_t d) {  // with gaps that must not matter
    draw(seed);
    for (int64_t i = 0; i < int64_t(all.size()) - offset; ++i) {
      if (is_gap(i / d)) data()[i] = number<T>(std::numeric_limits<float>::quiet_NaN());
    }
  }
};

// What a call has: the layer's own parts, and whether results take the place of inputs.
struct LayerParts {
  bool residual, dropout, mean, mean_of_dropped, in_place;
  bool numbers = false;  // of the rows, for the dropout
};

inline std::vector<LayerParts> every_layer() {
  std::vector<LayerParts> all;
  for (int bits = 0; bits < 32; ++bits) {
    all.push_back({(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0, (bits & 16) != 0});
    if (!all.back().dropout) continue;
    all.push_back(all.back());
    all.back().numbers = true;
  }
  return all;
}

template <typename T>
struct Layer {
  using A = d2net::accumulator_t<T>;
  static constexpr double kSlope = 0.25, kDropout = 0.375;
  LayerParts parts;
  int64_t n, d, bytes, width;  // of a row of partial sums
  std::shared_ptr<bool[]> mask;
  int64_t seed = 5;
  std::vector<int64_t> numbers;
  Memory<A> bias, partial;
  Memory<T> y, residual, other, x, dropped, mean, grad_dropped, grad_mean, grad_y, grad_residual;
  std::vector<uint8_t> signs, kept;

  Layer(LayerParts parts, int64_t n, int64_t d, int64_t offset = 0)
      : parts(parts),
        n(n),
        d(d),
        bytes((d + 7) / 8),
        width(d + 3),
        mask(mask_of(n)),
        numbers(n),
        bias(d, offset),
        partial(blocks_of(n) * width, offset),
        y(n * d, offset),
        residual(y),
        other(y),
        x(y),
        dropped(y),
        mean(y),
        grad_dropped(y),
        grad_mean(y),
        grad_y(y),
        grad_residual(y),
        signs(n * bytes, 0xee),
        kept(signs) {
    // The other way round, among them the largest; those of gaps must not matter.
    for (int64_t row = 0; row < n; ++row) {
      numbers[row] = is_gap(row) ? -1 : row % 2 == 0 ? n - row : std::numeric_limits<int64_t>::max() - row;
    }
    bias.draw(1);
    y.draw_rows(2, d);
    residual.draw_rows(3, d);
    other.draw_rows(4, d);
    grad_dropped.draw_rows(5, d);
    grad_mean.draw_rows(6, d);
  }

  d2net::StreamLayer<T> call() {
    d2net::StreamLayer<T> g{};
    g.slope = kSlope;
    g.dropout = kDropout;
    g.share = 0.5;
    g.n = n;
    g.d = d;
    g.stream = 1;
    g.mean_of_dropped = parts.mean_of_dropped;
    g.mask = mask.get();
    g.bias = bias.data();
    g.y = y.data();
    g.residual = parts.residual ? residual.data() : nullptr;
    g.x = parts.in_place ? y.data() : x.data();
    g.signs = signs.data();
    if (parts.dropout) {
      g.seed = &seed;
      g.numbers = parts.numbers ? numbers.data() : nullptr;
      g.dropped = dropped.data();
      g.kept = kept.data();
    }
    if (parts.mean) {
      g.other = other.data();
      g.mean = mean.data();
      g.grad_mean = grad_mean.data();
    }
    g.grad_dropped = grad_dropped.data();
    g.grad_y = parts.in_place ? grad_dropped.data() : grad_y.data();
    g.grad_residual = parts.residual ? grad_residual.data() : nullptr;
    g.partial = partial.data();
    g.width = width;
    return g;
  }

  const Memory<T>& activated() const { return parts.in_place ? y : x; }
  const Memory<T>& gradient() const { return parts.in_place ? grad_dropped : grad_y; }
};

template <typename T>
struct Head {
  using A = d2net::accumulator_t<T>;
  int64_t n, c, k, dilation, streams, row, width;  // numbers of a row of products, of a row of partial sums
  std::shared_ptr<bool[]> mask;
  Memory<T> products, grad_products;
  Memory<A> bias_a, bias_b, logits_a, logits_b, tcam, grad_tcam, grad_a, grad_b, partial;

  Head(int64_t n, int64_t c, int64_t k, int64_t dilation, int64_t streams)
      : n(n),
        c(c),
        k(k),
        dilation(dilation),
        streams(streams),
        row(c * k + 2),
        width(c + 3),
        mask(mask_of(n)),
        products(streams * n * row, 0),
        grad_products(products),
        bias_a(c, 0),
        bias_b(streams == 2 ? c : 0, 0),
        logits_a(n * c, 0),
        logits_b(streams == 2 ? n * c : 0, 0),
        tcam(n * c, 0),
        grad_tcam(tcam),
        grad_a(tcam),
        grad_b(tcam),
        partial(streams * (blocks_of(n) + 1) * width, 0) {
    products.draw(1);
    for (int64_t i = 0; i < streams * n * row; ++i) {  // what is not used must not matter
      if (i % row >= c * k) products.data()[i] = number<T>(std::numeric_limits<float>::quiet_NaN());
    }
    bias_a.draw(2);
    bias_b.draw(6);
    grad_tcam.draw_rows(3, c);
    grad_a.draw_rows(4, c);
    grad_b.draw_rows(5, c);
  }

  // Bits of `gradients`: of the TCAM, of the first stream's logits, of the second's.
  d2net::ClassHead<T> call(int gradients) {
    d2net::ClassHead<T> g{};
    g.n = n;
    g.c = c;
    g.k = k;
    g.dilation = dilation;
    g.streams = streams;
    g.row = row;
    g.mask = mask.get();
    g.products = products.data();
    g.bias_a = bias_a.data();
    g.bias_b = bias_b.data();
    g.logits_a = logits_a.data();
    g.logits_b = logits_b.data();
    g.tcam = tcam.data();
    g.grad_tcam = (gradients & 1) != 0 ? grad_tcam.data() : nullptr;
    g.grad_logits_a = (gradients & 2) != 0 ? grad_a.data() : nullptr;
    g.grad_logits_b = (gradients & 4) != 0 ? grad_b.data() : nullptr;
    g.grad_products = grad_products.data();
    g.partial = partial.data();
    g.partial_stride = (blocks_of(n) + 1) * width;
    g.width = width;
    return g;
  }
};

// The sums of the biases' gradients; what is past the columns of a row must not matter, and stays.
template <typename T>
struct Sums {
  int64_t streams, blocks, width, d, c;
  Memory<T> partial, sums;

  Sums(int64_t streams, int64_t blocks, int64_t d, int64_t c)
      : streams(streams),
        blocks(blocks),
        width(std::max(d, c) + 1),
        d(d),
        c(c),
        partial(streams * 3 * blocks * width, 0),
        sums(streams * 3 * width, 0) {
    partial.draw(1);
    for (int64_t i = 0; i < streams * 3 * blocks * width; ++i) {
      if (i % width >= columns(i / (blocks * width))) partial.data()[i] = std::numeric_limits<T>::quiet_NaN();
    }
  }
  int64_t columns(int64_t which) const { return which % 3 == 2 ? c : d; }
  d2net::BiasSums<T> call() { return {streams, blocks, width, d, c, partial.data(), sums.data()}; }
};

}  // namespace check

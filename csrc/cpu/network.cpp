// A row at a time: it is in the first cache while bias, activation, residual, dropout and mean pass over it.
#include "network.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/common/parallel.h"
#include "cpu/common/simd.h"
#include "math/dropout.h"

namespace d2net::cpu {
namespace {

// x = leaky ReLU of y + bias (+ residual, if there is one).
template <typename T>
[[gnu::always_inline]] inline void activated(const T* y, const T* bias, const T* residual, int64_t d, T slope, T* x) {
  if (residual == nullptr) {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) {
      const T value = y[k] + bias[k];
      x[k] = value > 0 ? value : slope * value;
    }
  } else {
#pragma omp simd
    for (int64_t k = 0; k < d; ++k) {
      const T value = y[k] + bias[k];
      x[k] = (value > 0 ? value : slope * value) + residual[k];
    }
  }
}
D2NET_SIMD void activate(const float* y, const float* bias, const float* residual, int64_t d, float slope, float* x) {
  activated(y, bias, residual, d, slope, x);
}
D2NET_SIMD void activate(const double* y, const double* bias, const double* residual, int64_t d, double slope,
                         double* x) {
  activated(y, bias, residual, d, slope, x);
}

// Bit k % 8 of bits[k / 8]: y + bias > 0.
template <typename T>
[[gnu::always_inline]] inline void signs_of(const T* y, const T* bias, int64_t d, uint8_t* bits) {
  const int64_t whole = d / kBitsOf;
  for (int64_t byte = 0; byte < whole; ++byte) {
    uint8_t signs = 0;
    for (int i = 0; i < int(kBitsOf); ++i) {
      signs |= uint8_t(uint8_t(y[byte * kBitsOf + i] + bias[byte * kBitsOf + i] > 0) << i);
    }
    bits[byte] = signs;
  }
  if (whole * kBitsOf == d) return;
  bits[whole] = 0;
  for (int64_t k = whole * kBitsOf; k < d; ++k) bits[whole] |= uint8_t(uint8_t(y[k] + bias[k] > 0) << k % kBitsOf);
}
D2NET_SIMD void find_signs(const float* y, const float* bias, int64_t d, uint8_t* bits) { signs_of(y, bias, d, bits); }
D2NET_SIMD void find_signs(const double* y, const double* bias, int64_t d, uint8_t* bits) {
  signs_of(y, bias, d, bits);
}

D2NET_SIMD void draw(const math::Dropout& dropout, uint64_t seed, uint64_t first, int64_t bytes, uint8_t* kept) {
  for (int64_t byte = 0; byte < bytes; ++byte) kept[byte] = uint8_t(dropout.kept(seed, first + byte));
}

// out = bit ? one * x : zero * x. x finite where the bit decides between 0 and x: dropped numbers may be anything.
template <typename T>
[[gnu::always_inline]] inline void by_bits(const T* x, const uint8_t* bits, int64_t d, T one, T zero, T* out) {
  for (int64_t first = 0; first < d; first += kBitsOf) {
    const uint8_t byte = bits[first / kBitsOf];
    const int64_t n = std::min(kBitsOf, d - first);
    for (int64_t i = 0; i < n; ++i) {
      const T value = (byte >> i & 1) != 0 ? one * x[first + i] : zero == T(0) ? T(0) : zero * x[first + i];
      out[first + i] = value;
    }
  }
}
D2NET_SIMD void scale_by_bits(const float* x, const uint8_t* bits, int64_t d, float one, float zero, float* out) {
  by_bits(x, bits, d, one, zero, out);
}
D2NET_SIMD void scale_by_bits(const double* x, const uint8_t* bits, int64_t d, double one, double zero, double* out) {
  by_bits(x, bits, d, one, zero, out);
}

template <typename T>
[[gnu::always_inline]] inline void mean_of(const T* x, const T* other, T share, int64_t d, T* out) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) out[k] = share * (x[k] + other[k]);
}
D2NET_SIMD void mean(const float* x, const float* other, float share, int64_t d, float* out) {
  mean_of(x, other, share, d, out);
}
D2NET_SIMD void mean(const double* x, const double* other, double share, int64_t d, double* out) {
  mean_of(x, other, share, d, out);
}

// sum += by * x
template <typename T>
[[gnu::always_inline]] inline void added(const T* x, T by, int64_t d, T* sum) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) sum[k] += by * x[k];
}
D2NET_SIMD void add(const float* x, float by, int64_t d, float* sum) { added(x, by, d, sum); }
D2NET_SIMD void add(const double* x, double by, int64_t d, double* sum) { added(x, by, d, sum); }

template <typename T>
void backward_of_row(const StreamLayer<T>& g, int64_t row, T scale, std::vector<T>& grad, T* sums) {
  const int64_t d = g.d, bytes = (d + kBitsOf - 1) / kBitsOf;
  T* const grad_y = g.grad_y + row * d;
  if (!g.mask[row]) {
    std::fill_n(grad_y, d, T(0));
    if (g.grad_residual != nullptr) std::fill_n(g.grad_residual + row * d, d, T(0));
    return;
  }
  std::fill_n(grad.data(), d, T(0));
  if (g.grad_dropped != nullptr) add(g.grad_dropped + row * d, T(1), d, grad.data());
  const bool mean_too = g.grad_mean != nullptr && g.mean_of_dropped != 0;
  if (mean_too) add(g.grad_mean + row * d, T(g.share), d, grad.data());
  if (g.kept != nullptr) scale_by_bits(grad.data(), g.kept + row * bytes, d, scale, T(0), grad.data());
  if (g.grad_mean != nullptr && !mean_too) add(g.grad_mean + row * d, T(g.share), d, grad.data());
  if (g.grad_residual != nullptr) std::copy_n(grad.data(), d, g.grad_residual + row * d);
  scale_by_bits(grad.data(), g.signs + row * bytes, d, T(1), T(g.slope), grad_y);
  add(grad_y, T(1), d, sums);
}

template <typename T>
T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

}  // namespace

template <typename T>
void stream_layer(const StreamLayer<T>& g, int threads) {
  const int64_t d = g.d, bytes = (d + kBitsOf - 1) / kBitsOf;
  const math::Dropout dropout(g.dropout);
  parallel_for(g.n, 1 + 16384 / (d + 1), threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> kept(bytes);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t at = row * d;
      if (!g.mask[row]) {
        std::fill_n(g.x + at, d, T(0));
        if (g.seed != nullptr) std::fill_n(g.dropped + at, d, T(0));
        if (g.other != nullptr) std::fill_n(g.mean + at, d, T(0));
        if (g.signs != nullptr) std::fill_n(g.signs + row * bytes, bytes, uint8_t(0));
        if (g.kept != nullptr) std::fill_n(g.kept + row * bytes, bytes, uint8_t(0));
        continue;
      }
      if (g.signs != nullptr) find_signs(g.y + at, g.bias, d, g.signs + row * bytes);  // before x takes y's place
      activate(g.y + at, g.bias, g.residual == nullptr ? nullptr : g.residual + at, d, T(g.slope), g.x + at);
      if (g.seed != nullptr) {
        uint8_t* const of_row = g.kept == nullptr ? kept.data() : g.kept + row * bytes;
        const uint64_t number = uint64_t(g.numbers == nullptr ? row : g.numbers[row]);
        draw(dropout, uint64_t(*g.seed) + uint64_t(g.stream), number * uint64_t(bytes), bytes, of_row);
        scale_by_bits(g.x + at, of_row, d, T(dropout.scale), T(0), g.dropped + at);
      }
      if (g.other != nullptr) {
        mean((g.mean_of_dropped != 0 && g.seed != nullptr ? g.dropped : g.x) + at, g.other + at, T(g.share), d,
             g.mean + at);
      }
    }
  });
}

template <typename T>
void stream_layer_backward(const StreamLayer<T>& g, int threads) {
  const T scale = g.kept == nullptr ? T(1) : T(math::Dropout(g.dropout).scale);
  const int64_t blocks = (g.n + kBlockRows - 1) / kBlockRows;
  parallel_for(blocks, 1 + 16384 / (kBlockRows * (g.d + 1)), threads, [&](int64_t begin, int64_t end) {
    std::vector<T> grad(g.d);
    for (int64_t block = begin; block < end; ++block) {
      T* const sums = g.partial + block * g.width;
      std::fill_n(sums, g.d, T(0));
      for (int64_t row = block * kBlockRows; row < std::min(g.n, (block + 1) * kBlockRows); ++row) {
        backward_of_row(g, row, scale, grad, sums);
      }
    }
  });
}

template <typename T>
void class_head(const ClassHead<T>& g, int threads) {
  const int64_t c = g.c;
  parallel_for(g.n, 1 + 4096 / (c + 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* const tcam = g.tcam + row * c;
      std::fill_n(tcam, c, T(0));
      for (int64_t s = 0; s < g.streams; ++s) {
        T* const logits = (s == 0 ? g.logits_a : g.logits_b) + row * c;
        if (!g.mask[row]) {
          std::fill_n(logits, c, T(0));
          continue;
        }
        std::copy_n(s == 0 ? g.bias_a : g.bias_b, c, logits);
        for (int64_t j = 0; j < g.k; ++j) {
          const int64_t from = row + (j - g.k / 2) * g.dilation;
          if (from < 0 || from >= g.n) continue;
          const T* const products = g.products + (s * g.n + from) * g.row + j;
          for (int64_t k = 0; k < c; ++k) logits[k] += products[k * g.k];
        }
        for (int64_t k = 0; k < c; ++k) tcam[k] += sigmoid(logits[k]);
      }
      for (int64_t k = 0; k < c; ++k) tcam[k] /= T(g.streams);
    }
  });
}

template <typename T>
void class_head_backward(const ClassHead<T>& g, int threads) {
  const int64_t c = g.c, blocks = (g.n + kBlockRows - 1) / kBlockRows;
  // With respect to the logits of a row of stream s; 0 in gaps and past the ends.
  const auto grad_logits = [&](int64_t s, int64_t row, T* to) {
    std::fill_n(to, c, T(0));
    if (row < 0 || row >= g.n || !g.mask[row]) return;
    const T* const given = s == 0 ? g.grad_logits_a : g.grad_logits_b;
    const T* const logits = (s == 0 ? g.logits_a : g.logits_b) + row * c;
    for (int64_t k = 0; k < c; ++k) {
      if (given != nullptr) to[k] = given[row * c + k];
      if (g.grad_tcam == nullptr) continue;
      const T probability = sigmoid(logits[k]);
      to[k] += g.grad_tcam[row * c + k] / T(g.streams) * probability * (1 - probability);
    }
  };
  parallel_for(g.streams * blocks, 1 + 4096 / (kBlockRows * g.row + 1), threads, [&](int64_t begin, int64_t end) {
    std::vector<T> gradient(c);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t s = at / blocks, first = at % blocks * kBlockRows, last = std::min(first + kBlockRows, g.n);
      T* const sums = g.partial + s * g.partial_stride + at % blocks * g.width;
      std::fill_n(sums, c, T(0));
      std::fill_n(g.grad_products + (s * g.n + first) * g.row, (last - first) * g.row, T(0));
      for (int64_t j = 0; j < g.k; ++j) {
        for (int64_t row = first; row < last; ++row) {
          grad_logits(s, row - (j - g.k / 2) * g.dilation, gradient.data());  // of which the products are part
          T* const to = g.grad_products + (s * g.n + row) * g.row + j;
          for (int64_t k = 0; k < c; ++k) to[k * g.k] = gradient[k];
          if (j == g.k / 2) add(gradient.data(), T(1), c, sums);
        }
      }
    }
  });
}

template <typename T>
void bias_sums(const BiasSums<T>& g, int threads) {
  parallel_for(g.streams * 3, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t which = begin; which < end; ++which) {
      const int64_t columns = which % 3 == 2 ? g.c : g.d;
      T* const sums = g.sums + which * g.width;
      std::fill_n(sums, columns, T(0));
      for (int64_t block = 0; block < g.blocks; ++block) {
        add(g.partial + (which * g.blocks + block) * g.width, T(1), columns, sums);
      }
    }
  });
}

D2NET_INSTANTIATE_CPU(stream_layer, StreamLayer)
D2NET_INSTANTIATE_CPU(stream_layer_backward, StreamLayer)
D2NET_INSTANTIATE_CPU(class_head, ClassHead)
D2NET_INSTANTIATE_CPU(class_head_backward, ClassHead)
D2NET_INSTANTIATE_CPU(bias_sums, BiasSums)

}  // namespace d2net::cpu

// Time step by time step the row of classes stays in the nearest cache: sigmoids, their mean and its maximum in the
// forward, all three gradients in the backward. The pooling over time is topk_pool's.
#include "two_stream_tcam.h"

#include <algorithm>
#include <limits>

#include "math/sigmoid.h"
#include "math/topk.h"
#include "parallel.h"
#include "pooled_gradient.h"
#include "simd.h"
#include "topk_pool.h"

namespace d2net::cpu {
namespace {

using math::Ordered;

// Rows whose maxima are taken at once: few classes make short vectors, and time steps there are enough of.
constexpr int kRows = 16;

// Maximum of each row of classes, and the lowest class that has it, of up to kRows rows.
template <typename T>
[[gnu::always_inline]] inline void maxima(const T* tcam, int rows, int64_t c, T* attention, int32_t* peak) {
  using Key = typename Ordered<T>::Key;
  Key best[kRows], found[kRows];
  for (int l = 0; l < kRows; ++l) {
    best[l] = std::numeric_limits<Key>::min();
    found[l] = -1;
  }
  for (int64_t j = 0; j < c; ++j) {
#pragma omp simd
    for (int l = 0; l < rows; ++l) {
      const Key key = math::ordered_key(tcam[l * c + j]);
      found[l] = key > best[l] ? Key(j) : found[l];
      best[l] = key > best[l] ? key : best[l];
    }
  }
  for (int l = 0; l < rows; ++l) {
    attention[l] = c > 0 ? tcam[l * c + found[l]] : T(0);
    peak[l] = int32_t(found[l]);
  }
}
template <typename T>
[[gnu::always_inline]] inline void all_maxima(const T* tcam, int64_t rows, int64_t c, T* attention, int32_t* peak) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) maxima(tcam + row * c, kRows, c, attention + row, peak + row);
  maxima(tcam + row * c, int(rows - row), c, attention + row, peak + row);
}
D2NET_SIMD void class_max(const float* tcam, int64_t rows, int64_t c, float* attention, int32_t* peak) {
  all_maxima(tcam, rows, c, attention, peak);
}
D2NET_SIMD void class_max(const double* tcam, int64_t rows, int64_t c, double* attention, int32_t* peak) {
  all_maxima(tcam, rows, c, attention, peak);
}

D2NET_SIMD void mean_sigmoid(const float* a, const float* b, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0.5f * (math::sigmoid(a[i]) + math::sigmoid(b[i]));
}
D2NET_SIMD void mean_sigmoid(const double* a, const double* b, int64_t n, double* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = 0.5 * (math::sigmoid(a[i]) + math::sigmoid(b[i]));
}

// The gradient of tcam, given in grad_a, to those of the logits.
D2NET_SIMD void through_sigmoids(const float* a, const float* b, int64_t n, float* grad_a, float* grad_b) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float half = 0.5f * grad_a[i];
    grad_a[i] = half * math::sigmoid_slope(a[i]);
    grad_b[i] = half * math::sigmoid_slope(b[i]);
  }
}
D2NET_SIMD void through_sigmoids(const double* a, const double* b, int64_t n, double* grad_a, double* grad_b) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double half = 0.5 * grad_a[i];
    grad_a[i] = half * math::sigmoid_slope(a[i]);
    grad_b[i] = half * math::sigmoid_slope(b[i]);
  }
}

// Calls body(row, rows) for blocks of rows within a length, small enough for the nearest cache, and fills attention
// and peak of the rows past it after padding(row, rows). Rows count through all recordings.
template <typename T, typename Body, typename Padding>
void for_blocks(const int64_t* lengths, int64_t b, int64_t t, int64_t c, T* attention, int32_t* peak, int threads,
                Body body, Padding padding) {
  const int64_t grain = 1 + 16384 / (c + 1);  // about 10 us of work
  const int64_t block = kRows * (1 + 128 / (c + 1));
  parallel_for(b * t, grain, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t recording = begin / t, from = begin % t, to = std::min(t, from + end - begin);
      const int64_t valid = std::clamp(math::clamped_length(lengths, recording, t), from, to);
      for (int64_t first = from; first < valid; first += block) {
        body(recording * t + first, std::min(block, valid - first));
      }
      const int64_t past = recording * t + valid;
      padding(past, to - valid);
      std::fill_n(attention + past, to - valid, T(0));
      std::fill_n(peak + past, to - valid, -1);
      begin += to - from;
    }
  });
}

}  // namespace

template <typename T>
void tcam_pool(const T* tcam, const int64_t* lengths, int64_t b, int64_t t, int64_t c, int64_t divisor, T* attention,
               int32_t* peak, T* pooled, T* kth, int32_t* last, int threads) {
  for_blocks(
      lengths, b, t, c, attention, peak, threads,
      [&](int64_t row, int64_t rows) { class_max(tcam + row * c, rows, c, attention + row, peak + row); },
      [](int64_t, int64_t) {});
  topk_pool(tcam, lengths, b, t, c, divisor, pooled, kth, last, threads);
}

template <typename T>
void tcam_pool_backward(const T* grad_attention, const T* grad_pooled, const T* tcam, const int64_t* lengths,
                        const int32_t* peak, const T* kth, const int32_t* last, int64_t b, int64_t t, int64_t c,
                        int64_t divisor, T* grad_tcam, int threads) {
  const PooledGradient<T> gradient{nullptr, grad_attention, grad_pooled, tcam, lengths, peak,
                                   kth,     last,           b,           t,    c,       divisor};
  const auto nothing = [](int64_t, int64_t) {};
  pooled_gradient(gradient, grad_tcam, 0, threads, nothing, nothing,
                  [&](int64_t row, int64_t rows) { std::fill_n(grad_tcam + row * c, rows * c, T(0)); });
}

template <typename T>
void two_stream_tcam(const T* logits_a, const T* logits_b, const int64_t* lengths, int64_t b, int64_t t, int64_t c,
                     int64_t divisor, T* tcam, T* attention, int32_t* peak, T* pooled, T* kth, int32_t* last,
                     int threads) {
  for_blocks(
      lengths, b, t, c, attention, peak, threads,
      [&](int64_t row, int64_t rows) {
        mean_sigmoid(logits_a + row * c, logits_b + row * c, rows * c, tcam + row * c);
        class_max(tcam + row * c, rows, c, attention + row, peak + row);
      },
      [&](int64_t row, int64_t rows) { std::fill_n(tcam + row * c, rows * c, T(0)); });
  topk_pool(tcam, lengths, b, t, c, divisor, pooled, kth, last, threads);
}

template <typename T>
void two_stream_tcam_backward(const T* grad_tcam, const T* grad_attention, const T* grad_pooled, const T* logits_a,
                              const T* logits_b, const T* tcam, const int64_t* lengths, const int32_t* peak,
                              const T* kth, const int32_t* last, int64_t b, int64_t t, int64_t c, int64_t divisor,
                              T* grad_a, T* grad_b, int threads) {
  const PooledGradient<T> gradient{grad_tcam, grad_attention, grad_pooled, tcam, lengths, peak,
                                   kth,       last,           b,           t,    c,       divisor};
  pooled_gradient(
      gradient, grad_a, 0, threads, [](int64_t, int64_t) {},
      [&](int64_t row, int64_t rows) {
        const int64_t at = row * c;
        through_sigmoids(logits_a + at, logits_b + at, rows * c, grad_a + at, grad_b + at);
      },
      [&](int64_t row, int64_t rows) {
        std::fill_n(grad_a + row * c, rows * c, T(0));
        std::fill_n(grad_b + row * c, rows * c, T(0));
      });
}

#define D2NET_INSTANTIATE(T)                                                                                       \
  template void tcam_pool<T>(const T*, const int64_t*, int64_t, int64_t, int64_t, int64_t, T*, int32_t*, T*, T*,   \
                             int32_t*, int);                                                                       \
  template void tcam_pool_backward<T>(const T*, const T*, const T*, const int64_t*, const int32_t*, const T*,      \
                                      const int32_t*, int64_t, int64_t, int64_t, int64_t, T*, int);                \
  template void two_stream_tcam<T>(const T*, const T*, const int64_t*, int64_t, int64_t, int64_t, int64_t, T*, T*, \
                                   int32_t*, T*, T*, int32_t*, int);                                               \
  template void two_stream_tcam_backward<T>(const T*, const T*, const T*, const T*, const T*, const T*,            \
                                            const int64_t*, const int32_t*, const T*, const int32_t*, int64_t,     \
                                            int64_t, int64_t, int64_t, T*, T*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)

}  // namespace d2net::cpu

// Time step by time step the row of classes stays in the nearest cache: sigmoids, their mean and its maximum in the
// forward, all three gradients in the backward. The pooling over time is topk_pool's.
#include "two_stream_tcam.h"

#include <algorithm>
#include <limits>

#include "cpu/common/parallel.h"
#include "cpu/common/pooled_gradient.h"
#include "cpu/common/simd.h"
#include "math/sigmoid.h"
#include "math/topk.h"
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
void for_blocks(const TopkPool<T>& x, int threads, Body body, Padding padding) {
  const int64_t t = x.t, c = x.c;
  const int64_t grain = 1 + 16384 / (c + 1);  // about 10 us of work
  const int64_t block = kRows * (1 + 128 / (c + 1));
  parallel_for(x.b * t, grain, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t recording = begin / t, from = begin % t, to = std::min(t, from + end - begin);
      const int64_t valid = std::clamp(math::clamped_length(x.lengths, recording, t), from, to);
      for (int64_t first = from; first < valid; first += block) {
        body(recording * t + first, std::min(block, valid - first));
      }
      const int64_t past = recording * t + valid;
      padding(past, to - valid);
      std::fill_n(x.attention + past, to - valid, T(0));
      std::fill_n(x.peak + past, to - valid, -1);
      begin += to - from;
    }
  });
}

}  // namespace

template <typename T>
void tcam_pool(const TopkPool<T>& x, int threads) {
  for_blocks(
      x, threads,
      [&](int64_t row, int64_t rows) { class_max(x.x + row * x.c, rows, x.c, x.attention + row, x.peak + row); },
      [](int64_t, int64_t) {});
  topk_pool(x, threads);
}

template <typename T>
void two_stream_tcam(const TwoStreamTcam<T>& x, int threads) {
  const TopkPool<T>& pool = x.pool;
  const int64_t c = pool.c;
  for_blocks(
      pool, threads,
      [&](int64_t row, int64_t rows) {
        mean_sigmoid(x.logits_a + row * c, x.logits_b + row * c, rows * c, x.tcam + row * c);
        class_max(x.tcam + row * c, rows, c, pool.attention + row, pool.peak + row);
      },
      [&](int64_t row, int64_t rows) { std::fill_n(x.tcam + row * c, rows * c, T(0)); });
  topk_pool(pool, threads);
}

template <typename T>
void two_stream_tcam_backward(const TwoStreamTcam<T>& x, int threads) {
  TopkPool<T> pool = x.pool;
  pool.grad_x = x.grad_a;  // on its way to the logits
  const int64_t c = pool.c;
  pooled_gradient(
      pool, 0, threads, [](int64_t, int64_t) {},
      [&](int64_t row, int64_t rows) {
        const int64_t at = row * c;
        through_sigmoids(x.logits_a + at, x.logits_b + at, rows * c, x.grad_a + at, x.grad_b + at);
      },
      [&](int64_t row, int64_t rows) {
        std::fill_n(x.grad_a + row * c, rows * c, T(0));
        std::fill_n(x.grad_b + row * c, rows * c, T(0));
      });
}

D2NET_INSTANTIATE_CPU(tcam_pool, TopkPool)
D2NET_INSTANTIATE_CPU(two_stream_tcam, TwoStreamTcam)
D2NET_INSTANTIATE_CPU(two_stream_tcam_backward, TwoStreamTcam)

}  // namespace d2net::cpu

#include "snippet_pdmi.h"

#include <algorithm>
#include <cmath>

#include "math/svd2x2.h"
#include "parallel.h"
#include "simd.h"

namespace d2net::cpu {
namespace {

// Number of chosen snippets and sum of their attention.
struct Chosen {
  double foreground = 0, fg_sum = 0, background = 0, bg_sum = 0;
};

// A recording belongs to one thread and is added up in double, in an order that its length alone decides.
template <typename T>
[[gnu::always_inline]] inline Chosen add_up(const T* attention, const T* scores, int64_t length, T fg_threshold,
                                            T bg_threshold) {
  double foreground = 0, fg_sum = 0, background = 0, bg_sum = 0;
#pragma omp simd reduction(+ : foreground, fg_sum, background, bg_sum)
  for (int64_t i = 0; i < length; ++i) {
    const double a = attention[i];
    foreground += scores[i] > fg_threshold ? 1.0 : 0.0;
    fg_sum += scores[i] > fg_threshold ? a : 0.0;
    background += scores[i] < bg_threshold ? 1.0 : 0.0;
    bg_sum += scores[i] < bg_threshold ? a : 0.0;
  }
  return {foreground, fg_sum, background, bg_sum};
}
D2NET_SIMD Chosen choose(const float* attention, const float* scores, int64_t length, float fg_threshold,
                         float bg_threshold) {
  return add_up(attention, scores, length, fg_threshold, bg_threshold);
}
D2NET_SIMD Chosen choose(const double* attention, const double* scores, int64_t length, double fg_threshold,
                         double bg_threshold) {
  return add_up(attention, scores, length, fg_threshold, bg_threshold);
}

template <typename T>
[[gnu::always_inline]] inline void spread_row(const T* scores, int64_t length, T fg_threshold, T bg_threshold, T fg,
                                              T bg, T* gradient) {
  for (int64_t i = 0; i < length; ++i) {
    gradient[i] = (scores[i] > fg_threshold ? fg : T(0)) + (scores[i] < bg_threshold ? bg : T(0));
  }
}
D2NET_SIMD void spread(const float* scores, int64_t length, float fg_threshold, float bg_threshold, float fg, float bg,
                       float* gradient) {
  spread_row(scores, length, fg_threshold, bg_threshold, fg, bg, gradient);
}
D2NET_SIMD void spread(const double* scores, int64_t length, double fg_threshold, double bg_threshold, double fg,
                       double bg, double* gradient) {
  spread_row(scores, length, fg_threshold, bg_threshold, fg, bg, gradient);
}

int64_t length_of(const int64_t* lengths, int64_t i, int64_t t) {
  return lengths == nullptr ? t : std::clamp<int64_t>(lengths[i], 0, t);
}

int64_t recordings_per_range(int64_t t) { return 1 + 32768 / (t + 1); }

}  // namespace

template <typename T>
void snippet_pdmi(const T* attention, const T* scores, const int64_t* lengths, int64_t b, int64_t t,
                  double fg_threshold, double bg_threshold, bool per_class, double entry_floor, double rank_tol,
                  T* loss, bool* valid, T* weights, int threads) {
  parallel_for(b, recordings_per_range(t), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chosen x =
          choose(attention + i * t, scores + i * t, length_of(lengths, i, t), T(fg_threshold), T(bg_threshold));
      valid[i] = x.foreground > 0 && x.background > 0;
      if (!valid[i]) {
        loss[i] = weights[2 * i] = weights[2 * i + 1] = 0;
        continue;
      }
      const double both = x.foreground + x.background;
      const double fg = 1 / (per_class ? x.foreground : both), bg = 1 / (per_class ? x.background : both);
      // Rows: lambda and 1 - lambda; columns: pseudo-foreground and pseudo-background.
      const Condition2x2 u = floored_condition_2x2(x.fg_sum * fg, x.bg_sum * bg, (x.foreground - x.fg_sum) * fg,
                                                   (x.background - x.bg_sum) * bg, entry_floor, rank_tol);
      loss[i] = T(std::log1p(u.excess));
      weights[2 * i] = T((u.da - u.dc) * fg);
      weights[2 * i + 1] = T((u.db - u.dd) * bg);
    }
  });
}

template <typename T>
void snippet_pdmi_backward(const T* grad, const T* weights, const T* scores, const int64_t* lengths, int64_t b,
                           int64_t t, double fg_threshold, double bg_threshold, T* gradient, int threads) {
  parallel_for(b, recordings_per_range(t), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t length = length_of(lengths, i, t);
      spread(scores + i * t, length, T(fg_threshold), T(bg_threshold), grad[i] * weights[2 * i],
             grad[i] * weights[2 * i + 1], gradient + i * t);
      std::fill(gradient + i * t + length, gradient + (i + 1) * t, T(0));
    }
  });
}

#define D2NET_INSTANTIATE(T)                                                                                        \
  template void snippet_pdmi<T>(const T*, const T*, const int64_t*, int64_t, int64_t, double, double, bool, double, \
                                double, T*, bool*, T*, int);                                                        \
  template void snippet_pdmi_backward<T>(const T*, const T*, const T*, const int64_t*, int64_t, int64_t, double,    \
                                         double, T*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu

#include "snippet_pdmi.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/parallel.h"
#include "cpu/common/simd.h"
#include "math/svd2x2.h"

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
void snippet_pdmi(const SnippetPdmi<T>& x, int threads) {
  const T fg_threshold = T(x.fg_threshold), bg_threshold = T(x.bg_threshold);
  parallel_for(x.b, recordings_per_range(x.t), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t length = length_of(x.lengths, i, x.t);
      const Chosen chosen = choose(x.attention + i * x.t, x.scores + i * x.t, length, fg_threshold, bg_threshold);
      const double n_f = chosen.foreground, n_b = chosen.background;
      x.valid[i] = n_f > 0 && n_b > 0;
      if (!x.valid[i]) {
        x.loss[i] = x.weights[2 * i] = x.weights[2 * i + 1] = 0;
        continue;
      }
      const double fg = 1 / (x.per_class ? n_f : n_f + n_b), bg = 1 / (x.per_class ? n_b : n_f + n_b);
      // Rows: lambda and 1 - lambda; columns: pseudo-foreground and pseudo-background.
      const Condition2x2 u = floored_condition_2x2(chosen.fg_sum * fg, chosen.bg_sum * bg, (n_f - chosen.fg_sum) * fg,
                                                   (n_b - chosen.bg_sum) * bg, x.entry_floor, x.rank_tol);
      x.loss[i] = T(std::log1p(u.excess));
      x.weights[2 * i] = T((u.da - u.dc) * fg);
      x.weights[2 * i + 1] = T((u.db - u.dd) * bg);
    }
  });
}

template <typename T>
void snippet_pdmi_backward(const SnippetPdmi<T>& x, int threads) {
  parallel_for(x.b, recordings_per_range(x.t), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t length = length_of(x.lengths, i, x.t);
      spread(x.scores + i * x.t, length, T(x.fg_threshold), T(x.bg_threshold), x.grad[i] * x.weights[2 * i],
             x.grad[i] * x.weights[2 * i + 1], x.gradient + i * x.t);
      std::fill(x.gradient + i * x.t + length, x.gradient + (i + 1) * x.t, T(0));
    }
  });
}

D2NET_INSTANTIATE_CPU(snippet_pdmi, SnippetPdmi)
D2NET_INSTANTIATE_CPU(snippet_pdmi_backward, SnippetPdmi)

}  // namespace d2net::cpu

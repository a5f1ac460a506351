#include "snippet_pdmi.h"

#include <algorithm>
#include <cmath>

#include "cpu/common/parallel.h"
#include "cpu/common/simd.h"
#include "math/svd2x2.h"

namespace d2net::cpu {
namespace {

// How many snippets are pseudo-foreground and pseudo-background, and the sums of their attention.
struct Sides {
  double n_fg = 0, sum_fg = 0, n_bg = 0, sum_bg = 0;
};

// One thread sums a recording, in double, in an order that depends on its length alone.
template <typename T>
[[gnu::always_inline]] inline Sides add_up(const T* attention, const T* scores, int64_t length, T fg_threshold,
                                           T bg_threshold) {
  double n_fg = 0, sum_fg = 0, n_bg = 0, sum_bg = 0;
#pragma omp simd reduction(+ : n_fg, sum_fg, n_bg, sum_bg)
  for (int64_t i = 0; i < length; ++i) {
    const double a = attention[i];
    n_fg += scores[i] > fg_threshold ? 1.0 : 0.0;
    sum_fg += scores[i] > fg_threshold ? a : 0.0;
    n_bg += scores[i] < bg_threshold ? 1.0 : 0.0;
    sum_bg += scores[i] < bg_threshold ? a : 0.0;
  }
  return {n_fg, sum_fg, n_bg, sum_bg};
}
D2NET_SIMD Sides sum_sides(const float* attention, const float* scores, int64_t length, float fg_threshold,
                           float bg_threshold) {
  return add_up(attention, scores, length, fg_threshold, bg_threshold);
}
D2NET_SIMD Sides sum_sides(const double* attention, const double* scores, int64_t length, double fg_threshold,
                           double bg_threshold) {
  return add_up(attention, scores, length, fg_threshold, bg_threshold);
}

template <typename T>
[[gnu::always_inline]] inline void spread_row(const T* scores, int64_t length, T fg_threshold, T bg_threshold, T fg,
                                              T bg, T* grad_attention) {
  for (int64_t i = 0; i < length; ++i) {
    grad_attention[i] = (scores[i] > fg_threshold ? fg : T(0)) + (scores[i] < bg_threshold ? bg : T(0));
  }
}
D2NET_SIMD void spread(const float* scores, int64_t length, float fg_threshold, float bg_threshold, float fg, float bg,
                       float* grad_attention) {
  spread_row(scores, length, fg_threshold, bg_threshold, fg, bg, grad_attention);
}
D2NET_SIMD void spread(const double* scores, int64_t length, double fg_threshold, double bg_threshold, double fg,
                       double bg, double* grad_attention) {
  spread_row(scores, length, fg_threshold, bg_threshold, fg, bg, grad_attention);
}

int64_t recordings_per_range(int64_t t) { return 1 + 32768 / (t + 1); }

}  // namespace

template <typename T>
void snippet_pdmi(const SnippetPdmi<T>& x, int threads) {
  const T fg_threshold = T(x.fg_threshold), bg_threshold = T(x.bg_threshold);
  parallel_for(x.b, recordings_per_range(x.t), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t length = x.rows.length(x.lengths, i, x.t), first = x.rows.first(i, x.t);
      const Sides sides = sum_sides(x.attention + first, x.scores + first, length, fg_threshold, bg_threshold);
      const double n_fg = sides.n_fg, n_bg = sides.n_bg;
      x.valid[i] = n_fg > 0 && n_bg > 0;
      if (!x.valid[i]) {
        x.loss[i] = x.side_grad[2 * i] = x.side_grad[2 * i + 1] = 0;
        continue;
      }
      const double fg = 1 / (x.per_class ? n_fg : n_fg + n_bg), bg = 1 / (x.per_class ? n_bg : n_fg + n_bg);
      // Rows: lambda and 1 - lambda; columns: pseudo-foreground and pseudo-background.
      const Condition2x2 u = clamped_condition_2x2(sides.sum_fg * fg, sides.sum_bg * bg, (n_fg - sides.sum_fg) * fg,
                                                   (n_bg - sides.sum_bg) * bg, x.entry_floor, x.rank_tol);
      x.loss[i] = T(std::log1p(u.excess));
      x.side_grad[2 * i] = T((u.da - u.dc) * fg);
      x.side_grad[2 * i + 1] = T((u.db - u.dd) * bg);
    }
  });
}

template <typename T>
void snippet_pdmi_backward(const SnippetPdmi<T>& x, int threads) {
  parallel_for(x.b, recordings_per_range(x.t), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t length = x.rows.length(x.lengths, i, x.t), first = x.rows.first(i, x.t);
      T* const out = x.grad_attention + first;
      spread(x.scores + first, length, T(x.fg_threshold), T(x.bg_threshold), x.grad_loss[i] * x.side_grad[2 * i],
             x.grad_loss[i] * x.side_grad[2 * i + 1], out);
      std::fill(out + length, out + x.rows.written(x.lengths, i, x.t), T(0));
    }
  });
}

D2NET_INSTANTIATE_CPU(snippet_pdmi, SnippetPdmi)
D2NET_INSTANTIATE_CPU(snippet_pdmi_backward, SnippetPdmi)

}  // namespace d2net::cpu

// The operators one after the other, with what they share computed once. Arrays of (b) or (b, c) are a few thousand
// numbers: the caller's thread computes them. The backward goes through time once, for embeddings and activations.
#include "loss.h"

#include <algorithm>
#include <vector>

#include "attention_pool.h"
#include "bottom_up_attention.h"
#include "condition_number.h"
#include "cpu/common/attention_pool_gradient.h"
#include "cpu/common/pages.h"
#include "cpu/common/pooled_gradient.h"
#include "cpu/common/rows.h"
#include "cpu/discriminative.h"
#include "math/kept_scores.h"
#include "math/topk.h"
#include "snippet_pdmi.h"

namespace d2net::cpu {
namespace {

// How many recordings count. Flag: bool, or a number above 0 for those that do.
template <typename Flag>
int64_t count_of(const Flag* counted, int64_t b) {
  return std::count_if(counted, counted + b, [](Flag flag) { return flag > 0; });
}

// The mean of values[i] where counted[i] > 0; 0 of nothing.
template <typename T, typename Flag>
double mean_of(const T* values, const Flag* counted, int64_t b) {
  double sum = 0;
  for (int64_t i = 0; i < b; ++i) sum += counted[i] > 0 ? double(values[i]) : 0;
  const int64_t count = count_of(counted, b);
  return count > 0 ? sum / count : 0;
}

// The backward of mean_of: grad / count where counted[i] > 0.
template <typename T, typename Flag>
std::vector<T> spread_mean(double grad, const Flag* counted, int64_t b) {
  const int64_t count = count_of(counted, b);
  std::vector<T> gradient(b);
  for (int64_t i = 0; i < b; ++i) gradient[i] = counted[i] > 0 ? T(grad / count) : T(0);
  return gradient;
}

template <typename T>
double or_zero(const T* x) {
  return x == nullptr ? 0 : double(*x);
}

// A term of weight 0 is off, even if it is NaN: NaN * 0 would be NaN.
double weighted(double weight, double x) { return weight == 0 ? 0 : weight * x; }

template <typename T>
std::vector<T> copy_or_zero(const T* x, int64_t n) {
  return x == nullptr ? std::vector<T>(n) : std::vector<T>(x, x + n);
}

template <typename X>
void count_recordings(const Loss<X>& x) {
  for (int64_t i = 0; i < x.b; ++i) {
    const auto* labels = x.labels + i * x.c;
    const int64_t length = x.rows.length(x.lengths, i, x.t);
    const bool counts = given_length(x.rows, x.lengths, i, length) >= x.with.min_snippets &&
                        (x.with.skip_unlabelled == 0 || std::any_of(labels, labels + x.c, [](X y) { return y > 0; }));
    x.counted[i] = counts ? length : 0;
  }
}

// The snippet of the lowest attention; NaN is lower than any number.
template <typename T>
int64_t lowest(const T* attention, int64_t length) {
  int64_t found = 0;
  for (int64_t s = 1; s < length; ++s) {
    // Compares 1 - attention, which rounds: among equals the first one counts.
    if (math::ordered_key(1 - attention[s]) > math::ordered_key(1 - attention[found])) found = s;
  }
  return found;
}

// Moves x_ref towards the mean over the recordings with a background: of their x_bg, or of their snippets of the
// lowest attention.
template <typename X>
void update_x_ref(const Loss<X>& x) {
  const bool* valid = x.valid + x.b;
  const int64_t count = count_of(valid, x.b);
  std::vector<double> sum(x.d);
  for (int64_t i = 0; i < x.b; ++i) {
    if (!valid[i]) continue;
    const X* row = x.x + (x.b + i) * x.d;
    if (x.with.lowest_attention != 0) {
      const int64_t first = x.rows.first(i, x.t);
      row = x.embeddings + (first + lowest(x.attention + first, x.counted[i])) * x.d;
    }
    for (int64_t k = 0; k < x.d; ++k) sum[k] += row[k];
  }
  const double momentum = x.with.momentum;
  for (int64_t k = 0; k < x.d; ++k) {
    x.new_x_ref[k] = count == 0 ? x.x_ref[k] : X(momentum * x.x_ref[k] + (1 - momentum) / count * sum[k]);
  }
}

// With own_classes, the attention of pseudo-foreground is the maximum over the recording's own classes; 0 if it has
// none.
template <typename X>
void maximum_over_own_classes(const Loss<X>& x, const LossWorkspace<X>& w, int threads) {
  const X threshold = X(x.with.fg_threshold);
  const auto rows = [&](int64_t i, int64_t from, int64_t to, int64_t row) {
    for (; from < to; ++from, ++row) {
      w.own_attention[row] = x.attention[row];
      w.own_argmax[row] = w.argmax[row];
      if (from >= x.counted[i] || !(x.scores[row] > threshold)) continue;
      w.own_attention[row] = 0;
      w.own_argmax[row] = -1;
      auto best = math::ordered_key(X(0)) - 1;
      for (int64_t k = 0; k < x.c; ++k) {
        const X value = x.tcam[row * x.c + k];
        if (!(x.labels[i * x.c + k] > 0) || math::ordered_key(value) <= best) continue;
        best = math::ordered_key(value);
        w.own_attention[row] = value;
        w.own_argmax[row] = int32_t(k);
      }
    }
  };
  parallel_rows(Snippets(x.rows, x.counted, x.b, x.t), 1 + 16384 / (x.c + 1), threads, rows);
}

template <typename X>
KeptScores<X> kept_scores(const X* pooled, const Loss<X>& x) {
  KeptScores<X> scores{X(x.with.probability_floor), X(x.with.peak_share)};
  for (int64_t k = 0; k < x.c; ++k) scores.compare(pooled[k]);
  for (int64_t k = 0; k < x.c; ++k) scores.add(pooled[k]);
  return scores;
}

// P_2 (c, b) and Y_2 (b, c) of Eq. 10: scores; labels of recordings that count, divided by their number or the class's.
template <typename X>
void video_factors(const Loss<X>& x, X* p, X* y) {
  const int64_t b = x.b, c = x.c;
  const bool per_class = x.with.video_per_class != 0;
  std::vector<double> size(c, per_class ? 0 : double(count_of(x.counted, b)));
  for (int64_t i = 0; per_class && i < b; ++i) {
    for (int64_t k = 0; k < c; ++k) size[k] += x.counted[i] > 0 ? double(x.labels[i * c + k]) : 0;
  }
  for (int64_t i = 0; i < b; ++i) {
    const X* row = x.pooled + i * c;
    const KeptScores<X> scores = kept_scores(row, x);
    for (int64_t k = 0; k < c; ++k) {
      p[k * b + i] = scores.value(row[k]);
      y[i * c + k] = x.counted[i] > 0 ? X(x.labels[i * c + k] / std::max(size[k], 1.0)) : X(0);
    }
  }
}

// Adds grad times the gradient of L_DV to grad_pooled.
template <typename X>
void video_backward(X grad, const Loss<X>& x, const LossWorkspace<X>& w, X* grad_pooled) {
  const int64_t b = x.b, c = x.c;
  std::vector<X> grad_p(c);
  for (int64_t i = 0; i < b; ++i) {
    const X* row = x.pooled + i * c;
    const KeptScores<X> scores = kept_scores(row, x);
    double dot = 0;  // gradient times value
    for (int64_t k = 0; k < c; ++k) {
      grad_p[k] = grad * w.p_left[k] * w.p_right[i] + grad * w.p_left[c + k] * w.p_right[b + i];
      dot += double(grad_p[k]) * scores.value(row[k]);
    }
    for (int64_t k = 0; k < c; ++k) grad_pooled[i * c + k] += scores.gradient(row[k], grad_p[k], dot);
  }
}

// Eq. 2
template <typename X>
AttentionPool<X> pool_of(const Loss<X>& x) {
  const int64_t b = x.b, mean = x.with.mean_embeddings != 0;
  AttentionPool<X> pool{x.with.threshold,
                        x.with.background_threshold,
                        mean,
                        x.embeddings,
                        x.attention,
                        x.counted,
                        b,
                        x.t,
                        x.d,
                        x.x,
                        x.x + b * x.d,
                        x.valid,
                        x.valid + b};
  pool.rows = x.rows;
  return pool;
}

}  // namespace

template <typename X>
void loss(const Loss<X>& x, int threads) {
  const LossWorkspace<X> w(x);
  const LossSettings& with = x.with;
  const int64_t b = x.b, t = x.t, c = x.c, d = x.d;
  double discriminative = 0, snippet = 0;
  *x.video = 0;
  count_recordings(x);
  const int64_t divisor = int64_t(with.topk_divisor);
  TopkPool<X> pool{x.tcam, x.counted, b, t, c, divisor, x.attention, w.argmax, x.pooled, w.kth, w.last};
  pool.rows = x.rows;
  tcam_pool(pool, threads);
  if (with.embed != 0) {
    attention_pool(pool_of(x), threads);
  }
  if (with.classify != 0) {
    if (with.separate != 0 && x.keys != nullptr) different_partners(x.keys, x.valid, b, w.partner);
    discriminative_terms(x.pooled, x.labels, x.counted, x.x, w.pairs(x), b, c, d, with, w.terms, w.grad_terms, w.saved,
                         threads);
    discriminative = mean_of(w.terms, x.counted, b);
  }
  if (with.update != 0) update_x_ref(x);
  if (with.score != 0) {
    const X* x_ref = with.update != 0 ? x.new_x_ref : x.x_ref;
    bottom_up_attention(BottomUpAttention<X>{x.embeddings, x_ref, x.counted, b, t, d, x.scores, nullptr, x.rows},
                        threads);
    for (int64_t i = 0; x.rows.offsets != nullptr && i < b; ++i) {  // as in a padded batch, behind what counts
      const int64_t length = x.rows.length(x.lengths, i, t);
      std::fill_n(x.scores + x.rows.first(i, t) + x.counted[i], length - x.counted[i], X(0.5));
    }
  }
  if (with.snippet != 0) {
    if (with.own_classes != 0) maximum_over_own_classes(x, w, threads);
    snippet_pdmi(
        SnippetPdmi<X>{with.fg_threshold, with.bg_threshold, with.entry_floor, with.rank_tol,
                       with.snippet_per_class != 0, with.own_classes != 0 ? w.own_attention : x.attention, x.scores,
                       x.counted, b, t, w.snippet_loss, w.snippet_valid, w.side_grad, nullptr, nullptr, x.rows},
        threads);
    snippet = mean_of(w.snippet_loss, w.snippet_valid, b);
  }
  if (with.video != 0 && b > 0 && c > 0) {
    std::vector<X> p(c * b), y(b * c), y_left(2 * b), y_right(2 * c);  // the gradient of Y_2 is not used
    video_factors(x, p.data(), y.data());
    joint_log_condition_number(JointLogConditionNumber<X>{kVideoRankTol, p.data(), y.data(), 1, c, b, x.video, w.p_left,
                                                          w.p_right, y_left.data(), y_right.data()},
                               threads);
  }
  *x.discriminative = X(discriminative);
  *x.snippet = X(snippet);
  *x.total = X(discriminative + weighted(with.alpha_snippet, snippet) + weighted(with.alpha_video, double(*x.video)));
}

template <typename X>
void loss_backward(const Loss<X>& x, int threads) {
  const LossWorkspace<X> w(x);
  const LossSettings& with = x.with;
  const int64_t b = x.b, t = x.t, c = x.c, d = x.d;
  const double total = or_zero(x.grad_total);
  const bool embed = with.embed != 0 && with.separate != 0;
  // A term without a gradient and of weight 0 is left out: its own gradient may be NaN.
  const bool video = with.video != 0 && (x.grad_video != nullptr || with.alpha_video != 0);
  const bool snippet = with.snippet != 0 && (x.grad_snippet != nullptr || with.alpha_snippet != 0);
  std::vector<X> grad_pooled = copy_or_zero(x.grad_pooled, b * c),
                 grad_x = copy_or_zero(x.grad_x, embed ? 2 * b * d : 0);
  if (video && c > 0) {
    video_backward(X(weighted(with.alpha_video, total) + or_zero(x.grad_video)), x, w, grad_pooled.data());
  }
  if (with.classify != 0) {
    const auto grad = spread_mean<X>(total + or_zero(x.grad_discriminative), x.counted, b);
    discriminative_terms_backward(grad.data(), w.grad_terms, w.saved, x.x, w.pairs(x), b, c, d, grad_pooled.data(),
                                  grad_x.data(), threads);
  }
  // With respect to the attention of any pseudo-foreground and of any pseudo-background snippet.
  std::vector<X> grad_sides(2 * b);
  if (snippet) {
    const auto grad = spread_mean<X>(weighted(with.alpha_snippet, total) + or_zero(x.grad_snippet), w.snippet_valid, b);
    for (int64_t i = 0; i < 2 * b; ++i) grad_sides[i] = grad[i / 2] * w.side_grad[i];
  }
  AttentionPool<X> embedded = pool_of(x);
  if (!embed) embedded.b = 0;
  embedded.grad_fg = grad_x.data(), embedded.grad_bg = grad_x.data() + embedded.b * d;
  const AttentionPoolGradient<X> pool(embedded);
  const X fg_threshold = X(with.fg_threshold), bg_threshold = X(with.bg_threshold);
  const bool own_classes = with.own_classes != 0;
  std::vector<X> grad_attention(x.rows.count(b, t));
  X* const grad_embeddings = x.grad_embeddings;
  if (grad_embeddings != nullptr) prefer_huge_pages(grad_embeddings, x.rows.count(b, t) * d * int64_t(sizeof(X)));

  TopkPool<X> topk{x.tcam,      x.counted, b,        t,     c,     int64_t(with.topk_divisor),
                   x.attention, w.argmax,  x.pooled, w.kth, w.last};
  topk.rows = x.rows;
  topk.grad_attention = grad_attention.data();
  topk.grad_pooled = grad_pooled.data();
  topk.grad_x = x.grad_tcam;
  const auto snippet_gradient = [&](int64_t recording, int64_t row) {  // of L_DS, with respect to the row's attention
    const X* grad = &grad_sides[2 * recording];
    return (x.scores[row] > fg_threshold ? grad[0] : X(0)) + (x.scores[row] < bg_threshold ? grad[1] : X(0));
  };
  pooled_gradient(
      topk, embed ? d / 2 : 0, threads,
      [&](int64_t recording, int64_t first, int64_t rows) {
        for (int64_t row = first; row < first + rows; ++row) {
          X sum = x.grad_attention == nullptr ? X(0) : x.grad_attention[row];
          if (embed) sum += pool.row(recording, row, grad_embeddings == nullptr ? nullptr : grad_embeddings + row * d);
          if (snippet && !own_classes) sum += snippet_gradient(recording, row);
          grad_attention[row] = sum;
        }
        if (!embed && grad_embeddings != nullptr) std::fill_n(grad_embeddings + first * d, rows * d, X(0));
      },
      [&](int64_t recording, int64_t first, int64_t rows) {
        for (int64_t row = first; snippet && own_classes && row < first + rows; ++row) {
          const int32_t argmax = w.own_argmax[row];
          if (argmax >= 0 && argmax < c) x.grad_tcam[row * c + argmax] += snippet_gradient(recording, row);
        }
      },
      [&](int64_t first, int64_t rows) {
        std::fill_n(x.grad_tcam + first * c, rows * c, X(0));
        if (grad_embeddings != nullptr) std::fill_n(grad_embeddings + first * d, rows * d, X(0));
      });
}

D2NET_INSTANTIATE_CPU(loss, Loss)
D2NET_INSTANTIATE_CPU(loss_backward, Loss)

}  // namespace d2net::cpu

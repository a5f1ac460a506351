#include "attention_pool.h"

#include <algorithm>
#include <memory>

#include "cpu/common/attention_pool_gradient.h"
#include "cpu/common/pages.h"
#include "cpu/common/parallel.h"
#include "cpu/common/rows.h"
#include "cpu/common/simd.h"

namespace d2net::cpu {
namespace {

// Blocks of this many snippets are summed on their own, and their sums added in double and in order: precise for long
// recordings, and the same for any number of threads.
constexpr int64_t kBlock = 64;

// sum (d) = sum of weights[i] * rows[i].
template <typename T>
inline void add_rows(const T* const* rows, const T* weights, int64_t n, int64_t d, T* __restrict__ sum) {
  std::fill(sum, sum + d, T(0));
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {  // four at a time: the sum is read and written a quarter as often
    const T *a = rows[i], *b = rows[i + 1], *c = rows[i + 2], *e = rows[i + 3];
    const T wa = weights[i], wb = weights[i + 1], wc = weights[i + 2], we = weights[i + 3];
    for (int64_t j = 0; j < d; ++j) sum[j] += (wa * a[j] + wb * b[j]) + (wc * c[j] + we * e[j]);
  }
  for (; i < n; ++i) {
    const T* a = rows[i];
    const T w = weights[i];
    for (int64_t j = 0; j < d; ++j) sum[j] += w * a[j];
  }
}

D2NET_SIMD void add_rows_of(const float* const* rows, const float* weights, int64_t n, int64_t d, float* sum) {
  add_rows(rows, weights, n, d, sum);
}
D2NET_SIMD void add_rows_of(const double* const* rows, const double* weights, int64_t n, int64_t d, double* sum) {
  add_rows(rows, weights, n, d, sum);
}

// The snippets of one block that are on one side.
template <typename T>
struct Selected {
  const T* rows[kBlock];
  T weights[kBlock];
  int64_t n = 0;
  double total = 0;

  void add(const T* row, T weight) {
    rows[n] = row;
    weights[n++] = weight;
    total += weight;
  }
};

// out (d) = sum of n partial sums, `stride` values apart, over divisor.
template <typename T>
void combine(const T* partial, int64_t stride, int64_t n, int64_t d, double divisor, T* out) {
  constexpr int64_t kColumns = 256;
  double sum[kColumns];
  for (int64_t from = 0; from < d; from += kColumns) {
    const int64_t columns = std::min(kColumns, d - from);
    std::fill(sum, sum + columns, 0.0);
    for (int64_t i = 0; i < n; ++i) {
      const T* p = partial + i * stride + from;
      for (int64_t j = 0; j < columns; ++j) sum[j] += p[j];
    }
    for (int64_t j = 0; j < columns; ++j) out[from + j] = T(sum[j] / divisor);
  }
}

// What a snippet receives from the gradient of one side: weight * grad for its x, scale * (x . grad - shift) for its
// attention.
template <typename T>
struct Received {
  const T* grad;
  T weight, scale;
};

// One snippet: returns x . (fg.scale * fg.grad + bg.scale * bg.grad) and writes grad_x = fg.weight * fg.grad +
// bg.weight * bg.grad. x or grad_x may be null.
template <typename T>
inline T row_backward(const T* __restrict__ x, const Received<T>& fg, const Received<T>& bg, int64_t d,
                      T* __restrict__ grad_x) {
  const T *grad_fg = fg.grad, *grad_bg = bg.grad;
  const T weight_fg = fg.weight, weight_bg = bg.weight, scale_fg = fg.scale, scale_bg = bg.scale;
  T dot = 0;
  if (grad_x == nullptr) {
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < d; ++j) dot += x[j] * (scale_fg * grad_fg[j] + scale_bg * grad_bg[j]);
  } else if (x == nullptr) {
    for (int64_t j = 0; j < d; ++j) grad_x[j] = weight_fg * grad_fg[j] + weight_bg * grad_bg[j];
  } else {
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < d; ++j) {
      dot += x[j] * (scale_fg * grad_fg[j] + scale_bg * grad_bg[j]);
      grad_x[j] = weight_fg * grad_fg[j] + weight_bg * grad_bg[j];
    }
  }
  return dot;
}

D2NET_SIMD float row_backward_of(const float* x, const Received<float>& fg, const Received<float>& bg, int64_t d,
                                 float* grad_x) {
  return row_backward(x, fg, bg, d, grad_x);
}
D2NET_SIMD double row_backward_of(const double* x, const Received<double>& fg, const Received<double>& bg, int64_t d,
                                  double* grad_x) {
  return row_backward(x, fg, bg, d, grad_x);
}

// Sets scale and shift of a weighted mean. total: the sum of its weights; pooled null: shift is not needed.
template <typename T>
void set_mean(PoolSide<T>& side, double total, const T* pooled, int64_t d) {
  if (!(total > 0)) return;
  side.scale = T(1 / total);
  if (pooled == nullptr) return;
  const Received<T> whole = {side.grad, 0, 1}, nothing = {side.grad, 0, 0};
  side.shift = row_backward_of(pooled, whole, nothing, d, nullptr);
}

}  // namespace

template <typename T>
void attention_pool(const AttentionPool<T>& x, int threads) {
  const int64_t b = x.b, t = x.t, d = x.d, blocks = (t + kBlock - 1) / kBlock;
  const T threshold = T(x.threshold), background_threshold = T(x.background_threshold);
  // Of every block: foreground and background sum.
  const std::unique_ptr<T[]> sums(new T[b * blocks * 2 * d]);
  const std::unique_ptr<double[]> totals(new double[b * blocks * 2]);
  const int64_t grain = 1 + 65536 / (kBlock * d + 1);  // about 10 us of work
  parallel_for(b * blocks, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t recording = block / blocks, first = block % blocks * kBlock, origin = x.rows.first(recording, t);
      const int64_t last = std::min(first + kBlock, x.rows.length(x.lengths, recording, t));
      Selected<T> fg, bg;
      for (int64_t s = first; s < last; ++s) {
        const int64_t row = origin + s;
        const T foreground = x.attention[row], background = 1 - foreground;
        if (foreground > threshold) fg.add(x.x + row * d, foreground);
        if (background > background_threshold) bg.add(x.x + row * d, background);
      }
      add_rows_of(fg.rows, fg.weights, fg.n, d, &sums[2 * block * d]);
      add_rows_of(bg.rows, bg.weights, bg.n, d, &sums[(2 * block + 1) * d]);
      totals[2 * block] = fg.total;
      totals[2 * block + 1] = bg.total;
    }
  });
  parallel_for(2 * b, 1 + 65536 / (blocks * d + 1), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t recording = i / 2, side = i % 2, first = 2 * recording * blocks + side;
      double total = 0;
      for (int64_t k = 0; k < blocks; ++k) total += totals[first + 2 * k];
      (side == 0 ? x.valid_fg : x.valid_bg)[recording] = total > 0;
      combine(sums.get() + first * d, 2 * d, blocks, d, x.mean && total > 0 ? total : 1.0,
              (side == 0 ? x.x_fg : x.x_bg) + recording * d);
    }
  });
}

template <typename T>
AttentionPoolGradient<T>::AttentionPoolGradient(const AttentionPool<T>& x)
    : x_(x), threshold_(T(x.threshold)), background_threshold_(T(x.background_threshold)), fg_(x.b), bg_(x.b) {
  const int64_t d = x.d;
  for (int64_t i = 0; i < x.b; ++i) {
    fg_[i] = {x.grad_fg + i * d, 1, 0};
    bg_[i] = {x.grad_bg + i * d, 1, 0};
    if (!x.mean) continue;
    double total_fg = 0, total_bg = 0;
    const T* a = x.attention + x.rows.first(i, x.t);
    for (const T* end = a + x.rows.length(x.lengths, i, x.t); a != end; ++a) {
      if (*a > threshold_) total_fg += *a;
      if (1 - *a > background_threshold_) total_bg += 1 - *a;
    }
    set_mean(fg_[i], total_fg, x.x == nullptr ? nullptr : x.x_fg + i * d, d);
    set_mean(bg_[i], total_bg, x.x == nullptr ? nullptr : x.x_bg + i * d, d);
  }
}

template <typename T>
T AttentionPoolGradient<T>::row(int64_t i, int64_t row, T* grad_x) const {
  const T foreground = x_.attention[row], background = 1 - foreground;
  const bool in_fg = foreground > threshold_, in_bg = background > background_threshold_;
  if (!in_fg && !in_bg) {
    if (grad_x != nullptr) std::fill(grad_x, grad_x + x_.d, T(0));
    return 0;
  }
  // The gradient of a side without this snippet may be NaN: the other side's is read instead, with weights of 0.
  const PoolSide<T>&fg = in_fg ? fg_[i] : bg_[i], &bg = in_bg ? bg_[i] : fg_[i];
  const Received<T> from_fg = {fg.grad, in_fg ? fg_[i].scale * foreground : 0, in_fg ? fg_[i].scale : 0};
  const Received<T> from_bg = {bg.grad, in_bg ? bg_[i].scale * background : 0, in_bg ? -bg_[i].scale : 0};
  const T dot = row_backward_of(x_.x == nullptr ? nullptr : x_.x + row * x_.d, from_fg, from_bg, x_.d, grad_x);
  return dot - from_fg.scale * fg.shift - from_bg.scale * bg.shift;
}

template <typename T>
void attention_pool_backward(const AttentionPool<T>& x, int threads) {
  if (x.grad_x == nullptr && x.grad_attention == nullptr) return;
  if (x.grad_x != nullptr) prefer_huge_pages(x.grad_x, x.rows.count(x.b, x.t) * x.d * int64_t(sizeof(T)));
  AttentionPool<T> read = x;
  if (x.grad_attention == nullptr) read.x = nullptr;
  const AttentionPoolGradient<T> gradient(read);
  const auto rows = [&](int64_t recording, int64_t from, int64_t to, int64_t row) {
    const int64_t valid = std::clamp(x.rows.length(x.lengths, recording, x.t), from, to);
    const int64_t past = row + valid - from, end = row + to - from;
    for (; row < past; ++row) {
      const T grad_attention = gradient.row(recording, row, x.grad_x == nullptr ? nullptr : x.grad_x + row * x.d);
      if (x.grad_attention != nullptr) x.grad_attention[row] = grad_attention;
    }
    if (x.grad_x != nullptr) std::fill(x.grad_x + past * x.d, x.grad_x + end * x.d, T(0));
    if (x.grad_attention != nullptr) std::fill(x.grad_attention + past, x.grad_attention + end, T(0));
  };
  parallel_rows(Snippets(x.rows, x.lengths, x.b, x.t), 1 + 65536 / (x.d + 1), threads, rows);
}

D2NET_INSTANTIATE_CPU(attention_pool, AttentionPool)
D2NET_INSTANTIATE_CPU(attention_pool_backward, AttentionPool)
template class AttentionPoolGradient<float>;
template class AttentionPoolGradient<double>;

}  // namespace d2net::cpu

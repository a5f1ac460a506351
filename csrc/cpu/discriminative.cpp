#include "discriminative.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "math/focal.h"
#include "math/ordered_float.h"
#include "math/pairs.h"
#include "parallel.h"
#include "simd.h"

namespace d2net::cpu {
namespace {

// Sums are in double: 1 - cosine of like vectors has few digits left.
template <typename T>
[[gnu::always_inline]] inline double dot_of(const T* u, const T* v, int64_t d) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) sum += double(u[k]) * double(v[k]);
  return sum;
}
D2NET_SIMD double dot(const float* u, const float* v, int64_t d) { return dot_of(u, v, d); }
D2NET_SIMD double dot(const double* u, const double* v, int64_t d) { return dot_of(u, v, d); }

D2NET_SIMD void add(const float* x, float by, int64_t d, float* sum) {
  for (int64_t k = 0; k < d; ++k) sum[k] += by * x[k];
}
D2NET_SIMD void add(const double* x, double by, int64_t d, double* sum) {
  for (int64_t k = 0; k < d; ++k) sum[k] += by * x[k];
}

// Recordings of a range that is worth a thread.
int64_t grain(int64_t c, int64_t d) { return 1 + 32768 / (1 + 8 * c + 4 * d); }

}  // namespace

void different_partners(const float* keys, const bool* valid_fg, const bool* valid_bg, int64_t b, int64_t* partner,
                        int) {
  std::vector<int64_t> order(b);
  std::vector<math::Ordered<float>::Key> key(b);
  for (int kind = 0; kind < 3; ++kind) {
    const bool* takes_part = kind == 1 ? valid_fg : valid_bg;  // in the cycle; of w_fb all do
    order.clear();
    for (int64_t i = 0; i < b; ++i) {
      key[i] = math::ordered_key(keys[kind * b + i]);
      if (kind == 0 || takes_part[i]) order.push_back(i);
    }
    std::sort(order.begin(), order.end(),
              [&](int64_t i, int64_t j) { return key[i] < key[j] || (key[i] == key[j] && i < j); });
    std::fill(partner + kind * b, partner + (kind + 1) * b, int64_t(-1));
    for (size_t k = 0; k < order.size(); ++k) {
      const int64_t i = order[k], next = order[(k + 1) % order.size()];
      if (next != i && (kind > 0 || (valid_fg[i] && valid_bg[next]))) partner[kind * b + i] = next;
    }
  }
}

template <typename T>
void discriminative_terms(const T* pooled, const T* labels, const int64_t* counted, const T* x_fg, const T* x_bg,
                          const int64_t* partner, const int64_t* source, int64_t b, int64_t c, int64_t d, double beta,
                          double gamma, double floor, bool mean, bool balanced, T* terms, T* to_pooled, T* saved,
                          int threads) {
  const int64_t row = partner == nullptr ? 0 : b;  // of saved
  T *to_cosine = saved + kToCosine * row, *cosine = saved + kCosine * row, *saved_norm = saved + kInverseNorm * row;
  std::vector<double> norm(2 * row);  // 1 / |x|
  if (partner != nullptr) {
    parallel_for(2 * b, 2 * grain(0, d), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const T* x = i < b ? x_fg + i * d : x_bg + (i - b) * d;
        norm[i] = inverse_norm(dot(x, x, d));
        saved_norm[i] = T(norm[i]);
      }
    });
  }
  parallel_for(b, grain(c, d), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double weight[3] = {}, slope[3] = {};  // of Eq. 3, and their derivatives by the cosines
      for (int kind = 0; partner != nullptr && kind < 3; ++kind) {
        const Pair pair = pair_of(partner, source, b, kind, i);
        cosine[kind * b + i] = 0;
        if (pair.x < 0) continue;
        const bool x_fore = x_is_foreground(kind), other_fore = other_is_foreground(kind);
        const double w = dot((x_fore ? x_fg : x_bg) + pair.x * d, (other_fore ? x_fg : x_bg) + pair.other * d, d) *
                         norm[(x_fore ? 0 : b) + pair.x] * norm[(other_fore ? 0 : b) + pair.other];
        cosine[kind * b + i] = T(w);
        weight[kind] = kind > 0 ? gamma * (1 - w) : w < 0 ? 0 : w;
        slope[kind] = kind > 0 ? -gamma : w < 0 ? 0 : 1;
      }
      const T of_positive = T(weight[1] + weight[0]), of_negative = T(weight[2] + weight[0]);
      double sum = 0, to_positive = 0, to_negative = 0;
      const double scale = mean ? 1.0 / c : 1.0;
      for (int64_t k = i * c; k < (i + 1) * c; ++k) {
        to_pooled[k] = 0;
        if (counted[i] <= 0) continue;
        const bool positive = labels[k] > T(0);
        const Focal<T> term = focal(pooled[k], positive, positive ? of_positive : of_negative, T(beta), T(floor));
        const double by = balanced && positive ? scale * c : scale;
        sum += by * term.loss;
        (positive ? to_positive : to_negative) += by * term.to_weight;
        to_pooled[k] = T(by * term.to_score);
      }
      terms[i] = T(sum);
      if (partner == nullptr) continue;
      to_cosine[i] = T(slope[0] * (to_positive + to_negative));
      to_cosine[b + i] = T(slope[1] * to_positive);
      to_cosine[2 * b + i] = T(slope[2] * to_negative);
    }
  });
}

template <typename T>
void discriminative_terms_backward(const T* grad, const T* to_pooled, const T* saved, const T* x_fg, const T* x_bg,
                                   const int64_t* partner, const int64_t* source, int64_t b, int64_t c, int64_t d,
                                   T* grad_pooled, T* grad_fg, T* grad_bg, int threads) {
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t k = i * c; k < (i + 1) * c; ++k) grad_pooled[k] = grad[i] * to_pooled[k];
  }
  if (partner == nullptr) return;
  const T *to_cosine = saved + kToCosine * b, *cosine = saved + kCosine * b, *norm = saved + kInverseNorm * b;
  // Every row of a gradient has one owner, which looks for the pairs that its embedding is in.
  parallel_for(2 * b, 2 * grain(0, d), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const bool foreground = row < b;
      const int64_t r = foreground ? row : row - b;
      T* sum = (foreground ? grad_fg : grad_bg) + r * d;
      std::fill(sum, sum + d, T(0));
      double own = 0;
      for (int kind = 0; kind < 3; ++kind) {
        for (int64_t i = 0; i < b; ++i) {
          const Pair pair = pair_of(partner, source, b, kind, i);
          if (pair.x < 0) continue;
          const bool x_fore = x_is_foreground(kind), other_fore = other_is_foreground(kind);
          const double by = double(grad[i]) * to_cosine[kind * b + i], of_pair = cosine[kind * b + i];
          const double x_norm = norm[(x_fore ? 0 : b) + pair.x];
          const double other_norm = norm[(other_fore ? 0 : b) + pair.other];
          if (pair.x == r && x_fore == foreground) {
            const Share share = cosine_gradient(by, of_pair, x_norm, other_norm);
            add((other_fore ? x_fg : x_bg) + pair.other * d, T(share.other), d, sum);
            own += share.own;
          }
          if (pair.other == r && other_fore == foreground) {
            const Share share = cosine_gradient(by, of_pair, other_norm, x_norm);
            add((x_fore ? x_fg : x_bg) + pair.x * d, T(share.other), d, sum);
            own += share.own;
          }
        }
      }
      add((foreground ? x_fg : x_bg) + r * d, T(own), d, sum);
    }
  });
}

#define D2NET_INSTANTIATE(T)                                                                                           \
  template void discriminative_terms<T>(const T*, const T*, const int64_t*, const T*, const T*, const int64_t*,        \
                                        const int64_t*, int64_t, int64_t, int64_t, double, double, double, bool, bool, \
                                        T*, T*, T*, int);                                                              \
  template void discriminative_terms_backward<T>(const T*, const T*, const T*, const T*, const T*, const int64_t*,     \
                                                 const int64_t*, int64_t, int64_t, int64_t, T*, T*, T*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu

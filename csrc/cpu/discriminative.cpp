#include "cpu/discriminative.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/common/parallel.h"
#include "cpu/common/simd.h"
#include "math/focal.h"
#include "math/ordered_float.h"

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

// Least recordings of a range: about 10 us of work.
int64_t grain(int64_t c, int64_t d) { return 1 + 32768 / (1 + 8 * c + 4 * d); }

}  // namespace

void different_partners(const float* keys, const bool* valid, int64_t b, int64_t* partner) {
  std::vector<int64_t> order(b);
  std::vector<math::Ordered<float>::Key> key(b);
  for (int pair = 0; pair < kPairs; ++pair) {
    const bool* valid_other = valid + (Pairs::other_is_foreground(pair) ? 0 : b);
    for (int64_t i = 0; i < b; ++i) key[i] = math::ordered_key(keys[pair * b + i]);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(),
              [&](int64_t i, int64_t j) { return key[i] < key[j] || (key[i] == key[j] && i < j); });
    // Backwards, twice around: the second time the first ones follow the last.
    int64_t next = -1;
    for (int64_t k = 2 * b - 1; k >= 0; --k) {
      const int64_t i = order[k % b];
      partner[pair * b + i] = next;
      if (valid_other[i]) next = i;
    }
  }
}

template <typename T>
void discriminative_terms(const T* pooled, const T* labels, const int64_t* counted, const T* x, const Pairs& pairs,
                          int64_t b, int64_t c, int64_t d, const LossSettings& with, T* terms, T* grad_terms, T* saved,
                          int threads) {
  const bool paired = pairs.partner != nullptr;
  std::vector<double> norm(paired ? 2 * b : 0);  // 1 / |x|
  if (paired) {
    parallel_for(2 * b, 2 * grain(0, d), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        norm[i] = inverse_norm(dot(x + i * d, x + i * d, d));
        saved[kInverseNormFg * b + i] = T(norm[i]);
      }
    });
  }
  parallel_for(b, grain(c, d), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double weight[kPairs] = {}, slope[kPairs] = {};  // w_fb, w_fg, w_bg of Eq. 3; d weight / d cosine
      for (int k = 0; paired && k < kPairs; ++k) {
        const Pair pair = pairs.of(k, i);
        saved[(kCosine + k) * b + i] = 0;
        if (pair.x < 0) continue;
        const double cosine = dot(x + pair.x * d, x + pair.other * d, d) * norm[pair.x] * norm[pair.other];
        saved[(kCosine + k) * b + i] = T(cosine);
        weight[k] = k != kFb ? with.gamma * (1 - cosine) : cosine < 0 ? 0 : cosine;
        slope[k] = k != kFb ? -with.gamma : cosine < 0 ? 0 : 1;
      }
      const T positive_weight = T(weight[kFg] + weight[kFb]), negative_weight = T(weight[kBg] + weight[kFb]);
      double sum = 0, grad_positive = 0, grad_negative = 0;  // gradients with respect to the two weights
      const double scale = with.mean_over_classes != 0 ? 1.0 / c : 1.0;
      for (int64_t k = i * c; k < (i + 1) * c; ++k) {
        grad_terms[k] = 0;
        if (counted[i] <= 0) continue;
        const bool positive = labels[k] > T(0);
        const Focal<T> term = focal(pooled[k], positive, positive ? positive_weight : negative_weight, T(with.beta),
                                    T(with.probability_floor));
        const double class_weight = with.balanced != 0 && positive ? scale * c : scale;
        sum += class_weight * term.loss;
        (positive ? grad_positive : grad_negative) += class_weight * term.grad_weight;
        grad_terms[k] = T(class_weight * term.grad_score);
      }
      terms[i] = T(sum);
      if (!paired) continue;
      saved[(kGradCosine + kFb) * b + i] = T(slope[kFb] * (grad_positive + grad_negative));
      saved[(kGradCosine + kFg) * b + i] = T(slope[kFg] * grad_positive);
      saved[(kGradCosine + kBg) * b + i] = T(slope[kBg] * grad_negative);
    }
  });
}

template <typename T>
void discriminative_terms_backward(const T* grad, const T* grad_terms, const T* saved, const T* x, const Pairs& pairs,
                                   int64_t b, int64_t c, int64_t d, T* grad_pooled, T* grad_x, int threads) {
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t k = i * c; k < (i + 1) * c; ++k) grad_pooled[k] += grad[i] * grad_terms[k];
  }
  if (pairs.partner == nullptr) return;
  const T *grad_cosines = saved + kGradCosine * b, *cosines = saved + kCosine * b, *norm = saved + kInverseNormFg * b;
  // One thread writes a row of the gradient: it looks for the pairs that the row's embedding is in.
  parallel_for(2 * b, 2 * grain(0, d), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* sum = grad_x + row * d;
      double own = 0;
      for (int k = 0; k < kPairs; ++k) {
        for (int64_t i = 0; i < b; ++i) {
          const Pair pair = pairs.of(k, i);
          if (pair.x != row && pair.other != row) continue;
          const double grad_cosine = double(grad[i]) * grad_cosines[k * b + i], cosine = cosines[k * b + i];
          const double x_norm = norm[pair.x], other_norm = norm[pair.other];
          if (pair.x == row) {
            const CosineGradient of_row = cosine_gradient(grad_cosine, cosine, x_norm, other_norm);
            add(x + pair.other * d, T(of_row.other), d, sum);
            own += of_row.own;
          }
          if (pair.other == row) {
            const CosineGradient of_row = cosine_gradient(grad_cosine, cosine, other_norm, x_norm);
            add(x + pair.x * d, T(of_row.other), d, sum);
            own += of_row.own;
          }
        }
      }
      add(x + row * d, T(own), d, sum);
    }
  });
}

#define D2NET_INSTANTIATE(T)                                                                                          \
  template void discriminative_terms<T>(const T*, const T*, const int64_t*, const T*, const Pairs&, int64_t, int64_t, \
                                        int64_t, const LossSettings&, T*, T*, T*, int);                               \
  template void discriminative_terms_backward<T>(const T*, const T*, const T*, const T*, const Pairs&, int64_t,       \
                                                 int64_t, int64_t, T*, T*, int);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cpu

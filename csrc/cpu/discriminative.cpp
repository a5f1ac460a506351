#include "cpu/discriminative.h"

#include <algorithm>
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

// Recordings of a range that is worth a thread.
int64_t grain(int64_t c, int64_t d) { return 1 + 32768 / (1 + 8 * c + 4 * d); }

}  // namespace

void different_partners(const float* keys, const bool* valid, int64_t b, int64_t* partner) {
  std::vector<int64_t> order(b);
  std::vector<math::Ordered<float>::Key> key(b);
  for (int kind = 0; kind < 3; ++kind) {
    const bool* takes_part = valid + (kind == 1 ? 0 : b);  // in the cycle; of w_fb all do
    order.clear();
    for (int64_t i = 0; i < b; ++i) {
      key[i] = math::ordered_key(keys[kind * b + i]);
      if (kind == 0 || takes_part[i]) order.push_back(i);
    }
    std::sort(order.begin(), order.end(),
              [&](int64_t i, int64_t j) { return key[i] < key[j] || (key[i] == key[j] && i < j); });
    std::fill(partner + kind * b, partner + (kind + 1) * b, int64_t(-1));
    for (size_t k = 0; k < order.size(); ++k) partner[kind * b + order[k]] = order[(k + 1) % order.size()];
  }
}

template <typename T>
void discriminative_terms(const T* pooled, const T* labels, const int64_t* counted, const T* x, const Pairs& pairs,
                          int64_t b, int64_t c, int64_t d, const LossSettings& with, T* terms, T* to_pooled, T* saved,
                          int threads) {
  const bool paired = pairs.partner != nullptr;
  std::vector<double> norm(paired ? 2 * b : 0);  // 1 / |x|
  if (paired) {
    parallel_for(2 * b, 2 * grain(0, d), threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        norm[i] = inverse_norm(dot(x + i * d, x + i * d, d));
        saved[kInverseNorm * b + i] = T(norm[i]);
      }
    });
  }
  parallel_for(b, grain(c, d), threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      double weight[3] = {}, slope[3] = {};  // of Eq. 3, and their derivatives by the cosines
      for (int kind = 0; paired && kind < 3; ++kind) {
        const Pair pair = pairs.of(kind, i);
        saved[(kCosine + kind) * b + i] = 0;
        if (pair.x < 0) continue;
        const double w = dot(x + pair.x * d, x + pair.other * d, d) * norm[pair.x] * norm[pair.other];
        saved[(kCosine + kind) * b + i] = T(w);
        weight[kind] = kind > 0 ? with.gamma * (1 - w) : w < 0 ? 0 : w;
        slope[kind] = kind > 0 ? -with.gamma : w < 0 ? 0 : 1;
      }
      const T of_positive = T(weight[1] + weight[0]), of_negative = T(weight[2] + weight[0]);
      double sum = 0, to_positive = 0, to_negative = 0;
      const double scale = with.mean_over_classes != 0 ? 1.0 / c : 1.0;
      for (int64_t k = i * c; k < (i + 1) * c; ++k) {
        to_pooled[k] = 0;
        if (counted[i] <= 0) continue;
        const bool positive = labels[k] > T(0);
        const Focal<T> term =
            focal(pooled[k], positive, positive ? of_positive : of_negative, T(with.beta), T(with.probability_floor));
        const double by = with.balanced != 0 && positive ? scale * c : scale;
        sum += by * term.loss;
        (positive ? to_positive : to_negative) += by * term.to_weight;
        to_pooled[k] = T(by * term.to_score);
      }
      terms[i] = T(sum);
      if (!paired) continue;
      saved[kToCosine * b + i] = T(slope[0] * (to_positive + to_negative));
      saved[(kToCosine + 1) * b + i] = T(slope[1] * to_positive);
      saved[(kToCosine + 2) * b + i] = T(slope[2] * to_negative);
    }
  });
}

template <typename T>
void discriminative_terms_backward(const T* grad, const T* to_pooled, const T* saved, const T* x, const Pairs& pairs,
                                   int64_t b, int64_t c, int64_t d, T* grad_pooled, T* grad_x, int threads) {
  for (int64_t i = 0; i < b; ++i) {
    for (int64_t k = i * c; k < (i + 1) * c; ++k) grad_pooled[k] += grad[i] * to_pooled[k];
  }
  if (pairs.partner == nullptr) return;
  const T *to_cosine = saved + kToCosine * b, *cosine = saved + kCosine * b, *norm = saved + kInverseNorm * b;
  // Every row of a gradient has one owner, which looks for the pairs that its embedding is in.
  parallel_for(2 * b, 2 * grain(0, d), threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* sum = grad_x + row * d;
      double own = 0;
      for (int kind = 0; kind < 3; ++kind) {
        for (int64_t i = 0; i < b; ++i) {
          const Pair pair = pairs.of(kind, i);
          if (pair.x != row && pair.other != row) continue;
          const double by = double(grad[i]) * to_cosine[kind * b + i], of_pair = cosine[kind * b + i];
          const double x_norm = norm[pair.x], other_norm = norm[pair.other];
          if (pair.x == row) {
            const Share share = cosine_gradient(by, of_pair, x_norm, other_norm);
            add(x + pair.other * d, T(share.other), d, sum);
            own += share.own;
          }
          if (pair.other == row) {
            const Share share = cosine_gradient(by, of_pair, other_norm, x_norm);
            add(x + pair.x * d, T(share.other), d, sum);
            own += share.own;
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

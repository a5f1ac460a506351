// A block a recording: its dot products, then its classes. Nothing is read more than a few times and all of it stays in
// L2 (B x 2 x D numbers), so that what counts is that there is one launch forward and one backward.
#include "cuda/block.h"
#include "discriminative.h"
#include "math/focal.h"
#include "math/pairs.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads, 1)
    different_partners_kernel(const float* __restrict__ keys, const bool* __restrict__ valid_fg,
                              const bool* __restrict__ valid_bg, int64_t b, int64_t* __restrict__ partner) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= 3 * b) return;
  const int64_t kind = n / b, i = n % b;
  const bool* takes_part = kind == 1 ? valid_fg : valid_bg;
  const float* key = keys + kind * b;
  // The next in the order of (key, number), which is the first of all after the last. No sort: each looks for its own.
  int64_t next = -1, first = -1;
  if (kind == 0 || takes_part[i]) {
    for (int64_t j = 0; j < b; ++j) {
      if (kind > 0 && !takes_part[j]) continue;
      if (first < 0 || key[j] < key[first]) first = j;  // of equal keys the lower number comes first
      const bool after = key[j] > key[i] || (key[j] == key[i] && j > i);
      if (after && (next < 0 || key[j] < key[next])) next = j;
    }
    if (next < 0) next = first;
  }
  const bool usable = next >= 0 && next != i && (kind > 0 || (valid_fg[i] && valid_bg[next]));
  partner[n] = usable ? next : -1;
}

// The sum of u[k] v[k], of all threads.
template <typename T>
__device__ __forceinline__ double block_dot(const T* u, const T* v, int64_t d) {
  double sum = 0;
  for (int64_t k = threadIdx.x; k < d; k += kThreads) sum += double(u[k]) * double(v[k]);
  return block_reduce(sum, Sum{});
}

// The epsilon makes the cosine of a zero vector 0 and keeps its gradient finite.
template <typename T>
__device__ __forceinline__ double block_inverse_norm(const T* x, int64_t d) {
  return 1 / sqrt(block_dot(x, x, d) + 1e-12);
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    discriminative_terms_kernel(const T* __restrict__ pooled, const T* __restrict__ labels,
                                const int64_t* __restrict__ counted, const T* __restrict__ x_fg,
                                const T* __restrict__ x_bg, const int64_t* __restrict__ partner,
                                const int64_t* __restrict__ source, int64_t b, int64_t c, int64_t d, T beta,
                                double gamma, T floor, bool mean, bool balanced, T* __restrict__ terms,
                                T* __restrict__ to_pooled, T* __restrict__ saved) {
  const int64_t i = blockIdx.x;
  double weight[3] = {}, slope[3] = {};  // of Eq. 3, and their derivatives by the cosines
  if (partner != nullptr) {
    const double fg_norm = block_inverse_norm(x_fg + i * d, d), bg_norm = block_inverse_norm(x_bg + i * d, d);
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      const Pair pair = pair_of(partner, source, b, kind, i);
      double w = 0;
      if (pair.x >= 0) {  // the same for all threads
        const T* u = (x_is_foreground(kind) ? x_fg : x_bg) + pair.x * d;
        const T* v = (other_is_foreground(kind) ? x_fg : x_bg) + pair.other * d;
        const double u_norm = pair.x != i ? block_inverse_norm(u, d) : x_is_foreground(kind) ? fg_norm : bg_norm;
        w = block_dot(u, v, d) * u_norm * block_inverse_norm(v, d);
        weight[kind] = kind > 0 ? gamma * (1 - w) : w < 0 ? 0 : w;
        slope[kind] = kind > 0 ? -gamma : w < 0 ? 0 : 1;
      }
      if (threadIdx.x == 0) saved[(kCosine + kind) * b + i] = T(w);
    }
    if (threadIdx.x == 0) {
      saved[kInverseNorm * b + i] = T(fg_norm);
      saved[(kInverseNorm + 1) * b + i] = T(bg_norm);
    }
  }
  const T of_positive = T(weight[1] + weight[0]), of_negative = T(weight[2] + weight[0]);
  const double scale = mean ? 1.0 / c : 1.0;
  double sum = 0, to_positive = 0, to_negative = 0;
  for (int64_t k = i * c + threadIdx.x; k < (i + 1) * c; k += kThreads) {
    T gradient = 0;
    if (counted[i] > 0) {
      const bool positive = labels[k] > T(0);
      const Focal<T> term = focal(pooled[k], positive, positive ? of_positive : of_negative, beta, floor);
      const double by = balanced && positive ? scale * c : scale;
      sum += by * term.loss;
      (positive ? to_positive : to_negative) += by * term.to_weight;
      gradient = T(by * term.to_score);
    }
    to_pooled[k] = gradient;
  }
  sum = block_reduce(sum, Sum{});
  to_positive = block_reduce(to_positive, Sum{});
  to_negative = block_reduce(to_negative, Sum{});
  if (threadIdx.x > 0) return;
  terms[i] = T(sum);
  if (partner == nullptr) return;
  saved[(kToCosine + 0) * b + i] = T(slope[0] * (to_positive + to_negative));
  saved[(kToCosine + 1) * b + i] = T(slope[1] * to_positive);
  saved[(kToCosine + 2) * b + i] = T(slope[2] * to_negative);
}

// The first b blocks have a row of grad_fg each, and of grad_pooled; the others one of grad_bg.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    discriminative_terms_backward_kernel(const T* __restrict__ grad, const T* __restrict__ to_pooled,
                                         const T* __restrict__ saved, const T* __restrict__ x_fg,
                                         const T* __restrict__ x_bg, const int64_t* __restrict__ partner,
                                         const int64_t* __restrict__ source, int64_t b, int64_t c, int64_t d,
                                         T* __restrict__ grad_pooled, T* __restrict__ grad_fg,
                                         T* __restrict__ grad_bg) {
  const bool foreground = blockIdx.x < b;
  const int64_t r = foreground ? blockIdx.x : blockIdx.x - b;
  if (foreground) {
    for (int64_t k = r * c + threadIdx.x; k < (r + 1) * c; k += kThreads) grad_pooled[k] = grad[r] * to_pooled[k];
  }
  if (partner == nullptr) return;
  const T *to_cosine = saved + kToCosine * b, *cosine = saved + kCosine * b, *inverse_norm = saved + kInverseNorm * b;
  const T* x = (foreground ? x_fg : x_bg) + r * d;
  T* out = (foreground ? grad_fg : grad_bg) + r * d;
  for (int64_t k = threadIdx.x; k < d; k += kThreads) {
    double sum = 0, own = 0;
    for (int kind = 0; kind < 3; ++kind) {
      const bool x_fore = x_is_foreground(kind), other_fore = other_is_foreground(kind);
      if (x_fore != foreground && other_fore != foreground) continue;
      for (int64_t i = 0; i < b; ++i) {
        const Pair pair = pair_of(partner, source, b, kind, i);
        const bool is_x = pair.x == r && x_fore == foreground;
        const bool is_other = pair.x >= 0 && pair.other == r && other_fore == foreground;
        if (!is_x && !is_other) continue;
        const double by = double(grad[i]) * to_cosine[kind * b + i], of_pair = cosine[kind * b + i];
        const double x_norm = inverse_norm[(x_fore ? 0 : b) + pair.x];
        const double other_norm = inverse_norm[(other_fore ? 0 : b) + pair.other];
        if (is_x) {
          const Share share = cosine_gradient(by, of_pair, x_norm, other_norm);
          sum += share.other * (other_fore ? x_fg : x_bg)[pair.other * d + k];
          own += share.own;
        }
        if (is_other) {
          const Share share = cosine_gradient(by, of_pair, other_norm, x_norm);
          sum += share.other * (x_fore ? x_fg : x_bg)[pair.x * d + k];
          own += share.own;
        }
      }
    }
    out[k] = T(sum + own * x[k]);
  }
}

}  // namespace

void different_partners(const float* keys, const bool* valid_fg, const bool* valid_bg, int64_t b, int64_t* partner,
                        int device, void* stream) {
  const Stream on("different_partners", device, stream);
  on.launch(different_partners_kernel, (3 * b + kThreads - 1) / kThreads, kThreads, 0, keys, valid_fg, valid_bg, b,
            partner);
}

template <typename T>
void discriminative_terms(const T* pooled, const T* labels, const int64_t* counted, const T* x_fg, const T* x_bg,
                          const int64_t* partner, const int64_t* source, int64_t b, int64_t c, int64_t d, double beta,
                          double gamma, double floor, bool mean, bool balanced, T* terms, T* to_pooled, T* saved,
                          int device, void* stream) {
  const Stream on("discriminative_terms", device, stream);
  on.launch(discriminative_terms_kernel<T>, b, kThreads, 0, pooled, labels, counted, x_fg, x_bg, partner, source, b, c,
            d, T(beta), gamma, T(floor), mean, balanced, terms, to_pooled, saved);
}

template <typename T>
void discriminative_terms_backward(const T* grad, const T* to_pooled, const T* saved, const T* x_fg, const T* x_bg,
                                   const int64_t* partner, const int64_t* source, int64_t b, int64_t c, int64_t d,
                                   T* grad_pooled, T* grad_fg, T* grad_bg, int device, void* stream) {
  const Stream on("discriminative_terms_backward", device, stream);
  on.launch(discriminative_terms_backward_kernel<T>, partner == nullptr ? b : 2 * b, kThreads, 0, grad, to_pooled,
            saved, x_fg, x_bg, partner, source, b, c, d, grad_pooled, grad_fg, grad_bg);
}

#define D2NET_INSTANTIATE(T)                                                                                           \
  template void discriminative_terms<T>(const T*, const T*, const int64_t*, const T*, const T*, const int64_t*,        \
                                        const int64_t*, int64_t, int64_t, int64_t, double, double, double, bool, bool, \
                                        T*, T*, T*, int, void*);                                                       \
  template void discriminative_terms_backward<T>(const T*, const T*, const T*, const T*, const T*, const int64_t*,     \
                                                 const int64_t*, int64_t, int64_t, int64_t, T*, T*, T*, int, void*);
D2NET_INSTANTIATE(float)
D2NET_INSTANTIATE(double)
#undef D2NET_INSTANTIATE

}  // namespace d2net::cuda

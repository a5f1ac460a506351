// A block a recording forward, a block a row of x_fg or x_bg backward. All of B x 2 x D numbers stays in L2, so what
// counts are launches, one forward and one backward, and within them how many loads and barriers wait for one another:
// forward takes all sums over D in one pass and combines them at once, backward first looks up which pairs a row is in.
#include "cuda/block.h"
#include "discriminative.h"
#include "math/focal.h"
#include "math/ordered_float.h"
#include "math/pairs.h"

namespace d2net::cuda {
namespace {

constexpr int kThreads = 256, kColumns = 4;  // of a thread, backward

__global__ void __launch_bounds__(kThreads, 1)
    different_partners_kernel(const float* __restrict__ keys, const bool* __restrict__ valid_fg,
                              const bool* __restrict__ valid_bg, int64_t b, int64_t* __restrict__ partner) {
  const int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (n >= 3 * b) return;
  const int64_t kind = n / b, i = n % b;
  const bool* takes_part = kind == 1 ? valid_fg : valid_bg;
  const auto key = [&](int64_t j) { return math::ordered_key(keys[kind * b + j]); };
  // The next in the order of (key, number), which is the first of all after the last. No sort: each looks for its own.
  int64_t next = -1, first = -1;
  if (kind == 0 || takes_part[i]) {
    for (int64_t j = 0; j < b; ++j) {
      if (kind > 0 && !takes_part[j]) continue;
      if (first < 0 || key(j) < key(first)) first = j;  // of equal keys the lower number comes first
      const bool after = key(j) > key(i) || (key(j) == key(i) && j > i);
      if (after && (next < 0 || key(j) < key(next))) next = j;
    }
    if (next < 0) next = first;
  }
  const bool usable = next >= 0 && next != i && (kind > 0 || (valid_fg[i] && valid_bg[next]));
  partner[n] = usable ? next : -1;
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
    Pair pair[3];
    double sums[11] = {};  // the squares of x_fg and x_bg; and for each pair u v, and the squares of u and of v
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) pair[kind] = pair_of(partner, source, b, kind, i);
    for (int64_t k = threadIdx.x; k < d; k += kThreads) {
      const double fg = double(x_fg[i * d + k]), bg = double(x_bg[i * d + k]);
      sums[0] += fg * fg;
      sums[1] += bg * bg;
#pragma unroll
      for (int kind = 0; kind < 3; ++kind) {
        if (pair[kind].x < 0) continue;  // the same for all threads
        const double u = double((x_is_foreground(kind) ? x_fg : x_bg)[pair[kind].x * d + k]);
        const double v = double((other_is_foreground(kind) ? x_fg : x_bg)[pair[kind].other * d + k]);
        sums[2 + 3 * kind] += u * v;
        sums[3 + 3 * kind] += u * u;
        sums[4 + 3 * kind] += v * v;
      }
    }
    block_reduce(sums, Sum{});
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      double w = 0;
      if (pair[kind].x >= 0) {
        w = sums[2 + 3 * kind] * inverse_norm(sums[3 + 3 * kind]) * inverse_norm(sums[4 + 3 * kind]);
        weight[kind] = kind > 0 ? gamma * (1 - w) : w < 0 ? 0 : w;
        slope[kind] = kind > 0 ? -gamma : w < 0 ? 0 : 1;
      }
      if (threadIdx.x == 0) saved[(kCosine + kind) * b + i] = T(w);
    }
    if (threadIdx.x == 0) {
      saved[kInverseNorm * b + i] = T(inverse_norm(sums[0]));
      saved[(kInverseNorm + 1) * b + i] = T(inverse_norm(sums[1]));
    }
  }
  const T of_positive = T(weight[1] + weight[0]), of_negative = T(weight[2] + weight[0]);
  const double scale = mean ? 1.0 / c : 1.0;
  double sums[3] = {};  // of the loss, and of its slopes by the weights of positive and of negative classes
  for (int64_t k = i * c + threadIdx.x; k < (i + 1) * c; k += kThreads) {
    T gradient = 0;
    if (counted[i] > 0) {
      const bool positive = labels[k] > T(0);
      const Focal<T> term = focal(pooled[k], positive, positive ? of_positive : of_negative, beta, floor);
      const double by = balanced && positive ? scale * c : scale;
      sums[0] += by * term.loss;
      sums[1] += positive ? by * term.to_weight : 0;
      sums[2] += positive ? 0 : by * term.to_weight;
      gradient = T(by * term.to_score);
    }
    to_pooled[k] = gradient;
  }
  block_reduce(sums, Sum{});
  if (threadIdx.x > 0) return;
  terms[i] = T(sums[0]);
  if (partner == nullptr) return;
  saved[(kToCosine + 0) * b + i] = T(slope[0] * (sums[1] + sums[2]));
  saved[(kToCosine + 1) * b + i] = T(slope[1] * sums[1]);
  saved[(kToCosine + 2) * b + i] = T(slope[2] * sums[2]);
}

// What the gradient of a row takes from a pair that it is in: `other` times the pair's other row, `own` times itself.
template <typename T>
struct Hit {
  const T* row;  // the other row; null: not in the pair
  Share share;
};

// Candidate j of 6 b: the row as x (j / b even) or as x~ (odd) of pair j % b of kind j / 2b.
template <typename T>
__device__ __forceinline__ Hit<T> candidate(int64_t j, bool foreground, int64_t r, const T* grad, const T* saved,
                                            const T* x_fg, const T* x_bg, const int64_t* partner, const int64_t* source,
                                            int64_t b, int64_t d) {
  const int kind = int(j / (2 * b));
  const bool as_x = j / b % 2 == 0, x_fore = x_is_foreground(kind), other_fore = other_is_foreground(kind);
  if ((as_x ? x_fore : other_fore) != foreground) return {};
  const int64_t i = j % b;
  const Pair pair = pair_of(partner, source, b, kind, i);
  if (pair.x < 0 || (as_x ? pair.x : pair.other) != r) return {};
  const T* inverse_norms = saved + kInverseNorm * b;
  const double x_norm = inverse_norms[(x_fore ? 0 : b) + pair.x];
  const double other_norm = inverse_norms[(other_fore ? 0 : b) + pair.other];
  const double by = double(grad[i]) * saved[(kToCosine + kind) * b + i], cosine = saved[(kCosine + kind) * b + i];
  return as_x ? Hit<T>{(other_fore ? x_fg : x_bg) + pair.other * d, cosine_gradient(by, cosine, x_norm, other_norm)}
              : Hit<T>{(x_fore ? x_fg : x_bg) + pair.x * d, cosine_gradient(by, cosine, other_norm, x_norm)};
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
  const T* x = (foreground ? x_fg : x_bg) + r * d;
  T* out = (foreground ? grad_fg : grad_bg) + r * d;
  D2NET_SHARED(Hit<T>, hits, [kThreads]);
  for (int64_t tile = threadIdx.x; tile - threadIdx.x < d; tile += kThreads * kColumns) {
    double sum[kColumns] = {}, own = 0;
    for (int64_t first = 0; first < 6 * b; first += kThreads) {
      Hit<T> mine = {};
      if (first + threadIdx.x < 6 * b) {
        mine = candidate(first + threadIdx.x, foreground, r, grad, saved, x_fg, x_bg, partner, source, b, d);
      }
      int found = 0;
      const int place = block_exclusive_sum(int(mine.row != nullptr), &found);
      if (mine.row != nullptr) hits[place] = mine;
      __syncthreads();
      for (int hit = 0; hit < found; ++hit) {
        own += hits[hit].share.own;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int64_t k = tile + c * kThreads;
          if (k < d) sum[c] += hits[hit].share.other * hits[hit].row[k];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t k = tile + c * kThreads;
      if (k < d) out[k] = T(sum[c] + own * x[k]);
    }
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

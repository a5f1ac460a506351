// Eq. 3 and 4 and the update of x_ref: what follows from embeddings and pooled scores.
#pragma once

#include "cuda/common/loss_task.h"
#include "math/focal.h"

namespace d2net::cuda {

// A recording's key and index as one number, by which recordings are ordered: by the key, NaN last, then by the index.
__device__ __forceinline__ unsigned long long order_key(const float* keys, int64_t i) {
  const unsigned key = unsigned(math::ordered_key(keys[i])) ^ 0x80000000u;
  return (unsigned long long)(key) << 32 | unsigned(i);
}

// Draws the partners of recording i: warp p those of pair p. Ends with a barrier.
template <typename X>
__device__ __forceinline__ void draw_partners(const LossTask<X>& x, int64_t i) {
  const int64_t b = x.b;
  const int pair = threadIdx.x / 32;
  if (pair < kPairs) {
    const float* keys = x.keys + pair * b;
    const bool* valid_other = x.valid + (Pairs::other_is_foreground(pair) ? 0 : b);
    const unsigned long long mine = order_key(keys, i), none = ~0ull;
    unsigned long long next = none, first = none;  // the first of all comes after the last
    for (int64_t j = threadIdx.x % 32; j < b; j += 32) {
      if (!valid_other[j]) continue;
      const unsigned long long key = order_key(keys, j);
      first = min(first, key);
      if (key > mine) next = min(next, key);
    }
    next = warp_reduce(next, Min{});
    first = warp_reduce(first, Min{});
    if (next == none) next = first;
    if (threadIdx.x % 32 == 0) x.w.partner[pair * b + i] = next == none ? -1 : int64_t(unsigned(next));
  }
  __syncthreads();
}

// w_fb, w_fg and w_bg of recording i (Eq. 3), and their derivatives with respect to the cosines, by all threads.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void separation_weights(const LossTask<X>& x, int64_t i, double (&weight)[kPairs],
                                                   double (&slope)[kPairs]) {
  const int64_t b = x.b, d = x.d;
  if (x.keys != nullptr) draw_partners(x, i);
  Pair pair[kPairs];
  double sums[2 + 3 * kPairs] = {};  // the squares of x_fg and x_bg; for each pair u . v and the squares of u and of v
#pragma unroll
  for (int p = 0; p < kPairs; ++p) pair[p] = x.pairs.of(p, i);
  for (int64_t k = threadIdx.x; k < d; k += kLossThreads) {
    const double fg = double(x.x_fg()[i * d + k]), bg = double(x.x_bg()[i * d + k]);
    sums[0] += fg * fg;
    sums[1] += bg * bg;
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      if (pair[p].x < 0) continue;  // the same for all threads
      const double u = double(x.x[pair[p].x * d + k]), v = double(x.x[pair[p].other * d + k]);
      sums[2 + 3 * p] += u * v;
      sums[3 + 3 * p] += u * u;
      sums[4 + 3 * p] += v * v;
    }
  }
  block_reduce(sums, Sum{});
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    double cosine = 0;
    if (pair[p].x >= 0) {
      cosine = sums[2 + 3 * p] * inverse_norm(sums[3 + 3 * p]) * inverse_norm(sums[4 + 3 * p]);
      weight[p] = p != kFb ? x.with.gamma * (1 - cosine) : cosine < 0 ? 0 : cosine;
      slope[p] = p != kFb ? -x.with.gamma : cosine < 0 ? 0 : 1;
    }
    if (threadIdx.x == 0) x.w.saved[(kCosine + p) * b + i] = A(cosine);
  }
  if (threadIdx.x == 0) {
    x.w.saved[kInverseNormFg * b + i] = A(inverse_norm(sums[0]));
    x.w.saved[kInverseNormBg * b + i] = A(inverse_norm(sums[1]));
  }
}

// Eq. 4 of recording i, by all threads.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void discriminative_term(const LossTask<X>& x, int64_t i) {
  const int64_t b = x.b, c = x.c;
  double weight[kPairs] = {}, slope[kPairs] = {};
  if (x.with.separate != 0) separation_weights(x, i, weight, slope);
  const A positive_weight = A(weight[kFg] + weight[kFb]), negative_weight = A(weight[kBg] + weight[kFb]);
  const double scale = x.with.mean_over_classes != 0 ? 1.0 / c : 1.0;
  double sums[3] = {};  // the loss, its gradients with respect to the weights of positive and of negative classes
  for (int64_t k = i * c + threadIdx.x; k < (i + 1) * c; k += kLossThreads) {
    A gradient = 0;
    if (x.counted[i] > 0) {
      const bool positive = x.labels[k] > A(0);
      const Focal<A> term = focal(x.pooled[k], positive, positive ? positive_weight : negative_weight, A(x.with.beta),
                                  A(x.with.probability_floor));
      const double class_weight = x.with.balanced != 0 && positive ? scale * c : scale;
      sums[0] += class_weight * term.loss;
      sums[1] += positive ? class_weight * term.grad_weight : 0;
      sums[2] += positive ? 0 : class_weight * term.grad_weight;
      gradient = A(class_weight * term.grad_score);
    }
    x.w.grad_terms[k] = gradient;
  }
  block_reduce(sums, Sum{});
  if (threadIdx.x > 0) return;
  x.w.terms[i] = A(sums[0]);
  if (x.with.separate == 0) return;
  x.w.saved[(kGradCosine + kFb) * b + i] = A(slope[kFb] * (sums[1] + sums[2]));
  x.w.saved[(kGradCosine + kFg) * b + i] = A(slope[kFg] * sums[1]);
  x.w.saved[(kGradCosine + kBg) * b + i] = A(slope[kBg] * sums[2]);
}

// Element k of x_ref, by one thread.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void update_x_ref(const LossTask<X>& x, int64_t k) {
  const int64_t b = x.b, t = x.t, d = x.d;
  const bool lowest = x.with.lowest_attention != 0;
  const bool* valid = x.valid + b;
  double sum = 0;
  int64_t count = 0;
#pragma unroll 4
  for (int64_t i = 0; i < b; ++i) {
    double value = x.x_bg()[i * d + k];  // read before `valid` is known, so that no load waits for another
    if (lowest) value = valid[i] ? double(to_float(x.embeddings[(x.rows.first(i, t) + x.s.lowest[i]) * d + k])) : 0;
    sum += valid[i] ? value : 0;
    count += valid[i];
  }
  x.new_x_ref[k] = count > 0 ? A(x.with.momentum * x.x_ref[k] + (1 - x.with.momentum) / count * sum) : x.x_ref[k];
}

// `term_blocks` blocks have a recording each, the others 256 elements of x_ref. final_blocks: 0 where another launch
// follows.
template <typename X>
__global__ void __launch_bounds__(kLossThreads, 1)
    discriminative_kernel(const LossTask<X> x, unsigned term_blocks, unsigned final_blocks) {
  if (blockIdx.x < term_blocks) {
    discriminative_term(x, blockIdx.x);
  } else {
    const int64_t k = int64_t(blockIdx.x - term_blocks) * kLossThreads + threadIdx.x;
    if (x.with.update != 0 && k < x.d) update_x_ref(x, k);
  }
  if (final_blocks > 0) total_loss(x, final_blocks);
}

}  // namespace d2net::cuda

// Eq. 3 and 4 and the update of x_ref: what follows from embeddings and pooled scores.
#pragma once

#include "cuda/common/loss_task.h"
#include "math/focal.h"

namespace d2net::cuda {

// Keys and numbers of recordings as one number each, in the order of cycles: the key, NaN last, then the number.
__device__ __forceinline__ unsigned long long place_of(const float* keys, int64_t i) {
  const unsigned key = unsigned(math::ordered_key(keys[i])) ^ 0x80000000u;
  return (unsigned long long)(key) << 32 | unsigned(i);
}

// Draws the partners of recording i: warp `kind` those of that kind. Ends with a barrier.
template <typename X>
__device__ __forceinline__ void draw_partners(const LossTask<X>& x, int64_t i) {
  const int64_t b = x.b;
  const int kind = threadIdx.x / 32;
  if (kind < 3) {
    const float* keys = x.keys + kind * b;
    const bool* takes_part = x.valid + (kind == 1 ? 0 : b);  // in the cycle; of w_fb all do
    const unsigned long long mine = place_of(keys, i), none = ~0ull;
    unsigned long long next = none, first = none;  // the first of all comes after the last
    for (int64_t j = threadIdx.x % 32; j < b; j += 32) {
      if (kind > 0 && !takes_part[j]) continue;
      const unsigned long long place = place_of(keys, j);
      first = min(first, place);
      if (place > mine) next = min(next, place);
    }
    next = warp_reduce(next, Min{});
    first = warp_reduce(first, Min{});
    const bool has_one = kind == 0 || takes_part[i];
    if (threadIdx.x % 32 == 0) {
      x.w.partner[kind * b + i] = has_one ? int64_t(unsigned(next == none ? first : next)) : -1;
    }
  }
  __syncthreads();
}

// The weights of recording i by all threads: w_fb, w_fg and w_bg of Eq. 3, and their derivatives by the cosines.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void separate(const LossTask<X>& x, int64_t i, double (&weight)[3], double (&slope)[3]) {
  const int64_t b = x.b, d = x.d;
  if (x.keys != nullptr) draw_partners(x, i);
  Pair pair[3];
  double sums[11] = {};  // the squares of x_fg and x_bg; and for each pair u v, and the squares of u and of v
#pragma unroll
  for (int kind = 0; kind < 3; ++kind) pair[kind] = x.pairs.of(kind, i);
  for (int64_t k = threadIdx.x; k < d; k += kLossThreads) {
    const double fg = double(x.x_fg()[i * d + k]), bg = double(x.x_bg()[i * d + k]);
    sums[0] += fg * fg;
    sums[1] += bg * bg;
#pragma unroll
    for (int kind = 0; kind < 3; ++kind) {
      if (pair[kind].x < 0) continue;  // the same for all threads
      const double u = double(x.x[pair[kind].x * d + k]), v = double(x.x[pair[kind].other * d + k]);
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
      weight[kind] = kind > 0 ? x.with.gamma * (1 - w) : w < 0 ? 0 : w;
      slope[kind] = kind > 0 ? -x.with.gamma : w < 0 ? 0 : 1;
    }
    if (threadIdx.x == 0) x.w.saved[(kCosine + kind) * b + i] = A(w);
  }
  if (threadIdx.x == 0) {
    x.w.saved[kInverseNorm * b + i] = A(inverse_norm(sums[0]));
    x.w.saved[(kInverseNorm + 1) * b + i] = A(inverse_norm(sums[1]));
  }
}

// Eq. 4 of recording i, by all threads.
template <typename X, typename A = accumulator_t<X>>
__device__ __forceinline__ void classify(const LossTask<X>& x, int64_t i) {
  const int64_t b = x.b, c = x.c;
  double weight[3] = {}, slope[3] = {};
  if (x.with.separate != 0) separate(x, i, weight, slope);
  const A of_positive = A(weight[1] + weight[0]), of_negative = A(weight[2] + weight[0]);
  const double scale = x.with.mean_over_classes != 0 ? 1.0 / c : 1.0;
  double sums[3] = {};  // of the loss, and of its slopes by the weights of positive and of negative classes
  for (int64_t k = i * c + threadIdx.x; k < (i + 1) * c; k += kLossThreads) {
    A gradient = 0;
    if (x.counted[i] > 0) {
      const bool positive = x.labels[k] > A(0);
      const Focal<A> term = focal(x.pooled[k], positive, positive ? of_positive : of_negative, A(x.with.beta),
                                  A(x.with.probability_floor));
      const double by = x.with.balanced != 0 && positive ? scale * c : scale;
      sums[0] += by * term.loss;
      sums[1] += positive ? by * term.to_weight : 0;
      sums[2] += positive ? 0 : by * term.to_weight;
      gradient = A(by * term.to_score);
    }
    x.w.to_pooled[k] = gradient;
  }
  block_reduce(sums, Sum{});
  if (threadIdx.x > 0) return;
  x.w.terms[i] = A(sums[0]);
  if (x.with.separate == 0) return;
  x.w.saved[(kToCosine + 0) * b + i] = A(slope[0] * (sums[1] + sums[2]));
  x.w.saved[(kToCosine + 1) * b + i] = A(slope[1] * sums[1]);
  x.w.saved[(kToCosine + 2) * b + i] = A(slope[2] * sums[2]);
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
    if (lowest) value = valid[i] ? double(to_float(x.embeddings[(i * t + x.s.lowest[i]) * d + k])) : 0;
    sum += valid[i] ? value : 0;
    count += valid[i];
  }
  x.new_x_ref[k] = count > 0 ? A(x.with.momentum * x.x_ref[k] + (1 - x.with.momentum) / count * sum) : x.x_ref[k];
}

// `compared` blocks have a recording each, the others 256 elements of x_ref. enders: 0 where another launch follows.
template <typename X>
__global__ void __launch_bounds__(kLossThreads, 1)
    compare_kernel(const LossTask<X> x, unsigned compared, unsigned enders) {
  if (blockIdx.x < compared) {
    classify(x, blockIdx.x);
  } else {
    const int64_t k = int64_t(blockIdx.x - compared) * kLossThreads + threadIdx.x;
    if (x.with.update != 0 && k < x.d) update_x_ref(x, k);
  }
  if (enders > 0) add_up(x, enders);
}

}  // namespace d2net::cuda

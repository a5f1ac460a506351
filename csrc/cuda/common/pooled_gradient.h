// The backward that topk_pool, tcam_pool and two_stream_tcam share: gradients of the results, brought to the (b, t, c)
// activations they were pooled from and, for the last, through the sigmoids to both logits.
//
// Bytes: activations (two_stream_tcam: also logits and, if given, the gradient of the TCAM) within the lengths are read
// once, gradients are written once, padding included. Attention's gradient and peak, one number a row, and what a
// column has come from the caches.
//
// Layout: a thread takes one pack of neighbouring classes, of 16 bytes or of 4 numbers in half precision.
#pragma once

#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/vector.h"
#include "math/sigmoid.h"
#include "math/topk.h"
#include "topk_pool.h"

namespace d2net::cuda {

// Where it goes: to the activations themselves, ...
template <typename T>
struct ToActivations {
  T* __restrict__ grad_x;

  template <int N>
  __device__ __forceinline__ void put(int64_t i, const accumulator_t<T> (&gradient)[N]) const {
    Pack<T, N> out;
#pragma unroll
    for (int l = 0; l < N; ++l) out.at[l] = from_float<T>(gradient[l]);
    store(grad_x + i, out);
  }
  template <int N>
  __device__ __forceinline__ void put_zeros(int64_t i) const {
    store(grad_x + i, Pack<T, N>{});
  }
  bool packs(int64_t c) const { return fits_packs(c, grad_x); }
};

// ... or to the logits whose sigmoids' mean they are.
template <typename T>
struct ToLogits {
  const T* __restrict__ a, * __restrict__ b;
  T* __restrict__ grad_a, * __restrict__ grad_b;

  template <int N>
  __device__ __forceinline__ void put(int64_t i, const accumulator_t<T> (&gradient)[N]) const {
    const Pack<T, N> of_a = load<N>(a + i), of_b = load<N>(b + i);
    Pack<T, N> out_a, out_b;
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const accumulator_t<T> half = accumulator_t<T>(0.5) * gradient[l];
      out_a.at[l] = from_float<T>(half * math::sigmoid_slope(to_float(of_a.at[l])));
      out_b.at[l] = from_float<T>(half * math::sigmoid_slope(to_float(of_b.at[l])));
    }
    store(grad_a + i, out_a);
    store(grad_b + i, out_b);
  }
  template <int N>
  __device__ __forceinline__ void put_zeros(int64_t i) const {
    store(grad_a + i, Pack<T, N>{});
    store(grad_b + i, Pack<T, N>{});
  }
  bool packs(int64_t c) const { return fits_packs(c, a, b, grad_a, grad_b); }
};

constexpr int kGradientThreads = 256;

template <int N, typename T, typename To>
__global__ void __launch_bounds__(kGradientThreads)
    pooled_gradient_kernel(const TopkPool<T> g, const To to, int64_t packs) {
  using A = accumulator_t<T>;
  const int64_t index = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (index >= packs) return;
  const int64_t of_row = g.c / N;
  // Dividing 64 bits takes several times as long.
  const bool small = packs <= 0xffffffffLL;
  const int64_t row = small ? unsigned(index) / unsigned(of_row) : index / of_row;
  const int64_t recording = small ? unsigned(row) / unsigned(g.t) : row / g.t;
  const int32_t step = int32_t(row - recording * g.t), first = int32_t(index - row * of_row) * N;
  const int64_t i = index * N, column = recording * g.c + first;
  const int64_t length = math::clamped_length(g.lengths, recording, g.t);
  if (step >= length) {
    to.template put_zeros<N>(i);
    return;
  }

  A gradient[N] = {};
  if (g.of_pooled != nullptr) {
    const Pack<T, N> x = load<N>(g.x + i), of_pooled = load<N>(g.of_pooled + column);
    const Pack<A, N> kth = load<N>(g.kth + column);
    const Pack<int32_t, N> last = load<N>(g.last + column);
    const A k = A(math::topk_count(length, g.divisor));
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const bool taken = math::among_topk(to_float(x.at[l]), step, math::ordered_key(kth.at[l]), last.at[l]);
      gradient[l] = taken ? to_float(of_pooled.at[l]) / k : A(0);
    }
  }
  if (g.of_x != nullptr) {
    const Pack<T, N> of_x = load<N>(g.of_x + i);
#pragma unroll
    for (int l = 0; l < N; ++l) gradient[l] += to_float(of_x.at[l]);
  }
  if (g.of_attention != nullptr) {
    const int32_t peak = g.peak[row];
    const A of_attention = to_float(g.of_attention[row]);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      if (first + l == peak) gradient[l] += of_attention;
    }
  }
  to.template put<N>(i, gradient);
}

template <typename T, typename To>
void pooled_gradient(const Stream& on, const TopkPool<T>& g, const To& to) {
  constexpr int N = kPackOf<T>;
  const auto launch = [&](auto kernel, int64_t packs) {
    on.launch(kernel, (packs + kGradientThreads - 1) / kGradientThreads, kGradientThreads, 0, g, to, packs);
  };
  const bool whole = reinterpret_cast<std::uintptr_t>(g.last) % alignof(Pack<int32_t, N>) == 0;
  if (whole && to.packs(g.c) && fits_packs(g.c, g.of_x, g.of_pooled, g.x) && fits_packs(g.c, g.kth)) {
    launch(pooled_gradient_kernel<N, T, To>, g.b * g.t * g.c / N);
  } else {
    launch(pooled_gradient_kernel<1, T, To>, g.b * g.t * g.c);
  }
}

}  // namespace d2net::cuda

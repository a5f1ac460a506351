// The forward is in pool_columns.h. The backward of topk_pool and tcam_pool computes the gradient with respect to the
// (b, t, c) activations.
//
// Bytes: activations within the lengths are read once, gradients are written once, padding included. grad_attention and
// argmax, one number a row each, and grad_pooled, kth and last, one a column each, come from the caches.
//
// Layout: a thread takes one pack of neighbouring classes, of 16 bytes or of 4 numbers in half precision.
#include <cstdint>

#include "cuda/common/device.h"
#include "cuda/common/pool_columns.h"
#include "cuda/common/vector.h"
#include "math/topk.h"
#include "topk_pool.h"

namespace d2net::cuda {
namespace {

constexpr int kGradientThreads = 256;

template <int N, typename T>
__global__ void __launch_bounds__(kGradientThreads) topk_pool_backward_kernel(const TopkPool<T> g, int64_t packs) {
  using A = accumulator_t<T>;
  const int64_t index = int64_t(blockIdx.x) * kGradientThreads + threadIdx.x;
  if (index >= packs) return;
  const int64_t row_packs = g.c / N;
  // 64-bit divisions take several times as long.
  const bool small = packs <= 0xffffffffLL;
  const int64_t snippet = small ? unsigned(index) / unsigned(row_packs) : index / row_packs;
  const int64_t recording = small ? unsigned(snippet) / unsigned(g.t) : snippet / g.t;
  const int32_t step = int32_t(snippet - recording * g.t), first = int32_t(index - snippet * row_packs) * N;
  const int64_t length = g.rows.length(g.lengths, recording, g.t);
  if (step >= g.rows.written(g.lengths, recording, g.t)) return;
  const int64_t row = g.rows.first(recording, g.t) + step, i = row * g.c + first, column = recording * g.c + first;
  if (step >= length) {
    store(g.grad_x + i, Pack<T, N>{});
    return;
  }

  A gradient[N] = {};
  if (g.grad_pooled != nullptr) {
    const Pack<T, N> x = load<N>(g.x + i), grad_pooled = load<N>(g.grad_pooled + column);
    const Pack<A, N> kth = load<N>(g.kth + column);
    const Pack<int32_t, N> last = load<N>(g.last + column);
    const A k = A(math::topk_count(length, g.divisor));
#pragma unroll
    for (int l = 0; l < N; ++l) {
      const bool taken = math::among_topk(to_float(x.at[l]), step, math::ordered_key(kth.at[l]), last.at[l]);
      gradient[l] = taken ? to_float(grad_pooled.at[l]) / k : A(0);
    }
  }
  if (g.grad_attention != nullptr) {
    const int32_t argmax = g.argmax[row];
    const A grad_attention = to_float(g.grad_attention[row]);
#pragma unroll
    for (int l = 0; l < N; ++l) {
      if (first + l == argmax) gradient[l] += grad_attention;
    }
  }
  Pack<T, N> out;
#pragma unroll
  for (int l = 0; l < N; ++l) out.at[l] = from_float<T>(gradient[l]);
  store(g.grad_x + i, out);
}

}  // namespace

template <typename T>
void topk_pool(const TopkPool<T>& x, int device, void* stream) {
  pool_columns(Stream("topk_pool", device, stream), Plain<T>{x.x}, x);
}

template <typename T>
void tcam_pool(const TopkPool<T>& x, int device, void* stream) {
  pool_columns(Stream("tcam_pool", device, stream), Plain<T>{x.x}, x);
}

template <typename T>
void topk_pool_backward(const TopkPool<T>& g, int device, void* stream) {
  const Stream on("topk_pool_backward", device, stream);
  constexpr int N = kPackOf<T>;
  const auto launch = [&](auto kernel, int64_t packs) {
    on.launch(kernel, (packs + kGradientThreads - 1) / kGradientThreads, kGradientThreads, 0, g, packs);
  };
  const bool whole = reinterpret_cast<std::uintptr_t>(g.last) % alignof(Pack<int32_t, N>) == 0;
  if (whole && fits_packs(g.c, g.grad_x, g.grad_pooled, g.x) && fits_packs(g.c, g.kth)) {
    launch(topk_pool_backward_kernel<N, T>, g.b * g.t * g.c / N);
  } else {
    launch(topk_pool_backward_kernel<1, T>, g.b * g.t * g.c);
  }
}

D2NET_INSTANTIATE_CUDA_HALF(topk_pool, TopkPool)
D2NET_INSTANTIATE_CUDA_HALF(tcam_pool, TopkPool)
D2NET_INSTANTIATE_CUDA_HALF(topk_pool_backward, TopkPool)

}  // namespace d2net::cuda
